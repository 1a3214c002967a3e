"""A short chaos run: every kind of part is hit once under running requests. ``make chaos`` runs as many as you like."""

from __future__ import annotations

import pytest

from tests.chaos.calls import expected
from tests.chaos.plan import Victim, plan
from tests.chaos.run import CLUSTER as TWO_OF_EACH
from tests.chaos.run import Chaos, passed, summary
from tests.cluster.launcher import LaunchedCluster

CLUSTER = TWO_OF_EACH
SEED = 3


async def test_replies_stay_the_same_whatever_dies_or_freezes(
    cluster: LaunchedCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = await expected(120)
    lines: list[str] = []
    outcomes = await Chaos(cluster, calls, lines.append).run(plan(len(Victim), SEED, len(calls), at_once=3))
    report = "\n".join([*lines, summary(outcomes)])
    with capsys.disabled():
        print(f"\n{report}")
    assert passed(outcomes), report
    assert sum(outcome.landed for outcome in outcomes) >= len(outcomes) - 1, report
