"""Tensors as a header and chunks: patches (numpy, uint8) and embeddings (torch, floating point).

Torch is imported where an embedding comes by: preprocessors and routers do without it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ernie_serving.internal.v1 import media_pb2

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 1_000_000

Patches = npt.NDArray[np.uint8]

_ITEM_BYTES = {"uint8": 1, "bfloat16": 2, "float32": 4, "float64": 8}


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
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in _ITEM_BYTES or not value.dtype.is_floating_point:
        raise ValueError(f"embeddings travel as bfloat16, float32 or float64, got {value.dtype}")
    return media_pb2.TensorHeader(dtype=dtype, shape=value.shape, checksum=zlib.crc32(_bytes_of(value).data))


def chunks_of(value: Patches | torch.Tensor) -> Iterator[bytes]:
    """Yields the row-major bytes in chunks of at most ``CHUNK_BYTES``; none when there are no elements."""
    flat = np.ascontiguousarray(value).reshape(-1) if isinstance(value, np.ndarray) else _bytes_of(value)
    for start in range(0, flat.nbytes, CHUNK_BYTES):
        yield flat[start : start + CHUNK_BYTES].tobytes()


def _bytes_of(embedding: torch.Tensor) -> Patches:
    """Its own bytes where it lies in one piece on the CPU, else a copy."""
    import torch

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
        shape = tuple(header.shape)
        if header.dtype not in _ITEM_BYTES:
            raise TensorMismatch(f"unknown element type {header.dtype!r}")
        byte_count = math.prod(shape) * _ITEM_BYTES[header.dtype]
        if byte_count > max_bytes:
            raise TensorMismatch(f"{byte_count} bytes announced, at most {max_bytes} expected")
        self._checksum: int | None = None
        self._value: Patches | torch.Tensor
        self._buffer: Patches
        if header.dtype == "uint8":
            self._value = np.empty(shape, dtype=np.uint8)
            self._buffer = self._value.reshape(-1)
        else:
            import torch

            self._checksum = header.checksum
            self._value = torch.empty(shape, dtype=getattr(torch, header.dtype))
            self._buffer = _bytes_of(self._value)
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
        if self._checksum is not None and zlib.crc32(self._buffer.data) != self._checksum:
            raise TensorMismatch("other bytes than were announced")
        return self._value
