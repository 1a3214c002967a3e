from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import pytest
import torch

from actors.errors import InternalError, Overloaded, Unavailable
from actors.processing.patches import PATCH_BYTES
from actors.types import Grid
from actors.wire.encode_queue import EncodeQueue, Ticket
from actors.wire.media import MediaMiss, MediaUnit
from actors.wire.tensors import Patches
from actors.wire.unit_store import Lease
from tests.unit.wire.media_places import embedding_store, make_unit
from tests.waiting import LIMIT_S, eventually

GRID = Grid(1, 4, 4)
UNIT_BYTES = GRID.patches * PATCH_BYTES
WIDTH = 3


class Bench:
    """A queue between a source of patches that opens gates and a model that sums bytes."""

    def __init__(self, *, window: int = 100 * UNIT_BYTES, batch: int = 64) -> None:
        self.store = embedding_store()
        self.patches: dict[bytes, Patches] = {}
        self.gone: set[tuple[str, bytes]] = set()
        self.pulls: list[tuple[str, bytes, str]] = []
        self.gates: dict[bytes, asyncio.Event] = {}
        self.batches: list[list[Grid]] = []
        self.encoding = threading.Event()
        self.go = threading.Event()
        self.go.set()
        self.spoil: set[bytes] = set()
        self.failure: Exception | None = None
        self.leases = AsyncExitStack()
        self.queue = EncodeQueue(
            store=self.store,
            pull=self.pull,
            encode=self.encode,
            value_bytes=PATCH_BYTES,
            window_bytes=window,
            max_batch_patches=batch,
        )

    def unit(self, seed: int, grid: Grid = GRID, *, gated: bool = False) -> MediaUnit:
        unit, patches = make_unit(grid, seed)
        self.patches[unit.content_key] = patches
        if gated:
            self.gates[unit.content_key] = asyncio.Event()
        return unit

    def lease(self, name: str) -> Lease:
        return self.leases.enter_context(self.store.open(name))

    def join(self, unit: MediaUnit, lease: Lease, address: str = "pre:1") -> Ticket:
        key = b"e" + unit.content_key
        reservation = None if key in self.queue else self.store.try_reserve(unit.grid.tokens * WIDTH * 8)
        return self.queue.join(key, unit, lease, address, reservation)

    async def pull(self, address: str, unit: MediaUnit, lease: str) -> Patches:
        self.pulls.append((address, unit.content_key, lease))
        if unit.content_key in self.gates:
            await self.gates[unit.content_key].wait()
        if (address, unit.content_key) in self.gone:
            raise MediaMiss("gone")
        return self.patches[unit.content_key]

    def encode(self, patches: Sequence[Patches], grids: Sequence[Grid]) -> list[torch.Tensor]:
        self.batches.append(list(grids))
        self.encoding.set()
        self.go.wait(10)
        if self.failure is not None:
            raise self.failure
        made = []
        for rows, grid in zip(patches, grids, strict=True):
            value = float("nan") if rows.tobytes()[:8] in self.spoil else float(rows.sum())
            made.append(torch.full((grid.tokens, WIDTH), value, dtype=torch.float64))
        return made

    def check_idle(self) -> None:
        self.store.check_integrity()
        assert self.queue.queued_patches == 0
        assert self.queue.window_bytes_used == 0
        assert self.store.stats().reserved_bytes == 0


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.leases.aclose()
    await made.queue.close()
    made.check_idle()


async def test_a_unit_is_pulled_encoded_and_kept_under_its_lease(bench: Bench) -> None:
    unit, lease = bench.unit(1), bench.lease("one")
    answer = await bench.join(unit, lease).future
    assert answer.embedding_key == b"e" + unit.content_key and not answer.cached and answer.busy_s > 0
    embedding = bench.store.get(b"e" + unit.content_key)
    assert embedding is not None and float(embedding[0, 0]) == bench.patches[unit.content_key].sum()
    assert lease.keys == {b"e" + unit.content_key}
    assert bench.pulls == [("pre:1", unit.content_key, "one")]
    bench.check_idle()


