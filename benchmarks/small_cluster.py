"""A whole cluster on this machine's CPUs, started and stopped as ``ernie serve`` does, for benchmarks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.builtin import locate
from cluster.config import parse, resolve
from cluster.launch import grpc_address, http_url, running_cluster
from cluster.model_check import check_model
from cluster.ports import free_ports


@contextlib.contextmanager
def small_cluster(description: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """URL of its HTTP API and address of its gRPC API. ``description``: fields of ClusterConfig; nano is served if it
    names no model. What the cluster says goes to stderr.
    """
    http_port, grpc_port = free_ports(2)
    config = locate(parse({"http_port": http_port, "grpc_port": grpc_port, **description}, "benchmark"))
    check_model(config)
    with running_cluster(resolve(config, gpus=0), lambda line: print(line, file=sys.stderr)):
        yield http_url(config), grpc_address(config)


def percentile(values: list[float], share: float) -> float:
    """The value that a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
