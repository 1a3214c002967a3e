"""``ernie demo`` as people run it: nano on a cluster of four places, from start to end."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import psutil

from cluster.demo import SEEDS, made_samples
from tests.cluster.conftest import Clusters
from tests.cluster.launcher import ROOT

LIMIT_S = 280.0
MARK = "ERNIE_TEST_DEMO"


def test_the_demo_asks_everything_and_leaves_nothing(clusters: Clusters, tmp_path: Path) -> None:
    clusters.stop()
    mark = secrets.token_hex(8)
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "demo", "--save", str(tmp_path / "kept")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            MARK: mark,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")]),
            # Ray would kill actors whenever anybody fills the machine's memory.
            "RAY_memory_monitor_refresh_ms": "0",
        },
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nano from" in done.stdout and "1 prefill + 1 decode" in done.stdout
    for sample in made_samples().values():
        assert f"Q: {sample.question.text}" in done.stdout
        assert f"A: {sample.question.answer}   (truth: {sample.question.answer})" in done.stdout
    assert {file.stem for file in (tmp_path / "kept").iterdir()} == SEEDS.keys()
    left = [process.pid for process in psutil.process_iter() if _environment(process).get(MARK) == mark]
    assert not left


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
