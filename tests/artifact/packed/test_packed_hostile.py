"""Files that were made to do harm: each is an error, soon, and in little memory."""

import json
import struct
import sys

import pytest
import torch
import zstandard
from safetensors.torch import save_file

from tests.processes import run_python
from tscnc_hf.artifact.files.tensor_file import tensors_digest
from tscnc_hf.artifact.packed.file import GAPS, SPARSE_FILE, pack_tensors, read_sparse_file


HEADER = ("format", "version", "index", "config")


def write(path, stored, entries, **changed):
    """A file whose digest fits, whatever it says."""
    index = entries if isinstance(entries, str) else json.dumps(entries)
    metadata = {"format": "tscnc_sparse", "version": "2", "index": index, "config": ""} | changed
    header = "".join(metadata[key] + "\n" for key in HEADER)
    save_file(stored, path, {**metadata, "sha256": tensors_digest(header, stored)})


def frame(data: bytes, **options) -> torch.Tensor:
    return torch.frombuffer(bytearray(zstandard.ZstdCompressor(**options).compress(data)), dtype=torch.uint8)


def lying(data: bytes, says: int) -> torch.Tensor:
    """A frame of `data` whose header states another size."""
    whole = bytearray(zstandard.ZstdCompressor().compress(data))
    assert whole[4] & 0xC0 == 0x80  # a content size of four bytes, at the end of the frame's header
    size_at = 5 if whole[4] & 0x20 else 6
    assert struct.unpack_from("<I", whole, size_at)[0] == len(data)
    struct.pack_into("<I", whole, size_at, says)
    return torch.frombuffer(whole, dtype=torch.uint8)


def bombs() -> dict[str, tuple[dict, dict]]:
    """name -> (stored tensors, index entries)."""
    size = 1 << 28
    zeros, skips = bytes(size), b"\xff" * size
    ones = torch.ones(1, 2)
    good = {"shape": [600], "dtype": "float32", "nnz": 2}
    packed, _ = pack_tensors({"t": torch.nn.functional.pad(torch.ones(2), (0, 598))})
    gaps = packed["t" + GAPS]

    def with_gaps(stored_gaps, **entry):
        return {"t": ones, "t" + GAPS: stored_gaps}, {"t": good | {"gaps": "zstd"} | entry}

    def with_values(values, **entry):
        return {"t": values[None], "t" + GAPS: gaps}, {"t": good | {"values": "zstd"} | entry}

    huge = {"shape": [255 * size], "nnz": 0}
    return {
        "gaps that blow up": with_gaps(frame(skips), gap_bytes=4),
        "gaps that blow up and say so": with_gaps(frame(skips), gap_bytes=size),
        "gaps and a shape that blow up": with_gaps(frame(skips), gap_bytes=size, **huge),
        "gaps that lie": with_gaps(lying(skips, 4), gap_bytes=4),
        "gaps of no stated size": with_gaps(frame(skips, write_content_size=False), gap_bytes=4),
        "two frames": with_gaps(torch.cat([frame(b"\0\0\xff\xff"), frame(skips)]), gap_bytes=4),
        "values that blow up": with_values(frame(zeros)),
        "values that lie": with_values(lying(zeros, 8)),
        "no frame": with_values(torch.ones(9, dtype=torch.uint8)),
        "a shape of terabytes": ({"t": ones, "t" + GAPS: gaps}, {"t": good | {"shape": [10**12]}}),
        "a shape beyond integers": ({"t": ones, "t" + GAPS: gaps}, {"t": good | {"shape": [2**62, 2**62]}}),
        "a nested index": ({"t": ones}, "[" * 200_000),
        "an index of numbers": ({"t": ones}, '{"t": {"shape": [' + "9" * 3_000_000 + ']}}'),
        "an index of many": ({"t": ones}, json.dumps({f"t{i}": good for i in range(300_000)})),
    }  # fmt: skip


CHILD = """
import resource, sys, time, torch
from tscnc_hf.artifact.packed.file import read_sparse_file, write_sparse_file
read_sparse_file(write_sparse_file({"w": torch.eye(200)}, sys.argv[1] + ".warm", compression="zstd"))
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (200 << 20), size + (200 << 20)))
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        read_sparse_file(path)
        found = "read"
    except ValueError as error:
        found = "ValueError " + str(error).split(": ", 1)[1][:150]
    print(f"{time.process_time() - start:.2f}", found.replace(chr(10), " "))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, where RLIMIT_AS limits the address space")
def test_bombs_go_off_in_200_megabytes_and_two_seconds_of_a_processor(tmp_path):
    names = []
    for name, (stored, entries) in bombs().items():
        names.append(name)
        write(tmp_path / name, stored, entries)
    raw = {
        "header of terabytes": struct.pack("<Q", 1 << 42) + b"{}",
        "header of all memory": struct.pack("<Q", (1 << 64) - 1) + b"{}",
        "tensor of terabytes": b'{"t":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
    }
    raw["tensor of terabytes"] = struct.pack("<Q", len(raw["tensor of terabytes"])) + raw["tensor of terabytes"]
    for name, data in raw.items():
        names.append(name)
        (tmp_path / name).write_bytes(data)
    done = run_python(["-c", CHILD, *(tmp_path / name for name in names)])
    lines = done.stdout.splitlines()
    assert len(lines) == len(names) == 17
    for name, line in zip(names, lines, strict=True):
        seconds, found = line.split(" ", 1)
        assert found.startswith("ValueError") and float(seconds) < 2, (name, line)


def test_names_like_paths_are_only_names(tmp_path):
    """Nothing is ever written or opened under a tensor's name."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    names = ["../../out", "/etc/passwd", "..\\out", "C:\\out", "a/../../../out", "\x00", "${HOME}", "__import__('os')"]
    tensors = {name: torch.nn.functional.pad(torch.ones(2), (0, 598)) for name in names}
    packed, metadata = pack_tensors(tensors)
    save_file(packed, folder / SPARSE_FILE, metadata)
    found = read_sparse_file(folder / SPARSE_FILE)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in names)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [SPARSE_FILE]
