"""The leader's side of an engine group: its meeting places, the processes of its ranks, and their common end."""

from __future__ import annotations

import multiprocessing
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Protocol

from actors.config import EngineReplicaConfig
from actors.engine.group.balance import BalanceConfig, Balancer
from actors.engine.group.channel import GroupConfig
from actors.engine.group.followers import Followers
from actors.engine.group.group_runner import GroupRunner
from actors.engine.group.meeting import Invitation, Meeting
from actors.engine_rank import Rank, load_rank, rank_main
from actors.ernie.weights import Progress
from actors.parallel.world import MeetingPlace, Seat, WorldConfig, WorldError
from actors.types import EngineRole

PATIENT_WORLD = WorldConfig(join_timeout_s=1800.0)
"""Ranks meet when they have loaded, and one may read its weights from a slow disk."""
END_TIMEOUT_S = 10.0
"""For a rank's process to end by itself."""


class RankProcess(Protocol):
    """What the leader asks of a rank's process, however it was started. A ``multiprocessing.Process`` is one."""

    def is_alive(self) -> bool: ...

    def join(self, timeout: float | None = None) -> None: ...

    def kill(self) -> None: ...


StartRank = Callable[[Invitation, Seat], RankProcess]
"""Starts a process that does what ``rank_main`` does."""


def child_processes(config: EngineReplicaConfig, role: EngineRole) -> StartRank:
    """Ranks as children of the leader's process, on its node."""
    context = multiprocessing.get_context("spawn")

    def start(invitation: Invitation, seat: Seat) -> RankProcess:
        process = context.Process(
            target=rank_main, args=(invitation, seat, config, role), name=f"engine-rank-{seat.rank}", daemon=True
        )
        process.start()
        return process

    return start


def start_processes(config: EngineReplicaConfig, role: EngineRole, host: str) -> EngineGroup:
    """A group whose ranks are children of this process, which leads it."""
    return EngineGroup([host] * config.ranks, child_processes(config, role), balance=balance_config(config))


def balance_config(config: EngineReplicaConfig) -> BalanceConfig | None:
    """When the experts of such a group change ranks; None is never."""
    return BalanceConfig(every_steps=config.rebalance_steps) if config.rebalance_steps else None


class EngineGroup:
    """Starts ranks 1 .. size - 1 at once and waits until their processes have come. ``close`` ends everything.

    Raises TimeoutError or RuntimeError if a rank does not come.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        start: StartRank,
        *,
        config: GroupConfig | None = None,
        world: WorldConfig = PATIENT_WORLD,
        balance: BalanceConfig | None = None,
    ) -> None:
        """``hosts``: the address of each rank's node, by rank; the leader listens on the first. ``balance``: None
        leaves the experts where they are.
        """
        size = len(hosts)
        if size < 2:
            raise ValueError(f"a group has two ranks or more, not {size}")
        self._balance = balance
        self._balancer: Balancer | None = None
        self._rank: Rank | None = None
        self._followers: Followers | None = None
        self._place = MeetingPlace(hosts[0])
        meeting = Meeting(hosts[0], size, config)
        name = uuid.uuid4().hex
        self._seats = [
            Seat(address=self._place.address, name=name, rank=rank, size=size, host=host, config=world)
            for rank, host in enumerate(hosts)
        ]
        self.processes: dict[int, RankProcess] = {}
        try:
            for seat in self._seats[1:]:
                self.processes[seat.rank] = start(meeting.invitation, seat)
            self._followers = Followers(meeting.wait(self._check_processes), meeting.invitation.config)
        except BaseException:
            self.close()
            raise
        finally:
            meeting.close()

    def load(
        self, config: EngineReplicaConfig, role: EngineRole, progress: Progress | None = None
    ) -> tuple[Rank, GroupRunner]:
        """The leader's own rank, loaded as ``load_rank`` does while the others load theirs, and the whole group.

        Raises ValueError as ``load_rank`` does; RankLost. The group is closed then.
        """
        assert self._followers is not None, "a closed group loads nothing"
        stop = threading.Event()
        self._followers.watch(lambda _: stop.set())
        try:
            self._rank = load_rank(config, role, progress, self._seats[0], stop)
            runner = self._rank.runner
            if self._balance is not None:
                self._balancer = Balancer(runner.need_experts(), self._followers, self._balance)
            return self._rank, GroupRunner(runner, self._followers, self._balancer)
        except WorldError as error:
            lost = self._followers.blame(error)
            self.close()
            raise lost from error
        except BaseException as error:
            self._followers.give_up(f"it could not load: {error!r}")
            self.close()
            raise

    @property
    def loading(self) -> tuple[tuple[int, int], ...]:
        """(bytes done, bytes in all) of each rank but the leader's."""
        return () if self._followers is None else self._followers.loading

    @property
    def notes(self) -> tuple[str, ...]:
        """What the ranks but the leader's say of what they read: the first of their notes."""
        said = {} if self._followers is None else self._followers.notes
        return tuple(f"rank {rank}: {notes[0]}" for rank, notes in sorted(said.items()))

    def close(self) -> None:
        """Lets the ranks end, and ends those that do not. No step runs any more. Idempotent."""
        if self._balancer is not None:
            self._balancer.close()
        if self._followers is not None:
            self._followers.close()
        for process in self.processes.values():
            process.join(END_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()
        if self._rank is not None:
            self._rank.runner.close()
        self._place.close()

    def _check_processes(self) -> None:
        dead = [rank for rank, process in self.processes.items() if not process.is_alive()]
        if dead:
            raise RuntimeError(f"the processes of ranks {dead} died at once")
