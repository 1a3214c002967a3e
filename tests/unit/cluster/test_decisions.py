from __future__ import annotations

from cluster.decisions import KEPT, DecisionKind, DecisionLog


def test_the_last_decisions_are_kept_with_their_numbers_and_times() -> None:
    clock = iter(range(1000))
    log = DecisionLog(lambda: float(next(clock)))
    for count in range(KEPT + 5):
        log.note(DecisionKind.SCALE, pool="p", subject="p", change=f"{count} -> {count + 1}", reason="queue")
    assert log.count == KEPT + 5
    assert [(one.number, one.time_s) for one in (log.kept[0], log.kept[-1])] == [(6, 5.0), (205, 204.0)]
    assert len(log.kept) == KEPT and log.kept[-1].change == "204 -> 205"
