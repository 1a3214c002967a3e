"""Runs steps on all ranks of a group. With one rank it only calls that rank's runner.

leader   masks, parts ==send==> | own part | gather |
rank r           receive        |  its part  | ==send==>
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from actors.engine.constraints.constraint import TokenConstraint, mask_words
from actors.engine.execution.runner import Runner
from actors.engine.group.balance import BalanceCounters, Balancer
from actors.engine.group.followers import Followers
from actors.engine.group.kv_remote import RemoteKvRank
from actors.engine.group.messages import Embedding, Part
from actors.engine.group.remote_constraints import RemoteConstraints
from actors.engine.plan import LayerPart, StepPlan, StepResult
from actors.parallel.world import WorldError
from actors.reports import GroupReport
from actors.types import EngineRole


@dataclass(kw_only=True, slots=True)
class GroupCounters:
    """Sums since the start, in seconds but for ``steps`` and ``sent_bytes``. Read by others, who keep differences."""

    steps: int = 0
    """Plans that were run, those without tokens among them."""
    plan_s: float = 0.0
    """From a plan to its last part on its way: masks, pickling, sending."""
    own_s: float = 0.0
    """The leader's own part."""
    gather_s: float = 0.0
    """From the end of the own part to the last of the others' results."""
    rank_s: list[float] = field(default_factory=list)
    """Computing, as each of the other ranks measured it."""
    sent_bytes: int = 0
    """Of parts."""
    balance: BalanceCounters | None = None
    """None where experts stay where they are."""


class _Home(NamedTuple):
    rank: int
    outputs: tuple[int, ...]
    """That it was introduced with."""


