"""Sends conversations: at given times whatever the replies do (open loop), or so many at a time (closed loop).

Open-loop latencies count from the time a conversation was *due*, not from when this process got round to sending it: a
slow server, or a slow client, must not hide its own delays (coordinated omission). Later turns of a conversation are
due when the reply before them is complete. In a closed loop a request is due when it is sent.

Times are the running event loop's, so tests may run on a loop with a clock of its own.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.bench.workload import Conversation, Turn


class SendFailed(Exception):
    """A request got no whole reply. The message is short, so that equal failures can be counted together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One request: a turn with what was said before it."""

    system: str | None
    history: tuple[tuple[Turn, str], ...]
    """Earlier turns and the replies to them."""
    turn: Turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A whole reply. ``chunk_s`` are the times at which tokens came, ``end_s`` that of the last event."""

    text: str
    chunk_s: tuple[float, ...]
    end_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


class Sender(Protocol):
    """A way to a server."""

    def prepare(self, ask: Ask) -> Any:
        """Does what can be done before the request is due."""

    async def send(self, prepared: Any) -> Reply:
        """Raises SendFailed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What became of one request. Times are the loop's; ``reply`` or ``error`` is set."""

    conversation: int
    turn: int
    kind: str
    due_s: float
    sent_s: float
    end_s: float
    reply: Reply | None = None
    error: str | None = None


def poisson_times(count: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start at which ``count`` conversations are due, ``rate`` a second; infinity: all at once."""
    if math.isinf(rate):
        return [0.0] * count
    random_ = random.Random(f"{seed}/arrivals")
    times = []
    now = 0.0
    for _ in range(count):
        now += random_.expovariate(rate)
        times.append(now)
    return times


async def open_loop(sender: Sender, conversations: Sequence[Conversation], due_s: Sequence[float]) -> list[Record]:
    """Starts every conversation when it is due, in order, and waits for all of them."""
    runs = [_Run(sender, conversation) for conversation in conversations]
    loop = asyncio.get_running_loop()
    start = loop.time()
    async with asyncio.TaskGroup() as tasks:
        for run, due in zip(runs, due_s, strict=True):
            if (wait := start + due - loop.time()) > 0:
                await asyncio.sleep(wait)
            tasks.create_task(run.run(start + due))
    return _records(runs)


async def closed_loop(sender: Sender, conversations: Sequence[Conversation], concurrency: int) -> list[Record]:
    """Keeps ``concurrency`` conversations going until there are no more."""
    runs = [_Run(sender, conversation) for conversation in conversations]
    waiting: Iterator[_Run] = iter(runs)

    async def worker() -> None:
        for run in waiting:
            await run.run(None)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(concurrency, len(runs))):
            tasks.create_task(worker())
    return _records(runs)


class _Run:
    """One conversation; its first request is prepared at once."""

    def __init__(self, sender: Sender, conversation: Conversation) -> None:
        self.records: list[Record] = []
        self._sender = sender
        self._conversation = conversation
        self._history: list[tuple[Turn, str]] = []
        self._first = self._prepare(conversation.turns[0])

    def _prepare(self, turn: Turn) -> Any:
        return self._sender.prepare(Ask(system=self._conversation.system, history=tuple(self._history), turn=turn))

    async def run(self, due_s: float | None) -> None:
        now: Callable[[], float] = asyncio.get_running_loop().time
        for number, turn in enumerate(self._conversation.turns):
            prepared = self._first if number == 0 else self._prepare(turn)
            sent_s = now()
            due = sent_s if due_s is None else due_s
            try:
                reply = await self._sender.send(prepared)
            except SendFailed as error:
                self._add(number, due, sent_s, now(), str(error))
                for later in range(number + 1, len(self._conversation.turns)):
                    self._add(later, now(), now(), now(), "not sent: an earlier turn failed")
                return
            self._add(number, due, sent_s, reply.end_s, reply)
            self._history.append((turn, reply.text))
            due_s = None if due_s is None else reply.end_s

    def _add(self, turn: int, due_s: float, sent_s: float, end_s: float, outcome: Reply | str) -> None:
        self.records.append(
            Record(
                conversation=self._conversation.index,
                turn=turn,
                kind=self._conversation.kind,
                due_s=due_s,
                sent_s=sent_s,
                end_s=end_s,
                reply=outcome if isinstance(outcome, Reply) else None,
                error=outcome if isinstance(outcome, str) else None,
            )
        )


def _records(runs: Iterable[_Run]) -> list[Record]:
    return [record for run in runs for record in run.records]
