"""``make chaos TRIALS=500 SEED=1``: starts a cluster, hits it, tells what became of the requests."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
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
from tests.chaos.report import Outcome, passed, read_pieces, summary, table
from tests.chaos.run import CLUSTER, Chaos
from tests.cluster.launcher import LaunchedCluster
from tests.tiny_model import tiny_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial: a plan can be run in pieces")
    parser.add_argument("--within-s", type=float, default=float("inf"), help="begin no trial after so many seconds")
    parser.add_argument("--at-once", type=int, default=3, help="requests under each fault, beside one that comes late")
    parser.add_argument("--tokens", type=int, default=160, help="of each reply")
    parser.add_argument("--mutant", choices=[*MUTANTS, ""], default="", help="break the router: the run must then fail")
    parser.add_argument("--json", type=Path, help="write a line about each trial to this file")
    parser.add_argument("--log-dir", type=Path, help="keep the cluster's logs here")
    parser.add_argument("--sum", type=Path, nargs="+", metavar="JSON", help="run nothing: add up such files")
    options = parser.parse_args()
    outcomes = _run(options) if options.sum is None else read_pieces(options.sum)
    print(*table(outcomes), summary(outcomes), sep="\n")
    return 0 if passed(outcomes) else 1


def _run(options: argparse.Namespace) -> list[Outcome]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cluster must not outlive this
    known = asyncio.run(expected(calls(options.tokens)))
    trials = plan(options.trials, options.seed, len(known), options.at_once, first=options.first)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ernie-chaos-"))
        stack.enter_context(mutated(options.mutant))
        kept = None if options.json is None else stack.enter_context(options.json.open("w"))

        def keep(outcome: Outcome) -> None:
            if kept is not None:
                print(outcome.to_json(), file=kept, flush=True)

        config = {"model": str(tiny_checkpoint()), "dtype": "float64", "served_model_name": "tiny", **CLUSTER}
        cluster = LaunchedCluster(Path(folder), config, log_dir=options.log_dir)
        try:
            cluster.wait_ready()
            chaos = Chaos(cluster, known, lambda line: print(line, flush=True), keep)
            mutant = bool(options.mutant)  # which may leave anything behind once it was seen
            outcomes = asyncio.run(chaos.run(trials, within_s=options.within_s, until_failure=mutant))
            (cluster.stop if passed(outcomes) or not mutant else cluster.kill)()
        except BaseException:
            cluster.kill()
            raise
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
