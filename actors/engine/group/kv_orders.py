"""Does in the process of a rank what its leader orders of the rank's KV."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from actors.engine.group.channel import ChannelBroken
from actors.engine.group.kv_messages import (
    AskFilled,
    CloseEnd,
    ForgetChunk,
    KvAnswer,
    KvOrder,
    LeaveGeneration,
    MakeEnd,
    PutPiece,
    ReadPiece,
    ReceiveChunk,
    ScatterChunk,
    SendChunk,
    ShutGuard,
    StageChunk,
    StopWork,
)
from actors.parallel.kv_threads import LocalKvRank, ReceivingThread, SendingThread
from actors.parallel.kv_transfer import BlockGuard, TransportError


class KvOrders:
    """``take`` is called on the thread that reads what the leader says: orders take effect in order, and none holds it
    up for longer than the copy of one layer.
    """

    def __init__(self, rank: LocalKvRank, answer: Callable[[KvAnswer], object]) -> None:
        self._rank = rank
        self._answer = answer
        self._ends: dict[int, SendingThread | ReceivingThread] = {}
        self._guards: dict[int, BlockGuard] = {}
        self._lock = threading.Lock()
        self._stops: dict[int, Callable[[], None]] = {}
        """Of orders under way. Guarded by the lock."""

    @property
    def address(self) -> str:
        """``host:port`` where the rank's receiving ends are met."""
        return self._rank.address

    def held(self) -> Mapping[str, int]:
        """What is kept for sequences; any thread. A thread that waits for a peer which is gone keeps nothing."""
        staged = sum(end.staging_in_use for end in [*self._ends.values()])
        return {"kv_guards": len(self._guards), "kv_staging": staged}

    def take(self, order: KvOrder) -> None:
        match order:
            case MakeEnd(end, sends, peer):
                self._ends[end] = self._rank.sending_end(peer) if sends else self._rank.receiving_end(peer)
            case CloseEnd(number, end):
                self._follow(number, self._ends.pop(end).close())
            case SendChunk():
                guard = self._guard(order.guard)
                sent = self._sending(order.end).send(order.name, order.address, order.place, guard)
                self._follow(order.number, sent.future, sent.stop)
            case StageChunk():
                staged = self._sending(order.end).stage(order.place, self._guard(order.guard))
                self._follow(order.number, staged)
            case ReadPiece(number, end, offset, size):
                self._follow(number, self._sending(end).piece(offset, size))
            case PutPiece(number, end, tokens, layers, offset, content):
                self._follow(number, self._receiving(end).put(tokens, layers, offset, content))
            case AskFilled(number, end):
                self._follow(number, self._receiving(end).filled())
            case ReceiveChunk(number, end, name, tokens, layers):
                received = self._receiving(end).receive(name, tokens, layers)
                self._follow(number, received.future, received.stop)
            case ScatterChunk(number, end, block_table, first, guard):
                self._follow(number, self._receiving(end).scatter(block_table, first, self._guard(guard)))
            case ForgetChunk(end):
                self._ends[end].forget()
            case LeaveGeneration(number, end):
                self._follow(number, self._receiving(end).leave())
            case StopWork(number):
                with self._lock:
                    stop = self._stops.get(number)
                if stop is not None:
                    stop()
            case ShutGuard(guard):
                self._guards.pop(guard).shut()

    def close(self) -> None:
        """Lets go of what is open, without waiting for peers."""
        with self._lock:
            stops = [*self._stops.values()]
        for stop in stops:
            stop()
        for end in self._ends.values():
            end.close()
        self._ends.clear()
        self._rank.close()

    def _sending(self, end: int) -> SendingThread:
        found = self._ends[end]
        assert isinstance(found, SendingThread), f"end {end} does not send"
        return found

    def _receiving(self, end: int) -> ReceivingThread:
        found = self._ends[end]
        assert isinstance(found, ReceivingThread), f"end {end} does not receive"
        return found

    def _guard(self, number: int | None) -> BlockGuard:
        if number is not None:
            return self._guards.setdefault(number, BlockGuard())
        shut = BlockGuard()
        shut.shut()
        return shut

    def _follow(self, number: int, future: Future[Any], stop: Callable[[], None] = lambda: None) -> None:
        with self._lock:
            self._stops[number] = stop
        future.add_done_callback(partial(self._done, number))

    def _done(self, number: int, future: Future[Any]) -> None:
        with self._lock:
            del self._stops[number]
        error = future.exception()
        if error is None:
            answer = KvAnswer(number, future.result())
        elif isinstance(error, TransportError):
            answer = KvAnswer(number, failure=str(error), broken=True)
        else:
            answer = KvAnswer(number, failure="".join(traceback.format_exception(error)).strip())
        try:
            self._answer(answer)
        except ChannelBroken:
            pass  # The leader is gone, and this process with it.
