"""The status of a cluster, from snapshot to rows."""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import replace
from typing import Any

from actors.reports import EncoderInfo, EngineInfo, GroupReport, LoadReport
from actors.types import EngineRole, Stage
from cluster.config_scaling import Slo
from cluster.decisions import Decision, DecisionKind
from cluster.registry import (
    EncoderEntry,
    EngineEntry,
    Latency,
    LoadingEntry,
    Percentiles,
    PoolScale,
    PreprocessorEntry,
    Snapshot,
)
from cluster.router.request import Whereabouts
from cluster.status import cluster_status, decision_lines, engine_notes, flow, pool_rows, rows, summary

ENGINE = EngineInfo(
    engine_id="engine-1",
    incarnation="i1",
    address="10.0.0.1:1",
    role=EngineRole.DECODE,
    epoch=1,
    fingerprint="f",
    dtype="float32",
    block_size=16,
    switches="s",
    max_model_len=512,
    notes=("KV arena of 1 GiB", "experts: loop"),
)
LOAD = LoadReport(
    step=1,
    running=2,
    waiting=3,
    free_blocks=90,
    total_blocks=100,
    block_size=16,
    queued_tokens=7,
    reserved=1,
    prefix_queried_tokens=200,
    prefix_hit_tokens=50,
    preemptions=4,
)
GROUP = replace(
    ENGINE, engine_id="group-1", incarnation="i4", address="10.0.0.4:4", role=EngineRole.COLOCATED, notes=()
)
REPORT = GroupReport(
    ranks=4,
    processes=(11, 12, 13, 14),
    steps=9,
    plan_s=0.1,
    own_s=2.0,
    gather_s=0.2,
    text_skew=1.5,
    vision_skew=1.25,
    loads=2,
    moves=1,
    moved_experts=6,
    move_s=0.3,
)
GB = 10**9
QUIET = Latency(window_s=60.0, count=0)
SNAPSHOT = Snapshot(
    term=1,
    version=4,
    engines=(
        EngineEntry(info=ENGINE, pool="engine", ready=True, load=LOAD),
        EngineEntry(info=GROUP, pool="engine", ready=True, load=LOAD, group=REPORT),
    ),
    encoders=(
        EncoderEntry(
            info=EncoderInfo(encoder_id="e1", incarnation="i2", address="10.0.0.2:2", fingerprint="f", dtype="float32"),
            queued_patches=5,
        ),
    ),
    preprocessors=(PreprocessorEntry(incarnation="0123456789", address="10.0.0.3:3"),),
    loading=(
        LoadingEntry(pool="engine", role=EngineRole.PREFILL, ranks=((12 * GB, 30 * GB), (3 * GB, 30 * GB))),
        LoadingEntry(pool="engine", role=EngineRole.DECODE, ranks=((0, 0), (0, 0))),
        LoadingEntry(pool="engine", role=EngineRole.DECODE, ranks=((GB, 57 * GB),)),
    ),
    pools=(PoolScale(name="engine", target=3, min=1, max=4), PoolScale(name="preprocessor", target=0, min=0, max=2)),
    decisions=(
        Decision(
            number=7,
            time_s=1.5,
            kind=DecisionKind.SCALE,
            pool="engine",
            subject="engine",
            change="2 -> 3",
            reason="decode short",
        ),
    ),
)


def told(
    snapshot: Snapshot,
    *,
    active: int = 0,
    missing: str | None = None,
    latency: Latency = QUIET,
    speaking: Container[str] = ("i1",),
) -> dict[str, Any]:
    """As a client reads it."""
    waits = Whereabouts(request_id="r", alias=None, stage=Stage.QUEUED, elapsed_s=1.0, output_tokens=0)
    status = cluster_status(
        snapshot,
        model="m",
        missing=missing,
        requests=[waits] * active,
        latency=latency,
        slo=Slo(ttft_s=2.0),
        speaking=speaking,
    )
    read: dict[str, Any] = json.loads(json.dumps(status))
    return read


def test_every_worker_has_a_row() -> None:
    status = told(SNAPSHOT, active=2, missing="no prefill engine")
    assert list(rows(status)) == [
        ("preprocessor", "01234567", "preprocess", "10.0.0.3:3", ""),
        ("vision_encoder", "e1", "encode", "10.0.0.2:2", "5 patches queued"),
        (
            "engine",
            "group-1",
            "colocated",
            "10.0.0.4:4, silent",
            "2 running, 3 waiting, 1 reserved, KV 10/100, prefix hits 25%, 4 preempted, "
            "4 ranks, skew 1.50 text, 1.25 vision, 6 experts moved",
        ),
        (
            "engine",
            "engine-1",
            "decode",
            "10.0.0.1:1",
            "2 running, 3 waiting, 1 reserved, KV 10/100, prefix hits 25%, 4 preempted",
        ),
        ("engine", "", "prefill", "loading, 15.0 GB of 60.0 GB, rank 1 at 10%", ""),
        ("engine", "", "decode", "loading", ""),
        ("engine", "", "decode", "loading, 1.0 GB of 57.0 GB", ""),
    ]
    assert list(engine_notes(status)) == ["decode engine-1: KV arena of 1 GiB", "decode engine-1: experts: loop"]
    assert summary(status) == "m: not ready: no prefill engine, 2 requests active"


