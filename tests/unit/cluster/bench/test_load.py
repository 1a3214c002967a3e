"""Open and closed loops on a clock that jumps from timer to timer."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Coroutine
from typing import Any

import pytest

from cluster.bench.load import Ask, Record, Reply, SendFailed, closed_loop, open_loop, poisson_times
from cluster.bench.metrics import summarise
from cluster.bench.workload import Conversation, Turn


class JumpingSelector(selectors.DefaultSelector):
    """Waits for nothing: the time that would pass is added to the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits and no timer is set"
        self.now += max(0.0, timeout)
        return super().select(0)


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.selector = JumpingSelector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def run(main: Coroutine[Any, Any, list[Record]]) -> list[Record]:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(main)


class TimedSender:
    """A server that gives ``tokens`` tokens, the first after ``first_s``, the others ``gap_s`` apart."""

    def __init__(self, first_s: float = 2.0, gap_s: float = 1.0, tokens: int = 3, busy_s: float = 0.0) -> None:
        self.first_s, self.gap_s, self.tokens = first_s, gap_s, tokens
        self.busy_s = busy_s
        """Holds the client up once, before the first request goes out, as a process short of CPU would."""
        self.asks: list[Ask] = []
        self.fail: set[str] = set()

    def prepare(self, ask: Ask) -> Ask:
        self.asks.append(ask)
        return ask

    async def send(self, prepared: Ask) -> Reply:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, JumpingLoop)
        loop.selector.now += self.busy_s
        self.busy_s = 0.0
        if prepared.turn.text in self.fail:
            await asyncio.sleep(self.first_s)
            raise SendFailed("HTTP 500: no")
        times = []
        for index in range(self.tokens):
            await asyncio.sleep(self.gap_s if index else self.first_s)
            times.append(loop.time())
        return Reply(
            text=f"re: {prepared.turn.text}",
            chunk_s=tuple(times),
            end_s=loop.time(),
            prompt_tokens=1,
            cached_tokens=0,
            output_tokens=self.tokens,
        )


def conversations(*turn_counts: int) -> list[Conversation]:
    return [
        Conversation(
            index=index,
            kind="text",
            turns=tuple(Turn(text=f"{index}.{turn}", output_tokens=1) for turn in range(count)),
        )
        for index, count in enumerate(turn_counts)
    ]


def test_an_open_loop_does_not_wait_for_replies() -> None:
    sender = TimedSender(first_s=100)
    records = run(open_loop(sender, conversations(1, 1, 1), [0, 1, 5]))
    assert [(record.due_s, record.sent_s, record.end_s) for record in records] == [
        (0, 0, 102),
        (1, 1, 103),
        (5, 5, 107),
    ]
    summary = summarise(records, {})
    assert summary.max_in_flight == 3
    assert summary.latencies.ttft is not None and summary.latencies.ttft.p99 == 100
    assert summary.latencies.tpot is not None and summary.latencies.tpot.mean == 1
    assert summary.latencies.e2e is not None and summary.latencies.e2e.mean == 102
    assert summary.send_lag is not None and summary.send_lag.p99 == 0


def test_latencies_count_from_when_a_request_was_due() -> None:
    records = run(open_loop(TimedSender(busy_s=4), conversations(1, 1, 1), [0, 1, 5]))
    assert [(record.due_s, record.sent_s, record.end_s) for record in records] == [(0, 0, 8), (1, 4, 8), (5, 5, 9)]
    summary = summarise(records, {})
    assert summary.send_lag is not None and summary.send_lag.mean == 1
    assert [record.end_s - record.due_s for record in records] == [8, 7, 4]


def test_all_at_once() -> None:
    records = run(open_loop(TimedSender(), conversations(*[1] * 50), poisson_times(50, math.inf, 0)))
    assert {(record.due_s, record.sent_s, record.end_s) for record in records} == {(0, 0, 4)}


def test_a_closed_loop_keeps_so_many_going() -> None:
    records = run(closed_loop(TimedSender(first_s=1), conversations(*[1] * 5), 2))
    assert [(record.due_s, record.end_s) for record in records] == [(0, 3), (0, 3), (3, 6), (3, 6), (6, 9)]
    assert summarise(records, {}).max_in_flight == 2


@pytest.mark.parametrize("is_open", [True, False])
def test_turns_follow_each_other_and_carry_what_was_said(is_open: bool) -> None:
    sender = TimedSender()
    talks = conversations(3, 1)
    records = run(open_loop(sender, talks, [0, 1]) if is_open else closed_loop(sender, talks, 2))
    assert [(record.conversation, record.turn) for record in records] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert [record.due_s for record in records] == [0, 4, 8, 1 if is_open else 0]
    last = sender.asks[-1]
    assert last.turn.text == "0.2"
    assert [(turn.text, reply) for turn, reply in last.history] == [("0.0", "re: 0.0"), ("0.1", "re: 0.1")]


def test_a_failed_turn_ends_its_conversation_only() -> None:
    sender = TimedSender()
    sender.fail = {"0.1"}
    records = run(closed_loop(sender, conversations(4, 1), 1))
    assert [record.error for record in records] == [
        None,
        "HTTP 500: no",
        "not sent: an earlier turn failed",
        "not sent: an earlier turn failed",
        None,
    ]
    assert (records[1].sent_s, records[1].end_s) == (4, 6)


def test_arrivals_are_a_poisson_process() -> None:
    times = poisson_times(20_000, 4.0, seed=3)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    assert min(gaps) > 0
    assert sum(gaps) / len(gaps) == pytest.approx(0.25, rel=0.03)
    # Exponential gaps: the deviation is the mean, and e^-1 of them are above it.
    assert math.sqrt(sum((gap - 0.25) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(0.25, rel=0.05)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.01)
    assert poisson_times(5, 4.0, seed=3) == times[:5] != poisson_times(5, 4.0, seed=4)
    assert poisson_times(3, math.inf, seed=3) == [0, 0, 0]
