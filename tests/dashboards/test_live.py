"""Every panel and every alert, asked of a real Prometheus that watched a cluster under load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.cluster.launcher import LaunchedCluster
from tests.dashboards.answers import JOB, Answers
from tests.dashboards.load import Load
from tests.dashboards.panels import ALERTS
from tests.prometheus import prometheus
from tests.tiny_model import tiny_checkpoint

os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

CLUSTER: dict[str, Any] = {
    "dtype": "float64",
    "served_model_name": "tiny",
    "max_model_len": 4096,
    "drain_timeout_s": 10.0,
    "router": {"max_active": 12, "alone_tokens": 0},
    "slo": {"ttft_s": 0.5, "tpot_s": 0.02},
    "engines": [
        {
            "name": "single",
            "roles": {"prefill": 1, "decode": 2},
            "kv_cache_gib": 0.02,
            "max_num_seqs": 16,
            "autoscaling": {"min_replicas": 3, "max_replicas": 4, "kv_use": 0.001, "upscale_delay_s": 0.0},
        },
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
"""Engines that pass KV on, which become one more as soon as any KV is used, and one of several ranks: without those
there is nothing to say of experts.
"""
CALM_S = 8.0
LOAD_S = 14.0
LOSS_LIMIT_S = 120.0


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    """A cluster that was asked for what it can and cannot do, one engine of which changed its role and was lost."""
    folder = tmp_path_factory.mktemp("dashboards")
    cluster = LaunchedCluster(folder, {"model": str(tiny_checkpoint()), **CLUSTER})
    try:
        cluster.wait_ready()
        wait_for_engines(cluster, 4)
        with prometheus(folder, scrapes(cluster), [ALERTS]) as found:
            start = time.time()
            asyncio.run(hard_times(cluster))
            yield Answers(found, start, time.time())
        cluster.stop()
    finally:
        cluster.kill()


def scrapes(cluster: LaunchedCluster) -> list[dict[str, Any]]:
    """As in deploy/dashboards/prometheus.yml: the cluster's page, and what Ray's nodes export. ``ernie serve`` runs Ray
    without its dashboard, which would write where that is into a file.
    """
    import ray

    with cluster.connected():
        nodes = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    return [
        {"job_name": JOB, "static_configs": [{"targets": [cluster.http_url.removeprefix("http://")]}]},
        {"job_name": "ray", "static_configs": [{"targets": nodes}]},
    ]


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
    await asyncio.to_thread(wait_for_engines, cluster, 5)
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


def test_no_panel_is_empty(watched: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    empty, still = watched.unanswered()
    with capsys.disabled():
        print("", "always 0:", *sorted(still), sep="\n  ")
    assert empty == set()


def test_every_series_that_is_asked_for_was_scraped(watched: Answers) -> None:
    assert watched.never_scraped() == set()


def test_every_alert_is_evaluated(watched: Answers) -> None:
    assert watched.broken_rules() == []


def test_the_nodes_export_too(watched: Answers) -> None:
    jobs = {target["labels"]["job"] for target in watched.prometheus.targets() if target["health"] == "up"}
    assert jobs == {JOB, "ray"}
    assert watched.prometheus.instant('ray_ernie_engine_role{job="ray"}')
