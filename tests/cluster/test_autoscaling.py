"""Pools of a real cluster follow a step of load up and down again, and no request notices."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import DEFAULTS
from tests.cluster.launcher import LaunchedCluster
from tests.cluster.test_groups import Stream, status

DELAYS = {"upscale_delay_s": 0.5, "downscale_delay_s": 2.0}
ENGINE = {"kv_cache_gib": 0.02, "max_num_seqs": 16, "num_cpus": 0.1}
CLUSTER = {
    "preprocessor": DEFAULTS["preprocessor"] | {"autoscaling": {"min_replicas": 0, "max_replicas": 2, **DELAYS}},
    "engines": [
        {"name": "prefill", "roles": {"prefill": 1}, **ENGINE},
        {
            "name": "decode",
            "roles": {"decode": 1},
            **ENGINE,
            "autoscaling": {"max_replicas": 2, "kv_use": 0.1, **DELAYS},
        },
    ],
}
STREAMS = 16
"""At once: more than a decode engine is to bear. One alone is no reason for a second one."""
LIMIT_S = 180.0


def pools(cluster: LaunchedCluster) -> dict[str, dict[str, Any]]:
    return {pool["name"]: pool for pool in status(cluster)["pools"]}


def wait_for(cluster: LaunchedCluster, what: str, holds: Callable[[dict[str, dict[str, Any]]], bool]) -> None:
    began = time.monotonic()
    while not holds(found := pools(cluster)):
        assert time.monotonic() - began < LIMIT_S, f"not {what}: {found}\n{status(cluster)['decisions']}"
        time.sleep(0.1)
    print(f"{what} after {time.monotonic() - began:.1f} s")


@pytest.mark.timeout(600)
def test_a_pool_grows_under_load_and_shrinks_behind_it_and_no_request_fails(cluster: LaunchedCluster) -> None:
    streams = [Stream(cluster, number) for number in range(STREAMS)]

    def reaches(replicas: int, load: int) -> Callable[[dict[str, dict[str, Any]]], bool]:
        """Keeps so many replies going meanwhile, on whichever engine they are."""

        def holds(found: dict[str, dict[str, Any]]) -> bool:
            going = sum(stream.is_alive() for stream in streams)
            streams.extend(Stream(cluster, len(streams)) for _ in range(load - going))
            return bool(found["decode"]["replicas"] == found["decode"]["target"] == replicas)

        return holds

    wait_for(cluster, "two decode engines", reaches(2, STREAMS))
    wait_for(cluster, "one decode engine again", reaches(1, 1))
    for stream in streams:
        stream.join()
    assert [stream.error for stream in streams] == [None] * len(streams)
    wait_for(cluster, "no preprocessor", lambda found: found["preprocessor"]["replicas"] == 0)
    assert httpx.get(f"{cluster.http_url}/ready", timeout=10).status_code == 200
    woken = Stream(cluster, 0)
    woken.join()
    assert woken.error is None and woken.token_ids == streams[0].token_ids
    told = [f"{one['subject']} {one['change']}" for one in status(cluster)["decisions"] if one["kind"] == "scale"]
    of_decode = [one for one in told if one.startswith("decode")]
    assert of_decode[0] == "decode 1 -> 2" and of_decode[-1] == "decode 2 -> 1"
    assert "preprocessor 1 -> 0" in told and told[-1] == "preprocessor 0 -> 1"
    shown = cluster.command("status", "--url", cluster.http_url)
    assert "0 to 2" in shown and "preprocessor 0 -> 1: a request came" in shown
