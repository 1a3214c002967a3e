"""What tests of lost ranks and leaders share."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest

from actors.engine.group.followers import RankLost
from tests.unit.engine.group.rank_group import CONTEXT, RankGroup
from tests.unit.engine.harness import Rig
from tests.waiting import wait_until


def lost_in(group: RankGroup, rig: Rig) -> RankLost:
    """The error that ends the engine."""
    with pytest.raises(RankLost) as caught:
        rig.sink.wait(lambda: False, timeout_s=60.0)
    rig.engine._thread.join(60)
    assert not rig.engine._thread.is_alive()
    return caught.value


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def assert_ranks_end_with_their_leader(lead: Callable[[Connection[Any, Any]], None]) -> None:
    """``lead`` runs in a process that is killed: it tells the process ids of its two ranks, then that a step runs."""
    hears, tells = multiprocessing.Pipe(duplex=False)
    leader = CONTEXT.Process(target=lead, args=(tells,))
    leader.start()
    try:
        assert hears.poll(120)
        ranks = [psutil.Process(pid) for pid in hears.recv()]
        assert hears.poll(120) and hears.recv() == "running"
        assert len(ranks) == 2 and not any(map(is_gone, ranks))
    finally:
        leader.kill()
        leader.join()
    wait_until(lambda: all(map(is_gone, ranks)))