async def test_who_waits_for_a_unit_goes_on_when_it_is_made_or_given_up(bench: Bench) -> None:
    made, given_up = bench.unit(1, gated=True), bench.unit(2, gated=True)
    lease = bench.lease("one")
    await asyncio.wait_for(bench.queue.wait_for(b"unknown"), LIMIT_S)
    bench.join(made, lease)
    ticket = bench.join(given_up, lease)
    waits = [asyncio.create_task(bench.queue.wait_for(b"e" + unit.content_key)) for unit in (made, given_up)]
    await asyncio.sleep(0.01)
    assert not any(wait.done() for wait in waits)
    bench.gates[made.content_key].set()
    await asyncio.wait_for(waits[0], LIMIT_S)
    assert bench.store.get(b"e" + made.content_key) is not None
    bench.queue.leave(ticket)
    await asyncio.wait_for(waits[1], LIMIT_S)
    assert bench.store.get(b"e" + given_up.content_key) is None


async def test_units_of_several_calls_share_a_batch_up_to_its_bound(bench: Bench) -> None:
    bench.go.clear()
    first = bench.join(bench.unit(0), bench.lease("zero"))
    await eventually(bench.encoding.is_set)
    tickets = [bench.join(bench.unit(i), bench.lease(f"lease {i}")) for i in range(1, 8)]
    await eventually(lambda: len(bench.pulls) == 8)
    bench.go.set()
    await asyncio.gather(first.future, *(ticket.future for ticket in tickets))
    assert [len(batch) for batch in bench.batches] == [1, 4, 3]


async def test_a_unit_over_the_bound_goes_alone(bench: Bench) -> None:
    bench.go.clear()
    lease = bench.lease("one")
    first = bench.join(bench.unit(0), lease)
    await eventually(bench.encoding.is_set)
    tickets = [bench.join(bench.unit(1, Grid(1, 10, 10)), lease), bench.join(bench.unit(2), lease)]
    await eventually(lambda: len(bench.pulls) == 3)
    bench.go.set()
    await asyncio.gather(first.future, *(ticket.future for ticket in tickets))
    assert [[grid.patches for grid in batch] for batch in bench.batches] == [[16], [100], [16]]


async def test_the_same_unit_is_made_once_for_all_who_want_it(bench: Bench) -> None:
    unit = bench.unit(1, gated=True)
    one, two = bench.lease("one"), bench.lease("two")
    tickets = [bench.join(unit, one), bench.join(unit, two, "pre:2")]
    await eventually(lambda: len(bench.pulls) == 1)
    bench.gates[unit.content_key].set()
    answers = await asyncio.gather(*(ticket.future for ticket in tickets))
    assert answers[0] == answers[1] and len(bench.batches) == 1 and len(bench.pulls) == 1
    assert one.keys == two.keys == {b"e" + unit.content_key}


async def test_a_unit_without_wishers_is_dropped_before_its_batch(bench: Bench) -> None:
    unit = bench.unit(1, gated=True)
    tickets = [bench.join(unit, bench.lease("one")), bench.join(unit, bench.lease("two"))]
    await eventually(lambda: len(bench.pulls) == 1)
    bench.queue.leave(tickets[0])
    assert bench.queue.queued_patches == 16
    bench.queue.leave(tickets[1])
    bench.queue.leave(tickets[1])
    await asyncio.sleep(0)
    assert not bench.batches
    bench.check_idle()


async def test_a_unit_that_waits_for_its_batch_is_dropped_too(bench: Bench) -> None:
    bench.go.clear()
    first = bench.join(bench.unit(0), bench.lease("one"))
    await eventually(bench.encoding.is_set)
    waiting = bench.join(bench.unit(1), bench.lease("two"))
    await eventually(lambda: len(bench.pulls) == 2)
    await asyncio.sleep(0)
    bench.queue.leave(waiting)
    bench.go.set()
    await first.future
    bench.check_idle()
    assert len(bench.batches) == 1


async def test_a_unit_in_a_running_batch_ends_in_the_cache(bench: Bench) -> None:
    bench.go.clear()
    unit = bench.unit(0)
    with bench.store.open("one") as lease:
        ticket = bench.join(unit, lease)
        await eventually(bench.encoding.is_set)
        bench.queue.leave(ticket)
    bench.go.set()
    await eventually(lambda: bench.queue.queued_patches == 0)
    assert bench.store.stats().cached_units == 1 and bench.store.stats().leases == 0


async def test_a_miss_asks_the_next_source_and_answers_only_who_named_it(bench: Bench) -> None:
    unit = bench.unit(1, gated=True)
    bench.gone.add(("pre:1", unit.content_key))
    tickets = [bench.join(unit, bench.lease(name), address) for name, address in (("a", "pre:1"), ("b", "pre:2"))]
    await eventually(lambda: len(bench.pulls) == 1)
    bench.gates[unit.content_key].set()
    missing, found = [await ticket.future for ticket in tickets]
    assert missing.embedding_key is None and found.embedding_key is not None
    assert [address for address, *_ in bench.pulls] == ["pre:1", "pre:2"]


