"""
How small the packed file is, and what it costs to decode: `make bench-packing`.

Models are at their initialisation with the smallest weights of each layer set to zero, float32. Sizes are those of
safetensors files, headers included, and `limit` is `tscnc_hf.artifact.packed.limit.storage_limit`. Decoding reads a
file and ends with dense tensors of its own, every check included; beside it, in the same round, `load_file` and a
copy of the dense file. Times are ratios to that, medians over rounds with the smallest and the largest; the digest,
which is part of it, has a line of its own. Every tensor gets its memory fresh from the system, on both sides, as in a
process that loads one model (MALLOC_MMAP_THRESHOLD_; with 1000000000 memory is reused, and the ratios are larger).
Peak memory is what a fresh process needed beyond what it had before it read the file (VmHWM), beside what dense
tensors and file have together.
"""

from __future__ import annotations

import argparse
import gzip
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import zstandard
from constraints import resnet18, vit_small
from torch import Tensor, nn

from tscnc_hf.artifact.files.tensor_file import read_safetensors, tensors_digest
from tscnc_hf.artifact.packed.file import read_sparse_file, write_sparse_file
from tscnc_hf.artifact.packed.limit import storage_limit
from tscnc_hf.method.matrices import weight_matrices


FRESH = "MALLOC_MMAP_THRESHOLD_"
MODELS = {"resnet18": resnet18, "vit_small": vit_small}
FORMS = {"packed": {}, "packed zstd": {"compression": "zstd"}}
PEAK = """
import ctypes, sys, torch
from tscnc_hf.artifact.packed.file import read_sparse_file, write_sparse_file
from safetensors.torch import load_file
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
generator = torch.Generator().manual_seed(0)
warm = torch.rand(1000, 1000, generator=generator)  # whatever is loaded on first use, threads included
warm = write_sparse_file({"w": warm.masked_fill(warm > 0.1, 0.0)}, sys.argv[2] + ".warm", compression="zstd")
read_sparse_file(warm)
load_file(warm)
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is in use
before = status("VmRSS")
if sys.argv[1] == "dense":
    tensors = {name: tensor.clone() for name, tensor in load_file(sys.argv[2]).items()}
else:
    tensors = read_sparse_file(sys.argv[2])
print(status("VmHWM") - before)
"""


def pruned(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """The state dict of the model with that part of each layer's weights zero."""
    with torch.no_grad():
        for record in weight_matrices(model):
            flat = record.weight.abs().reshape(-1)
            record.weight.reshape(-1)[flat.argsort()[: round(sparsity * len(flat))]] = 0
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def file_bytes(tensors: dict[str, Tensor]) -> int:
    return len(safetensors.torch.save(tensors))


def csr(tensors: dict[str, Tensor], names: set[str], columns: torch.dtype) -> dict[str, Tensor]:
    """Rows (out, in * k * k), int32 row offsets; int32 columns where int16 is too short."""
    stored = dict(tensors)
    for name in names:
        matrix = stored.pop(name).flatten(1)
        rows, cols = matrix.nonzero(as_tuple=True)
        offsets = torch.zeros(len(matrix) + 1, dtype=torch.int32)
        offsets[1:] = torch.bincount(rows, minlength=len(matrix)).cumsum(0)
        kind = columns if matrix.shape[1] <= torch.iinfo(columns).max else torch.int32
        stored |= {f"{name}.v": matrix[rows, cols], f"{name}.c": cols.to(kind), f"{name}.o": offsets}
    return stored


def bitmask(tensors: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    stored = dict(tensors)
    for name in names:
        flat = stored.pop(name).reshape(-1)
        mask = torch.from_numpy(np.packbits((flat != 0).numpy()))
        stored |= {f"{name}.v": flat[flat != 0], f"{name}.m": mask}
    return stored


def sizes(tensors: dict[str, Tensor], names: set[str], folder: Path) -> dict[str, int]:
    """Bytes by form; leaves the files that are decoded later in `folder`."""
    dense = safetensors.torch.save(tensors)
    (folder / "dense").write_bytes(dense)
    found = {
        "dense": len(dense),
        "gzip -6": len(gzip.compress(dense, 6)),
        "zstd -3": len(zstandard.ZstdCompressor(level=3).compress(dense)),
        "CSR int32": file_bytes(csr(tensors, names, torch.int32)),
        "CSR int16": file_bytes(csr(tensors, names, torch.int16)),
        "bitmask": file_bytes(bitmask(tensors, names)),
    }
    for form, options in FORMS.items():
        found[form] = write_sparse_file(tensors, folder / form, **options).stat().st_size
    return found | {"limit": storage_limit(tensors)}


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - start
    del result  # outside: freeing is not decoding
    return elapsed


def decoding(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each part in each round; the first two rounds, which warm up, are left out."""
    parts = {
        "load + copy": lambda: {
            name: tensor.clone() for name, tensor in safetensors.torch.load_file(folder / "dense").items()
        },
        "load": lambda: safetensors.torch.load_file(folder / "dense"),
    }
    for form in FORMS:
        parts[form] = lambda form=form: read_sparse_file(folder / form)
        parts[f"digest of {form}"] = lambda form=form: tensors_digest("", read_safetensors(folder / form)[0])
    times: dict[str, list[float]] = {part: [] for part in parts}
    for index in range(rounds + 2):
        for part, function in parts.items():
            elapsed = seconds(function)
            if index >= 2:
                times[part].append(elapsed)
    return times


def peak(form: str, path: Path) -> int:
    command = [sys.executable, "-c", PEAK, form, str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


def main() -> None:
    if FRESH not in os.environ:  # glibc reads it once, when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {FRESH: "131072"})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.95, 0.99])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds, float32\n")
    for name in args.models:
        for sparsity in args.sparsities:
            torch.manual_seed(0)
            model = MODELS[name]()
            weights = {record.name for record in weight_matrices(model)}
            tensors = pruned(model, sparsity)
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                found = sizes(tensors, weights & tensors.keys(), folder)
                for form in FORMS:
                    back = read_sparse_file(folder / form)
                    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items()), form
                print(f"{name}, {sparsity:.0%} zeros in {len(weights)} weights: dense {found['dense'] / 1e6:.2f} MB")
                for form, size in found.items():
                    print(
                        f"  {form:<12} {size:>12,} bytes {size / found['dense']:7.2%}  {size / found['limit']:.3f} x"
                    )
                times = decoding(folder, args.rounds)
                base = times["load + copy"]
                for part, values in times.items():
                    ratios = [value / whole for value, whole in zip(values, base, strict=True)]
                    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
                    own = f"{1e3 * statistics.median(values):7.1f} ms"
                    print(f"  {part:<22} {middle:5.2f} x ({low:.2f} to {high:.2f}) {own}")
                for form in ("dense", *FORMS):
                    allowed = found["dense"] + (found[form] if form != "dense" else found["dense"])
                    used = peak(form, folder / form)
                    print(f"  peak, {form:<14} {used / 1e6:6.1f} MB, {used / allowed:.3f} x (tensors + file)")
            print(flush=True)


if __name__ == "__main__":
    main()
