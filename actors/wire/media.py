"""Nouns of the media path: what callers of a Media server and its implementers share."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from actors.types import Grid, PromptMedia


class MediaMiss(Exception):
    """The unit is not at the place that was asked, or the place is gone: make it again. Never shown to a client."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaUnit:
    """One image (``grid.frames`` is 1) or one frame pair (2), by the content key of its patches."""

    content_key: bytes
    grid: Grid


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeCall:
    """What an encoder is asked for. ``patch_address``: host:port of the preprocessor that keeps the patches."""

    lease: str
    units: tuple[MediaUnit, ...]
    patch_address: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedUnit:
    """One answer of an encoder. ``embedding_key`` is None when the patches are gone."""

    content_key: bytes
    embedding_key: bytes | None
    cached: bool = False
    busy_s: float = 0.0
    """Working time spent on the unit, shared evenly by the calls that wanted it."""


AnswerUnit = Callable[[EncodedUnit], Awaitable[None]]


class UnitEncoder(Protocol):
    """What a Media server needs of a vision encoder."""

    async def encode(self, call: EncodeCall, answer: AnswerUnit) -> None:
        """Answers once per distinct unit, as each is ready. Raises ServingError; cancelling drops what waits."""

    async def wait_for(self, key: bytes) -> None:
        """Returns when no embedding of that key is being made any more, or none was."""


def units_of(media: Iterable[PromptMedia]) -> tuple[MediaUnit, ...]:
    """The units of a prompt's media in prompt order."""
    return tuple(MediaUnit(content_key=key, grid=item.grid.unit) for item in media for key in item.content_keys)


def embedding_key(content_key: bytes, fingerprint: bytes, dtype: str) -> bytes:
    """Names the embedding of a unit: 32 bytes over content, vision weights and element type."""
    digest = hashlib.blake2b(digest_size=32)
    for part in (content_key, fingerprint, dtype.encode()):
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()
