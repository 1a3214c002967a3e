"""Tensors as a header and chunks: patches (numpy, uint8) and embeddings (torch, floating point)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from ernie_serving.internal.v1 import media_pb2

CHUNK_BYTES = 1_000_000

Patches = npt.NDArray[np.uint8]

_FLOATS = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _FLOATS.items()}


class TensorMismatch(ValueError):
    """Bytes received do not make the tensor announced."""


def header_of(value: Patches | torch.Tensor) -> media_pb2.TensorHeader:
    """Describes a value.

    Raises:
        ValueError: an element type that does not travel.
    """
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8:
            raise ValueError(f"patches travel as uint8, got {value.dtype}")
        return media_pb2.TensorHeader(dtype="uint8", shape=value.shape)
    if value.dtype not in _NAMES:
        raise ValueError(f"embeddings travel as {', '.join(_FLOATS)}, got {value.dtype}")
    return media_pb2.TensorHeader(
        dtype=_NAMES[value.dtype], shape=value.shape, checksum=zlib.crc32(_bytes_of(value).data)
    )


def chunks_of(value: Patches | torch.Tensor) -> Iterator[bytes]:
    """Yields the row-major bytes in chunks of at most ``CHUNK_BYTES``; none when there are no elements."""
    if isinstance(value, torch.Tensor):
        flat = _bytes_of(value)
    else:
        flat = np.ascontiguousarray(value).reshape(-1)
    for start in range(0, flat.nbytes, CHUNK_BYTES):
        yield flat[start : start + CHUNK_BYTES].tobytes()


def _bytes_of(embedding: torch.Tensor) -> Patches:
    return embedding.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class TensorAssembler:
    """Puts a tensor together from its chunks.

    Args:
        header: as announced by the sender.
        max_bytes: refuses anything larger before allocating it.

    Raises:
        TensorMismatch: unknown element type or more than ``max_bytes``.
    """

    def __init__(self, header: media_pb2.TensorHeader, max_bytes: int) -> None:
        self._shape = tuple(header.shape)
        self._dtype = _FLOATS.get(header.dtype)
        if self._dtype is None and header.dtype != "uint8":
            raise TensorMismatch(f"unknown element type {header.dtype!r}")
        byte_count = math.prod(self._shape) * (self._dtype.itemsize if self._dtype is not None else 1)
        if byte_count > max_bytes:
            raise TensorMismatch(f"{byte_count} bytes announced, at most {max_bytes} expected")
        self._checksum = header.checksum
        self._bytes = torch.empty(byte_count, dtype=torch.uint8)
        self._buffer: Patches = self._bytes.numpy()
        self._filled = 0

    def add(self, data: bytes) -> None:
        """Appends a chunk; raises TensorMismatch when there are more bytes than announced."""
        end = self._filled + len(data)
        if end > self._buffer.nbytes:
            raise TensorMismatch(f"more than the {self._buffer.nbytes} bytes announced")
        self._buffer[self._filled : end] = np.frombuffer(data, dtype=np.uint8)
        self._filled = end

    def finish(self) -> Patches | torch.Tensor:
        """Returns the whole tensor; raises TensorMismatch when bytes are missing, or not those of the embedding."""
        if self._filled != self._buffer.nbytes:
            raise TensorMismatch(f"{self._filled} of {self._buffer.nbytes} bytes announced")
        if self._dtype is None:
            return self._buffer.reshape(self._shape)
        if zlib.crc32(self._buffer.data) != self._checksum:
            raise TensorMismatch("other bytes than were announced")
        return self._bytes.view(self._dtype).reshape(self._shape)
