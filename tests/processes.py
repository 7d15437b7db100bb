"""Processes that tests start. Whatever a test does, none is left when it ends."""

import ctypes
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import psutil


PATIENCE = 1200  # seconds after which something counts as stuck: many times what it takes beside other work
GRACE = 10  # seconds for a process that is about to end
PR_SET_CHILD_SUBREAPER = 36  # prctl.h
# Imports are paid once: processes are forked from one that has them. Nothing of this package: some must do without it.
PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torchvision",
    "transformers.trainer",
    "transformers.models.auto.image_processing_auto",
    "transformers.models.timm_wrapper.modeling_timm_wrapper",
    "transformers.models.vit.modeling_vit",
    "timm",
    "datasets",
    "matplotlib.figure",
    "scipy.stats",
]


# ---- commands ----


@contextmanager
def started(command: list, **options) -> Iterator[subprocess.Popen]:
    """A process in a session of its own, which ends with the block, and so does what it has started."""
    process = subprocess.Popen([str(part) for part in command], text=True, start_new_session=True, **options)
    try:
        yield process
    finally:
        members = family(process.pid)
        end(members)
        process.wait()
        psutil.wait_procs(members[1:], GRACE)


def run_command(command: list, status: int | None = 0, **options) -> subprocess.CompletedProcess:
    """What it prints is captured. It must end with `status`, unless that is None."""
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        printed, errors = process.communicate(timeout=PATIENCE)
    return _done(command, process.returncode, printed, errors, status)


def _done(command: list, found: int, printed: str, errors: str, status: int | None) -> subprocess.CompletedProcess:
    assert status is None or found == status, f"{command} ended with {found}:\n{printed[-2000:]}{errors[-4000:]}"
    return subprocess.CompletedProcess(command, found, printed, errors)


# ---- forked, with the imports of others done ----


def fork(function: Callable, *args, environment: dict[str, str] | None = None) -> multiprocessing.Process:
    """
    `function(*args)` in a process that is not a fork of this one, with the environment of this one and more, but
    without what a trainer of an earlier test has set in it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    process = context.Process(target=_forked, args=(function, args, here | (environment or {})))
    process.start()
    return process


def _forked(function: Callable, args: tuple, environment: dict[str, str]) -> None:
    # ignored if the tests were started in the background, which children inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    function(*args)


@contextmanager
def started_python(
    arguments: list, streams=(os.devnull,) * 3, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> Iterator[multiprocessing.Process]:
    """
    What `python` makes of `arguments`: "-c" and code, "-m" and a module, or a script, and arguments of theirs. It has
    done the imports of `PRELOADED`, has `streams` for standard input, output and error, and ends with the block.
    """
    process = fork(_python, [str(part) for part in arguments], cwd, streams, environment=environment)
    try:
        yield process
    finally:
        end(family(process.pid))
        process.join()


def run_python(
    arguments: list, status: int | None = 0, text: str = "", cwd: Path | None = None, environment: dict | None = None
) -> subprocess.CompletedProcess:
    """`started_python` as `run_command`; it reads `text`."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("in", "out", "err")]
        for path in streams:
            path.write_text(text if path.name == "in" else "")
        with started_python(arguments, streams, cwd, environment) as process:
            process.join(PATIENCE)
        printed, errors = (path.read_text() for path in streams[1:])
    return _done(arguments, process.exitcode, printed, errors, status)


def _python(arguments: list[str], folder: Path | None, streams: list[Path]) -> None:
    redirect(*streams)
    if folder is not None:
        os.chdir(folder)
    from huggingface_hub import constants

    importlib.reload(constants)  # which it reads from the environment
    first, *rest = arguments
    if first == "-c":
        sys.argv = [first, *rest[1:]]
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        sys.path.insert(0, "")
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def redirect(read: Path | str, printed: Path | str, errors: Path | str) -> None:
    """Standard input, output and error of this process; the outputs are appended to."""
    for number, path in enumerate((read, printed, errors)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY
        descriptor = os.open(path, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r", closefd=False) for n in range(3))


def run_processes(function: Callable, *args, count: int = 2) -> None:
    """`function(rank, *args)` in processes beside each other. A process group that one leaves is ended."""
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(count)]
        for log in logs:  # one that is ended before it has begun has printed nothing
            log.touch()
        try:
            processes += [fork(_ranked, rank, function, args, log) for rank, log in enumerate(logs)]
            waiting = {process.sentinel: process for process in processes}
            while waiting:
                ready = multiprocessing.connection.wait(list(waiting), PATIENCE)
                codes = [waiting.pop(sentinel).exitcode for sentinel in ready]
                if not ready or any(codes):  # the others may wait for it forever
                    break
        finally:
            for process in processes:
                end(family(process.pid))
                process.join()
        codes = [process.exitcode for process in processes]
        assert codes == [0] * count, f"{codes}: " + "\n".join(log.read_text()[-4000:] for log in logs)


def _ranked(rank: int, function: Callable, args: tuple, log: Path) -> None:
    import torch.distributed as dist

    redirect(os.devnull, log, log)
    function(rank, *args)
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    # All is done and checked. A thread of gloo that wants the interpreter while that is torn down would abort it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ---- ended ----


def family(pid: int) -> list[psutil.Process]:
    """That process and all that it started, as far as they are alive."""
    try:
        process = psutil.Process(pid)
        found = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return [one for one in found if _runs(one)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass


def adopt_orphans() -> None:
    """What a process that has ended leaves behind becomes a child of this one, where Linux is: so it can be found."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def left_behind() -> list[psutil.Process]:
    """What this process has started and is alive, but for what multiprocessing keeps for the next ones."""
    kept = {os.getpid(), forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    found = [process for process in family(os.getpid()) if process.pid not in kept]
    if found:
        psutil.wait_procs(found, GRACE)
    return [process for process in found if _runs(process)]
