"""Who gets which request: filter, then pick, over an immutable view. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from actors.reports import EncoderInfo, EngineInfo, KvIdentity, LoadReport
from cluster.registry import EncoderEntry


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineView:
    """An engine this router has a live link to."""

    info: EngineInfo
    load: LoadReport
    cached_blocks: AbstractSet[bytes] = frozenset()
    """Chain hashes of the blocks its prefix cache holds; the link's own set, which goes on changing."""


PrefixHashes = Callable[[KvIdentity], Sequence[bytes]]
"""Chain hashes of the whole blocks of a prompt, for engines of an identity."""

QUEUE_STEP = 8192
"""Patches queued at encoders that differ by less are about equal: a large picture has 24,000."""
USED_STEP = 0.1
"""Shares of blocks in use that differ by less are about equal."""


def no_hashes(identity: KvIdentity) -> Sequence[bytes]:
    """Of a prompt that is to be placed by load alone."""
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """Where an attempt runs: ``decode`` is None when ``prefill`` also decodes."""

    prefill: EngineInfo
    decode: EngineInfo | None


def blocks_needed(token_count: int, block_size: int) -> int:
    return math.ceil(token_count / block_size)


def _has_room(view: EngineView, token_count: int) -> bool:
    return view.load.free_blocks >= blocks_needed(token_count, view.load.block_size)


def _used(view: EngineView) -> float:
    return 1.0 - view.load.free_blocks / max(1, view.load.total_blocks)


def cached_tokens(view: EngineView, token_count: int, prefix_hashes: PrefixHashes) -> int:
    """Leading tokens of a prompt whose KV an engine has. The last token is always computed."""
    if not view.cached_blocks:
        return 0
    block_size = view.info.block_size
    held = 0
    for hash in prefix_hashes(view.info.kv_identity)[: (token_count - 1) // block_size]:
        if hash not in view.cached_blocks:
            break
        held += block_size
    return held


def pairable(prefill: EngineInfo, decode: EngineInfo) -> bool:
    """KV may move only between engines of equal weights, element type, block size and rules."""
    return prefill.kv_identity == decode.kv_identity


def pick_route(
    engines: Sequence[EngineView], token_count: int, prefix_hashes: PrefixHashes = no_hashes
) -> Route | None:
    """Picks where a prompt of ``token_count`` tokens (earlier outputs included) runs. None when no path exists at all.

    Engines that may take so long a prompt come first, then those with room, then those that have the least to compute
    before its first token: what is queued there and what of this prompt they have not cached. Among equals, by tenths
    of the share of blocks in use, and in the same tenth by how much of the prompt the decode engine holds, which need
    not be sent. A pair counts both its engines, and a colocated engine goes before a pair that is no better.
    """
    cached = {view.info.incarnation: cached_tokens(view, token_count, prefix_hashes) for view in engines}
    candidates: list[tuple[tuple[bool, bool, int, int, int, float, bool], Route]] = []
    for first in engines:
        if not first.info.role.prefills:
            continue
        lacking = token_count - cached[first.info.incarnation]
        for second in [first] if first.info.role.decodes else _partners(first, engines):
            split = second is not first
            too_long = token_count >= min(first.info.max_model_len, second.info.max_model_len)
            full = not (_has_room(first, token_count) and _has_room(second, token_count))
            work = first.load.queued_tokens + split * second.load.queued_tokens + lacking
            used = _used(first) + split * _used(second)
            held = cached[second.info.incarnation]
            route = Route(prefill=first.info, decode=second.info if split else None)
            candidates.append(((too_long, full, work, int(used / USED_STEP), -held, used, split), route))
    return min(candidates, key=lambda candidate: candidate[0])[1] if candidates else None


def _partners(prefill: EngineView, engines: Sequence[EngineView]) -> list[EngineView]:
    """Engines that only decode and may take over from ``prefill``."""
    return [
        view
        for view in engines
        if view.info.role.decodes and not view.info.role.prefills and pairable(prefill.info, view.info)
    ]


def has_room_on(engines: Sequence[EngineView], route: Route, token_count: int) -> bool:
    """True when all engines of a route are there and could hold the sequence now."""
    wanted = {info.incarnation for info in (route.prefill, route.decode) if info is not None}
    return sum(view.info.incarnation in wanted and _has_room(view, token_count) for view in engines) == len(wanted)


def admissible(view: EngineView, waiting: Sequence[int]) -> int:
    """How many of those who wait, counted from the first, an engine that decodes can take up now. ``waiting``: their
    tokens. Nobody overtakes the first.
    """
    if not view.info.role.decodes:
        return 0
    free = view.load.free_blocks
    for count, token_count in enumerate(waiting):
        free -= blocks_needed(token_count, view.load.block_size)
        if free < 0:
            return count
    return len(waiting)


def pick_encoder(encoders: Sequence[EncoderEntry], content_key: bytes = b"") -> EncoderInfo | None:
    """Picks among the encoders with the fewest queued patches the one where media of that key always go, as long as the
    same encoders are there (rendezvous hashing): it may still have their embeddings, and other media go elsewhere.
    """
    least = min((entry.queued_patches for entry in encoders), default=0)
    near = [entry.info for entry in encoders if entry.queued_patches < least + QUEUE_STEP]
    return max(near, key=lambda info: _weight(content_key, info.incarnation), default=None)


def _weight(content_key: bytes, incarnation: str) -> bytes:
    return hashlib.blake2b(content_key + incarnation.encode(), digest_size=16).digest()
