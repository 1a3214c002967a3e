from __future__ import annotations

from actors.engine.scheduling.timers import Timers
from tests.unit.engine.engine_requests import key


def test_timers_are_due_in_order_and_once() -> None:
    timers = Timers()
    assert timers.next_due is None
    for due, name in ((3.0, "c"), (1.0, "a"), (2.0, "b"), (1.0, "again")):
        timers.set(due, key(name))
    assert timers.next_due == 1.0
    assert timers.pop_due(0.9) == []
    assert timers.pop_due(2.0) == [key("a"), key("again"), key("b")]
    assert (timers.pop_due(2.0), timers.next_due) == ([], 3.0)


def test_timers_of_the_dead_do_not_pile_up() -> None:
    timers = Timers()
    alive, others = {key("alive"), key(7)}, {key("early")}
    for number in range(1000):
        timers.prune(alive, others)
        timers.set(float(number), key(number))
    timers.set(5000.0, key("alive"))
    timers.set(6000.0, key("early"))
    left = timers.pop_due(1e9)
    assert key(7) in left
    assert left[-2:] == [key("alive"), key("early")]
    assert len(left) < 100
