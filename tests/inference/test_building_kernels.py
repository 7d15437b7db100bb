"""The kernels' library: built once, kept, and one line where it cannot be."""

import os
import re
import shutil
import stat
import subprocess
import sys

import pytest

from tests.processes import run_command
from tscnc_hf.inference.building import CACHE, load_kernels


LOAD = "from tscnc_hf.inference.building import load_kernels; print(load_kernels())"
REASON = (
    "from tscnc_hf.inference.building import NoKernels, load_kernels\n"
    "try:\n    load_kernels()\nexcept NoKernels as error:\n    print(error)"
)


@pytest.fixture
def compiler(tmp_path):
    """A compiler that writes down when it starts, waits, and then gives the library that is there already."""
    path, log = tmp_path / "c++", tmp_path / "compiled"
    path.write_text(
        f"""#!{sys.executable}
import shutil, sys, time
out = sys.argv[sys.argv.index("-o") + 1] if "-o" in sys.argv else None
if "-c" in sys.argv:
    open({str(log)!r}, "a").write("once\\n")
    time.sleep(1)
    open(out, "w")
elif out:
    shutil.copy({str(load_kernels())!r}, out)
else:
    print("g++ (GCC) 12.2.0")
"""
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path, log


def environment(**changed):
    return {name: value for name, value in (os.environ | changed).items() if value is not None}


@pytest.mark.launched
def test_two_processes_build_once(tmp_path, compiler):
    path, log = compiler
    cache = tmp_path / "kernels"
    env = environment(CXX=str(path), **{CACHE: str(cache)})
    processes = [
        subprocess.Popen([sys.executable, "-c", LOAD], env=env, text=True, stdout=subprocess.PIPE) for _ in range(2)
    ]
    libraries = {process.communicate(timeout=120)[0].splitlines()[-1] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert log.read_text() == "once\n"
    assert len(libraries) == 1 and [str(path) for path in cache.glob("*.so")] == list(libraries)
    assert not list(cache.glob("build-*"))


def test_another_compiler_is_another_library(tmp_path, compiler, monkeypatch):
    from tscnc_hf.inference import building

    before = building._name()
    monkeypatch.setenv("CXX", str(compiler[0]))
    assert building._name() != before


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"CXX": "no-such-compiler"}, "need a C\\+\\+ compiler, and 'no-such-compiler' is not there: install one"),
        ({"PATH": "{tools}"}, "need ninja: pip install 'tscnc-hf\\[cpu\\]'"),
        ({"CXX": "{failing}"}, "cannot compile the kernels \\(.*\\); all it said: .*log"),
    ],
)
def test_what_is_missing_is_said_in_one_line(tmp_path, changed, message):
    failing, tools = tmp_path / "failing", tmp_path / "tools"
    failing.write_text("#!/bin/sh\necho 'error: no' >&2\nexit 1\n")
    failing.chmod(0o755)
    tools.mkdir()
    for name in ("c++", "g++", "which"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    changed = {name: value.format(failing=failing, tools=tools) for name, value in changed.items()}
    elsewhere = f"import sys; sys.executable = {str(tools / 'python')!r}\n"  # ninja may lie beside this Python
    code = elsewhere + REASON if "PATH" in changed else REASON
    env = environment(**changed, **{CACHE: str(tmp_path / "kernels")})
    (line,) = run_command([sys.executable, "-c", code], env=env).stdout.splitlines()
    assert re.search(message, line)
    assert not list((tmp_path / "kernels").glob("*.so"))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    env = environment(**{CACHE: str(tmp_path / "file" / "kernels")})
    (line,) = run_command([sys.executable, "-c", REASON], env=env).stdout.splitlines()
    assert "cannot be kept" in line and CACHE in line
