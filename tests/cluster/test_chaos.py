"""A short chaos run: every kind of part is hit once under running requests, and one engine changes its role. ``make
chaos`` runs as many trials as you like."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from cluster.client import AsyncClient
from tests.chaos.calls import calls, expected
from tests.chaos.plan import FIRST, plan
from tests.chaos.report import passed, summary
from tests.chaos.run import CLUSTER as TWO_OF_EACH
from tests.chaos.run import Chaos
from tests.chaos.victims import Processes
from tests.cluster.launcher import LaunchedCluster

CLUSTER = TWO_OF_EACH
SEED = 120
LONG = 1200


async def test_replies_stay_the_same_whatever_dies_or_freezes(
    cluster: LaunchedCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    known = await expected(calls(120))
    lines: list[str] = []
    outcomes = await Chaos(cluster, known, lines.append).run(plan(FIRST, SEED, len(known), at_once=3))
    report = "\n".join([*lines, summary(outcomes)])
    with capsys.disabled():
        print(f"\n{report}")
    assert passed(outcomes), report
    assert sum(outcome.landed for outcome in outcomes) >= len(outcomes) - 1, report


async def test_an_engine_that_serve_stops_hands_its_replies_over(cluster: LaunchedCluster) -> None:
    """As when a pool is scaled down or updated: they are longer than the drain timeout."""
    (reply,) = await expected({"sampled": calls(LONG)["sampled"]})
    async with (
        AsyncClient(cluster.grpc_address, retries=0) as client,
        httpx.AsyncClient(base_url=cluster.http_url, timeout=10) as http,
    ):
        processes = Processes(cluster, http)
        await processes.wait_whole()
        stream = client.stream_generate(reply.request, timeout_s=120)
        tokens: list[int] = []
        while len(tokens) < 5:
            tokens += (await anext(stream)).delta.token_ids
        status = await processes.status()
        (where,) = status["requests"]
        (name,) = (engine["id"] for engine in status["engines"] if engine["address"] == where["decode"])
        stopping = asyncio.create_task(asyncio.to_thread(stop_replica, cluster, name))
        async for event in stream:
            tokens += event.delta.token_ids
            now: list[dict[str, Any]] = (await processes.status())["requests"]
            if now and now[0]["decode"] not in (None, where["decode"]):
                break
        else:
            raise AssertionError("it finished where it was")
        async for event in stream:
            tokens += event.delta.token_ids
        await stopping
        assert tokens == list(reply.tokens)
        await processes.wait_whole()
    await asyncio.to_thread(cluster.wait_clean, 10.0)


def stop_replica(cluster: LaunchedCluster, engine_id: str) -> None:
    """What Serve's controller does to a replica it takes away."""
    import ray

    pool, _, replica = engine_id.partition("-")
    with cluster.connected():
        actor = ray.get_actor(f"SERVE_REPLICA::ernie#{pool}#{replica}", namespace="serve")
        ray.get(actor.perform_graceful_shutdown.remote(), timeout=30)
        ray.kill(actor, no_restart=False)
