"""No test leaves a process, whatever becomes of it."""

import re
import signal
import sys
import time

import psutil
import pytest

from tests import processes
from tests.processes import family, fork, left_behind, run_command, run_processes, run_python, started


LEAVES = """
import subprocess, time
from tests import processes

processes.GRACE = 0.5

def test_that_fails():
    child = subprocess.Popen(["sleep", "1000"])
    print("PID", child.pid)
    assert False, "as it should"

def test_that_passes():
    shell = subprocess.run(["sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True)
    print("PID", shell.stdout)

def test_that_forks():
    print("PID", processes.fork(time.sleep, 1000).pid)

def test_that_cleans_up():
    pass
"""


@pytest.mark.launched
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, where orphans can be adopted")
def test_a_test_that_leaves_a_process_fails_and_the_process_ends(tmp_path):
    (tmp_path / "test_leaves.py").write_text(LEAVES)
    command = [sys.executable, "-m", "pytest", tmp_path / "test_leaves.py", "-p", "tests.conftest", "-rP", "-q"]
    done = run_command([*command, "--rootdir", tmp_path, "-p", "no:randomly", "-p", "no:cacheprovider"], status=1)
    pids = [int(number) for number in re.findall(r"^PID (\d+)", done.stdout, re.MULTILINE)]
    assert len(set(pids)) == 3 and not any(family(pid) for pid in pids)
    assert "1 failed, 3 passed, 3 errors" in done.stdout
    assert done.stdout.count("processes were left behind, and are killed") >= 3


def test_what_a_command_starts_ends_with_it():
    code = "import subprocess; print(subprocess.Popen(['sleep', '1000']).pid, flush=True); input()"
    with started([sys.executable, "-c", code], stdin=-1, stdout=-1) as process:
        child = psutil.Process(int(process.stdout.readline()))
        assert child.is_running()
    assert process.returncode == -signal.SIGKILL and family(child.pid) == left_behind() == []


def test_a_process_says_why_it_failed(tmp_path):
    with pytest.raises(AssertionError, match="ended with 3:\nit broke"):
        run_command([sys.executable, "-c", "print('it broke'); raise SystemExit(3)"])
    with pytest.raises(AssertionError, match="ended with 1:\n(?s:.*)ZeroDivisionError"):
        run_python(["-c", "1 / 0"])
    with pytest.raises(AssertionError, match=r"\[0, 1\]|\[-9, 1\](?s:.*)broke on 1"):
        run_processes(_breaks_on_the_second)


def test_a_process_says_why_it_failed_before_the_others_have_begun(monkeypatch):
    begin = processes.fork
    monkeypatch.setattr(processes, "fork", lambda *call: begin(*call) if call[1] else begin(time.sleep, 1000))
    with pytest.raises(AssertionError, match=r"\[-9, 1\](?s:.*)broke on 1"):
        run_processes(_breaks_on_the_second)


def _breaks_on_the_second(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("broke on 1")
    time.sleep(1000)


def test_python_is_run_as_from_the_command_line(tmp_path):
    code = "import os, sys; print(__name__, sys.argv[1:], sys.stdin.read(), os.environ['WHO'], os.getcwd())"
    expected = f"__main__ ['a', 'b'] said me {tmp_path}\n"
    (tmp_path / "script.py").write_text(code)
    for command in (["-c", code], ["-m", "script"], ["script.py"]):
        done = run_python([*command, "a", "b"], text="said", cwd=tmp_path, environment={"WHO": "me"})
        assert done.stdout == expected, command
    assert run_python(["-c", "raise SystemExit('no')"], status=1).stderr == "no\n"
    hub = "from huggingface_hub import constants; print(constants.ENDPOINT)"
    assert run_python(["-c", hub], environment={"HF_ENDPOINT": "http://here"}).stdout == "http://here\n"


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_reaches_what_a_test_starts():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = fork(_interrupts_itself)
    process.join()
    signal.signal(signal.SIGINT, before)
    assert process.exitcode == 7


def _interrupts_itself() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise SystemExit(7) from None
