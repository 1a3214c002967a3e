"""The benchmarks run and report, on models too small to say anything about speed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_model import tiny_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCENARIOS = ("decode_b1", "decode_b8", "decode_b32", "prefill_512", "image_prompt")


def run(*arguments: str) -> str:
    command = [
        sys.executable,
        str(BENCHMARKS / "engine.py"),
        "--model",
        str(tiny_checkpoint()),
        "--threads",
        "1",
        "--tokens",
        "2",
    ]
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


def expert_parallel(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(BENCHMARKS / "expert_parallel.py"),
        "--threads",
        "1",
        "--rounds",
        "1",
        "--tokens",
        "3",
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=250)


def test_groups_of_ranks_are_compared_with_one() -> None:
    done = expert_parallel("--sequences", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] is True and found["tokens_compared"] == 2 * (1 + 5) * 8
    for kind in ("prefill", "decode"):
        for side in ("ep1", "ep2"):
            row = found[kind][side]
            parts = {part: row[f"{part}_ms"] for part in ("dispatch", "experts", "combine", "rest", "plan", "gather")}
            waits = parts.pop("plan"), parts.pop("gather")
            assert all(part > 0 for part in parts.values())
            assert all(wait > 0 for wait in waits) if side == "ep2" else waits == (0, 0)
            assert max(parts.values()) < row["step_ms"]
        assert found[kind]["ratio"] > 0
    whole, share = found["load"]["ep1"]["bytes"], found["load"]["ep2"]["bytes"]
    assert share < whole < 2 * share


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, script)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec.loader.exec_module(script)
    return script


def test_transfers_are_measured_and_their_bytes_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = imported("kv_transfer", monkeypatch)
    bench_round = script._round

    async def round_with_a_slip(bench: Any, tokens: int, *, cold_first: bool) -> Any:
        made = await bench_round(bench, tokens, cold_first=cold_first)
        assert not bench.wrong_bytes
        await bench.transfer(bench.prompt(32), 31)
        return made

    monkeypatch.setattr(script, "_round", round_with_a_slip)
    options = ["--model", str(tiny_checkpoint()), "--dtype", "float32", "--threads", "1", "--rounds", "1"]
    assert script.main([*options, "--prompts", "200", "--max-batched-tokens", "64", "--json"]) == 1
    told = capsys.readouterr()
    (slip,) = told.err.strip().splitlines()
    assert "31 of which" in slip
    found = json.loads(told.out)
    row = found["prompts"]["200"]
    (made,) = row["rounds"]
    token_bytes = found["token_bytes"]
    assert [made[kind]["sent_bytes"] for kind in ("cold", "alone", "again")] == [
        tokens * token_bytes for tokens in (200, 200, 8 + 32)
    ]
    assert made["cold"]["chunks"] == 5 and 0 < row["exposed_ms"] <= row["on_way_ms"]
    assert row["hidden"] == 1 - row["exposed_ms"] / row["on_way_ms"]


def test_a_token_that_differs_fails_the_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = imported("expert_parallel", monkeypatch)

    class Side:
        """Answers like a real one, but for one token of the group."""

        def __init__(self, directory: Path, dtype: Any, threads: int, ranks: int) -> None:
            self.last = 7 if ranks == 1 else says[0]

        def run(self, work: Any) -> Any:
            return {sequence: [1, 2, self.last if sequence else 3] for sequence in range(work.sequences)}, {}

        def close(self) -> None:
            pass

    monkeypatch.setattr(script, "Side", Side)
    monkeypatch.setattr(script, "time_steps", lambda *arguments: {})
    says = [7]
    assert script.main(["--json"]) == 0
    says = [8]
    assert script.main(["--json"]) == 1
