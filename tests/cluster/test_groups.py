"""Engine groups on several nodes: where their ranks lie, that they compute what one rank does, and how they end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Set
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics.definitions import METRICS, Source
from tests.cluster.conftest import DEFAULTS, Clusters
from tests.cluster.launcher import LaunchedCluster
from tests.cluster.nodes import ON_HEAD
from tests.tiny_model import tiny_checkpoint

ENGINE = {"roles": {"prefill": 1, "decode": 1}, "kv_cache_gib": 0.02, "max_num_seqs": 16, "rebalance_steps": 20}
ON_ENGINE_NODES = {"expert_parallel": 2, "node_labels": {"holds": "engines"}}
PACKED = ENGINE | ON_ENGINE_NODES | {"name": "packed", "placement": "strict_pack"}
SPREAD = ENGINE | ON_ENGINE_NODES | {"name": "spread", "placement": "strict_spread", "roles": {"colocated": 1}}
NODES = [{"num_cpus": 3, "labels": {"holds": "engines"}}] * 3
STREAMS = 8
TOKENS = 120
REPLACED_LIMIT_S = 120.0


@pytest.fixture(scope="module")
def groups(clusters: Clusters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedCluster]:
    """Three groups of two ranks on three nodes: two that prefill and decode for each other, and one that does both."""
    clusters.stop()
    config = DEFAULTS | {
        "model": str(tiny_checkpoint()),
        "router": {"alone_tokens": 0, "node_labels": ON_HEAD},
        # Anywhere else they could leave no node with room for a packed group.
        **{name: DEFAULTS[name] | {"node_labels": ON_HEAD} for name in ("preprocessor", "vision_encoder")},
        "engines": [PACKED, SPREAD],
        "nodes": NODES,
    }
    cluster = LaunchedCluster(tmp_path_factory.mktemp("groups"), config, ("-m", "tests.cluster.nodes"))
    try:
        cluster.wait_ready()
        wait_for_engines(cluster)
        yield cluster
        cluster.stop()
    finally:
        cluster.kill()


def status(cluster: LaunchedCluster, **params: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{cluster.http_url}/status", params=params, timeout=30).json()
    return found


def wait_for_engines(cluster: LaunchedCluster, *, other_than: Set[str] = frozenset()) -> set[str]:
    """The ids of three engines that are ready, other ones than these three."""
    deadline = time.monotonic() + REPLACED_LIMIT_S
    while True:
        ids = {engine["id"] for engine in status(cluster)["engines"] if engine["ready"]}
        if len(ids) == 3 and ids != other_than:
            return ids
        assert time.monotonic() < deadline, f"engines {ids} after {REPLACED_LIMIT_S} s\n{cluster.output}"
        time.sleep(0.1)


def nodes_of_groups(cluster: LaunchedCluster) -> dict[str, list[tuple[str, ...]]]:
    """By pool, the node of each rank of each group that exists."""
    from ray.util import placement_group_table

    found: dict[str, list[tuple[str, ...]]] = {}
    for group in placement_group_table().values():
        if group["state"] != "REMOVED":
            pool = next(pool for pool in ("packed", "spread") if f"#{pool}#" in group["name"])
            nodes = group["bundles_to_node_id"]
            found.setdefault(pool, []).append(tuple(nodes[rank] for rank in sorted(nodes)))
    return found


class Stream(threading.Thread):
    """One streamed reply."""

    def __init__(self, cluster: LaunchedCluster, number: int) -> None:
        super().__init__(daemon=True)
        self._url = f"{cluster.http_url}/v1/chat/completions"
        content = f"Tell me about the number {number}."
        self._body = {
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            "temperature": 0.8,
            "seed": number,
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "return_token_ids": True,
            "cache_salt": secrets.token_hex(4),  # So that load alone chooses the engine.
        }
        self.began = threading.Event()
        self.token_ids: list[int] = []
        self.error: Any = None
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    self.error = chunk.get("error")
                    for choice in chunk.get("choices", ()):
                        self.token_ids += choice.get("token_ids") or ()
                    if self.token_ids:
                        self.began.set()


def replies(cluster: LaunchedCluster) -> list[list[int]]:
    streams = [Stream(cluster, number) for number in range(STREAMS)]
    for stream in streams:
        stream.join()
        assert stream.error is None and len(stream.token_ids) == TOKENS
    return [stream.token_ids for stream in streams]


@pytest.fixture(scope="module")
def known(groups: LaunchedCluster) -> list[list[int]]:
    """What the streams say when nothing happens."""
    return replies(groups)


def test_ranks_lie_where_their_pool_wants_them(groups: LaunchedCluster) -> None:
    with groups.connected():
        import ray

        engine_nodes = {node["NodeID"] for node in ray.nodes() if node["Labels"].get("holds") == "engines"}
        found = nodes_of_groups(groups)
    assert len(engine_nodes) == 3
    assert engine_nodes.issuperset(node for pool in found.values() for group in pool for node in group)
    (first, second), (spread,) = found["packed"], found["spread"]
    assert len(set(first)) == len(set(second)) == 1, "each packed group is on one node"
    assert set(first) != set(second), "and the groups are on different ones"
    assert len(set(spread)) == 2


def test_experts_move_and_nothing_is_heard_of_it(known: list[list[int]], groups: LaunchedCluster) -> None:
    """Groups of ranks on one node and on two say the same, before their experts moved and behind."""
    assert replies(groups) == known
    reports = [engine["group"] for engine in status(groups)["engines"]]
    assert [report["ranks"] for report in reports] == [2, 2, 2]
    assert sum(report["loads"] for report in reports) > 0
    assert sum(report["moved_experts"] for report in reports) > 0
    assert "ranks, skew" in groups.command("status", "--url", groups.http_url)


def test_metrics_show_the_load_of_experts(groups: LaunchedCluster) -> None:
    """On the router's page all there is to say of groups, and some of it, to be sure, at the agents of Ray."""
    page = httpx.get(f"{groups.http_url}/metrics", timeout=10).text
    told = {family.name: family.samples for family in text_string_to_metric_families(page)}
    wanted = {name.removesuffix("_total") for name, metric in METRICS.items() if metric.source is Source.GROUP}
    assert {name: len({sample.labels["worker"] for sample in told[name]}) for name in wanted} == dict.fromkeys(
        wanted, 3
    )
    with groups.connected():
        import ray

        ports = {node["MetricsExportPort"] for node in ray.nodes()}
        address = ray.util.get_node_ip_address()
    deadline = time.monotonic() + 60
    wanted = {"ray_ernie_expert_load_skew", "ray_ernie_experts_moved_total", "ray_ernie_group_step_seconds_total"}
    while wanted:
        text = "".join(httpx.get(f"http://{address}:{port}/metrics", timeout=10).text for port in ports)
        wanted = {name for name in wanted if f"\n{name}{{" not in text}
        assert time.monotonic() < deadline, f"no metrics {wanted}"
        time.sleep(0.5)
    line = next(line for line in text.splitlines() if line.startswith("ray_ernie_expert_load_skew{"))
    assert 'bank="' in line and 'deployment="' in line and float(line.rpartition(" ")[2]) >= 1


