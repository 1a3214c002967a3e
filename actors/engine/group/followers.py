"""The other ranks of a group as its leader sees them: what they were sent, what they answered, whether they live.

The first rank that is lost, for whatever reason, ends the group: every connection is cut, upon which the processes of
the other ranks end by themselves, and everybody who waits here is told which rank it was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from actors.engine.group.channel import ChannelBroken, GroupConfig, RankChannel
from actors.engine.group.kv_messages import KvAnswer, KvOrder
from actors.engine.group.kv_remote import RemoteKvRank
from actors.engine.group.messages import (
    AskHeld,
    Done,
    End,
    Failed,
    FromRank,
    Held,
    Loading,
    Ready,
    RoleSet,
    SetRole,
    ToRank,
    Written,
)
from actors.engine.plan import LayerPart
from actors.parallel.kv_transfer import TransportError
from actors.parallel.world import WorldError
from actors.types import EngineRole


class RankLost(RuntimeError):
    """A rank died, fell silent, failed or hangs. The group is at its end."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} is lost: {reason}")
        self.rank = rank


class Followers:
    """Ranks 1 .. size - 1. Threads read and tick from the start until ``close``."""

    def __init__(self, connections: Mapping[int, Connection[Any, Any]], config: GroupConfig) -> None:
        """``connections``: as ``Meeting.wait`` gives them."""
        self._config = config
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._loading: dict[int, Loading] = {}
        self._ready: dict[int, Ready] = {}
        self._done: dict[int, Done] = {}
        self._written: list[tuple[int, LayerPart]] = []
        self._roles_set: dict[int, int] = {}
        self._lost: RankLost | None = None
        self._on_lost: Callable[[Exception], None] | None = None
        self._closed = False
        self._step: tuple[int, float] | None = None
        """Number of the step under way and when it hangs."""
        self._own_done = False
        self._held: dict[int, Mapping[str, int]] = {}
        self._asking = threading.Lock()
        self._kv_ranks = {rank: RemoteKvRank(partial(self._order, rank)) for rank in sorted(connections)}
        self._channels = {
            rank: RankChannel(
                connection,
                config,
                name=f"rank-{rank}",
                on_message=partial(self._take, rank),
                on_broken=partial(self._lose, rank),
            )
            for rank, connection in sorted(connections.items())
        }
        for channel in self._channels.values():
            channel.start()
        self._over = threading.Event()
        self._watchdog = threading.Thread(target=self._watch_steps, name="group-watchdog", daemon=True)
        self._watchdog.start()

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self._channels)

    def watch(self, on_lost: Callable[[Exception], None]) -> None:
        """``on_lost`` is called once, on any thread, when a rank is lost; at once if one is already."""
        with self._changed:
            self._on_lost = on_lost
            lost = self._lost
        if lost is not None:
            on_lost(lost)

    def wait_ready(self) -> tuple[int, ...]:
        """KV blocks of each rank, once all are loaded. Raises RankLost."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or len(self._ready) == len(self._channels))
            self._check()
            return tuple(self._ready[rank].block_count for rank in self._channels)

    @property
    def loading(self) -> tuple[tuple[int, int], ...]:
        """(bytes done, bytes in all) of each rank, as it said last."""
        with self._changed:
            said = [self._loading.get(rank, Loading(0, 0)) for rank in self._channels]
        return tuple((one.bytes_done, one.bytes_total) for one in said)

    @property
    def notes(self) -> dict[int, tuple[str, ...]]:
        """What the ranks that are ready say of themselves."""
        with self._changed:
            return {rank: ready.notes for rank, ready in self._ready.items()}

    @property
    def processes(self) -> tuple[int, ...]:
        """The ids of all that are ready, by rank."""
        with self._changed:
            return tuple(ready.process for _, ready in sorted(self._ready.items()))

    @property
    def kv_ranks(self) -> tuple[RemoteKvRank, ...]:
        """The KV of each rank."""
        return tuple(self._kv_ranks.values())

    def ask_held(self) -> list[Mapping[str, int]]:
        """What each rank keeps for sequences, once it has done what it was told before. Raises RankLost."""
        with self._asking:
            for rank in self._channels:
                self.send(rank, AskHeld())
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or self._lost is not None or len(self._held) == len(self._channels)
                )
                self._check()
                held, self._held = self._held, {}
            return [held[rank] for rank in sorted(held)]

    def set_role(self, role: EngineRole) -> None:
        """Tells the ranks; ``wait_role`` waits until they have it. Raises RankLost."""
        with self._changed:
            self._roles_set = {}
        for rank, channel in self._channels.items():
            channel.be_patient(True)
            self.send(rank, SetRole(role))

    def wait_role(self) -> tuple[int, ...]:
        """KV blocks of each rank in its new role. Raises RankLost."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or len(self._roles_set) == len(self._channels))
            self._check()
            return tuple(self._roles_set[rank] for rank in self._channels)

    def send(self, rank: int, message: ToRank) -> int:
        """The number of bytes. Raises RankLost."""
        try:
            return self._channels[rank].send(message)
        except ChannelBroken as error:
            with self._changed:
                self._check()
            raise RankLost(rank, str(error)) from error

    def begin(self, step: int) -> None:
        """From now on the ranks, this one too, have the step's time to finish it."""
        with self._changed:
            self._check()
            self._own_done = False
            self._step = (step, time.monotonic() + self._config.step_timeout_s)

    def own_part_done(self) -> None:
        """The leader's own part of the step is computed."""
        with self._changed:
            self._own_done = True

    def take_written(self) -> list[tuple[int, LayerPart]]:
        """What ranks have said since the last time of the step under way: their number, and the layers whose keys and
        values they have.
        """
        with self._changed:
            written, self._written = self._written, []
        return written

    def gather(self, number: int) -> list[Done]:
        """The results of parts of that number, by rank. Ends the step. Raises RankLost."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or len(self._done) == len(self._channels))
            self._check()
            self._step = None
            done, self._done = self._done, {}
        for rank in self._channels:
            if done[rank].number != number:
                raise self._defect(rank, f"it answered part {done[rank].number} instead of {number}")
        return [done[rank] for rank in self._channels]

    def blame(self, error: WorldError) -> RankLost:
        """The world broke in the leader. Ends the group, and tells who is lost: whoever gave no word, unless the group
        ended before because of another.
        """
        return self._defect(_suspect(error.silent, error.rank), str(error))

    def give_up(self, reason: str) -> None:
        """The leader cannot go on: the other ranks end at once, whatever they are doing."""
        self._lose(0, reason)

    def close(self) -> None:
        """Lets the ranks' processes end, and the connections with them. Idempotent."""
        with self._changed:
            self._closed = True
            lost = self._lost
            self._changed.notify_all()
        self._over.set()
        for channel in self._channels.values():
            if lost is None:
                try:
                    channel.send(End())
                except ChannelBroken:
                    pass  # It is gone already.
        for channel in self._channels.values():
            channel.close()
        for kv_rank in self._kv_ranks.values():
            kv_rank.lose("the group has ended")
        self._watchdog.join()

    def _order(self, rank: int, order: KvOrder) -> None:
        try:
            self._channels[rank].send(order)
        except ChannelBroken as error:
            raise TransportError(f"rank {rank} is lost: {error}") from error

    def _take(self, rank: int, message: FromRank) -> None:
        match message:
            case KvAnswer():
                self._kv_ranks[rank].take(message)
            case Held(counts):
                with self._changed:
                    self._held[rank] = counts
                    self._changed.notify_all()
            case Loading():
                with self._changed:
                    self._loading[rank] = message
            case Ready():
                self._kv_ranks[rank].address = message.kv_address
                self._channels[rank].be_patient(False)
                with self._changed:
                    self._ready[rank] = message
                    self._changed.notify_all()
            case RoleSet(block_count):
                self._channels[rank].be_patient(False)
                with self._changed:
                    self._roles_set[rank] = block_count
                    self._changed.notify_all()
            case Written(layers):
                with self._changed:
                    self._written.append((rank, layers))
            case Done():
                with self._changed:
                    self._done[rank] = message
                    self._changed.notify_all()
            case Failed(reason, silent):
                self._lose(_suspect(silent, rank), reason)
            case _:
                self._lose(rank, f"it said {message}")

    def _defect(self, rank: int, reason: str) -> RankLost:
        self._lose(rank, reason)
        with self._changed:
            return self._lost or RankLost(rank, reason)

    def _lose(self, rank: int, reason: str) -> None:
        with self._changed:
            if self._lost is not None or self._closed:
                return
            lost = self._lost = RankLost(rank, reason)
            on_lost = self._on_lost
            self._changed.notify_all()
        for channel in self._channels.values():
            channel.hang_up()
        for kv_rank in self._kv_ranks.values():
            kv_rank.lose(str(lost))
        if on_lost is not None:
            on_lost(lost)

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _watch_steps(self) -> None:
        """A rank may hang with its connection alive, and this one with it, in a collective.

        Looks now and then by itself: whatever woke it in every step would hold the step thread up.
        """
        while not self._over.wait(min(self._config.tick_s, self._config.step_timeout_s / 10)):
            with self._changed:
                if self._step is None or time.monotonic() < self._step[1]:
                    continue
                step = self._step[0]
                missing = [*([] if self._own_done else [0]), *(self._channels.keys() - self._done.keys())]
            others = f" (nor did ranks {missing[1:]})" if missing[1:] else ""
            self._lose(missing[0], f"it did not finish step {step} in {self._config.step_timeout_s} s{others}")
            return


def _suspect(silent: tuple[int, ...], witness: int) -> int:
    """Who is lost, if ``witness`` saw the world break and heard nothing of the ``silent``.

    The leader last: it may be computing, while its connections tell it of the death of others.
    """
    return min(silent, key=lambda rank: (rank == 0, rank), default=witness)
