"""One real cluster at a time, shared by all modules that want the same one.

A module says what it wants by ``CLUSTER = {...}``: fields of ClusterConfig over the defaults below. Its tests get it as
``cluster``. The last cluster is stopped at the end, and whenever another one is wanted; nothing of it may remain.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.launcher import LaunchedCluster
from tests.tiny_model import tiny_checkpoint

# One token for all clusters and for this process, which may connect to them; read by Ray when it is imported.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

HERE = Path(__file__).parent

DEFAULTS: dict[str, Any] = {
    "dtype": "float64",
    "served_model_name": "tiny",
    "drain_timeout_s": 20.0,
    "engines": [{"roles": {"prefill": 1, "decode": 1}, "kv_cache_gib": 0.05, "max_num_seqs": 16}],
    "vision_encoder": {"embedding_bytes": 64 << 20, "cache_bytes": 32 << 20},
    "preprocessor": {"patch_bytes": 128 << 20},
}


class Clusters:
    """Keeps the cluster in use."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._wanted = ""
        self._running: LaunchedCluster | None = None

    def get(self, wanted: dict[str, Any]) -> LaunchedCluster:
        key = json.dumps(wanted, sort_keys=True)
        if self._running is not None and key == self._wanted:
            return self._running
        self.stop()
        cluster = LaunchedCluster(self._folders.mktemp("cluster"), wanted)
        try:
            cluster.wait_ready()
        except BaseException:
            cluster.kill()
            raise
        self._wanted, self._running = key, cluster
        return cluster

    def stop(self) -> None:
        cluster, self._running = self._running, None
        if cluster is not None:
            try:
                cluster.stop()
            except BaseException:
                cluster.kill()
                raise


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    clusters = Clusters(tmp_path_factory)
    yield clusters
    clusters.stop()


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, clusters: Clusters) -> LaunchedCluster:
    """The module's cluster; unless it says otherwise with one preprocessor, encoder, prefill and decode engine."""
    wanted: dict[str, Any] = DEFAULTS | getattr(request.module, "CLUSTER", {})
    return clusters.get({"model": str(tiny_checkpoint()), **wanted})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("ray")
