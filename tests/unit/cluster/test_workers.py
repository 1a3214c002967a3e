"""What workers do as replicas, without Serve."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.wire.audit import Audit
from cluster.scaling_policy import Echo
from cluster.workers import common
from cluster.workers.common import ScaleEcho
from tests.in_process import Handle

HEARD = {"planner_term": 1, "planner_decision": 2, "planner_target": 3}


class Planner:
    """Answers, fails or is silent, as the test says."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Echo]] = []
        self.answer: Any = HEARD

    async def scale_of(self, pool: str, known: Echo) -> Echo:
        self.asked.append((pool, known))
        if self.answer is None:
            await asyncio.sleep(60)
        if isinstance(self.answer, Exception):
            raise self.answer
        answer: Echo = self.answer
        return answer


async def test_a_replica_echoes_what_it_heard_last_while_no_planner_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "ECHO_TIMEOUT_S", 0.02)
    planner = Planner()
    echo = ScaleEcho(Handle(planner), "pool")
    planner.answer = RuntimeError("away")
    assert await echo.hear() == {}
    planner.answer = HEARD
    assert await echo.hear() == HEARD
    for silent in (RuntimeError("away"), None):
        planner.answer = silent
        assert await echo.hear() == HEARD
    assert planner.asked == [("pool", {}), ("pool", {}), ("pool", HEARD), ("pool", HEARD)]


class Part:
    """Holds something for a request for so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def audit(self) -> Audit:
        self.looks -= 1
        return Audit(held={"leases": max(0, self.looks), "bytes": 0})


async def test_a_worker_that_ends_waits_for_what_it_keeps_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "LET_GO_POLL_S", 0.001)
    part = Part(5)
    await common.let_go(part)  # type: ignore[arg-type]
    assert part.looks == 0
    monkeypatch.setattr(common, "LET_GO_S", 0.02)
    await common.let_go(Part(10**9))  # type: ignore[arg-type]
