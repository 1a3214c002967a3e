"""Clusters side by side on one machine, and what every way to end leaves behind: nothing."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from ernie_serving.v1 import inference_pb2, inference_pb2_grpc
from tests.cluster.conftest import DEFAULTS, Clusters
from tests.cluster.launcher import LaunchedCluster
from tests.tiny_model import tiny_checkpoint


@pytest.fixture
def launch(tmp_path: Path, clusters: Clusters) -> Iterator[Any]:
    """Starts a cluster named after its model; kills what a test leaves running."""
    clusters.stop()
    launched: list[LaunchedCluster] = []

    def start(name: str, **changes: Any) -> LaunchedCluster:
        folder = tmp_path / name
        folder.mkdir()
        config = DEFAULTS | {"model": str(tiny_checkpoint()), "served_model_name": name} | changes
        launched.append(LaunchedCluster(folder, config))
        return launched[-1]

    yield start
    for cluster in launched:
        cluster.kill()


def models(cluster: LaunchedCluster) -> set[str]:
    """Names told over HTTP and over gRPC, each asked on several connections."""
    names = set()
    for _ in range(5):
        names.add(httpx.get(f"{cluster.http_url}/v1/models", timeout=10).json()["data"][0]["id"])
        with grpc.insecure_channel(cluster.grpc_address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            names |= {model.name for model in stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10).models}
    return names


def ask(cluster: LaunchedCluster, tokens: int, first: threading.Event, chunks: list[dict[str, Any]]) -> None:
    body = {
        "messages": [{"role": "user", "content": "Count."}],
        "stream": True,
        "max_tokens": tokens,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with httpx.stream("POST", f"{cluster.http_url}/v1/chat/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: ")))
                first.set()


def test_two_clusters_do_not_meet_and_leave_nothing(launch: Any) -> None:
    north, south = launch("north"), launch("south")
    north.wait_ready()
    south.wait_ready()
    assert models(north) == {"north"}
    assert models(south) == {"south"}

    session = north.session
    north.signal(signal.SIGKILL)
    north.wait_ended()
    north.assert_nothing_left(session, within_s=10.0)
    assert models(south) == {"south"}

    # SIGTERM: the running answer is finished, then everything ends.
    first, chunks = threading.Event(), list[dict[str, Any]]()
    reader = threading.Thread(target=ask, args=(south, 400, first, chunks))
    reader.start()
    assert first.wait(30)
    south.stop()
    reader.join(30)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert sum(len(chunk["choices"][0]["token_ids"]) for chunk in chunks) == 400


def test_a_second_signal_ends_everything_at_once(launch: Any) -> None:
    cluster = launch("hasty")
    cluster.wait_ready()
    session = cluster.session
    first = threading.Event()

    def ask_in_vain() -> None:
        with pytest.raises(httpx.HTTPError):
            ask(cluster, 900, first, [])

    reader = threading.Thread(target=ask_in_vain)
    reader.start()
    assert first.wait(30)
    cluster.signal(signal.SIGINT)
    cluster.wait_output("Stopping")
    cluster.signal(signal.SIGINT)
    assert cluster.wait_ended() == 128 + signal.SIGINT
    cluster.assert_nothing_left(session, within_s=10.0)
    reader.join(30)
    assert not reader.is_alive()


def test_a_signal_while_starting_ends_it(launch: Any) -> None:
    cluster = launch("brief")
    cluster.wait_output("planner")
    session = cluster.session
    cluster.signal(signal.SIGTERM)
    assert cluster.wait_ended() == 130
    cluster.assert_nothing_left(session, within_s=10.0)


def test_a_replica_that_cannot_start_ends_the_command(launch: Any) -> None:
    engines = [{"name": "narrow", "roles": {"prefill": 1, "decode": 1}, "kv_cache_gib": 1e-9}]
    cluster = launch("narrow", engines=engines)
    assert cluster.wait_ended() == 1
    assert "\nnarrow does not start: ValueError: " in cluster.output
    assert "Traceback" not in cluster.output
    cluster.assert_nothing_left(None, within_s=0.0)


def test_a_port_in_use_is_told(launch: Any, tmp_path: Path) -> None:
    import socket

    cluster = launch("blocked")
    # The ports were free a moment ago; take one before the command gets to look.
    with socket.create_server(("127.0.0.1", cluster.ports[0])):
        assert cluster.wait_ended() == 1
    assert f"http_port: cannot listen on 127.0.0.1:{cluster.ports[0]}" in cluster.output
    cluster.assert_nothing_left(None, within_s=5.0)


def test_status_tells_of_every_pool(cluster: LaunchedCluster) -> None:
    status = httpx.get(f"{cluster.http_url}/status", timeout=10).json()
    assert status["ready"] and status["missing"] is None
    assert sorted(engine["role"] for engine in status["engines"]) == ["decode", "prefill"]
    assert all(engine["ready"] for engine in status["engines"])
    assert len(status["encoders"]) == 1


def test_a_second_driver_reaches_the_deployments(cluster: LaunchedCluster) -> None:
    with cluster.connected():
        from ray import serve

        handle = serve.get_deployment_handle("router", "ernie")
        assert handle.status.remote().result(timeout_s=10)["ready"]
