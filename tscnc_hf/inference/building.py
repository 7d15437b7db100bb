"""The kernels, compiled for this machine on first use and kept: one shared library, built once however many ask."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock


SOURCES = ("ops.cpp", "attention.h", "kernels.h")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-Wno-psabi")
CACHE = "TSCNC_KERNELS"  # environment variable: the folder that libraries are kept in
HOW_TO_INSTALL = (
    "install one (Debian and Ubuntu: `apt install g++`; macOS: `xcode-select --install`) or name it in CXX"
)


class NoKernels(ImportError):
    """The kernels cannot be compiled here; the message says what to do."""


@cache
def load_kernels() -> Path:
    """
    Compile the operators `torch.ops.tscnc`, a minute at most, unless that was done before, and load them.

    Returns:
        The library.

    Raises:
        NoKernels: no compiler or no ninja, the folder for libraries cannot be written, or the compiler fails.
    """
    folder = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "tscnc_hf" / "kernels")
    path = folder / f"{_name()}.so"
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{path.name}.lock"):
                if not path.is_file():  # by another process, meanwhile
                    _build(path)
        except OSError as error:
            raise NoKernels(
                f"compiled kernels cannot be kept in {folder} ({error.strerror or error}): name a folder that can be "
                f"written in the environment variable {CACHE}"
            ) from error
    torch.ops.load_library(path)
    return path


def _name() -> str:
    """Other sources, another torch or another CPU: another library."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    for part in (torch.__version__, platform.machine(), _cpu(), " ".join(FLAGS), os.environ.get("CXX", "")):
        digest.update(f"{part}\0".encode())
    return f"tscnc-{torch.__version__}-{digest.hexdigest()[:16]}"


def _cpu() -> str:
    """What -march=native looks at: a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.split("\t")[0] in ("flags", "Features", "model name")}))


def _build(path: Path) -> None:
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if not shutil.which(compiler):
        raise NoKernels(f"the kernels need a C++ compiler, and {compiler!r} is not there: {HOW_TO_INSTALL}")
    own = str(Path(sys.executable).parent)  # of an environment that is not activated
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, own])
    try:
        if not shutil.which("ninja"):
            raise NoKernels("the kernels need ninja: pip install 'tscnc-hf[cpu]'")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder, redirect_stdout(sys.stderr):
            cpp_extension.load(
                path.stem.replace("-", "_").replace(".", "_").replace("+", "_"),
                [str(Path(__file__).with_name("ops.cpp"))],
                extra_cflags=list(FLAGS),
                extra_ldflags=["-fopenmp"],
                build_directory=folder,
                is_python_module=False,
                with_cuda=False,
            )
            (library,) = Path(folder).glob("*.so")
            os.replace(library, path)  # still loaded here, and the same file
    except (RuntimeError, subprocess.CalledProcessError) as error:
        log = path.with_suffix(".log")
        log.write_text(str(error), encoding="utf-8")
        first = next((line for line in str(error).splitlines() if "error" in line.lower()), "no reason given")
        raise NoKernels(
            f"{compiler} cannot compile the kernels ({first.strip()[:200]}); all it said: {log}"
        ) from error
    finally:
        os.environ["PATH"] = before
