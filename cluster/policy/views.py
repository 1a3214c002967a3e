"""What a choice is made from: places as they last described themselves, and what a request asks of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from actors.reports import EncoderInfo, EngineInfo, KvIdentity, LoadReport

PrefixHashes = Callable[[KvIdentity], Sequence[bytes]]
"""Chain hashes of the whole blocks of a prompt, for engines of an identity."""


def no_hashes(identity: KvIdentity) -> Sequence[bytes]:
    """Of a prompt that is to be placed by load alone."""
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineView:
    """An engine this router has a live link to."""

    info: EngineInfo
    load: LoadReport
    cached_blocks: AbstractSet[bytes] = frozenset()
    """Chain hashes of the blocks its prefix cache holds; the link's own set, which goes on changing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderView:
    """A vision encoder, and what this router knows of it."""

    info: EncoderInfo
    queued_patches: int = 0
    known_units: AbstractSet[bytes] = frozenset()
    """Content keys of units whose embeddings it should still have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """A prompt that is to be placed, outputs of earlier attempts included."""

    token_count: int
    prefix_hashes: PrefixHashes = no_hashes
    alone_tokens: int = 0
    """The most of it that an engine which only decodes may compute."""
    vision_end: int = 0
    """Leading tokens which that engine must have, for it has no vision experts."""
    units: tuple[tuple[bytes, int], ...] = ()
    """(content key, patches) of the media that are to be encoded."""
    media_tokens: int = 0
    """Tokens whose embeddings the engine that prefills pulls from an encoder."""
    encoder_address: str | None = None
    """Where they are, once that is decided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """Where an attempt runs: ``decode`` is None when ``prefill`` also decodes."""

    prefill: EngineInfo
    decode: EngineInfo | None


def node_of(address: str) -> str:
    """Places of one node reach each other without a network."""
    return address.rpartition(":")[0]


def blocks_needed(token_count: int, block_size: int) -> int:
    return math.ceil(token_count / block_size)


def has_room(view: EngineView, token_count: int) -> bool:
    return view.load.free_blocks >= blocks_needed(token_count, view.load.block_size)


def used_share(view: EngineView) -> float:
    return 1.0 - view.load.free_blocks / max(1, view.load.total_blocks)


def cached_tokens(view: EngineView, token_count: int, prefix_hashes: PrefixHashes) -> int:
    """Leading tokens of a prompt whose KV an engine has. The last token is always computed."""
    known = view.cached_blocks
    if not known:
        return 0
    block_size = view.info.block_size
    held = 0
    for hash in prefix_hashes(view.info.kv_identity)[: (token_count - 1) // block_size]:
        if hash not in known:
            break
        held += block_size
    return held


def has_room_on(engines: Sequence[EngineView], route: Route, token_count: int) -> bool:
    """True when all engines of a route are there and could hold the sequence now."""
    wanted = {info.incarnation for info in (route.prefill, route.decode) if info is not None}
    return sum(view.info.incarnation in wanted and has_room(view, token_count) for view in engines) == len(wanted)


def admissible(view: EngineView, waiting: Sequence[int]) -> list[int]:
    """Which of those who wait an engine that decodes can take up now, by their places. ``waiting``: their tokens.

    Nobody overtakes the first, but one that this engine could never hold waits for another and holds nobody back here.
    """
    if not view.info.role.decodes:
        return []
    taken: list[int] = []
    free = view.load.free_blocks
    for place, token_count in enumerate(waiting):
        needed = blocks_needed(token_count, view.load.block_size)
        if needed > view.load.total_blocks:
            continue
        free -= needed
        if free < 0:
            break
        taken.append(place)
    return taken
