"""Recipes in processes of their own, cut off at any moment."""

import json
import os
import signal
import socket
import time
from pathlib import Path

from tests.processes import PATIENCE, end, family, fork, redirect


class Recipe:
    """`recipes/vit_cifar10.py` with options, started again and again in one output folder, until `close`."""

    def __init__(self, folder: Path, **options):
        self.folder, self.log = folder, folder.with_name(f"{folder.name}.log")
        self.options = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        self.options += ["--output_dir", str(folder)]
        self.processes = []

    def start(self, *more: str, environment: dict[str, str] | None = None):
        self.processes.append(fork(_main, [*self.options, *more], str(self.log), environment=environment))
        return self.processes[-1]

    def start_group(self, count: int) -> list:
        """As `accelerate launch` or `torchrun` would: one run of several processes, which talk over gloo."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            started.append(self.start(environment={name: str(value) for name, value in place.items()}))
        return started

    def close(self) -> None:
        for process in self.processes:
            end(family(process.pid))
            process.join()

    def finish(self, *more: str) -> None:
        process = self.start(*more)
        process.join(PATIENCE)
        assert process.exitcode == 0, (process.exitcode, self.log.read_text()[-4000:])

    def last_step(self) -> int:
        """The last step that there is a checkpoint of, by its name alone."""
        return max((int(path.name.split("-")[1]) for path in self.folder.glob("checkpoint-*")), default=0)

    def cut_off(self, number: signal.Signals, further: int, delay: float, *more: str) -> int:
        """
        Start, wait until the last checkpoint is `further` steps later and then `delay` seconds, or until the next
        checkpoint if steps take less than they did, and send the signal.

        Returns:
            `int`: the exit status, negative for the number of a signal.
        """
        goal = self.last_step() + further
        process = self.start(*more)
        deadline = time.monotonic() + PATIENCE
        while further and self.last_step() < goal and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        reached, deadline = self.last_step(), time.monotonic() + delay
        while self.last_step() == reached and time.monotonic() < deadline:
            time.sleep(0.002)
        if process.is_alive():
            os.kill(process.pid, number)
        process.join(PATIENCE)
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


def _main(options: list[str], log: str) -> None:
    redirect(os.devnull, log, log)
    from recipes import vit_cifar10

    vit_cifar10.main(options)
