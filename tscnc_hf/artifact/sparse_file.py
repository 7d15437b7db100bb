"""The packed file: every weight that is not zero, and one byte or so to say where it stands.

`model.sparse.safetensors` is an ordinary safetensors file, so its tensors and its string metadata can be read with any
safetensors reader. The format is this project's own; all of it is on this page.

**Stored tensors.** A tensor `NAME` of dtype float64, float32, float16 or bfloat16 with at least one element is stored
as two one-dimensional tensors if together they are smaller in bytes than the tensor itself:

    NAME              NAME's dtype   the elements that are not zero, in row-major (C) order
    NAME.tscnc_gaps   uint8          where they stand

Any other tensor is stored as it is under its own name. "Zero" means all bits zero: -0.0, NaN and infinities are
values, and what is read back has the same bits as what was written. (A tensor is also stored as it is if another one
has the name NAME.tscnc_gaps.) The values have NAME's own name but never its shape, so that a loader which knows
nothing of this format and takes the file for dense weights stops at a wrong size, and does not go on with random ones.

**Gaps.** The flattened tensor is read from its start with a position that begins at 0. For each byte `g` of the gaps:

    g < 255     g zeros, then the next element of the values:  position + g holds the value; position += g + 1
    g == 255    255 zeros and no value:                        position += 255

After the last byte fewer than 255 elements are left, and they are zero. So a gap of exactly 255 zeros before a value
is the bytes 255, 0; a gap of 600 is 255, 255, 90; 300 zeros after the last value are one 255 and a remainder that the
shape implies. The number of elements is therefore bound by the length of the gaps (at most 255 a byte), and a file of
n bytes can not ask its reader for more than about 2040 n bytes of memory.

**Metadata**, all strings, exactly these keys:

    format    "tscnc_sparse"
    version   "1"
    index     JSON: {NAME: {"shape": [int, ...], "dtype": "float32", "nnz": int}} for the packed tensors only
    sha256    hexadecimal digest of what is stored, below

**Digest.** SHA-256 over the UTF-8 bytes of `format`, `version` and `index`, each followed by a line feed, and then,
for each stored tensor in order of its name (by code points), the line

    ["NAME","DTYPE",[SHAPE]]    compact JSON, non-ASCII characters escaped, followed by a line feed

and the tensor's raw bytes (little-endian, row-major, as they are in the file). DTYPE is torch's name without "torch.":
float32, bfloat16, uint8, int64, bool. The digest covers the packed bytes, not the dense ones, so that it is checked
before anything is decoded and costs little. It finds damage; it is no signature.

**A reader** checks the digest, then for every index entry: counts the bytes below 255 (must be `nnz` and the length of
the values), adds up the positions (must leave 0 to 254 elements), fills a zero tensor. Source: ours; coding the gaps
of a pruned network in few bits is from Han et al. 2016 (Deep Compression), whose padding zero stands where our 255
stands.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tscnc_hf.artifact.atomic import atomic_file


SPARSE_FILE = "model.sparse.safetensors"
FORMAT = "tscnc_sparse"
VERSION = "1"
GAPS = ".tscnc_gaps"
SKIP = 255
# dtype name -> (dtype, integer dtype of the same width, in which "all bits zero" and exact copies are plain)
PACKED_DTYPES = {
    "float64": (torch.float64, torch.int64),
    "float32": (torch.float32, torch.int32),
    "float16": (torch.float16, torch.int16),
    "bfloat16": (torch.bfloat16, torch.int16),
}


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype without the module: "float32"."""
    return str(dtype).removeprefix("torch.")


