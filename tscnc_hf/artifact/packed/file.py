"""The packed file: every weight that is not zero, and one byte or so to say where it stands.

The format is described to the last byte in `docs/packed_format.md`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tscnc_hf.artifact.files.atomic import atomic_file
from tscnc_hf.artifact.files.tensor_file import (
    BIT_PATTERNS,
    dtype_name,
    magnitude_bits,
    naming,
    own_copy,
    read_safetensors,
    reading,
    tensors_digest,
)
from tscnc_hf.artifact.packed import index as packed_index
from tscnc_hf.artifact.packed.gaps import encode_gaps
from tscnc_hf.artifact.packed.index import GAPS, PACKED_DTYPES
from tscnc_hf.artifact.packed.zstd import COMPRESSIONS, compress, to_planes, zstandard


SPARSE_FILE = "model.sparse.safetensors"
FORMAT = "tscnc_sparse"
VERSION = "2"
METADATA = ("format", "version", "index", "config", "sha256")
VALUE_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "float16": "float16", "bfloat16": "bfloat16"}
ENTRY_BYTES = 256  # what the entries of a compressed tensor take in the header, about: it has to save more
MOST_TENSORS = 1 << 17


def pack_tensors(
    tensors: dict[str, torch.Tensor],
    compression: str | None = None,
    value_dtype: str | None = None,
    config: str = "",
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Pack the tensors of a checkpoint: (stored tensors, metadata), ready for a safetensors file.

    Args:
        tensors: name -> tensor of any shape, dtype and device, contiguous or not, tied or not. Not changed.
        compression, value_dtype: as in `tscnc_hf.save_sparse`. Values that are zero once they are rounded are zeros.
        config: digest of the config.json that goes with the tensors (`config_digest`).

    Returns:
        The stored tensors (contiguous, on the CPU, sharing no memory) and the metadata of `packed_format.md`.
        `unpack_tensors` gives back the same names, shapes and dtypes, and without `value_dtype` the same bits, but
        for -0.0, which comes back as 0.0.

    Raises:
        ValueError: something in the dict is not a tensor with data; an unknown option; a value that is finite and
            would not be in `value_dtype`; a `value_dtype` that rounds nothing.
        ImportError: zstandard is not installed.
    """
    if compression is not None and compression not in COMPRESSIONS:
        raise ValueError(f"compression={compression!r}; use one of {COMPRESSIONS} or None.")
    if value_dtype not in (None, *VALUE_DTYPES):
        raise ValueError(f"value_dtype={value_dtype!r}; use one of {[*VALUE_DTYPES]} or None, which keeps every bit.")
    if compression:
        zstandard()
    value_dtype = VALUE_DTYPES.get(value_dtype)
    stored: dict[str, torch.Tensor] = {}
    index: dict[str, dict] = {}
    wider = 0
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(f"{name!r} is {type(tensor).__name__}, not a strided tensor with data: nothing to pack.")
        dense = own_copy(tensor)
        if dtype_name(dense.dtype) in PACKED_DTYPES and dense.numel() and name + GAPS not in tensors:
            narrower = value_dtype if dense.element_size() > 2 else None
            wider += narrower is not None
            packed = _pack_one(name, dense, narrower, compression is not None)
            if packed is not None:
                stored[name], stored[name + GAPS], index[name] = packed
                continue
        stored[name] = dense
    if value_dtype and not wider:
        raise ValueError(f"value_dtype={value_dtype!r} rounds nothing: no tensor is float32 or float64. Leave it out.")
    text = json.dumps(index, sort_keys=True, separators=(",", ":"))
    if len(text) > packed_index.MOST_INDEX_BYTES or len(stored) > MOST_TENSORS:
        raise ValueError(f"{len(tensors)} tensors: too many for one packed file ({MOST_TENSORS} at most).")
    metadata = {"format": FORMAT, "version": VERSION, "index": text, "config": config}
    return stored, {**metadata, "sha256": tensors_digest(packed_index.header_text(metadata), stored)}


