"""zstd for the parts of a packed file, with a bound on what may come out; `zstandard` is an optional dependency."""

from __future__ import annotations

from types import ModuleType

import numpy as np


COMPRESSIONS = ("zstd",)
LEVEL = 9


def zstandard() -> ModuleType:
    """
    The module of that name.

    Raises:
        ImportError: it is not installed; the message has the line that installs it.
    """
    try:
        import zstandard as module
    except ImportError as error:
        raise ImportError(
            "compressed packed files need zstandard, which is not installed: pip install 'tscnc-hf[pack]' "
            "(or pip install zstandard), or write the file without compression."
        ) from error
    return module


def compress(data: np.ndarray) -> np.ndarray:
    """Bytes, uint8 (n,), as one zstd frame that states its content size, uint8 (m,). ImportError without zstandard."""
    frame = zstandard().ZstdCompressor(level=LEVEL).compress(np.ascontiguousarray(data))
    return np.frombuffer(bytearray(frame), np.uint8)


def decompress(frame: np.ndarray, size: int) -> np.ndarray:
    """
    The `size` bytes that one zstd frame holds, uint8 (size,), read-only.

    The frame must state that very size before anything is decoded, so that no more memory than that is asked for,
    whatever the frame would blow up to.

    Raises:
        ImportError: zstandard is not installed.
        ValueError: damaged, more than one frame, or another size.
    """
    module = zstandard()
    try:
        stated = module.frame_content_size(frame[:18])  # of -1 if it does not say
        if stated != size:
            raise ValueError(f"a zstd frame states {stated} bytes where the index has {size}.")
        return np.frombuffer(module.ZstdDecompressor().decompress(frame, allow_extra_data=False), np.uint8)
    except module.ZstdError as error:
        raise ValueError(f"a zstd frame cannot be decoded ({error}).") from error


def to_planes(values: np.ndarray) -> np.ndarray:
    """Values (n,) of w bytes each -> uint8 (w * n,): first bytes of all, second bytes of all, ... (little-endian)."""
    return np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T).reshape(-1)


def from_planes(planes: np.ndarray, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    """The values from `start` to before `stop`, (stop - start,) of `dtype`, out of the planes of all of them."""
    values = np.empty((stop - start, dtype.itemsize), np.uint8)
    for index, plane in enumerate(planes.reshape(dtype.itemsize, -1)):
        values[:, index] = plane[start:stop]
    return values.reshape(-1).view(dtype)
