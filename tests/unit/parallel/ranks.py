"""Runs a function as the ranks of a world, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from actors.parallel.world import MeetingPlace, World, WorldConfig, WorldError, join_world

HOST = "127.0.0.1"
PATIENCE_S = 240
"""Bounds the test as a whole; nothing that is tested takes this long."""
LONG = WorldConfig(join_timeout_s=120, collective_timeout_s=120)
"""A limit no healthy group reaches on a busy machine, and no broken one may need."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rank ended: with a value, with a WorldError told by its parts, with another error, or without a word."""

    value: Any = None
    world_error: dict[str, Any] | None = None
    error: str | None = None
    exit_code: int | None = None
    """Of a rank that ended without a word."""


def run_ranks(
    size: int,
    work: Callable[..., Any],
    *args: Any,
    config: WorldConfig = LONG,
    ranks: Sequence[int] | None = None,
    address: str | None = None,
) -> list[Outcome]:
    """``work(world, *args)`` on every rank; outcomes of ``ranks`` (None = all). Then kills what still runs.

    ``address`` of a meeting place; None = one in this process.
    """
    place, name = MeetingPlace(HOST), uuid.uuid4().hex
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_rank, args=(theirs, address or place.address, name, rank, size, config, work, args), daemon=True
        )
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    try:
        return [_outcome(ends[rank], processes[rank]) for rank in (range(size) if ranks is None else ranks)]
    finally:
        for process in processes:
            process.kill()
            process.join()
        place.close()


def values(outcomes: list[Outcome]) -> list[Any]:
    """What the ranks returned; their errors are the test's."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.world_error is None and outcome.error is None and outcome.exit_code is None, (rank, outcome)
    return [outcome.value for outcome in outcomes]


def _outcome(end: Connection, process: BaseProcess) -> Outcome:
    try:
        if end.poll(PATIENCE_S):
            return end.recv()
        return Outcome(error="did not end")
    except EOFError:
        process.join()
        return Outcome(exit_code=process.exitcode)


def _rank(
    end: Connection,
    address: str,
    name: str,
    rank: int,
    size: int,
    config: WorldConfig,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        world = join_world(
            address, name=name, rank=rank, size=size, host=HOST, device=torch.device("cpu"), config=config
        )
        end.send(Outcome(value=_with(world, work, args)))
    except WorldError as error:
        parts = {"text": str(error), "rank": error.rank, "step": error.step, "layer": error.layer}
        end.send(Outcome(world_error=parts | {"timed_out": error.timed_out, "silent": error.silent}))
    except BaseException:
        end.send(Outcome(error=traceback.format_exc()))


def _with(world: World, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        with torch.inference_mode():
            return work(world, *args)
    finally:
        world.close()
