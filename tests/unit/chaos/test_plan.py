"""What a chaos run does and how it judges what it saw."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from actors.types import Stage
from ernie_serving.v1 import inference_pb2
from tests.chaos.calls import Expected
from tests.chaos.plan import OWN_STAGE, STAGES, Fault, Victim, plan
from tests.chaos.run import Outcome, Reply, passed, summary, table

EXPECTED = Expected("greedy", inference_pb2.GenerateRequest(), (1, 2, 3))


def test_a_seed_says_all_and_cells_come_equally_often() -> None:
    trials = plan(500, 1, call_count=6, at_once=3)
    assert trials == plan(500, 1, call_count=6, at_once=3) != plan(500, 2, call_count=6, at_once=3)
    counts = Counter((trial.victim, trial.stage) for trial in trials)
    assert set(counts) == {(victim, stage) for victim in Victim for stage in STAGES}
    assert min(counts.values()) >= 18 and max(counts.values()) <= 21
    assert Counter(trial.fault for trial in trials).most_common()[-1][1] > 240
    assert len({trial.salt for trial in trials}) == 500


@pytest.mark.parametrize("seed", range(5))
def test_the_first_trials_hit_every_kind(seed: int) -> None:
    trials = plan(len(Victim), seed, call_count=6, at_once=3)
    assert {(trial.victim, trial.stage) for trial in trials} == set(OWN_STAGE.items())


def outcome(*replies: Reply, fault: Fault = Fault.KILL, pause_s: float = 0.5) -> Outcome:
    trial = replace(plan(1, 1, 1, 1)[0], victim=Victim.DECODE, stage=Stage.DECODE, fault=fault)
    return Outcome(trial=trial, replies=list(replies), landed=True, pause_s=pause_s)


@pytest.mark.parametrize(
    ("tokens", "error", "counts"),
    [
        ([1, 2, 3], "", (0, 0, 0)),
        ([1, 2, 3, 3], "", (0, 1, 0)),
        ([1, 2], "", (0, 0, 1)),
        ([1, 3, 3], "", (0, 0, 1)),
        ([1], "UNAVAILABLE", (1, 0, 0)),
    ],
)
def test_verdicts(tokens: list[int], error: str, counts: tuple[int, int, int]) -> None:
    found = [outcome(Reply(EXPECTED, tokens=tokens, error=error)), outcome(fault=Fault.FREEZE, pause_s=4.21)]
    failed, duplicated, missing = counts
    assert summary(found) == (
        f"chaos: 2 trials, {failed} failed, {duplicated} duplicated, {missing} missing, "
        "pause p99 kill 0.5 s freeze 4.2 s"
    )
    assert passed(found) is (counts == (0, 0, 0))
    assert table(found)[1 + list(Victim).index(Victim.DECODE)].split() == ["decode", "1+1"]


def test_a_pause_is_the_longest_time_that_was_not_over_when_the_fault_fell() -> None:
    reply = Reply(EXPECTED, times=[1.0, 5.0, 5.5, 8.0, 8.1])
    assert reply.pause_s(5.2) == 2.5
    assert reply.pause_s(4.0) == 4.0
    assert reply.pause_s(8.05) == pytest.approx(0.1)
    assert reply.pause_s(9.0) == 0.0
    assert Reply(EXPECTED, times=[7.0]).pause_s(5.0) == 2.0
