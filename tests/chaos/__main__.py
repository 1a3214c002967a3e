"""``make chaos TRIALS=500 SEED=1``: starts a cluster, hits it, tells what became of the requests."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys
import tempfile
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from tests.chaos.calls import calls, expected
from tests.chaos.mutants import MUTANTS, mutated
from tests.chaos.plan import plan
from tests.chaos.run import CLUSTER, Chaos, passed, summary, table
from tests.cluster.launcher import LaunchedCluster
from tests.tiny_model import tiny_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=3, help="requests under each fault")
    parser.add_argument("--tokens", type=int, default=160, help="of each reply")
    parser.add_argument("--mutant", choices=[*MUTANTS, ""], default="", help="break the router: the run must then fail")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cluster must not outlive this
    known = asyncio.run(expected(calls(options.tokens)))
    trials = plan(options.trials, options.seed, len(known), options.at_once)
    with tempfile.TemporaryDirectory(prefix="ernie-chaos-") as folder, mutated(options.mutant):
        config = {"model": str(tiny_checkpoint()), "dtype": "float64", "served_model_name": "tiny", **CLUSTER}
        cluster = LaunchedCluster(Path(folder), config)
        try:
            cluster.wait_ready()
            outcomes = asyncio.run(Chaos(cluster, known, lambda line: print(line, flush=True)).run(trials))
            cluster.stop()
        except BaseException:
            cluster.kill()
            raise
    print(*table(outcomes), summary(outcomes), sep="\n")
    return 0 if passed(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
