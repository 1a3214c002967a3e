"""The safetensors files of a model directory: which tensors lie where. Headers only; no tensor data is read here."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
"""Bytes; the format's own bound on its JSON header."""

ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per value of the stored dtypes that can be loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor in one file. ``name`` is as stored; ``offset`` counts from the start of the file, in bytes."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def stored_tensors(directory: str | Path) -> dict[str, StoredTensor]:
    """All tensors of ``model.safetensors``, or of the shards its index names, by stored name.

    Raises ValueError naming the file for a missing, truncated or malformed file or index, and naming the tensors for
    disagreement between index and shards.
    """
    root = Path(directory)
    if (root / SINGLE_FILE).is_file():
        return _collect([root / SINGLE_FILE])
    index_path = root / INDEX_FILE
    if not index_path.is_file():
        raise ValueError(f"{root} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = _weight_map(index_path)
    found = _collect([root / shard for shard in sorted(set(weight_map.values()))])
    astray = [name for name, shard in weight_map.items() if name not in found or found[name].path.name != shard]
    if astray:
        raise ValueError(f"{index_path}: not in the shard the index names: {quote_some(astray)}")
    return found


def quote_some(names: Iterable[str], limit: int = 10) -> str:
    """At most ``limit`` names for a message, and how many more there are."""
    listed = sorted(names)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an index of shards: {error!r}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map is not a filled object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path}: weight_map[{name!r}] = {shard!r} is not a file name")
    return weight_map


def _collect(paths: list[Path]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in _read_header(path):
            if tensor.name in found:
                raise ValueError(f"{tensor.name} is in both {found[tensor.name].path} and {path}")
            found[tensor.name] = tensor
    return found


def _read_header(path: Path) -> list[StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= min(HEADER_LIMIT, size - 8):
                raise ValueError("its header does not fit the file")
            header = json.loads(file.read(length))
        return [_entry(path, name, raw, 8 + length, size) for name, raw in header.items() if name != "__metadata__"]
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def _entry(path: Path, name: str, raw: dict[str, Any], data_start: int, file_size: int) -> StoredTensor:
    shape, dtype = tuple(int(n) for n in raw["shape"]), str(raw["dtype"])
    begin, end = (int(n) for n in raw["data_offsets"])
    if dtype not in ITEM_SIZES:
        raise ValueError(f"{name} has dtype {dtype}, which cannot be loaded; known: {', '.join(ITEM_SIZES)}")
    if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise ValueError(f"{name} of shape {list(shape)} and dtype {dtype} has {end - begin} bytes")
    if begin < 0 or data_start + end > file_size:
        raise ValueError(f"{name} ends at byte {data_start + end} of {file_size}")
    return StoredTensor(name=name, path=path, dtype=dtype, shape=shape, offset=data_start + begin, nbytes=end - begin)
