"""A rank or the leader is lost while the others sit in a collective: named, and nothing stays behind."""

from __future__ import annotations

import multiprocessing
import re
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from actors.engine.group.channel import GroupConfig
from actors.parallel.world import WorldConfig
from tests.unit.engine.engine_requests import request
from tests.unit.engine.group.losses import assert_ranks_end_with_their_leader, lost_in
from tests.unit.engine.group.rank_group import PATIENT, Fault
from tests.unit.engine.group.shared_experts import NEVER, SharingGroup
from tests.unit.engine.harness import Rig

IMPATIENT = replace(NEVER, collective_timeout_s=4.0)
SOON = GroupConfig(tick_s=0.2, serving_silence_s=4.0)
IN_LAYER = r"rank [01] of 3, step 3, layer 1, dispatch: .*\(no word from rank 2\)"
IN_PROMPT = r"rank [01] of 3, step 3, layer 1, dispatch of counts: .*\(no word from rank 2\)"


@pytest.mark.parametrize(
    ("kind", "prompt", "config", "world", "reason"),
    [
        ("raise", 6, PATIENT, NEVER, "RuntimeError: a kernel broke"),
        ("die", 6, PATIENT, NEVER, "the connection was closed"),
        ("die", 60, PATIENT, NEVER, "the connection was closed"),
        ("hang", 6, PATIENT, IMPATIENT, IN_LAYER),
        ("freeze", 60, PATIENT, IMPATIENT, IN_PROMPT),
        ("freeze", 6, SOON, replace(NEVER, collective_timeout_s=8.0), "it said nothing for 4.0 s"),
    ],
)
def test_a_rank_that_is_lost_in_a_step_is_named_by_those_who_wait_for_it(
    kind: str, prompt: int, config: GroupConfig, world: WorldConfig, reason: str
) -> None:
    """In a step of replies, or of a prompt. Where no limit ends a collective, only the loss itself can."""
    stays = kind in ("freeze", "hang")
    with SharingGroup(3, config=config, world=world, fault=Fault(rank=2, kind=kind, step=3)) as group:
        rig = Rig(group.model, group=group.join, max_batched_tokens=8)
        with rig:
            rig.submit(0, request([5] * prompt, max_tokens=100))
            error = lost_in(group, rig)
            assert error.rank == 2
            assert str(error).startswith("rank 2 is lost: ") and re.search(reason, str(error)), str(error)
            group.wait_gone(but=(2,) if stays else ())
            if stays:
                group.processes[2].kill()


def test_a_rank_that_is_lost_while_loads_are_compared_is_named() -> None:
    with SharingGroup(3) as group:
        take_load = group.experts.take_load

        def kill_first() -> Any:
            group.processes[1].kill()
            return take_load()

        group.experts.take_load = kill_first  # type: ignore[method-assign]
        with Rig(group.model, group=group.rebalanced) as rig:
            rig.submit(0, request([5] * 6, max_tokens=100))
            error = lost_in(group, rig)
            assert error.rank == 1
            group.wait_gone()


def test_a_leader_whose_own_part_fails_keeps_nobody_waiting() -> None:
    with SharingGroup(3) as group:
        rig = Rig(group.model, group=group.join)

        def fail(plan: object) -> object:
            raise RuntimeError("the leader's kernel broke")

        rig.runner.run = fail  # type: ignore[method-assign, assignment]
        with rig:
            rig.submit(0, request([5] * 6))
            with pytest.raises(
                Exception, match=r"the leader's kernel broke|rank 0 of 3|rank [12] of 3, step 1, layer 1"
            ):
                rig.sink.wait(lambda: False, timeout_s=60.0)
            group.wait_gone()


def lead(told: Connection[Any, Any]) -> None:
    """A leader in a process of its own: tells the process ids of its ranks, and when they are in a step.

    In the second step rank 1 hangs, and the others wait for it in a collective.
    """
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    with SharingGroup(3, fault=Fault(rank=1, kind="hang", step=2), context=context) as group:
        with Rig(group.model, group=group.join) as rig:
            told.send([process.pid for process in group.processes.values()])
            rig.submit(0, request([5] * 4, max_tokens=190))
            rig.sink.wait(lambda: bool(rig.sink.steps), timeout_s=60.0)
            told.send("running")
            threading.Event().wait()


def test_ranks_in_a_collective_end_when_their_leader_is_killed() -> None:
    assert_ranks_end_with_their_leader(lead)
