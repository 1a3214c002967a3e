"""What runs in the process of every rank but the leader's: it computes its parts, and ends with its leader."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from actors.engine.execution.runner import Runner
from actors.engine.group.channel import RankChannel
from actors.engine.group.kv_messages import KvOrder
from actors.engine.group.kv_orders import KvOrders
from actors.engine.group.meeting import Invitation, join
from actors.engine.group.messages import (
    AskHeld,
    Done,
    Embedding,
    End,
    Failed,
    Held,
    Loading,
    MoveExperts,
    Part,
    Ready,
    RoleSet,
    SetRole,
    TakeLoad,
    ToRank,
    Written,
)
from actors.engine.group.remote_constraints import SentConstraint
from actors.engine.plan import LayerPart, StepResult
from actors.ernie.weights import Progress
from actors.parallel.kv_threads import LocalKvRank
from actors.parallel.world import WorldError

log = logging.getLogger(__name__)

LEADER_LOST = 70
"""Exit status of a rank whose leader is gone, with no word."""


class Loaded(NamedTuple):
    runner: Runner
    notes: tuple[str, ...]
    """What the rank says of itself, for people."""


def follow(
    invitation: Invitation, rank: int, load: Callable[[Progress], Loaded], kv_rank: Callable[[Runner], LocalKvRank]
) -> None:
    """Joins the group, loads, and computes parts of steps until the leader ends the group; meanwhile sends and receives
    KV as the leader orders, by ``kv_rank`` of what was loaded.

    The connection comes first: whatever happens while ranks load, each knows whether the leader is there. When the
    leader is lost the process ends at once, whatever it is doing: it may be in a collective that nobody else is in.

    Closes both at the end. Raises whatever ``load`` or a step raises, after the leader was told and before any
    other rank learns of it.
    """

    inbox: queue.SimpleQueue[ToRank] = queue.SimpleQueue()
    dismissed, finished = threading.Event(), threading.Event()
    orders: KvOrders | None = None

    def hear(message: ToRank) -> None:
        if isinstance(message, KvOrder):
            assert orders is not None, "nothing is ordered of a rank that is not ready"
            orders.take(message)
            return
        if isinstance(message, End):
            dismissed.set()
        inbox.put(message)

    def leave(reason: str) -> None:
        if dismissed.is_set() and finished.wait(invitation.config.silence_s):
            return
        log.critical("rank %d ends without its leader: %s", rank, reason)
        logging.shutdown()
        os._exit(LEADER_LOST)

    channel = RankChannel(join(invitation, rank), invitation.config, name="leader", on_message=hear, on_broken=leave)
    channel.start()
    runner: Runner | None = None
    try:
        runner, notes = load(lambda done, total: channel.send(Loading(done, total)))
        orders = KvOrders(kv_rank(runner), channel.send)
        channel.send(Ready(runner.block_count, os.getpid(), orders.address, notes))
        _compute(runner, orders, inbox, channel)
    except BaseException as error:
        channel.send(_failed(error))
        raise
    finally:
        finished.set()
        if orders is not None:
            orders.close()
        if runner is not None:
            runner.close()
        channel.close()


def _failed(error: BaseException) -> Failed:
    if isinstance(error, WorldError):
        return Failed(str(error), error.silent)
    return Failed("".join(traceback.format_exception(error)).strip())


def _compute(runner: Runner, orders: KvOrders, inbox: queue.SimpleQueue[ToRank], channel: RankChannel) -> None:
    constraints: dict[int, SentConstraint] = {}

    def tell_written(layers: LayerPart) -> None:
        channel.send(Written(layers))

    while True:
        match inbox.get():
            case Part() as part:
                has_prompts = any(piece.count > 1 for piece in part.plan.slices)
                runner.kv_written = tell_written if has_prompts else None
                started = time.perf_counter()
                result = _run(runner, part, constraints)
                channel.send(Done(part.number, result, time.perf_counter() - started))
            case Embedding() as unit:
                runner.supply_embedding(unit.id, unit.media_index, unit.unit_index, unit.tensor())
            case TakeLoad():
                runner.need_experts().take_load()
            case MoveExperts(wanted):
                runner.need_experts().move(wanted)
            case SetRole(role):
                runner.set_role(role)
                channel.send(RoleSet(runner.block_count))
            case AskHeld():
                channel.send(Held({"rank_sequences": runner.resident_count, **orders.held()}))
            case End():
                return
            case other:
                raise ValueError(f"the leader said {other}")


def _run(runner: Runner, part: Part, constraints: dict[int, SentConstraint]) -> StepResult:
    for id in part.plan.ended:
        constraints.pop(id, None)
    for id, row in part.masks.items():
        if id not in constraints:
            constraints[id] = SentConstraint()
            runner.supply_constraint(id, constraints[id])
        constraints[id].row = row
    return runner.run(part.plan)
