"""Every panel and every alert, asked of a real Prometheus that watched a cluster under load."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from deploy.dashboards import promql
from tests.cluster.launcher import LaunchedCluster
from tests.dashboards.load import Load
from tests.dashboards.panels import ALERTS, Asked, alerts, asked_by_annotations, asked_by_panels
from tests.prometheus import Prometheus, prometheus
from tests.tiny_model import tiny_checkpoint

os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

CLUSTER: dict[str, Any] = {
    "dtype": "float64",
    "served_model_name": "tiny",
    "max_model_len": 4096,
    "drain_timeout_s": 10.0,
    "router": {"max_active": 12},
    "slo": {"ttft_s": 0.5, "tpot_s": 0.02},
    "engines": [
        {"name": "single", "roles": {"prefill": 1, "decode": 2}, "kv_cache_gib": 0.02, "max_num_seqs": 16},
        {
            "name": "group",
            "roles": {"colocated": 1},
            "expert_parallel": 2,
            "kv_cache_gib": 0.02,
            "max_num_seqs": 16,
            "rebalance_steps": 20,
        },
    ],
    "vision_encoder": {"embedding_bytes": 64 << 20, "cache_bytes": 32 << 20},
    "preprocessor": {"patch_bytes": 128 << 20},
}
"""Engines that pass KV on, and one of several ranks: without those there is nothing to say of experts."""
CALM_S = 8.0
LOAD_S = 14.0
LOSS_LIMIT_S = 120.0
RATE_S = 10
"""What panels that show rates look back, at a scrape a second."""
STILL: frozenset[str] = frozenset()
"""Panels whose values stay 0 here; the series are there."""


@dataclass(frozen=True)
class Watched:
    """What was watched. ``start``, ``end``: of the load."""

    prometheus: Prometheus
    start: float
    end: float


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A cluster that was asked for what it can and cannot do, one engine of which changed its role and was lost."""
    folder = tmp_path_factory.mktemp("dashboards")
    cluster = LaunchedCluster(folder, {"model": str(tiny_checkpoint()), **CLUSTER})
    try:
        cluster.wait_ready()
        wait_for_engines(cluster, 4)
        with prometheus(folder, scrapes(cluster), [ALERTS]) as found:
            start = time.time()
            asyncio.run(hard_times(cluster))
            yield Watched(found, start, time.time())
        cluster.stop()
    finally:
        cluster.kill()


def scrapes(cluster: LaunchedCluster) -> list[dict[str, Any]]:
    return [{"job_name": "ernie", "static_configs": [{"targets": [cluster.http_url.removeprefix("http://")]}]}]


async def hard_times(cluster: LaunchedCluster) -> None:
    load = Load(cluster.http_url)
    await load.run(CALM_S)
    mover = next(engine for engine in status(cluster)["engines"] if engine["role"] == "decode")
    moving = asyncio.create_task(
        asyncio.to_thread(cluster.command, "role", mover["id"], "prefill", "--url", cluster.http_url)
    )
    await load.run(LOAD_S)
    await moving
    await load.burst(24)
    loaded = asyncio.create_task(load.run(LOAD_S))
    await asyncio.sleep(2.0)
    victim = next(engine for engine in status(cluster)["engines"] if engine["role"] == "prefill")
    kill_engine(cluster, victim["address"])
    await loaded
    await asyncio.to_thread(wait_for_engines, cluster, 4)
    await load.run(CALM_S)
    print(dict(load.ended))


def status(cluster: LaunchedCluster) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{cluster.http_url}/status", timeout=30).json()
    return found


def wait_for_engines(cluster: LaunchedCluster, count: int) -> None:
    deadline = time.monotonic() + LOSS_LIMIT_S
    while sum(engine["ready"] for engine in status(cluster)["engines"]) != count:
        assert time.monotonic() < deadline, status(cluster)["engines"]
        time.sleep(0.2)


def kill_engine(cluster: LaunchedCluster, address: str) -> None:
    """The process that listens there."""
    port = int(address.rpartition(":")[2])
    for pid in cluster.processes():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            ports = {c.laddr.port for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN}
            if port in ports:
                process.send_signal(signal.SIGKILL)
                return
    raise AssertionError(f"nobody listens at {address}")


def filled(expr: str) -> str:
    """As Grafana would, with its variables set."""
    values = {"$job": "ernie", "$__rate_interval": f"{RATE_S}s", "$__interval": "1s"}
    return promql.filled(expr, values)


def values(watched: Watched, asked: Asked) -> list[float]:
    """All values of the result, over the time of the load."""
    found = watched.prometheus.ranged(filled(asked.expr), watched.start, watched.end)
    return [number for series in found for _, text in series["values"] if math.isfinite(number := float(text))]


def test_no_panel_is_empty(watched: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    found = {asked: values(watched, asked) for asked in (*asked_by_panels(), *asked_by_annotations())}
    still = {f"{asked}" for asked, numbers in found.items() if numbers and not any(numbers)}
    with capsys.disabled():
        print(f"\n{len(found)} queries of panels and annotations; always 0:", *sorted(still), sep="\n  ")
    assert not [str(asked) for asked, numbers in found.items() if not numbers]
    assert still <= STILL


def test_every_series_that_is_asked_for_was_scraped(watched: Watched) -> None:
    exprs = [asked.expr for asked in (*asked_by_panels(), *asked_by_annotations())]
    names = {name for expr in [*exprs, *(alert["expr"] for alert in alerts())] for name in promql.reads(expr)}
    there = {series["metric"]["__name__"] for series in watched.prometheus.instant('{job="ernie"}')}
    assert names - there == set()


def test_every_alert_is_evaluated(watched: Watched) -> None:
    rules = {rule["name"]: rule for rule in watched.prometheus.rules()}
    assert rules.keys() == {alert["alert"] for alert in alerts()}
    for rule in rules.values():
        assert rule["health"] == "ok" and "lastError" not in rule, rule