def test_pools_and_decisions_are_told() -> None:
    status = told(SNAPSHOT, active=2)
    assert status["pools"] == [
        {"name": "engine", "replicas": 2, "target": 3, "min": 1, "max": 4},
        {"name": "preprocessor", "replicas": 1, "target": 0, "min": 0, "max": 2},
    ]
    assert status["decisions"] == [
        {
            "number": 7,
            "time_s": 1.5,
            "kind": "scale",
            "pool": "engine",
            "subject": "engine",
            "change": "2 -> 3",
            "reason": "decode short",
        }
    ]


def test_pools_and_decisions_are_shown() -> None:
    status = told(SNAPSHOT)
    assert list(pool_rows(status)) == [("engine", "2", "3", "1 to 4"), ("preprocessor", "1", "0", "0 to 2")]
    (line,) = decision_lines(status, 5)
    assert line.partition(" ")[2] == "engine 2 -> 3: decode short"
    assert list(decision_lines(told(Snapshot(term=0, version=-1)), 5)) == []


def test_latencies_are_told_with_what_they_should_be() -> None:
    some = Latency(window_s=60.0, count=3, ttft_s=Percentiles(p50=0.5, p95=1.0, p99=1.5), slo_met=1.0)
    assert told(SNAPSHOT, latency=some)["latency"] == {
        "window_s": 60.0,
        "count": 3,
        "ttft_s": {"p50": 0.5, "p95": 1.0, "p99": 1.5},
        "tpot_s": None,
        "e2e_s": None,
        "slo": {"ttft_s": 2.0, "tpot_s": None, "met": 1.0},
    }


def test_an_empty_cluster_has_no_rows() -> None:
    status = told(Snapshot(term=0, version=-1))
    assert list(rows(status)) == []
    assert summary(status) == "m: ready, 0 requests active"


def test_workers_have_nodes_and_engines_states() -> None:
    leaving = replace(ENGINE, engine_id="engine-2", incarnation="i5", address="[fd00::7]:9")
    frozen = replace(ENGINE, engine_id="engine-3", incarnation="i6")
    entries = (
        *SNAPSHOT.engines,
        EngineEntry(info=leaving, pool="engine", ready=True, load=replace(LOAD, draining=True)),
        EngineEntry(info=frozen, pool="engine", ready=True, load=LOAD),
        EngineEntry(info=frozen, pool="engine", ready=False, load=None),
    )
    snapshot = replace(SNAPSHOT, engines=entries)
    status = told(snapshot, speaking={"i1", "i4", "i5"})
    assert [(engine["node"], engine["state"]) for engine in status["engines"]] == [
        ("10.0.0.1", "ready"),
        ("10.0.0.4", "ready"),
        ("fd00::7", "draining"),
        ("10.0.0.1", "silent"),
        ("10.0.0.1", "starting"),
    ]
    assert [one["node"] for one in (*status["encoders"], *status["preprocessors"])] == ["10.0.0.2", "10.0.0.3"]


def test_requests_are_counted_by_stage_and_place() -> None:
    def at(stage: Stage, **places: str) -> Whereabouts:
        return Whereabouts(request_id="r", alias=None, stage=stage, elapsed_s=1.0, output_tokens=0, **places)

    engines = {"prefill": "p:1", "decode": "d:1"}
    requests = [
        at(Stage.QUEUED, **engines),
        at(Stage.PREPROCESS, preprocessor="x:1"),
        at(Stage.ENCODE, encoder="e:1"),
        *[at(Stage.PREFILL, **engines)] * 2,
        at(Stage.PREFILL, prefill="p:2", decode="d:1"),
        at(Stage.TRANSFER, **engines),
        at(Stage.DECODE, **engines),
        at(Stage.FINISHED, **engines),
    ]
    assert flow(requests) == [
        {"stage": "queued", "requests": 1, "at": {}},
        {"stage": "preprocess", "requests": 1, "at": {}},
        {"stage": "encode", "requests": 1, "at": {"e:1": 1}},
        {"stage": "prefill", "requests": 3, "at": {"p:1": 2, "p:2": 1}},
        {"stage": "transfer", "requests": 1, "at": {"d:1": 1}},
        {"stage": "decode", "requests": 1, "at": {"d:1": 1}},
    ]
    thousand = flow(requests * 125)
    assert sum(entry["requests"] for entry in thousand) == 1000 and len(json.dumps(thousand)) < 1000
