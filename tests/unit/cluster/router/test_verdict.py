"""What becomes of a choice whose attempt ended, and what retries cost."""

from __future__ import annotations

import pytest

from actors.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MediaChanged,
    Overloaded,
    ServingError,
    Unavailable,
)
from cluster.router.retry_budget import FLOOR_PER_S, RetryBudget
from cluster.router.verdict import Verdict, judge

ROOM = ("NO_BLOCKS", "PREEMPTED", "UNKNOWN", "ENDED", "DUPLICATE", "DRAINING", "EPOCH_CHANGED", "WRONG_ROLE")
LOST = ("ENGINE_LOST", "STAGE_LOST", "TRANSFER_FAILED", "PEER_CANCELLED")


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        *((Unavailable("", reason=reason), Verdict.ROOM) for reason in ROOM),
        *((Unavailable("", reason=reason), Verdict.LOST) for reason in LOST),
        *((Unavailable("", reason=reason), Verdict.MOVED) for reason in ("MOVED", "STOPPED")),
        *((Unavailable("", reason=reason), Verdict.TOLD) for reason in ("MISMATCH", "NO_ENGINE", "UNAVAILABLE")),
        *((kind(""), Verdict.TOLD) for kind in (InvalidRequest, MediaChanged, InternalError, DeadlineExceeded)),
    ],
)
def test_verdicts(error: ServingError, verdict: Verdict) -> None:
    assert judge(error, newcomer=True) is verdict
    assert judge(error, newcomer=False) is verdict


def test_a_full_queue_turns_away_newcomers_only() -> None:
    assert judge(Overloaded(""), newcomer=True) is Verdict.TOLD
    assert judge(Overloaded(""), newcomer=False) is Verdict.ROOM


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_empty_budget_delays_and_never_refuses() -> None:
    clock = Clock()
    budget = RetryBudget(share=0.5, burst=2, clock=clock)
    assert [budget.spend() for _ in range(4)] == [0.0, 0.0, 1 / FLOOR_PER_S, 2 / FLOOR_PER_S]
    assert not budget.try_spend()
    clock.now += 10.0
    assert budget.saved == 2.0
    assert budget.try_spend() and budget.try_spend() and not budget.try_spend()


def test_admitted_requests_pay_for_retries() -> None:
    budget = RetryBudget(share=0.5, burst=2, clock=Clock())
    for _ in range(3):
        budget.spend()
    assert budget.saved == -1.0
    for _ in range(3):
        budget.admit()
    assert budget.spend() == pytest.approx(0.5 / FLOOR_PER_S)
    for _ in range(100):
        budget.admit()
    assert budget.saved == 2.0
