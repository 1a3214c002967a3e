from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import uuid
from multiprocessing.connection import Connection

import pytest
import torch

from actors.parallel.world import MeetingPlace, World, WorldConfig, WorldError, join_world
from tests.unit.parallel.ranks import HOST, run_ranks, values

CPU = torch.device("cpu")


def join(place: MeetingPlace, *, size: int, timeout_s: float, stop: threading.Event | None = None) -> World:
    config = WorldConfig(join_timeout_s=timeout_s)
    name = uuid.uuid4().hex
    return join_world(place.address, name=name, rank=0, size=size, host=HOST, device=CPU, config=config, stop=stop)


def collectives(world: World) -> tuple[list[int], list[int], list[int]]:
    """Rank r sends r + 1 rows to each; rank 0 contributes nothing to the uneven exchange."""
    rank, size = world.rank, world.size
    sizes = [[0 if r == 0 else r + to for to in range(size)] for r in range(size)]
    out = torch.full((sum(row[rank] for row in sizes), 1), -1)
    rows = torch.full((sum(sizes[rank]), 1), rank)
    world.all_to_all(out, [row[rank] for row in sizes], rows, sizes[rank], layer=None, what="exchange")
    gathered = torch.empty(2 * size, dtype=torch.int64)
    world.all_gather(gathered, torch.tensor([rank, 10 * rank]), layer=None, what="gather")
    summed = torch.empty(1, dtype=torch.int64)
    world.reduce_scatter(summed, torch.arange(size) + 100 * rank, layer=None, what="sum")
    return out.flatten().tolist(), gathered.tolist(), summed.tolist()


def test_collectives() -> None:
    for rank, (rows, gathered, summed) in enumerate(values(run_ranks(3, collectives))):
        assert rows == [1] * (1 + rank) + [2] * (2 + rank)
        assert gathered == [0, 0, 1, 10, 2, 20]
        assert summed == [3 * rank + 300]


def leaves(world: World) -> str:
    """Rank 0 leaves; the other waits for it."""
    if world.rank == 0:
        world.close()
    world.step = 4
    try:
        world.all_gather(torch.empty(2), torch.ones(1), layer=None, what="gather")
    except WorldError as error:
        assert error.layer is None and not error.timed_out
        return str(error)
    return "gathered"


def meets(world: World) -> list[str]:
    """All come, rank 1 last; then rank 0 waits alone, until it is stopped and until its time is over."""
    if world.rank == 1:
        time.sleep(0.5)
    world.meet("loaded", timeout_s=120.0)
    said = []
    if world.rank == 0:
        stop = threading.Event()
        stop.set()
        for limit_s, event in ((120.0, stop), (0.1, None)):
            with pytest.raises(WorldError) as caught:
                world.meet("warm", timeout_s=limit_s, stop=event)
            said.append(str(caught.value))
    world.meet("done", timeout_s=120.0)
    return said


def test_ranks_meet_for_longer_than_in_a_collective() -> None:
    waited, other = values(run_ranks(2, meets, config=WorldConfig(join_timeout_s=120, collective_timeout_s=0.2)))
    assert other == []
    assert waited == [
        "rank 0 of 2, waiting until all are warm: stopped",
        "rank 0 of 2, waiting until all are warm: timed out after 0.1 s without rank 1",
    ]


def test_a_rank_that_leaves_is_told_to_the_others() -> None:
    left, waiting = values(run_ranks(2, leaves))
    assert left.startswith("rank 0 of 2, step 4, gather: this rank has left the group")
    assert waiting.startswith("rank 1 of 2, step 4, gather: ") and "onnection" in waiting, waiting


def keep_a_place(end: Connection) -> None:
    place = MeetingPlace(HOST)
    end.send(place.address)
    end.recv()
    place.close()


def freeze_and_die(world: World, keeper: int) -> tuple[int, ...]:
    """Rank 0 stops the process of the meeting place, then rank 1 dies."""
    if world.rank == 0:
        os.kill(keeper, signal.SIGSTOP)
    world.all_gather(torch.empty(2), torch.ones(1), layer=None, what="gather")
    if world.rank == 1:
        os._exit(3)
    with pytest.raises(WorldError) as raised:
        world.all_gather(torch.empty(2), torch.ones(1), layer=None, what="gather")
    assert not raised.value.timed_out
    return raised.value.silent


def test_a_frozen_meeting_place_holds_up_no_error() -> None:
    """torch would wait for its answer without end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    keeper = context.Process(target=keep_a_place, args=(theirs,), daemon=True)
    keeper.start()
    try:
        alive, dead = run_ranks(2, freeze_and_die, keeper.pid, address=ours.recv())
        assert alive.value == () and dead.exit_code == 3
    finally:
        keeper.kill()
        keeper.join()


def test_a_world_waits_for_all_its_ranks_and_names_those_who_did_not_come() -> None:
    place = MeetingPlace(HOST)
    with pytest.raises(WorldError, match="rank 0 of 3, joining the group: timed out after 2 s without rank 1, rank 2"):
        join(place, size=3, timeout_s=2)
    place.close()


def test_waiting_for_ranks_can_be_stopped() -> None:
    place, stop = MeetingPlace(HOST), threading.Event()
    stop.set()
    with pytest.raises(WorldError, match="stopped"):
        join(place, size=2, timeout_s=3600, stop=stop)
    place.close()


def test_a_place_that_is_gone() -> None:
    place = MeetingPlace(HOST)
    place.close()
    with pytest.raises(WorldError, match="joining the group"):
        join(place, size=2, timeout_s=2)


def test_ports_are_the_systems() -> None:
    first, second = MeetingPlace(HOST), MeetingPlace(HOST)
    assert first.address != second.address
    first.close()
    second.close()
