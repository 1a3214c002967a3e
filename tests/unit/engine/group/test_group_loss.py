"""A rank or the leader is lost: named by whoever is left, and nothing stays behind. Times are bounds of patience."""

from __future__ import annotations

import multiprocessing
import pickle
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client, Connection
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from actors.engine.group.channel import GroupConfig, RankChannel
from actors.engine.group.followers import RankLost
from actors.engine.group.meeting import Meeting, join
from actors.engine.group.rank_process import LEADER_LOST
from tests.unit.engine.engine_requests import request
from tests.unit.engine.group.losses import assert_ranks_end_with_their_leader, lost_in
from tests.unit.engine.group.rank_group import HOST, PATIENT, Fault, RankGroup, RankLoader, small_model, start_rank
from tests.unit.engine.harness import Rig

SOON = GroupConfig(tick_s=0.2, silence_s=60.0, serving_silence_s=4.0, step_timeout_s=6.0)


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("raise", PATIENT, "RuntimeError: a kernel broke"),
        ("die", PATIENT, "the connection was closed"),
        ("freeze", SOON, "it said nothing for 4.0 s"),
        ("hang", SOON, "it did not finish step 3 in 6.0 s"),
    ],
)
def test_a_rank_that_is_lost_in_a_step_ends_the_group_and_is_named(kind: str, config: GroupConfig, reason: str) -> None:
    loader = RankLoader(fault=Fault(rank=2, kind=kind, step=3))
    with RankGroup(3, loader.main, config) as group:
        rig = Rig(group=group.join)
        with rig:
            rig.submit(0, request([5] * 6, max_tokens=100))
            error = lost_in(group, rig)
            assert error.rank == 2
            assert str(error).startswith("rank 2 is lost: ") and reason in str(error)
            # A frozen process cannot end by itself; the one beside it does, in the midst of its idleness.
            group.wait_gone(but=(2,) if kind == "freeze" else ())
            if kind == "freeze":
                group.processes[2].kill()


def test_a_rank_that_dies_while_nothing_is_to_be_done_is_noticed_at_once() -> None:
    with RankGroup(3) as group, Rig(group=group.join) as rig:
        rig.run(request([5], max_tokens=2))
        started = time.monotonic()
        group.processes[1].kill()
        error = lost_in(group, rig)
        assert (error.rank, "the connection was closed" in str(error)) == (1, True)
        assert time.monotonic() - started < PATIENT.silence_s
        group.wait_gone()


def test_a_rank_that_cannot_load_is_named() -> None:
    with RankGroup(2, RankLoader(blocks=-1).main) as group:
        with pytest.raises(RankLost, match="rank 1 is lost: Traceback"):
            group.join(RankLoader().runner(0, *small_model()))
        group.wait_gone()


def test_the_leaders_own_part_that_hangs_is_named_with_the_ranks_that_wait_for_it() -> None:
    """As in a collective: nobody returns, and the step thread cannot be interrupted."""
    config = GroupConfig(tick_s=0.2, serving_silence_s=4.0, step_timeout_s=3.0)
    with RankGroup(2, RankLoader(fault=Fault(rank=1, kind="hang")).main, config) as group:
        rig = Rig(group=group.join)
        run = rig.runner.run
        waited: list[bool] = []

        def hang(plan: object) -> object:
            waited.append(group.processes[1].join(60) is None)
            return run(plan)  # type: ignore[arg-type]

        rig.runner.run = hang  # type: ignore[method-assign, assignment]
        with rig:
            rig.submit(0, request([5]))
            error = lost_in(group, rig)
        assert str(error) == "rank 0 is lost: it did not finish step 1 in 3.0 s (nor did ranks [1])"
        assert waited == [True]


def test_idle_ranks_and_their_leader_hear_of_each_other() -> None:
    with RankGroup(2, config=GroupConfig(tick_s=0.2, silence_s=3.0)) as group, Rig(group=group.join) as rig:
        before = rig.run(request([5] * 5))
        time.sleep(4.0)  # longer than anybody may be silent
        assert rig.sink.fatal is None
        assert rig.submit("again", request([5] * 5))
        rig.sink.wait(lambda: len(rig.sink.released) == 2)
        assert rig.sink.ids(rig.sink.released[1]) == before[0]


