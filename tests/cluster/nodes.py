"""A program: several Ray nodes on this machine with one application, as several machines have after ``serve deploy``.

The head, which ``ON_HEAD`` labels, has no room for engines. ``nodes`` in the description lists the others: what
``Cluster.add_node`` takes.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

from cluster.config import parse, read_file
from cluster.processes import MARK

HEAD_CPUS = 4
ON_HEAD = {"holds": "others"}
OBJECT_STORE_BYTES = 128 << 20
JOIN_LIMIT_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--log-dir", type=Path, required=True)
    options = parser.parse_args()
    begin = time.monotonic()
    stop = threading.Event()
    folder = tempfile.mkdtemp(prefix="ernie-", dir="/tmp")
    os.environ |= {MARK: folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_worker_prestart": "0"}
    # Ray reads its settings when it is imported.
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster
    from ray.serve.config import HTTPOptions, gRPCOptions

    from cluster.app import build
    from cluster.session import APPLICATION, GRPC_SERVICERS

    values = read_file(options.config)
    nodes = values.pop("nodes")
    config = parse(values, str(options.config))
    head = {"num_cpus": HEAD_CPUS, "labels": ON_HEAD, "include_dashboard": False, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=head | {"object_store_memory": OBJECT_STORE_BYTES})
    try:
        for node in nodes:
            cluster.add_node(wait=False, object_store_memory=OBJECT_STORE_BYTES, **node)
        cluster.wait_for_nodes(JOIN_LIMIT_S)
        ray.init(address=cluster.address, namespace="ernie", log_to_driver=False, logging_level=logging.ERROR)
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=config.host, port=config.http_port),
            grpc_options=gRPCOptions(port=config.grpc_port, grpc_servicer_functions=list(GRPC_SERVICERS)),
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        serve.run(build(config), name=APPLICATION)
        print(f"Ready after {time.monotonic() - begin:.1f} s.", flush=True)
        stop.wait()
        serve.shutdown()
        ray.shutdown()
    finally:
        shutil.copytree(folder, options.log_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("sockets"))
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