def unpack_tensors(
    packed: dict[str, torch.Tensor],
    metadata: dict[str, str] | None,
    config: str | None = None,
    elements: tuple[int, int] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors that `pack_tensors` packed, on the CPU, sharing no memory. `packed` is emptied on the way.

    The digest, and what the index claims, are checked before memory is asked for. The largest tensor is decoded first,
    and what was decoded is let go: at no time is there more in memory than the dense and the packed tensors.

    Args:
        config: what the digest of the config must be, if the file has one.
        elements: least and greatest number of elements of all tensors together.

    Raises:
        ValueError: another format or version, a digest that does not fit, or counts, gaps, shapes or dtypes that
            contradict each other or the arguments. No tensor is returned then.
        ImportError: the file is compressed and zstandard is not installed.
    """
    metadata = _check_metadata(metadata)
    entries = packed_index.read_index(metadata["index"])
    for name in [*packed]:
        packed[name] = packed[name].detach().cpu().contiguous()
    if tensors_digest(packed_index.header_text(metadata), packed) != metadata["sha256"]:
        raise ValueError("the SHA-256 digest does not fit the contents: the file or its index is damaged.")
    if config is not None and metadata["config"] not in ("", config):
        raise ValueError(
            "it was saved with another config.json than the one beside it (number of heads, activation, labels, ...): "
            "the two would make a model that nobody trained. Pack the model again with tscnc_hf.save_sparse."
        )
    for name, entry in entries.items():
        packed_index.may_claim(name, entry, packed.get(name), packed.get(name + GAPS))
    parts = {*entries, *(name + GAPS for name in entries)}
    total = sum(entry.numel for entry in entries.values())
    total += sum(tensor.numel() for name, tensor in packed.items() if name not in parts)
    if elements is not None and not elements[0] <= total <= elements[1]:
        raise ValueError(f"it holds {total} elements; the model has between {elements[0]} and {elements[1]}.")
    order, tensors = list(packed), {}
    for name in sorted(entries, key=lambda name: -entries[name].bytes):
        tensors[name] = packed_index.unpack_one(name, entries[name], packed.pop(name), packed.pop(name + GAPS))
    for name in [*packed]:
        tensors[name] = own_copy(packed.pop(name))
    return {name: tensors[name] for name in order if name in tensors}


def write_sparse_file(tensors: dict[str, torch.Tensor], path: str | os.PathLike, **options: Any) -> Path:
    """Pack `tensors` into the file `path`, atomically, and return the path. Options and errors: `pack_tensors`."""
    packed, metadata = pack_tensors(tensors, **options)
    with atomic_file(path) as temporary:
        save_file(packed, temporary, metadata=metadata)
    return Path(path)


def read_sparse_file(
    path: str | os.PathLike, config: str | None = None, elements: tuple[int, int] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a packed file, on the CPU, bit for bit what was packed. Arguments and errors: `unpack_tensors`.

    Raises:
        FileNotFoundError: there is no such file. A ValueError, also of a truncated file, names it.
    """
    metadata = read_sparse_metadata(path)
    packed, _ = read_safetensors(path)
    with naming(path):
        return unpack_tensors(packed, metadata, config, elements)


def read_sparse_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a packed file, of a known version but with no digest checked. Errors: `read_sparse_file`."""
    with reading(path):
        with open(path, "rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little") if os.path.getsize(path) > 8 else 0)
        with safe_open(path, framework="pt") as file:
            metadata, count = file.metadata() or {}, len(file.keys())
    with naming(path):
        if not header.rstrip(b" ").endswith(b"}"):  # padding that is not: nobody would notice a flipped byte in it
            raise ValueError("the header is damaged.")
        if count > MOST_TENSORS:
            raise ValueError(f"it has {count} tensors; at most {MOST_TENSORS} are allowed.")
        return _check_metadata(metadata)


def _check_metadata(metadata: dict[str, str] | None) -> dict[str, str]:
    metadata = metadata or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"not a packed checkpoint: metadata 'format' is {metadata.get('format')!r}, not {FORMAT!r}.")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"packed checkpoint of version {metadata.get('version')!r}; this tscnc_hf reads version {VERSION!r}. "
            "Update tscnc_hf, or save the checkpoint again."
        )
    if set(metadata) != set(METADATA):
        raise ValueError(f"metadata has the keys {sorted(metadata)}; expected {', '.join(METADATA)}.")
    return metadata


def _pack_one(
    name: str, dense: torch.Tensor, value_dtype: str | None, compressed: bool
) -> tuple[torch.Tensor, torch.Tensor, dict] | None:
    """(values, gaps, index entry) of a contiguous CPU tensor; None if it is smaller as it is."""
    entry: dict[str, Any] = {"shape": list(dense.shape), "dtype": dtype_name(dense.dtype)}
    flat = dense.reshape(-1)
    if value_dtype:
        entry["value_dtype"], wide = value_dtype, flat
        flat = wide.to(PACKED_DTYPES[value_dtype])
        overflown = wide[flat.isfinite() != wide.isfinite()]
        if len(overflown):
            raise ValueError(
                f"{name!r}: {len(overflown)} values are too large for {value_dtype}, the first is {overflown[0]:.3g}. "
                'Use value_dtype="bf16", or none.'
            )
    bits = BIT_PATTERNS[flat.element_size()]
    positions = magnitude_bits(flat).nonzero().reshape(-1)
    entry["nnz"] = len(positions)
    values, gaps = flat[positions], encode_gaps(positions, flat.numel())
    smallest = min(values.nbytes + len(gaps), dense.nbytes)
    if compressed:
        frames = [compress(to_planes(values.view(bits).numpy())), compress(gaps.numpy())]
        small = [len(frames[0]) < values.nbytes, len(frames[1]) < len(gaps)]
        size = min(len(frames[0]), values.nbytes) + min(len(frames[1]), len(gaps))
        if any(small) and size + ENTRY_BYTES < smallest and dense.nbytes <= 2040 * size + 2032:
            if small[0]:
                values, entry["values"] = torch.from_numpy(frames[0]), "zstd"
            if small[1]:
                entry |= {"gaps": "zstd", "gap_bytes": len(gaps)}
                gaps = torch.from_numpy(frames[1])
    if values.nbytes + len(gaps) >= dense.nbytes:
        return None
    return values.reshape(packed_index.value_shape(entry["shape"], len(values))), gaps, entry