class GroupRunner:
    """Implements ``StepRunner``. The step thread's own."""

    def __init__(self, runner: Runner, followers: Followers | None = None, balancer: Balancer | None = None) -> None:
        """``runner`` is rank 0. Waits until the ``followers`` are loaded; closing them is their owner's, and so are the
        runner and the ``balancer``, without which experts stay where they are.

        Raises RankLost if one of them is lost before.
        """
        self._runner = runner
        self._followers = followers
        self._balancer = balancer
        counts = () if followers is None else followers.wait_ready()
        self.block_counts = (runner.block_count, *counts)
        self.counters = GroupCounters(
            rank_s=[0.0] * len(counts), balance=None if balancer is None else balancer.counters
        )
        self._kv_written: Callable[[int, LayerPart], None] = lambda _rank, _part: None
        self._numbers = 0
        self._homes: dict[int, _Home] = {}
        self._early: dict[int, TokenConstraint] = {}
        """Of sequences not introduced yet: where they will live is not known."""
        self._remote = RemoteConstraints(mask_words(runner.config.text.vocab_size))

    @property
    def kv_written(self) -> Callable[[int, LayerPart], None]:
        """Of other ranks, called when the leader's own part of the step gives it a moment."""
        return self._kv_written

    @kv_written.setter
    def kv_written(self, told: Callable[[int, LayerPart], None]) -> None:
        self._kv_written = told
        self._runner.kv_written = self._own_kv_written

    def _own_kv_written(self, part: LayerPart) -> None:
        self._kv_written(0, part)
        self._tell_kv_written()

    def _tell_kv_written(self) -> None:
        for rank, part in () if self._followers is None else self._followers.take_written():
            self._kv_written(rank, part)

    def report(self) -> GroupReport | None:
        """None with one rank. Any thread."""
        if self._followers is None:
            return None
        counters, balance = self.counters, self.counters.balance or BalanceCounters()
        return GroupReport(
            ranks=len(self.block_counts),
            processes=(os.getpid(), *self._followers.processes),
            steps=counters.steps,
            plan_s=counters.plan_s,
            own_s=counters.own_s,
            gather_s=counters.gather_s,
            text_skew=balance.text_skew,
            vision_skew=balance.vision_skew,
            loads=balance.loads,
            moves=balance.moves,
            moved_experts=balance.moved_experts,
            move_s=balance.move_s,
        )

    @property
    def tracked_count(self) -> int:
        """Sequences it keeps anything of, on whichever rank; 0 with one rank."""
        return len(self._homes.keys() | self._early.keys())

    @property
    def kv_ranks(self) -> tuple[RemoteKvRank, ...]:
        """The KV of ranks 1 .. size - 1, for transfers."""
        return () if self._followers is None else self._followers.kv_ranks

    def held(self) -> Mapping[str, int]:
        """What the other ranks keep for sequences, by name, in all; 0 when nothing is to be done. Waits for the step
        under way; not for the step thread. Raises RankLost.
        """
        counts: Counter[str] = Counter()
        for one in () if self._followers is None else self._followers.ask_held():
            counts.update(one)
        return dict(counts)

    def watch(self, on_lost: Callable[[Exception], None]) -> None:
        if self._followers is not None:
            self._followers.watch(on_lost)

    def set_role(self, role: EngineRole) -> None:
        """Ranks read their experts at the same time. Raises RankLost, and what ``Runner.set_role`` raises."""
        if self._followers is None:
            self._runner.set_role(role)
            self.block_counts = (self._runner.block_count,)
            return
        self._followers.set_role(role)
        self._runner.set_role(role)
        self.block_counts = (self._runner.block_count, *self._followers.wait_role())

    def supply_embedding(self, rank: int, id: int, media_index: int, unit_index: int, embedding: Tensor) -> None:
        """Raises RankLost."""
        if rank == 0:
            self._runner.supply_embedding(id, media_index, unit_index, embedding)
        else:
            assert self._followers is not None, f"there is no rank {rank}"
            self._followers.send(rank, Embedding.of(id, media_index, unit_index, embedding))

    def supply_constraint(self, id: int, constraint: TokenConstraint) -> None:
        if self._followers is None:
            self._runner.supply_constraint(id, constraint)
        elif (home := self._homes.get(id)) is None:
            self._early[id] = constraint
        else:
            self._bring_home(id, constraint, home)

    def run(self, plan: StepPlan) -> StepResult:
        """Raises RankLost, or whatever the leader's own part raises."""
        if len(plan.parts) != len(self.block_counts):
            raise ValueError(f"a plan for {len(plan.parts)} ranks, and there are {len(self.block_counts)}")
        started = time.perf_counter()
        if self._followers is None:
            result = self._runner.run(plan.parts[0])
            self.counters.steps += 1
            self.counters.own_s += time.perf_counter() - started
            return result
        self._take_news(plan)
        self._followers.begin(plan.shape.step)
        self._numbers += 1
        try:
            if self._balancer is not None and plan.shape.max_tokens:
                self._balancer.before_step()
                started = time.perf_counter()
            for rank in self._followers.ranks:
                part = plan.parts[rank]
                masks = self._remote.masks(part.slices)
                self.counters.sent_bytes += self._followers.send(rank, Part(self._numbers, part, masks))
            sent = time.perf_counter()
            own = self._runner.run(plan.parts[0])
        except WorldError as error:
            raise self._followers.blame(error) from error
        except BaseException:
            self._runner.close()  # Nobody is to wait for this rank.
            raise
        self._followers.own_part_done()
        computed = time.perf_counter()
        self._tell_kv_written()
        done = self._followers.gather(self._numbers)
        self._tell_kv_written()
        result = StepResult.gathered((own, *(one.result for one in done)))
        self._remote.accept(result.tokens)
        self.counters.steps += 1
        self.counters.plan_s += sent - started
        self.counters.own_s += computed - sent
        self.counters.gather_s += time.perf_counter() - computed
        for number, one in enumerate(done):
            self.counters.rank_s[number] += one.seconds
        return result

    def _take_news(self, plan: StepPlan) -> None:
        """Where sequences live, from now on and no more."""
        for rank, part in enumerate(plan.parts):
            for id in part.ended:
                self._homes.pop(id, None)
                self._early.pop(id, None)
                self._remote.forget(id)
            for new in part.new:
                home = self._homes[new.id] = _Home(rank, new.token_ids[new.prompt_length :])
                constraint = self._early.pop(new.id, None)
                if constraint is not None:
                    self._bring_home(new.id, constraint, home)

    def _bring_home(self, id: int, constraint: TokenConstraint, home: _Home) -> None:
        if home.rank == 0:
            self._runner.supply_constraint(id, constraint)
        else:
            self._remote.keep(id, constraint, home.outputs)