@pytest.mark.parametrize("victim", ["EngineRank.run", "ServeReplica:ernie:packed"])
def test_a_lost_process_ends_its_group_alone(victim: str, groups: LaunchedCluster, known: list[list[int]]) -> None:
    """A rank or a leader is killed under load: no stream says anything else, and a new group comes."""
    with groups.connected():
        before = nodes_of_groups(groups)
    streams = [Stream(groups, number) for number in range(STREAMS)]
    assert all(stream.began.wait(60) for stream in streams)
    audits = status(groups, audit="true")["audits"]
    engines = wait_for_engines(groups)
    prefills = {engine["id"] for engine in status(groups)["engines"] if engine["role"] == "prefill"}
    os.kill(next(pid for pid, command in groups.processes().items() if victim in command), signal.SIGKILL)
    killed = time.monotonic()
    for stream in streams:
        stream.join()
    assert [stream.error for stream in streams] == [None] * STREAMS
    assert [stream.token_ids for stream in streams] == known
    (lost,) = engines - wait_for_engines(groups, other_than=engines)
    print(f"replaced after {time.monotonic() - killed:.1f} s")
    attempts = {engine: audits[f"engine {engine}"]["held"]["attempts"] for engine in engines if engine not in prefills}
    assert all(attempts.values()) and sum(attempts.values()) >= STREAMS, f"{attempts}, and {lost} was lost"
    assert replies(groups) == known
    with groups.connected():
        after = nodes_of_groups(groups)
    assert {pool: len(found) for pool, found in after.items()} == {pool: len(found) for pool, found in before.items()}
    ranks = [command for command in groups.processes().values() if "EngineRank.run" in command]
    assert len(ranks) == 3