class Stalled(Connection):  # type: ignore[type-arg]
    """Its first look takes longer than anybody may be silent, and sees nothing: as where all processes stood still."""

    looked = False

    def poll(self, timeout: float | None = 0.0) -> bool:
        if not self.looked:
            self.looked = True
            time.sleep(0.4)
            return False
        return super().poll(timeout)


def test_who_stood_still_takes_nobody_for_silent() -> None:
    config = GroupConfig(tick_s=0.1, serving_silence_s=0.2)
    told: SimpleQueue[str] = SimpleQueue()
    with socket.create_server((HOST, 0)) as server:
        there: Connection[Any, Any] = Connection(socket.create_connection(server.getsockname()).detach())
        here, _ = server.accept()
    there.send_bytes(pickle.dumps("hello"))
    channel = RankChannel(Stalled(here.detach()), config, name="rank", on_message=told.put, on_broken=told.put)
    channel.be_patient(False)
    channel.start()
    assert told.get(timeout=60) == "hello"
    assert told.get(timeout=60) == "it said nothing for 0.2 s"
    channel.close()
    there.close()


def lead(told: Connection[Any, Any]) -> None:
    """A leader in a process of its own: tells the process ids of its ranks, and when they are in a step.

    In the second step rank 1 hangs.
    """
    torch.set_num_threads(1)
    main = RankLoader(fault=Fault(rank=1, kind="hang", step=2)).main
    with RankGroup(3, main, context=multiprocessing.get_context("fork")) as group, Rig(group=group.join) as rig:
        told.send([process.pid for process in group.processes.values()])
        for number in range(3):
            rig.submit(number, request([5 + number] * 4, max_tokens=190))
        rig.sink.wait(lambda: bool(rig.sink.steps), timeout_s=60.0)
        told.send("running")
        threading.Event().wait()


def test_ranks_end_when_their_leader_is_killed() -> None:
    """One sits in a step that will never end, as in a collective; the other has nothing to do."""
    assert_ranks_end_with_their_leader(lead)


def test_a_rank_whose_leader_falls_silent_ends_by_itself() -> None:
    meeting = Meeting(HOST, 2, GroupConfig(tick_s=0.2, silence_s=2.0))
    process = start_rank(RankLoader().main, meeting.invitation, 1)
    (leader,) = meeting.wait().values()
    process.join(60)
    assert process.exitcode == LEADER_LOST
    leader.close()


def test_only_who_knows_the_key_comes_in_and_nobody_keeps_the_others_waiting() -> None:
    meeting = Meeting(HOST, 2, GroupConfig(silence_s=30.0))
    address = (HOST, meeting.invitation.port)
    assert "key" not in repr(meeting.invitation)
    with socket.create_connection(address) as silent, socket.create_connection(address) as rude:
        rude.sendall(b"\x00\x00\x00\x04junk")
        with ThreadPoolExecutor(3) as pool:
            waiting = pool.submit(meeting.wait)
            thief = pool.submit(Client, address, authkey=b"another")
            with pytest.raises(Exception, match="digest"):
                thief.result(60)
            mine = pool.submit(join, meeting.invitation, 1)
            come = waiting.result(60)
            assert list(come) == [1]
            mine.result(60).close()
            come[1].close()
        assert silent.fileno() >= 0


def test_a_rank_that_does_not_come_is_named() -> None:
    meeting = Meeting(HOST, 3, GroupConfig(join_timeout_s=0.3))
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not come"):
        meeting.wait()


def test_times_of_a_group_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"GroupConfig.silence_s = 1.0 must be more than tick_s = 1.0"):
        GroupConfig(silence_s=1.0, serving_silence_s=1.0)
    with pytest.raises(ValueError, match=r"GroupConfig.step_timeout_s must be positive, got 0"):
        GroupConfig(step_timeout_s=0)
