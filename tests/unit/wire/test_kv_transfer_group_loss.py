"""A rank of either group dies in the midst of transfers: its group ends, and the other engine is told and clean."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
from torch import Tensor

from actors.engine.group.channel import GroupConfig
from actors.types import AttemptMode
from tests.unit.engine.engine_requests import chats, key
from tests.unit.engine.group.losses import is_gone
from tests.unit.engine.group.rank_group import CONTEXT, PATIENT
from tests.unit.engine.harness import Rig
from tests.unit.wire.kv_engines import Through
from tests.unit.wire.kv_groups import (
    DecodeEngineSide,
    Loop,
    PrefillEngineSide,
    Side,
    decode_group,
    is_idle,
    prefill_group,
)
from tests.waiting import wait_until

SOON = GroupConfig(tick_s=0.2, serving_silence_s=4.0)
LOSSES = [(signal.SIGKILL, PATIENT), (signal.SIGSTOP, SOON)]
KEYS = [key(number) for number in range(32)]


class Hangs(Through):
    """Neither sends nor receives."""

    def send(self, tensors: Iterable[Tensor]) -> None:
        threading.Event().wait()

    def recv(self, buffers: Sequence[Tensor], arrived: Callable[[int], None]) -> None:
        threading.Event().wait()


def end_process(_error: BaseException) -> None:
    os._exit(1)


def lead_decode(tells: Connection[Any, Any], config: GroupConfig) -> None:
    """A decode engine of two ranks that takes every request; rank 1 never receives anything."""
    with decode_group(2, config, wrap=Hangs) as group:
        side = DecodeEngineSide(Loop(), Side(join=group.join))
        side.sink.on_fatal = end_process  # type: ignore[method-assign]
        side.rig.__enter__()
        for name, (wanted, _) in zip(KEYS, chats(), strict=True):
            side.rig.engine.submit(name, wanted, AttemptMode.DECODE)
        tells.send((group.processes[1].pid, side.peer))
        threading.Event().wait()


def lead_prefill(tells: Connection[Any, Any], config: GroupConfig, peer: tuple[str, str]) -> None:
    """A prefill engine of two ranks for every request; rank 1 never sends anything."""
    with prefill_group(2, config, wrap=Hangs) as group:
        side = PrefillEngineSide(Loop(), Side(join=group.join), peer)
        side.sink.on_fatal = end_process  # type: ignore[method-assign]
        side.rig.__enter__()
        tells.send(group.processes[1].pid)
        for name, (wanted, embeddings) in zip(KEYS, chats(), strict=True):
            side.sink.embeddings[name] = embeddings or {}
            side.rig.engine.submit(name, wanted, AttemptMode.PREFILL)
        side.sink.wait(lambda: any(chunk.rank == 1 for name in KEYS for chunk in side.sink.chunks[name]))
        tells.send("sending")
        threading.Event().wait()


@contextmanager
def leading(lead: Callable[..., None], *arguments: Any) -> Iterator[Connection[Any, Any]]:
    """A leader in a process of its own, which ends when its group is lost."""
    hears, tells = multiprocessing.Pipe(duplex=False)
    leader = CONTEXT.Process(target=lead, args=(tells, *arguments))
    leader.start()
    try:
        yield hears
        leader.join(60)
        assert leader.exitcode == 1
    finally:
        leader.kill()
        leader.join()


def heard(hears: Connection[Any, Any]) -> Any:
    assert hears.poll(120)
    return hears.recv()


def end(rank: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        rank.kill()


@pytest.mark.parametrize(("sent", "config"), LOSSES)
def test_a_decode_rank_that_is_lost_ends_the_transfers_to_its_group(sent: signal.Signals, config: GroupConfig) -> None:
    loop = Loop()
    with leading(lead_decode, config) as hears:
        pid, peer = heard(hears)
        rank = psutil.Process(pid)
        with prefill_group(2) as there, PrefillEngineSide(loop, Side(join=there.join), peer) as prefill:
            for name, (wanted, embeddings) in zip(KEYS, chats(), strict=True):
                prefill.sink.embeddings[name] = embeddings or {}
                prefill.rig.engine.submit(name, wanted, AttemptMode.PREFILL)
            # What is on rank 0 has gone; what is on rank 1 never does.
            prefill.sink.wait(lambda: len(prefill.sink.released) > 5)
            prefill.sink.wait(lambda: all(prefill.sink.chunks[name] for name in KEYS))
            started = time.monotonic()
            rank.send_signal(sent)
            prefill.rig.wait_released(*KEYS)
            took_s = time.monotonic() - started
            if sent is signal.SIGKILL:
                assert took_s < config.silence_s
            # A lane may break twice before the stream does.
            assert {error.reason for error in prefill.sink.ended.values()} <= {"ENGINE_LOST", "TRANSFER_FAILED"}
            assert prefill.sender.counters.failures > 0
            prefill.rig.assert_empty()
            end(rank)  # A frozen one holds the thread that sends to it until its time is up.
            wait_until(lambda: is_idle(prefill.sender.check_integrity) and not any(prefill.rig.group.held().values()))
            assert prefill.sender.pair_count == 0
        wait_until(lambda: is_gone(rank))
    loop.close()


@pytest.mark.parametrize(("sent", "config"), LOSSES)
def test_a_prefill_rank_that_is_lost_ends_the_transfers_from_its_group(
    sent: signal.Signals, config: GroupConfig
) -> None:
    with Rig(blocks=400, max_num_seqs=32) as rig:
        want = rig.run(*chats())
    loop = Loop()
    with decode_group(2) as here, DecodeEngineSide(loop, Side(join=here.join)) as decode:
        for name, (wanted, _) in zip(KEYS, chats(), strict=True):
            decode.rig.engine.submit(name, wanted, AttemptMode.DECODE)
        with leading(lead_prefill, config, decode.peer) as hears:
            rank = psutil.Process(heard(hears))
            assert heard(hears) == "sending"
            decode.sink.wait(lambda: len(decode.sink.released) > 3)
            rank.send_signal(sent)
            decode.sink.wait(lambda: any(error.reason == "ENGINE_LOST" for error in decode.sink.ended.values()))
            for name in KEYS:
                decode.rig.engine.cancel(name)  # Those that nobody reserved for.
            decode.rig.wait_released(*KEYS)
            assert {error.reason for error in decode.sink.ended.values()} <= {"ENGINE_LOST", "CLIENT_CANCELLED"}
            finished = [number for number, name in enumerate(KEYS) if name not in decode.sink.ended]
            assert finished and all(decode.sink.ids(KEYS[number]) == want[number][1:] for number in finished)
            decode.rig.assert_empty()
            end(rank)
            wait_until(lambda: is_idle(decode.receiver.check_integrity) and not any(decode.rig.group.held().values()))
            wait_until(lambda: is_gone(rank))
    loop.close()
