"""Recipes in processes of their own, cut off at any moment. Imports are paid once: the processes are forked."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

from recipes import vit_cifar10


PRELOADED = [
    "tests.killed_runs",
    "tscnc_hf.training.trainer",
    "tscnc_hf.evaluation.run",
    "tscnc_hf.artifact.card.card",
]


class Recipe:
    """`recipes/vit_cifar10.py` with options, started again and again in one output folder."""

    def __init__(self, folder: Path, **options):
        self.folder, self.log = folder, folder.with_name(f"{folder.name}.log")
        self.options = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        self.options += ["--output_dir", str(folder)]
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def start(self, *more: str):
        process = self.context.Process(target=_main, args=([*self.options, *more], str(self.log)))
        process.start()
        return process

    def start_group(self, count: int) -> list:
        """As `accelerate launch` or `torchrun` would: one run of several processes, which talk over gloo."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            place = {name: str(value) for name, value in place.items()}
            processes.append(self.context.Process(target=_main, args=(self.options, str(self.log), place)))
            processes[-1].start()
        return processes

    def finish(self, *more: str) -> None:
        process = self.start(*more)
        process.join(300)
        assert process.exitcode == 0, (process.exitcode, self.log.read_text()[-4000:])

    def last_step(self) -> int:
        """The last step that there is a checkpoint of, by its name alone."""
        return max((int(path.name.split("-")[1]) for path in self.folder.glob("checkpoint-*")), default=0)

    def cut_off(self, number: signal.Signals, further: int, delay: float, *more: str) -> int:
        """
        Start, wait until the last checkpoint is `further` steps later and then `delay` seconds, send the signal.

        Returns:
            `int`: the exit status, negative for the number of a signal.
        """
        goal = self.last_step() + further
        process = self.start(*more)
        deadline = time.monotonic() + 120
        while further and self.last_step() < goal and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delay)
        if process.is_alive():
            os.kill(process.pid, number)
        process.join(120)
        assert process.exitcode is not None, "it goes on in spite of the signal"
        return process.exitcode

    def seconds_per_step(self) -> float:
        """Between the last two checkpoints."""
        times = sorted(path.stat().st_mtime for path in self.folder.glob("checkpoint-*"))
        steps = sorted(int(path.name.split("-")[1]) for path in self.folder.glob("checkpoint-*"))
        return (times[-1] - times[-2]) / (steps[-1] - steps[-2])

    def state(self) -> dict:
        """`trainer_state.json` of the last checkpoint."""
        return json.loads((self.folder / f"checkpoint-{self.last_step()}" / "trainer_state.json").read_text())


def _main(options: list[str], log: str, environment: dict[str, str] | None = None) -> None:
    os.environ |= environment or {}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    vit_cifar10.main(options)
