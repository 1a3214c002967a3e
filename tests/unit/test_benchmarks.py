"""The benchmark against transformers runs and reports, on a model too small to say anything about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.tiny_model import tiny_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "engine.py"
SCENARIOS = ("decode_b1", "decode_b8", "decode_b32", "prefill_512", "image_prompt")


def run(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), "--model", str(tiny_checkpoint()), "--threads", "1", "--tokens", "2"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_compares_every_scenario() -> None:
    """In float32, where both sides must agree."""
    found = json.loads(run("--dtype", "float32", "--rounds", "1", "--json"))
    for name in SCENARIOS:
        row = found[name]
        assert row["ours"] > 0 and row["transformers"] > 0
        assert row["ratio"] == row["ours"] / row["transformers"]
    assert found["first_tokens_agree"]
    assert sum(row["same"] for row in found["first_tokens"].values()) == 1 + 8 + 32 + 1 + 1
    assert found["read_bandwidth_gb_s"] > 0
    assert set(found["roofline"]) == {"decode_b1", "decode_b8", "decode_b32"}
    one, many = found["roofline"]["decode_b1"], found["roofline"]["decode_b32"]
    assert one["experts_per_layer"] == 3, "one token hits as many experts as it chooses"
    assert 3 < many["experts_per_layer"] <= 8
    assert 0 < one["bytes_per_step"] < many["bytes_per_step"]


def test_it_profiles_our_side() -> None:
    table = run("--only", "decode_b8", "--profile")
    assert table.strip().startswith("decode_b8:")
    assert "aten::" in table and "share" in table
