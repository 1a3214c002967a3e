"""What ``GET /status`` says and how ``ernie status`` prints it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from actors.types import Stage
from cluster.config_scaling import Slo
from cluster.registry import EngineEntry, Latency, Percentiles, Snapshot

if TYPE_CHECKING:
    from cluster.router.request import Whereabouts

READY, STARTING, DRAINING, SILENT = "ready", "starting", "draining", "silent"
"""What an engine is: it takes requests, has yet to warm up, leaves, or says nothing to this router."""


def cluster_status(
    snapshot: Snapshot,
    *,
    model: str,
    missing: str | None,
    requests: Sequence[Whereabouts],
    latency: Latency,
    slo: Slo,
    speaking: Container[str],
) -> dict[str, Any]:
    """The registry as this router knows it, its requests and their latencies, as JSON values.

    ``speaking``: incarnations of the engines it hears.
    """
    return {
        "ready": missing is None,
        "missing": missing,
        "model": model,
        "active_requests": len(requests),
        "planner_term": snapshot.term,
        "engines": [
            {
                "id": entry.info.engine_id,
                "pool": entry.pool,
                "role": str(entry.info.role),
                "ready": entry.ready,
                "state": _state(entry, speaking),
                "address": entry.info.address,
                "node": _node(entry.info.address),
                "dtype": entry.info.dtype,
                "notes": list(entry.info.notes),
                "load": None
                if entry.load is None
                else {
                    "running": entry.load.running,
                    "waiting": entry.load.waiting,
                    "reserved": entry.load.reserved,
                    "queued_tokens": entry.load.queued_tokens,
                    "free_blocks": entry.load.free_blocks,
                    "total_blocks": entry.load.total_blocks,
                    "block_size": entry.load.block_size,
                    "cached_blocks": entry.load.cached_blocks,
                    "prefix_queried_tokens": entry.load.prefix_queried_tokens,
                    "prefix_hit_tokens": entry.load.prefix_hit_tokens,
                    "preemptions": entry.load.preemptions,
                    "prefill_busy": entry.load.prefill_busy,
                },
                "group": None if entry.group is None else asdict(entry.group),
            }
            for entry in snapshot.engines
        ],
        "loading": [
            {
                "pool": entry.pool,
                "role": str(entry.role),
                "ranks": [{"bytes_done": done, "bytes_total": total} for done, total in entry.ranks],
                "progress": entry.progress,
            }
            for entry in snapshot.loading
        ],
        "preprocessors": [
            {
                "id": entry.worker_id,
                "address": entry.address,
                "node": _node(entry.address),
                "queue_age_s": entry.queue_age_s,
                "busy": entry.busy,
            }
            for entry in snapshot.preprocessors
        ],
        "encoders": [
            {
                "id": entry.info.encoder_id,
                "address": entry.info.address,
                "node": _node(entry.info.address),
                "dtype": entry.info.dtype,
                "queued_patches": entry.queued_patches,
                "busy": entry.busy,
            }
            for entry in snapshot.encoders
        ],
        "pools": [{"replicas": snapshot.replicas(pool.name)} | asdict(pool) for pool in snapshot.pools],
        "flow": flow(requests),
        "latency": {
            "window_s": latency.window_s,
            "count": latency.count,
            "ttft_s": _percentiles(latency.ttft_s),
            "tpot_s": _percentiles(latency.tpot_s),
            "e2e_s": _percentiles(latency.e2e_s),
            "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "met": latency.slo_met},
        },
        "decisions": [asdict(decision) for decision in snapshot.decisions],
    }


def flow(requests: Iterable[Whereabouts]) -> list[dict[str, Any]]:
    """How many requests are in each stage, in the order of stages, and at which addresses. Those that queue or are
    preprocessed are at none that is known; those in transfer are where they go to.
    """
    counts = dict.fromkeys((stage for stage in Stage if stage is not Stage.FINISHED), 0)
    places: dict[Stage, Counter[str]] = {stage: Counter() for stage in counts}
    for request in requests:
        if request.stage not in counts:
            continue
        counts[request.stage] += 1
        place = {
            Stage.ENCODE: request.encoder,
            Stage.PREFILL: request.prefill,
            Stage.TRANSFER: request.decode,
            Stage.DECODE: request.decode,
        }.get(request.stage)
        if place is not None:
            places[request.stage][place] += 1
    return [{"stage": str(stage), "requests": count, "at": dict(places[stage])} for stage, count in counts.items()]


def _state(entry: EngineEntry, speaking: Container[str]) -> str:
    if not entry.ready:
        return STARTING
    if entry.load is not None and entry.load.draining:
        return DRAINING
    return READY if entry.info.incarnation in speaking else SILENT


def _node(address: str) -> str:
    """The host of ``host:port``."""
    return address.rpartition(":")[0].strip("[]")


def _percentiles(found: Percentiles | None) -> dict[str, float] | None:
    return None if found is None else asdict(found)


def summary(status: Mapping[str, Any]) -> str:
    """One line about the whole."""
    state = "ready" if status["ready"] else f"not ready: {status['missing']}"
    return f"{status['model']}: {state}, {status['active_requests']} requests active"


def pool_rows(status: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(pool, replicas there are, how many there are to be, bounds) of every pool."""
    for pool in status["pools"]:
        bounds = "" if pool["min"] == pool["max"] else f"{pool['min']} to {pool['max']}"
        yield (pool["name"], str(pool["replicas"]), str(pool["target"]), bounds)


