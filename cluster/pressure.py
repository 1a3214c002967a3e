"""How much there is to do for engines, over what they bear well: 1 is the most they should have. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.config_scaling import EngineBounds, Slo
from cluster.registry import EngineEntry, RouterEntry

WORKING = 0.5
"""Share of its time an engine spends on prompts, from which on it is the one that keeps prompts waiting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lateness:
    """What 95 of 100 requests waited for, over the SLO; 0 where there is none or nothing was measured."""

    ttft: float = 0.0
    tpot: float = 0.0


ON_TIME = Lateness()


def lateness(routers: Iterable[RouterEntry], slo: Slo, *, changed_s_ago: float = float("inf")) -> Lateness:
    """Of the router whose requests wait most. What was measured in part before the last change says nothing."""
    ttft = tpot = 0.0
    for entry in routers:
        latency = entry.latency
        if latency is None or latency.window_s > changed_s_ago:
            continue
        if slo.ttft_s is not None and latency.ttft_s is not None:
            ttft = max(ttft, latency.ttft_s.p95 / slo.ttft_s)
        if slo.tpot_s is not None and latency.tpot_s is not None:
            tpot = max(tpot, latency.tpot_s.p95 / slo.tpot_s)
    return Lateness(ttft=ttft, tpot=tpot)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pressure:
    """Of both kinds of work."""

    prefill: float
    decode: float


def measure(entries: Iterable[EngineEntry], bounds: EngineBounds, late: Lateness = ON_TIME) -> Pressure:
    """Prefill: tokens of prompts in the queue of an engine, and late first tokens as far as engines work on prompts.
    Decode: share of KV blocks in use, at least 1 where somebody waits for blocks, and slow replies where several share
    an engine.
    """
    queues, uses, running = [], [], 0
    entries = [entry for entry in entries if entry.load is not None]
    for entry in entries:
        load = entry.load
        assert load is not None
        if entry.info.role.prefills:
            queues.append(load.queued_tokens / bounds.queued_tokens)
        if entry.info.role.decodes:
            used = 1.0 - load.free_blocks / max(1, load.total_blocks)
            uses.append(max(used / bounds.kv_use, float(load.waiting > 0)))
            running += load.running
    slow = late.tpot if running > len(uses) else 0.0
    return Pressure(
        prefill=max(mean(queues), min(late.ttft, working(entries))),
        decode=max(mean(uses), slow),
    )


def working(entries: Iterable[EngineEntry]) -> float:
    """1 where engines that prefill spend ``WORKING`` of their time on prompts: if they do not, what keeps prompts
    waiting is something else, such as blocks on decode engines.
    """
    busy = [entry.load.prefill_busy for entry in entries if entry.load is not None and entry.info.role.prefills]
    return mean(busy) / WORKING


def mean(values: Sequence[float]) -> float:
    """0 of none."""
    return sum(values) / max(1, len(values))
