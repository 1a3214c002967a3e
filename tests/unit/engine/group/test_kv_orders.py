"""What a leader orders of the KV of another rank, over a connection that is a queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.engine.group.kv_messages import KvAnswer, KvOrder
from actors.engine.group.kv_orders import KvOrders
from actors.engine.group.kv_remote import RemoteKvRank
from actors.parallel.kv_threads import LocalKvRank
from actors.parallel.kv_transfer import BlockGuard, ChunkPlace, KvGeometry, Transport, TransportError

PATIENCE_S = 30.0
GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=1, head_dim=4, dtype=torch.float64, device=torch.device("cpu"))
ALL = range(GEOMETRY.num_layers)


class Cache:
    """Blocks of one token."""

    def __init__(self) -> None:
        self.data = torch.zeros(3, 64, 2, 1, 4, dtype=torch.float64)
        self.before_write: Callable[[], None] = lambda: None

    def read_tokens(self, layer: int, block_table: Sequence[int], first: int, count: int) -> Tensor:
        return self.data[layer, list(block_table[first : first + count])]

    def write_tokens(self, layer: int, block_table: Sequence[int], first: int, kv_T2Hd: Tensor) -> None:
        self.before_write()
        self.data[layer, list(block_table[first : first + len(kv_T2Hd)])] = kv_T2Hd


class Pipes:
    """A meeting of ends in this process: a pipe by name."""

    address = "here"

    def __init__(self) -> None:
        self.pipes: dict[str, queue.SimpleQueue[Tensor]] = {}
        self.lock = threading.Lock()

    def pipe(self, name: str) -> queue.SimpleQueue[Tensor]:
        with self.lock:
            return self.pipes.setdefault(name, queue.SimpleQueue())

    def connect(self, address: str, name: str, stop: threading.Event) -> Transport:
        assert address == self.address
        return Pipe(self.pipe(name))

    def listen(self, name: str, stop: threading.Event) -> Transport:
        if name == "nobody comes":
            assert stop.wait(PATIENCE_S)
            raise TransportError("stopped")
        return Pipe(self.pipe(name))

    def close(self) -> None:
        pass


class Pipe:
    def __init__(self, pipe: queue.SimpleQueue[Tensor]) -> None:
        self.pipe = pipe

    def send(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.pipe.put(tensor.clone())

    def recv(self, buffers: Sequence[Tensor], arrived: Callable[[int], None]) -> None:
        for position, buffer in enumerate(buffers):
            buffer.copy_(self.pipe.get(timeout=PATIENCE_S))
            arrived(position)

    def close(self) -> None:
        pass


class Far:
    """A rank behind a connection: a thread takes what comes, in order."""

    def __init__(self, meeting: Any) -> None:
        self.cache = Cache()
        self.lost = False
        self.inbox: queue.SimpleQueue[KvOrder | Callable[[], None] | None] = queue.SimpleQueue()
        self.orders = KvOrders(LocalKvRank(self.cache, GEOMETRY, meeting), self.answer)
        self.remote = RemoteKvRank(self.send)
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def send(self, order: KvOrder) -> None:
        if self.lost:
            raise TransportError("rank 1 is lost")
        self.inbox.put(order)

    def answer(self, answer: KvAnswer) -> None:
        self.remote.take(answer)

    def read(self) -> None:
        while (message := self.inbox.get()) is not None:
            if callable(message):
                message()
            else:
                self.orders.take(message)

    def do(self, act: Callable[[], None]) -> threading.Event:
        """Something else the leader says, as a part of a step."""
        done = threading.Event()

        def both() -> None:
            act()
            done.set()

        self.inbox.put(both)
        return done

    def settle(self) -> None:
        assert self.do(lambda: None).wait(PATIENCE_S)


@contextmanager
def two_ranks() -> Iterator[tuple[Far, Far]]:
    meeting = Pipes()
    ranks = Far(meeting), Far(meeting)
    try:
        yield ranks
        for rank in ranks:
            rank.settle()
            assert rank.orders.held() == {"kv_guards": 0, "kv_staging": 0}
    finally:
        for rank in ranks:
            rank.inbox.put(None)
            rank.thread.join()
            rank.orders.close()


@pytest.mark.parametrize("layers", [ALL, range(1, 3)])
def test_a_chunk_goes_from_rank_to_rank(layers: range) -> None:
    with two_ranks() as (source, target):
        source.cache.data.normal_()
        sends, receives = source.remote.sending_end("peer"), target.remote.receiving_end("peer")
        out, into = BlockGuard(), BlockGuard()
        received = receives.receive("one", 4, layers)
        assert receives.staging_in_use
        sent = sends.send("one", "here", ChunkPlace([9, 8, 7, 6, 5], 1, 4, layers), out)
        assert sent.future.result(PATIENCE_S).checksums == received.future.result(PATIENCE_S).checksums
        assert not sends.staging_in_use and receives.staging_in_use
        assert receives.scatter([1, 2, 3, 4], 0, into).result(PATIENCE_S) > 0
        assert torch.equal(target.cache.data[layers, 1:5], source.cache.data[layers][:, [8, 7, 6, 5]])
        assert all(target.cache.data[layer].any() == (layer in layers) for layer in ALL)
        target.settle()
        assert target.orders.held()["kv_guards"] == 1
        for guard in (out, into):
            guard.shut()
            guard.shut()
        assert not wait([sends.close(), receives.close()], PATIENCE_S).not_done
        assert not source.orders._ends and not target.orders._ends


def test_what_was_received_can_be_forgotten_or_left() -> None:
    with two_ranks() as (source, target):
        sends, receives = source.remote.sending_end("peer"), target.remote.receiving_end("peer")
        for leave in (False, True, False):
            received = receives.receive(f"{leave}", 1, ALL)
            guard = BlockGuard()
            sends.send(f"{leave}", "here", ChunkPlace([1], 0, 1, ALL), guard).future.result(PATIENCE_S)
            guard.shut()
            received.future.result(PATIENCE_S)
            if leave:
                receives.leave().result(PATIENCE_S)
            else:
                receives.forget()
            assert not receives.staging_in_use


def test_nothing_that_follows_a_shut_guard_meets_a_write() -> None:
    """``shut`` returns at once; the rank reads on when the one layer that is being written is done."""
    with two_ranks() as (source, target):
        writing, go_on, late = threading.Event(), threading.Event(), []
        sends, receives = source.remote.sending_end("peer"), target.remote.receiving_end("peer")
        out, into = BlockGuard(), BlockGuard()
        received = receives.receive("one", 2, ALL)
        sends.send("one", "here", ChunkPlace([1, 2], 0, 2, ALL), out).future.result(PATIENCE_S)
        received.future.result(PATIENCE_S)

        def before_write() -> None:
            late.append(step_began.is_set() if writing.is_set() else False)
            writing.set()
            assert go_on.wait(PATIENCE_S)

        step_began = threading.Event()
        target.cache.before_write = before_write
        scattered = receives.scatter([5, 6], 0, into)
        assert writing.wait(PATIENCE_S)
        into.shut()
        began = target.do(step_began.set)
        assert not began.wait(0.1)
        go_on.set()
        assert began.wait(PATIENCE_S)
        scattered.result(PATIENCE_S)
        assert late == [False], "a layer was written after its blocks were given to another"
        out.shut()


def test_a_guard_that_is_shut_orders_no_copy() -> None:
    with two_ranks() as (source, target):
        source.cache.data.normal_()
        sends, receives = source.remote.sending_end("peer"), target.remote.receiving_end("peer")
        shut = BlockGuard()
        shut.shut()
        received = receives.receive("one", 2, ALL)
        # What was promised goes out; nothing of the blocks is in it.
        sent = sends.send("one", "here", ChunkPlace([1, 2], 0, 2, ALL), shut).future.result(PATIENCE_S)
        assert received.future.result(PATIENCE_S).checksums == sent.checksums
        target.cache.before_write = pytest.fail
        assert receives.scatter([5, 6], 0, shut).result(PATIENCE_S) == 0
        assert not receives.staging_in_use


def test_waiting_for_a_peer_is_ended() -> None:
    with two_ranks() as (_, target):
        receives = target.remote.receiving_end("peer")
        received = receives.receive("nobody comes", 1, ALL)
        received.stop()
        with pytest.raises(TransportError, match="stopped"):
            received.future.result(PATIENCE_S)
        assert not receives.staging_in_use
        received.stop()


def test_a_defect_is_told_with_its_place_and_is_no_network_error() -> None:
    with two_ranks() as (source, target):
        sends, receives = source.remote.sending_end("peer"), target.remote.receiving_end("peer")
        guard, out = BlockGuard(), BlockGuard()
        received = receives.receive("one", 1, ALL)
        sends.send("one", "here", ChunkPlace([1], 0, 1, ALL), out).future.result(PATIENCE_S)
        received.future.result(PATIENCE_S)

        def defect() -> None:
            raise ValueError("a defect")

        target.cache.before_write = defect
        with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ValueError: a defect"):
            receives.scatter([5], 0, guard).result(PATIENCE_S)
        assert not receives.staging_in_use
        guard.shut()
        out.shut()


def test_a_lost_rank_holds_nobody_up() -> None:
    with two_ranks() as (source, target):
        sends, receives = source.remote.sending_end("peer"), target.remote.receiving_end("peer")
        waiting = receives.receive("nobody comes", 1, ALL)
        target.lost = True
        target.remote.lose("rank 1 is lost: the connection was closed")
        source.lost = True
        guard = BlockGuard()
        unsent = sends.send("one", "here", ChunkPlace([1], 0, 1, ALL), guard)
        for work in (waiting, unsent, receives.receive("more", 1, ALL)):
            with pytest.raises(TransportError, match="rank 1 is lost"):
                work.future.result(PATIENCE_S)
            work.stop()
        guard.shut()
        receives.forget()
        assert not sends.staging_in_use and not receives.staging_in_use
        for end in (sends, receives):
            assert end.close().result(PATIENCE_S) is None
        target.orders.close()
        target.remote.take(KvAnswer(1000, None))
