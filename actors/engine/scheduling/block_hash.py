"""Names for the KV of whole blocks: equal names, equal keys and values.

    root      = H(tag, weights fingerprint, dtype, switches, block size, salt)
    block[i]  = H(block[i - 1] or root, ids, units that lie in the block)

H is blake2b with 32 bytes. A unit (an image or a frame pair) counts for every block it touches, by where it begins
relative to the block, its place in its medium, the medium's kind and grid, and the whole of its embedding key: ids of
placeholders are all alike, and positions follow from grids. Numbers have fixed widths and texts their lengths before
them, so that different inputs never read the same.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

from actors.reports import KvIdentity
from actors.types import Grid, MediaKind, MediaSpan

HASH_BYTES = 32
TAG = b"ernie-serving kv block 1"
ID_TYPE = "I"
ID_BYTES = array(ID_TYPE).itemsize

_COUNT = struct.Struct("<I")
_UNIT = struct.Struct("<BIIIIqI")
_KINDS = {MediaKind.IMAGE: 1, MediaKind.VIDEO: 2}


class _Unit(NamedTuple):
    start: int
    end: int
    kind: int
    grid: Grid
    number: int
    """Its place in its medium."""
    key: bytes


class BlockHasher:
    """Hashes of the whole blocks of one sequence, which grows by ``extend``.

    ``media`` are the spans of the prompt, in order; everything after the prompt is text. ``salt`` separates tenants.
    """

    def __init__(self, identity: KvIdentity, media: Sequence[MediaSpan] = (), salt: bytes = b"") -> None:
        self.hashes: list[bytes] = []
        """One per whole block; only grows."""
        self._block_bytes = identity.block_size * ID_BYTES
        self._block_size = identity.block_size
        self._parent = _root(identity, salt)
        self._units = list(_units(media))
        self._first_unit = 0
        """Of those that may still touch a block."""
        self._rest = b""

    @property
    def token_count(self) -> int:
        """Tokens read so far."""
        return len(self.hashes) * self._block_size + len(self._rest) // ID_BYTES

    def extend(self, token_ids: Iterable[int]) -> None:
        """Appends tokens. Raises ValueError or OverflowError for what is no unsigned 32-bit number."""
        ids = array(ID_TYPE, token_ids)
        if struct.pack("=I", 1) != struct.pack("<I", 1):
            ids.byteswap()
        data = self._rest + ids.tobytes()
        size = self._block_bytes
        whole = len(data) // size * size
        for at in range(0, whole, size):
            state = blake2b(self._parent, digest_size=HASH_BYTES)
            state.update(data[at : at + size])
            if self._first_unit < len(self._units):
                self._add_units(state)
            self._parent = state.digest()
            self.hashes.append(self._parent)
        self._rest = data[whole:]

    def _add_units(self, state: blake2b) -> None:
        first = len(self.hashes) * self._block_size
        end = first + self._block_size
        while self._first_unit < len(self._units) and self._units[self._first_unit].end <= first:
            self._first_unit += 1
        at = self._first_unit
        while at < len(self._units) and self._units[at].start < end:
            unit = self._units[at]
            state.update(_UNIT.pack(unit.kind, *unit.grid, unit.number, unit.start - first, len(unit.key)))
            state.update(unit.key)
            at += 1


def hash_blocks(
    identity: KvIdentity, token_ids: Iterable[int], media: Sequence[MediaSpan] = (), salt: bytes = b""
) -> tuple[bytes, ...]:
    """Hashes of the whole blocks of a prompt."""
    hasher = BlockHasher(identity, media, salt)
    hasher.extend(token_ids)
    return tuple(hasher.hashes)


def _units(media: Sequence[MediaSpan]) -> Iterator[_Unit]:
    for span in media:
        count = span.grid.tokens_per_unit
        for number, key in enumerate(span.embedding_keys):
            start = span.offset + number * count
            yield _Unit(start, start + count, _KINDS[span.kind], span.grid, number, key)


def _root(identity: KvIdentity, salt: bytes) -> bytes:
    """Parent of first blocks."""
    state = blake2b(TAG, digest_size=HASH_BYTES)
    for text in (identity.fingerprint.encode(), identity.dtype.encode(), identity.switches.encode(), salt):
        state.update(_COUNT.pack(len(text)))
        state.update(text)
    state.update(_COUNT.pack(identity.block_size))
    return state.digest()
