"""Writes safetensors files tensor by tensor, so that a checkpoint never has to fit into memory.

The library's own writer takes all tensors of a file at once. The format is a length (8 bytes, little endian), a JSON
header padded with spaces to a multiple of 8, and the data in the order of the header's offsets.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from actors.ernie.files import INDEX_FILE, ITEM_SIZES, SINGLE_FILE

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTensor:
    """A tensor to be written; ``values`` gives its values in storage order, in pieces of any shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def write_sharded(directory: Path, tensors: Sequence[PlannedTensor], shard_bytes: int) -> list[Path]:
    """Write ``model.safetensors``, or an index and shards of at most ``shard_bytes`` (a larger tensor is alone)."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        write_file(directory / SINGLE_FILE, shards[0])
        return [directory / SINGLE_FILE]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [directory / name for name in names]


def write_file(path: Path, tensors: Sequence[PlannedTensor]) -> None:
    """Write one file. Raises ValueError if a tensor's pieces do not add up to its shape."""
    with path.open("wb") as file:
        header = _header(tensors)
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors:
            written = 0
            for piece in tensor.values():
                data = piece.to(DTYPES[tensor.dtype]).contiguous().flatten().view(torch.uint8)
                written += file.write(data.numpy().data)
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name} has {written} bytes, planned {tensor.nbytes}")


def _header(tensors: Iterable[PlannedTensor]) -> bytes:
    entries: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    return encoded + b" " * (-len(encoded) % 8)