def decision_lines(status: Mapping[str, Any], count: int) -> Iterator[str]:
    """The last decisions, one line each, the oldest first."""
    for decision in status["decisions"][-count:]:
        at = datetime.fromtimestamp(decision["time_s"]).strftime("%H:%M:%S")
        reason = f": {decision['reason']}" if decision["reason"] else ""
        yield f"{at} {decision['subject']} {decision['change']}{reason}"


def rows(status: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """(pool, id, role, address or progress, load) of every worker the planner knows."""
    for preprocessor in sorted(status["preprocessors"], key=_by_id):
        yield ("preprocessor", preprocessor["id"], "preprocess", preprocessor["address"], "")
    for encoder in sorted(status["encoders"], key=_by_id):
        load = f"{encoder['queued_patches']} patches queued"
        yield ("vision_encoder", encoder["id"], "encode", encoder["address"], load)
    for engine in sorted(status["engines"], key=lambda item: (item["pool"], item["role"], item["id"])):
        place = engine["address"] if engine["state"] == READY else f"{engine['address']}, {engine['state']}"
        yield (engine["pool"], engine["id"], engine["role"], place, _load(engine["load"]) + _group(engine["group"]))
    for engine in status["loading"]:
        yield (engine["pool"], "", engine["role"], ", ".join(filter(None, ("loading", engine["progress"]))), "")


def engine_notes(status: Mapping[str, Any]) -> Iterator[str]:
    """What the engines say of themselves: one line per engine and note."""
    for engine in sorted(status["engines"], key=lambda item: (item["pool"], item["role"], item["id"])):
        for note in engine["notes"]:
            yield f"{engine['role']} {engine['id']}: {note}"


def _by_id(item: Mapping[str, Any]) -> str:
    return str(item["id"])


def _group(group: Mapping[str, Any] | None) -> str:
    if group is None:
        return ""
    skew = f"skew {group['text_skew']:.2f} text, {group['vision_skew']:.2f} vision"
    return f", {group['ranks']} ranks, {skew}, {group['moved_experts']} experts moved"


def _load(load: Mapping[str, Any] | None) -> str:
    if load is None:
        return ""
    used = load["total_blocks"] - load["free_blocks"]
    busy = f"{load['running']} running, {load['waiting']} waiting, {load['reserved']} reserved"
    queried = load["prefix_queried_tokens"]
    hits = f", prefix hits {load['prefix_hit_tokens'] / queried:.0%}" if queried else ""
    preempted = f", {load['preemptions']} preempted" if load["preemptions"] else ""
    return f"{busy}, KV {used}/{load['total_blocks']}{hits}{preempted}"