async def test_when_every_source_misses_nothing_is_left(bench: Bench) -> None:
    unit = bench.unit(1)
    bench.gone.add(("pre:1", unit.content_key))
    answer = await bench.join(unit, bench.lease("one")).future
    assert answer.embedding_key is None
    bench.check_idle()
    bench.gone.clear()
    assert (await bench.join(unit, bench.lease("one")).future).embedding_key is not None


@pytest.mark.parametrize(
    ("error", "shown"), [(Overloaded("busy"), Overloaded), (RuntimeError("secret"), InternalError)]
)
async def test_a_failing_source_fails_who_asked(
    bench: Bench, error: Exception, shown: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(address: str, unit: MediaUnit, lease: str) -> Patches:
        raise error

    monkeypatch.setattr(bench.queue, "_pull", fail)
    ticket = bench.join(bench.unit(1), bench.lease("one"))
    with pytest.raises(shown, match=r"busy|pulling patches failed"):
        await ticket.future
    bench.queue.leave(ticket)
    bench.check_idle()
    assert bench.queue.failure is None


async def test_the_window_bounds_patches_ahead_of_their_batch() -> None:
    bench = Bench(window=2 * UNIT_BYTES)
    bench.go.clear()
    lease = bench.lease("one")
    tickets = [bench.join(bench.unit(i), lease) for i in range(6)]
    tickets.append(bench.join(bench.unit(9, Grid(1, 8, 8)), lease))
    await eventually(bench.encoding.is_set)
    assert len(bench.pulls) == 2 and bench.queue.window_bytes_used == 2 * UNIT_BYTES
    bench.queue.leave(tickets.pop(3))
    bench.go.set()
    await asyncio.gather(*(ticket.future for ticket in tickets))
    assert len(bench.pulls) == 6
    bench.check_idle()
    await bench.leases.aclose()
    await bench.queue.close()


async def test_values_that_are_no_numbers_are_not_served(bench: Bench) -> None:
    bench.go.clear()
    lease = bench.lease("one")
    first = bench.join(bench.unit(0), lease)
    await eventually(bench.encoding.is_set)
    bad, good = bench.unit(1), bench.unit(2)
    bench.spoil.add(bench.patches[bad.content_key].tobytes()[:8])
    tickets = [bench.join(bad, lease), bench.join(good, lease)]
    await eventually(lambda: len(bench.pulls) == 3)
    bench.go.set()
    with pytest.raises(InternalError, match="not finite"):
        await tickets[0].future
    await asyncio.gather(first.future, tickets[1].future)
    assert [len(batch) for batch in bench.batches] == [1, 2]
    assert bench.store.get(b"e" + bad.content_key) is None and bench.store.get(b"e" + good.content_key) is not None
    bench.check_idle()


async def test_a_failing_batch_ends_the_queue_loudly(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    gated = bench.unit(1, gated=True)
    bench.failure = ValueError("kernel")
    lease = bench.lease("one")
    tickets = [bench.join(gated, lease), bench.join(bench.unit(2), lease)]
    for ticket in tickets:
        with pytest.raises(InternalError, match="the vision encoder failed"):
            await ticket.future
    assert bench.queue.failure is bench.failure and "takes no more work" in caplog.text
    with pytest.raises(Unavailable, match="being replaced"):
        bench.join(bench.unit(3), lease)
    bench.check_idle()


async def test_an_embedding_larger_than_reserved_ends_the_queue(bench: Bench) -> None:
    unit = bench.unit(1)
    ticket = bench.queue.join(b"key", unit, bench.lease("one"), "pre:1", bench.store.try_reserve(8))
    with pytest.raises(InternalError):
        await ticket.future
    assert isinstance(bench.queue.failure, ValueError)


async def test_closing_fails_what_is_open() -> None:
    bench = Bench()
    gated = bench.unit(1, gated=True)
    lease = bench.lease("one")
    ticket = bench.join(gated, lease)
    await bench.queue.close()
    with pytest.raises(Unavailable, match="closing"):
        await ticket.future
    with pytest.raises(Unavailable):
        bench.join(bench.unit(2), lease)
    await bench.leases.aclose()
    bench.check_idle()
