"""The KV of another rank as the group's leader sees it: orders on the rank's connection, and their answers.

Why blocks are safe. A rank takes what its leader says in order, and shuts a guard before it reads on. So whatever may
touch blocks again - a part of a step, a chunk of another sequence - is told after their guard was shut and takes effect
after it: the leader never waits for an answer before it gives blocks to another.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

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
from actors.parallel.kv_ends import Received
from actors.parallel.kv_transfer import BlockGuard, ChunkPlace, TransportError

_T = TypeVar("_T")


@dataclass(eq=False, slots=True)
class Ordered(Generic[_T]):
    """Implements ``Work``."""

    future: Future[_T]
    _stop: Callable[[], None]

    def stop(self) -> None:
        self._stop()


class RemoteKvRank:
    """Implements ``KvRank``. Any thread."""

    def __init__(self, send: Callable[[KvOrder], object]) -> None:
        """``send`` raises TransportError when the rank is lost."""
        self.address = ""
        """Known once the rank is loaded."""
        self._send = send
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._pending: dict[int, Future[Any]] = {}
        self._lost: str | None = None

    def sending_end(self, peer: str) -> RemoteSendingEnd:
        return RemoteSendingEnd(self, peer)

    def receiving_end(self, peer: str) -> RemoteReceivingEnd:
        return RemoteReceivingEnd(self, peer)

    def take(self, answer: KvAnswer) -> None:
        """What the rank says."""
        with self._lock:
            future = self._pending.pop(answer.number, None)
        if future is None:
            return  # The rank was lost meanwhile.
        if answer.failure is None:
            future.set_result(answer.value)
        elif answer.broken:
            future.set_exception(TransportError(answer.failure))
        else:
            future.set_exception(RuntimeError(answer.failure))

    def lose(self, reason: str) -> None:
        """The rank answers no more."""
        with self._lock:
            self._lost = reason
            pending, self._pending = self._pending, {}
        for future in pending.values():
            future.set_exception(TransportError(reason))

    def open(self, peer: str, *, sends: bool) -> int:
        end = next(self._numbers)
        self.tell(MakeEnd(end, sends, peer))
        return end

    def tell(self, order: KvOrder) -> None:
        """An order without an answer."""
        try:
            self._send(order)
        except TransportError:
            pass  # Nothing is done there any more.

    def order(self, make: Callable[[int], KvOrder]) -> Ordered[Any]:
        """``make`` is given the order's number."""
        number = next(self._numbers)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            lost = self._lost
            if lost is None:
                self._pending[number] = future
        if lost is not None:
            future.set_exception(TransportError(lost))
        else:
            try:
                self._send(make(number))
            except TransportError as error:
                self.lose(str(error))
        return Ordered(future, partial(self._stop, number))

    def order_under(self, guard: BlockGuard, make: Callable[[int], KvOrder]) -> Ordered[Any] | None:
        """``order`` for one that names the guard; None if that is shut."""
        ordered: list[Ordered[Any]] = []
        guard.lend(self, lambda: ordered.append(self.order(make)), lambda: self.tell(ShutGuard(guard.number)))
        return ordered[0] if ordered else None

    def _stop(self, number: int) -> None:
        with self._lock:
            under_way = number in self._pending
        if under_way:
            self.tell(StopWork(number))


class _RemoteEnd:
    def __init__(self, rank: RemoteKvRank, peer: str, *, sends: bool) -> None:
        self._rank = rank
        self._end = rank.open(peer, sends=sends)
        self._staged = False

    @property
    def staging_in_use(self) -> bool:
        return self._staged

    def forget(self) -> None:
        self._rank.tell(ForgetChunk(self._end))
        self._free()

    def close(self) -> Future[None]:
        closed: Future[None] = Future()
        closed.set_running_or_notify_cancel()
        ordered = self._rank.order(lambda number: CloseEnd(number, self._end))
        # The thread of a rank that is lost has ended with it.
        ordered.future.add_done_callback(lambda _future: closed.set_result(None))
        return closed

    def _free(self, _future: object = None) -> None:
        self._staged = False

    def _free_if_failed(self, future: Future[Any]) -> None:
        if future.exception() is not None:
            self._free()


class RemoteSendingEnd(_RemoteEnd):
    """Implements ``SendingEnd``."""

    def __init__(self, rank: RemoteKvRank, peer: str) -> None:
        super().__init__(rank, peer, sends=True)

    def send(self, name: str, address: str, place: ChunkPlace, guard: BlockGuard) -> Ordered[Received]:
        def order(number: int, guard_number: int | None) -> SendChunk:
            return SendChunk(number, self._end, name, address, place, guard_number)

        self._staged = True
        work = self._rank.order_under(guard, lambda number: order(number, guard.number))
        if work is None:
            work = self._rank.order(lambda number: order(number, None))
        work.future.add_done_callback(self._free)
        return work

    def stage(self, place: ChunkPlace, guard: BlockGuard) -> Future[Received]:
        def order(number: int, guard_number: int | None) -> StageChunk:
            return StageChunk(number, self._end, place, guard_number)

        self._staged = True
        work = self._rank.order_under(guard, lambda number: order(number, guard.number))
        if work is None:
            work = self._rank.order(lambda number: order(number, None))
        work.future.add_done_callback(self._free_if_failed)
        return work.future

    def piece(self, offset: int, size: int) -> Future[bytes]:
        return self._rank.order(lambda number: ReadPiece(number, self._end, offset, size)).future


class RemoteReceivingEnd(_RemoteEnd):
    """Implements ``ReceivingEnd``."""

    def __init__(self, rank: RemoteKvRank, peer: str) -> None:
        super().__init__(rank, peer, sends=False)

    def receive(self, name: str, tokens: int, layers: range) -> Ordered[Received]:
        self._staged = True
        work: Ordered[Received] = self._rank.order(lambda number: ReceiveChunk(number, self._end, name, tokens, layers))
        work.future.add_done_callback(self._free_if_failed)
        return work

    def put(self, tokens: int, layers: range, offset: int, content: bytes) -> Future[None]:
        self._staged = True
        return self._rank.order(lambda number: PutPiece(number, self._end, tokens, layers, offset, content)).future

    def filled(self) -> Future[Received]:
        return self._rank.order(lambda number: AskFilled(number, self._end)).future

    def scatter(self, block_table: Sequence[int], first: int, guard: BlockGuard) -> Future[float]:
        work: Ordered[float] | None = self._rank.order_under(
            guard, lambda number: ScatterChunk(number, self._end, tuple(block_table), first, guard.number)
        )
        if work is None:
            self.forget()
            nothing: Future[float] = Future()
            nothing.set_result(0.0)
            return nothing
        work.future.add_done_callback(self._free)
        return work.future

    def leave(self) -> Future[None]:
        left: Future[None] = self._rank.order(lambda number: LeaveGeneration(number, self._end)).future
        left.add_done_callback(self._free)
        return left
