"""What the index of a packed file says of a tensor, whether that can be true, and the tensor itself."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import torch

from tscnc_hf.artifact.files.tensor_file import BIT_PATTERNS, dtype_name, magnitude_bits
from tscnc_hf.artifact.packed.gaps import SKIP, decode_gaps, measure_gaps
from tscnc_hf.artifact.packed.zstd import decompress, from_planes


GAPS = ".tscnc_gaps"
PACKED_DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
NEEDED = {"shape", "dtype", "nnz"}
ALLOWED = NEEDED | {"value_dtype", "values", "gaps", "gap_bytes"}
MOST_INDEX_BYTES = 1 << 24
MOST_DIMENSIONS = 64
MOST_ELEMENTS = 1 << 62


@dataclass(frozen=True)
class Entry:
    """A packed tensor as the index has it; `packed_format.md` says what each means."""

    shape: list[int]
    dtype: str
    nnz: int
    value_dtype: str
    values_compressed: bool
    gaps_compressed: bool
    gap_bytes: int | None  # None: as many as are stored

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of the dense tensor."""
        return self.numel * PACKED_DTYPES[self.dtype].itemsize


def header_text(metadata: dict[str, str]) -> str:
    """The part of the metadata that the digest covers."""
    return "".join(f"{metadata[key]}\n" for key in ("format", "version", "index", "config"))


def value_shape(shape: list[int], length: int) -> tuple[int, ...]:
    """The shape that values are stored in: never of as many dimensions as the tensor."""
    return (1, length) if len(shape) == 1 else (length,)


def read_index(text: str) -> dict[str, Entry]:
    """The entries of the metadata's `index`. ValueError if it is no such index; sizes are checked for overflow."""
    if len(text) > MOST_INDEX_BYTES:
        raise ValueError(f"metadata 'index' has {len(text)} characters; at most {MOST_INDEX_BYTES} are allowed.")
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata 'index' is not JSON ({error}).") from error
    if not isinstance(index, dict):
        raise ValueError("metadata 'index' is not a JSON object.")
    return {name: _read_entry(name, entry) for name, entry in index.items()}


def may_claim(name: str, entry: Entry, values: torch.Tensor | None, gaps: torch.Tensor | None) -> None:
    """
    Whether an entry fits what is stored under its name and may ask for the memory that it asks for.

    Raises:
        ValueError: parts that are missing or of a wrong dtype or shape, or counts out of the format's bounds.
    """
    if values is None or gaps is None:
        raise ValueError(f"{name!r} is in the index but {name!r} or {name + GAPS!r} is not stored.")
    dtype = torch.uint8 if entry.values_compressed else PACKED_DTYPES[entry.value_dtype]
    length = values.numel()
    shape = value_shape(entry.shape, length)
    if (values.dtype, gaps.dtype, gaps.ndim) != (dtype, torch.uint8, 1) or tuple(values.shape) != shape:
        raise ValueError(
            f"{name!r}: values are {values.dtype} {tuple(values.shape)} and gaps {gaps.dtype} {tuple(gaps.shape)}; "
            f"expected {dtype} {shape} and one-dimensional torch.uint8."
        )
    numel = entry.numel
    if not entry.values_compressed and length != entry.nnz:
        raise ValueError(f"{name!r}: the index counts {entry.nnz} values and {length} are stored.")
    if entry.nnz > numel or entry.bytes > 2040 * (values.nbytes + gaps.nbytes) + 2032:
        raise ValueError(
            f"{name!r}: shape {entry.shape} with {entry.nnz} values, more than {values.nbytes + gaps.nbytes} stored "
            "bytes can cover."
        )
    if entry.gap_bytes is not None and entry.gap_bytes > entry.nnz + numel // SKIP:
        raise ValueError(f"{name!r}: {entry.gap_bytes} gap bytes, more than shape {entry.shape} can have.")


def unpack_one(name: str, entry: Entry, values: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
    """
    The dense tensor of an entry, from contiguous CPU parts that `may_claim` let pass.

    Raises:
        ValueError: damaged or contradicting parts.
        ImportError: they are compressed and zstandard is not installed.
    """
    dtype, stored_dtype = PACKED_DTYPES[entry.dtype], PACKED_DTYPES[entry.value_dtype]
    bits, stored_bits = BIT_PATTERNS[dtype.itemsize], BIT_PATTERNS[stored_dtype.itemsize]
    try:
        gap_bytes = decompress(gaps.numpy(), entry.gap_bytes) if entry.gaps_compressed else gaps.numpy()
        count, covered = measure_gaps(gap_bytes)
        if count != entry.nnz:
            raise ValueError(f"the index and the gaps count {(entry.nnz, count)} values.")
        if not 0 <= entry.numel - covered < SKIP:
            raise ValueError(f"the gaps cover {covered} elements, but shape {entry.shape} has {entry.numel}.")
        planes = None
        if entry.values_compressed:
            planes = decompress(values.reshape(-1).numpy(), entry.nnz * stored_dtype.itemsize)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    raw, integer = values.reshape(-1), np.dtype(dtype_name(stored_bits))

    def take(start: int, stop: int) -> torch.Tensor:
        if planes is None:
            part = raw[start:stop].view(stored_bits)
        else:
            part = torch.from_numpy(from_planes(planes, integer, start, stop))
        if torch.count_nonzero(magnitude_bits(part.view(stored_dtype))) != len(part):
            raise ValueError(f"{name!r}: a zero is stored among the values.")
        return part if stored_dtype is dtype else part.view(stored_dtype).to(dtype).view(bits)

    dense = torch.empty(entry.numel, dtype=bits)
    decode_gaps(gap_bytes, take, dense)
    return dense.view(dtype).reshape(entry.shape)


def _read_entry(name: str, entry: object) -> Entry:
    if not isinstance(entry, dict) or not NEEDED <= set(entry) <= ALLOWED:
        raise ValueError(f"index entry of {name!r} must have shape, dtype and nnz, and may have {sorted(ALLOWED)}.")
    shape, nnz, dtype, coding = entry["shape"], entry["nnz"], entry["dtype"], entry.get("gaps")
    sizes = [*shape, nnz] if isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS else [None]
    if coding is not None:
        sizes.append(entry.get("gap_bytes"))
    if not all(type(n) is int and 0 <= n < MOST_ELEMENTS for n in sizes) or not 0 < math.prod(shape) < MOST_ELEMENTS:
        raise ValueError(f"index entry of {name!r} has an impossible shape, nnz or gap_bytes: {str(entry)[:200]}.")
    if dtype not in [*PACKED_DTYPES]:
        raise ValueError(f"index entry of {name!r}: dtype {dtype!r}, expected one of {[*PACKED_DTYPES]}.")
    value_dtype = entry.get("value_dtype", dtype)
    if value_dtype != dtype and (value_dtype not in ["float16", "bfloat16"] or PACKED_DTYPES[dtype].itemsize == 2):
        raise ValueError(f"index entry of {name!r}: value_dtype {value_dtype!r} is no narrower dtype than {dtype}.")
    codings = (entry.get("values", "zstd"), entry.get("gaps", "zstd"))
    if codings != ("zstd", "zstd") or (coding is None) != ("gap_bytes" not in entry):
        raise ValueError(f"index entry of {name!r}: values and gaps may be 'zstd', the latter with gap_bytes.")
    return Entry(shape, dtype, nnz, value_dtype, "values" in entry, "gaps" in entry, entry.get("gap_bytes"))
