"""Who gets which request: filter, then pick, over an immutable view. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from actors.types import EncoderInfo, EngineInfo, LoadReport
from cluster.registry import EncoderEntry


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineView:
    """An engine this router has a live link to."""

    info: EngineInfo
    load: LoadReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """Where an attempt runs: ``decode`` is None when ``prefill`` also decodes."""

    prefill: EngineInfo
    decode: EngineInfo | None


def blocks_needed(token_count: int, block_size: int) -> int:
    return math.ceil(token_count / block_size)


def _has_room(view: EngineView, token_count: int) -> bool:
    return view.load.free_blocks >= blocks_needed(token_count, view.load.block_size)


def _pressure(view: EngineView) -> tuple[int, float]:
    """Orders engines: queued work first, then the share of blocks in use."""
    load = view.load
    return load.queued_tokens, 1.0 - load.free_blocks / max(1, load.total_blocks)


def pairable(prefill: EngineInfo, decode: EngineInfo) -> bool:
    """KV may move only between engines of equal weights, element type, block size and rules."""
    return (prefill.fingerprint, prefill.dtype, prefill.block_size, prefill.switches) == (
        decode.fingerprint,
        decode.dtype,
        decode.block_size,
        decode.switches,
    )


def pick_route(engines: Sequence[EngineView], token_count: int) -> Route | None:
    """Picks where a prompt of ``token_count`` tokens (earlier outputs included) runs.

    Engines with room come first; among equals the least loaded prefill engine, then the least loaded decode engine
    that may be paired with it. A colocated engine is taken when it is less loaded than any pair. None when no path
    exists at all.
    """
    candidates: list[tuple[tuple[bool, int, float, bool], Route]] = []
    for first in engines:
        if not first.info.role.prefills:
            continue
        if first.info.role.decodes:
            full = not _has_room(first, token_count)
            candidates.append(((full, *_pressure(first), False), Route(prefill=first.info, decode=None)))
            continue
        for second in engines:
            if second.info.role.decodes and not second.info.role.prefills and pairable(first.info, second.info):
                full = not (_has_room(first, token_count) and _has_room(second, token_count))
                queued, used = _pressure(first)
                pressure = (queued + second.load.queued_tokens, used + _pressure(second)[1])
                candidates.append(((full, *pressure, True), Route(prefill=first.info, decode=second.info)))
    return min(candidates, key=lambda candidate: candidate[0])[1] if candidates else None


def route_has_room(engines: Sequence[EngineView], token_count: int) -> bool:
    """True when some decode-capable engine could hold the sequence now."""
    return any(view.info.role.decodes and _has_room(view, token_count) for view in engines)


def pick_encoder(encoders: Sequence[EncoderEntry]) -> EncoderInfo | None:
    """Picks the encoder with the fewest queued patches."""
    return min(encoders, key=lambda entry: entry.queued_patches).info if encoders else None
