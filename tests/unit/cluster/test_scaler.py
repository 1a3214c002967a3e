"""What the planner remembers of counts, what replicas echo of it, and what Serve's policy makes of that."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from actors.types import EngineRole
from cluster.config import ClusterConfig, parse
from cluster.registry import PoolScale, PreprocessorEntry, Snapshot
from cluster.scaler import Scaler
from cluster.scaling_policy import DECISION, TARGET, TERM, Echo, follow_planner

CONFIG = parse(
    {
        "model": "m",
        "preprocessor": {"autoscaling": {"min_replicas": 0, "max_replicas": 3, "downscale_delay_s": 0}},
        "vision_encoder": {"replicas": 2},
        "engines": [{"roles": {"prefill": 1, "decode": 2}, "autoscaling": {"min_replicas": 2, "max_replicas": 5}}],
    },
    "test",
)
EMPTY = Snapshot(term=1, version=1)
IDLE = PreprocessorEntry(incarnation="p", address="a")
WANTED = {"engine": {EngineRole.PREFILL: 1, EngineRole.DECODE: 2}}


def scaler(term: int = 1, config: ClusterConfig = CONFIG, begins: bool = True) -> Scaler:
    made = Scaler(config, term)
    if begins:
        made.begin()
    return made


def echo(term: int, decision: int, target: int) -> Echo:
    return {TERM: term, DECISION: decision, TARGET: target}


def test_pools_that_do_not_scale_have_one_count_for_everything() -> None:
    assert scaler().pools() == (
        PoolScale(name="router", target=1, min=1, max=1),
        PoolScale(name="preprocessor", target=1, min=0, max=3),
        PoolScale(name="vision_encoder", target=2, min=2, max=2),
        PoolScale(name="engine", target=3, min=2, max=5),
    )


def test_a_planner_that_follows_another_goes_on_from_what_replicas_heard() -> None:
    made = scaler(term=3, begins=False)
    for known in ({}, echo(1, 9, 2), echo(2, 4, 5), echo(2, 3, 4)):
        assert made.answer("engine", known) == (known, None), "it only listens"
    made.answer("preprocessor", echo(2, 1, 9))
    made.begin()
    assert (made.target("engine"), made.target("preprocessor")) == (5, 3)
    assert made.answer("engine", {}) == (echo(3, 0, 5), None)


def test_what_was_decided_has_a_number_of_its_own() -> None:
    made = scaler()
    assert made.decide(EMPTY, WANTED, 0.0) == [], "it has yet to start"
    (change,) = made.decide(replace(EMPTY, preprocessors=(IDLE,)), WANTED, 0.0)
    assert (change.pool, change.former, change.target) == ("preprocessor", 1, 0)
    assert made.answer("preprocessor", echo(1, 0, 1)) == (echo(1, 1, 0), None)
    answer, woken = made.answer("preprocessor", {})
    assert answer == echo(1, 2, 1) and woken is not None and woken.why == "a request came"
    assert made.answer("preprocessor", {}) == (echo(1, 2, 1), None), "once"


@dataclass
class Value:
    value: float


@dataclass
class Context:
    """Of Serve, as far as the policy looks."""

    target_num_replicas: int
    raw_metrics: dict[str, dict[str, list[Value]]] | None = field(default=None)


def context(*series: list[Echo], target: int = 7) -> Any:
    """``series``: what each replica echoed, the oldest first."""
    said = {
        name: {f"replica {number}": [Value(one[name]) for one in echoes] for number, echoes in enumerate(series)}
        for name in (TERM, DECISION, TARGET)
    }
    return Context(target, said)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (Context(7), 7),
        (Context(7, {}), 7),
        (context(), 7),
        (context([]), 7),
        (context([echo(1, 0, 2)]), 2),
        (context([echo(1, 0, 2), echo(1, 1, 3)], [echo(1, 0, 2)]), 3),
        (context([echo(1, 9, 9)], [echo(2, 0, 4)]), 4),
        (context([echo(2, 0, 0)], []), 0),
        (Context(7, {TARGET: {"replica": [Value(3)]}}), 7),
    ],
)
def test_serve_follows_the_newest_decision_and_keeps_the_count_where_nothing_is_heard(given: Any, count: int) -> None:
    assert follow_planner(given) == (count, {})
