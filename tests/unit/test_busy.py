from __future__ import annotations

import pytest

from actors.busy import WINDOW_S, BusyShare


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_share_is_of_the_last_seconds_and_of_all_that_can_go_on_at_once() -> None:
    clock = Clock()
    one, two = BusyShare(clock=clock), BusyShare(2, clock)
    assert one.share() == 0
    with one.doing(), two.doing():
        clock.now += 1.0
        assert one.share() == pytest.approx(1 / WINDOW_S), "work that goes on counts so far"
        clock.now += 1.0
    assert (one.share(), two.share()) == pytest.approx((2 / WINDOW_S, 1 / WINDOW_S))
    clock.now += WINDOW_S - 1.0
    assert one.share() == pytest.approx(1 / WINDOW_S), "the first second is over"
    clock.now += 1.0
    assert one.share() == 0 and not one._pieces


def test_work_counts_by_its_weight_and_never_more_than_all() -> None:
    clock = Clock()
    busy = BusyShare(clock=clock)
    with busy.doing(0.25):
        clock.now += 2 * WINDOW_S
    assert busy.share() == pytest.approx(0.25)
    with busy.doing(), busy.doing():
        clock.now += WINDOW_S
    assert busy.share() == 1


def test_what_fails_ends_too() -> None:
    clock = Clock()
    busy = BusyShare(clock=clock)
    with pytest.raises(ValueError), busy.doing():
        raise ValueError
    clock.now += WINDOW_S
    assert busy.share() == 0
