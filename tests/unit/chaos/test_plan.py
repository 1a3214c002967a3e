"""What a chaos run does and how it judges what it saw."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from actors.types import Stage
from ernie_serving.v1 import inference_pb2
from tests.chaos.calls import Expected
from tests.chaos.plan import FIRST, OWN_STAGE, STAGES, Fault, Trial, Victim, plan
from tests.chaos.report import Outcome, passed, read_pieces, summary, table
from tests.chaos.run import Hit, Reply, outcome_of

EXPECTED = Expected("greedy", inference_pb2.GenerateRequest(), (1, 2, 3))


def test_a_seed_says_all_and_cells_come_equally_often() -> None:
    trials = plan(500, 1, call_count=6, at_once=3)
    assert trials == plan(500, 1, call_count=6, at_once=3) != plan(500, 2, call_count=6, at_once=3)
    counts = Counter((trial.victim, trial.stage) for trial in trials if trial.fault is not Fault.SWITCH)
    assert set(counts) == {(victim, stage) for victim in Victim for stage in STAGES}
    assert min(counts.values()) >= 12 and max(counts.values()) <= 18
    faults = Counter(trial.fault for trial in trials)
    assert set(faults) == set(Fault) and abs(faults[Fault.KILL] - faults[Fault.FREEZE]) < 20
    assert len({trial.salt for trial in trials}) == 500


def test_pieces_of_a_plan_are_the_plan() -> None:
    whole = plan(200, 7, call_count=6, at_once=3)
    pieces = [plan(50, 7, call_count=6, at_once=3, first=first) for first in range(0, 200, 50)]
    assert [trial for piece in pieces for trial in piece] == whole


def test_few_trials_follow_one_that_hit_the_same_parts() -> None:
    trials = plan(500, 1, call_count=6, at_once=3)
    assert sum(before.role is after.role for before, after in pairwise(trials)) < 25


@pytest.mark.parametrize("seed", range(5))
def test_the_first_trials_hit_every_kind_and_change_a_role(seed: int) -> None:
    trials = plan(FIRST, seed, call_count=6, at_once=3)
    hit = {(trial.victim, trial.stage) for trial in trials if trial.fault is not Fault.SWITCH}
    assert hit == set(OWN_STAGE.items())
    assert [trial.victim for trial in trials if trial.fault is Fault.SWITCH] == [Victim.PREFILL]


def trial_of(fault: Fault, number: int = 0) -> Trial:
    return next(
        replace(trial, number=number)
        for trial in plan(500, 1, call_count=1, at_once=1)
        if (trial.victim, trial.stage, trial.fault) == (Victim.DECODE, Stage.DECODE, fault)
    )


def outcome(*replies: Reply, fault: Fault = Fault.KILL, pause_s: float = 0.5, died: bool = False) -> Outcome:
    begun = Reply(EXPECTED, tokens=[1, 2, 3], times=[0.0, pause_s])
    hit = Hit(fell_at=0.0, landed=True, address="", pid=0, died=died)
    return outcome_of(trial_of(fault), hit, [begun, *replies], took_s=1.0)


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
    assert table(found)[1 + list(Victim).index(Victim.DECODE)].split() == ["decode", *["0+0"] * 4, "1+1"]


def test_an_engine_must_survive_its_change_of_roles() -> None:
    survived, died = outcome(fault=Fault.SWITCH), outcome(fault=Fault.SWITCH, died=True)
    assert passed([survived]) and not passed([survived, died])
    assert table([survived, died])[-2:] == [
        "decode changes role   " + "".join(f"{count:>12}" for count in (0, 0, 0, 0, 2)),
        "1 engines did not come through a change of roles",
    ]
    assert summary([died]).endswith("pause p99 kill - freeze -")


def test_pieces_add_up(tmp_path: Path) -> None:
    found = [replace(outcome(), number=number) for number in range(4)]
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, piece in zip(paths, (found[2:], found[:2]), strict=True):
        path.write_text("".join(f"{one.to_json()}\n" for one in piece))
    assert read_pieces(paths) == found
    for wrong in (found[1], replace(found[0], number=9, seed=2)):
        (tmp_path / "c").write_text(wrong.to_json())
        with pytest.raises(ValueError, match="no pieces of one plan"):
            read_pieces([*paths, tmp_path / "c"])


def test_a_pause_is_the_longest_time_that_was_not_over_when_the_fault_fell() -> None:
    reply = Reply(EXPECTED, times=[1.0, 5.0, 5.5, 8.0, 8.1])
    assert reply.pause_s(5.2) == 2.5
    assert reply.pause_s(4.0) == 4.0
    assert reply.pause_s(8.05) == pytest.approx(0.1)
    assert reply.pause_s(9.0) == 0.0
    assert Reply(EXPECTED, times=[7.0]).pause_s(5.0) == 2.0