def tensors_digest(header: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 (hexadecimal) over `header`, and the names, dtypes, shapes and bytes of contiguous CPU `tensors`.

    The order of the dict does not matter. The module's docstring gives the exact bytes.
    """
    sha = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        line = json.dumps([name, dtype_name(tensor.dtype), list(tensor.shape)], separators=(",", ":"))
        sha.update(line.encode() + b"\n")
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous CPU copy, bit for bit, that shares memory with nothing (safetensors refuses tied tensors)."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def encode_gaps(positions: torch.Tensor, numel: int) -> torch.Tensor:
    """Ascending positions of the values, int64 (nnz,), among `numel` elements -> gap bytes, uint8 (length,)."""
    gap = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    skips, rest = gap // SKIP, gap % SKIP
    ends = torch.cumsum(skips + 1, 0)
    after_last = numel - 1 - (int(positions[-1]) if len(positions) else -1)
    gaps = torch.full(((int(ends[-1]) if len(ends) else 0) + after_last // SKIP,), SKIP, dtype=torch.uint8)
    gaps[ends - 1] = rest.to(torch.uint8)
    return gaps


def pack_tensors(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Pack the tensors of a checkpoint: (stored tensors, metadata), ready for a safetensors file.

    Args:
        tensors: name -> tensor of any shape, dtype and device, contiguous or not, tied or not. Not changed.

    Returns:
        The stored tensors (contiguous, on the CPU, sharing no memory) and the metadata that the module's docstring
        describes. `unpack_tensors` gives back the same names, shapes, dtypes and bits.

    Raises:
        ValueError: something in the dict is not a tensor with data.
    """
    stored: dict[str, torch.Tensor] = {}
    index: dict[str, dict] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(f"{name!r} is {type(tensor).__name__}, not a strided tensor with data: nothing to pack.")
        dense = own_copy(tensor)
        kind = dtype_name(dense.dtype)
        if kind in PACKED_DTYPES and dense.numel() and name + GAPS not in tensors:
            flat = dense.reshape(-1)
            positions = flat.view(PACKED_DTYPES[kind][1]).nonzero().reshape(-1)
            gaps = encode_gaps(positions, flat.numel())
            if len(positions) * dense.element_size() + len(gaps) < flat.numel() * dense.element_size():
                stored[name], stored[name + GAPS] = flat[positions], gaps
                index[name] = {"shape": list(dense.shape), "dtype": kind, "nnz": len(positions)}
                continue
        stored[name] = dense
    metadata = {"format": FORMAT, "version": VERSION, "index": json.dumps(index, sort_keys=True)}
    return stored, {**metadata, "sha256": tensors_digest(_header(metadata), stored)}


def unpack_tensors(packed: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> dict[str, torch.Tensor]:
    """The tensors that `pack_tensors` packed: same names, shapes, dtypes and bits, on the CPU, sharing no memory.

    Everything is checked before a packed tensor's memory is asked for.

    Raises:
        ValueError: another format or version, a digest that does not fit, or counts, gaps, shapes or dtypes that
            contradict each other. No tensor is returned then.
    """
    metadata = metadata or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"not a packed checkpoint: metadata 'format' is {metadata.get('format')!r}, not {FORMAT!r}.")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"packed checkpoint of version {metadata.get('version')!r}; this tscnc_hf reads version {VERSION!r}. "
            "Update tscnc_hf, or save the checkpoint again."
        )
    if set(metadata) != {"format", "version", "index", "sha256"}:
        raise ValueError(f"metadata has the keys {sorted(metadata)}; expected format, index, sha256, version.")
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in packed.items()}
    if tensors_digest(_header(metadata), packed) != metadata["sha256"]:
        raise ValueError("the SHA-256 digest does not fit the contents: the file or its index is damaged.")
    index = _read_index(metadata["index"])

    tensors: dict[str, torch.Tensor] = {}
    for name, entry in index.items():
        values, gaps = packed.pop(name, None), packed.pop(name + GAPS, None)
        if values is None or gaps is None:
            raise ValueError(f"{name!r} is in the index but {name!r} or {name + GAPS!r} is not stored.")
        tensors[name] = _unpack_one(name, entry, values, gaps)
    return {**tensors, **{name: own_copy(tensor) for name, tensor in packed.items()}}


def write_sparse_file(tensors: dict[str, torch.Tensor], path: str | os.PathLike) -> Path:
    """Pack `tensors` into the file `path`, atomically, and return the path. Raises what `pack_tensors` raises."""
    packed, metadata = pack_tensors(tensors)
    with atomic_file(path) as temporary:
        save_file(packed, temporary, metadata=metadata)
    return Path(path)


def read_sparse_file(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a packed file, on the CPU, bit for bit what was written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged or no packed checkpoint; the message names it.
    """
    packed, metadata = read_safetensors(path)
    try:
        return unpack_tensors(packed, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error} Download the file or save it again.") from error


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of any safetensors file; FileNotFoundError if it is not there, ValueError if unreadable."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file, truncated or damaged ({error}). "
            "Download the file or save it again."
        ) from error


def _header(metadata: dict[str, str]) -> str:
    return "".join(f"{metadata[key]}\n" for key in ("format", "version", "index"))


def _read_index(text: str) -> dict[str, dict]:
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata 'index' is not JSON ({error}).") from error
    if not isinstance(index, dict):
        raise ValueError("metadata 'index' is not a JSON object.")
    for name, entry in index.items():
        if not isinstance(entry, dict) or set(entry) != {"shape", "dtype", "nnz"}:
            raise ValueError(f"index entry of {name!r} must have shape, dtype and nnz; it is {entry!r}.")
        shape, nnz = entry["shape"], entry["nnz"]
        sizes = [*shape, nnz] if isinstance(shape, list) else [None]
        if not all(type(n) is int and n >= 0 for n in sizes):
            raise ValueError(f"index entry of {name!r} has an impossible shape or nnz: {entry!r}.")
        if entry["dtype"] not in [*PACKED_DTYPES]:
            raise ValueError(f"index entry of {name!r}: dtype {entry['dtype']!r}, expected one of {[*PACKED_DTYPES]}.")
    return index


def _unpack_one(name: str, entry: dict, values: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
    dtype, bits = PACKED_DTYPES[entry["dtype"]]
    if values.dtype != dtype or gaps.dtype != torch.uint8 or values.ndim != 1 or gaps.ndim != 1:
        raise ValueError(
            f"{name!r}: values are {values.dtype} {tuple(values.shape)} and gaps {gaps.dtype} {tuple(gaps.shape)}; "
            f"expected one-dimensional {dtype} and torch.uint8."
        )
    numel = math.prod(entry["shape"])  # Python integers: can not overflow
    is_value = gaps != SKIP
    counts = (entry["nnz"], len(values), int(is_value.sum()))
    if len(set(counts)) != 1:
        raise ValueError(f"{name!r}: the index, the values and the gaps count {counts} values.")
    ends = torch.cumsum(gaps.to(torch.int64) + is_value, 0)
    covered = int(ends[-1]) if len(ends) else 0
    if not 0 <= numel - covered < SKIP:
        raise ValueError(f"{name!r}: the gaps cover {covered} elements, but shape {entry['shape']} has {numel}.")
    value_bits = values.view(bits)
    if not bool((value_bits != 0).all()):
        raise ValueError(f"{name!r}: a zero is stored among the values.")
    dense = torch.zeros(numel, dtype=bits)
    dense[ends[is_value] - 1] = value_bits
    return dense.view(dtype).reshape(entry["shape"])
