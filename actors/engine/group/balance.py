"""Experts change ranks as their load asks, between steps and without a request noticing.

every N steps      all ranks take the load       a collective
then               the leader plans              on a thread of its own: it may take longer than many steps
when it is done    all ranks move                before the next step, in order with its parts
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

from actors.engine.execution.expert_steps import ExpertSteps
from actors.engine.group.followers import Followers
from actors.engine.group.messages import MoveExperts, TakeLoad
from actors.parallel.layout import ExpertPlacement
from actors.parallel.placement import plan_layers, skew


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig:
    every_steps: int = 1000
    """Steps with tokens whose load decides."""
    least_gain: float = 0.01
    """Of a layer's present cost, for each expert that moves (see ``plan_placement``)."""

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.least_gain < 0:
            raise ValueError(f"every_steps must be positive and least_gain not negative: {self}")


@dataclass(kw_only=True, slots=True)
class BalanceCounters:
    """Sums since the start, but for the last load's skews. Read by others."""

    loads: int = 0
    """Times the load was taken."""
    moves: int = 0
    """Times experts moved."""
    moved_experts: int = 0
    """That changed their rank, of all layers."""
    move_s: float = 0.0
    """Taking loads and moving: the time steps waited."""
    text_skew: float = 1.0
    """Rows of the busiest rank over the mean of ranks, the mean of all layers. 1 is even."""
    vision_skew: float = 1.0


class Balancer:
    """The leader's. ``before_step`` is the step thread's."""

    def __init__(
        self,
        experts: ExpertSteps,
        followers: Followers,
        config: BalanceConfig | None = None,
        executor: Executor | None = None,
    ) -> None:
        """``executor`` plans; None is a thread of its own."""
        self._experts = experts
        self._followers = followers
        self._config = config or BalanceConfig()
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="expert-plan")
        self._memory = experts.memory()
        self._planned: Future[ExpertPlacement] | None = None
        self._steps = 0
        self.counters = BalanceCounters()

    def before_step(self) -> None:
        """Of every step with tokens. Raises WorldError or RankLost."""
        if self._planned is not None and self._planned.done():
            wanted, self._planned = self._planned.result(), None
            if wanted != self._experts.group.placement:
                self._move(wanted)
        elif self._planned is None and self._steps >= self._config.every_steps:
            self._take_load()
        self._steps += 1

    def close(self) -> None:
        """Nothing is planned any more. Does not wait."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _take_load(self) -> None:
        started = time.perf_counter()
        for rank in self._followers.ranks:
            self._followers.send(rank, TakeLoad())
        load = self._experts.take_load()
        placement = self._experts.group.placement
        skews = [skew(rows, placement.layout(layer)) for layer, rows in load.items()]
        self.counters.text_skew, self.counters.vision_skew = map(statistics.mean, zip(*skews, strict=True))
        self.counters.loads += 1
        self.counters.move_s += time.perf_counter() - started
        self._steps = 0
        self._planned = self._executor.submit(
            plan_layers, load, placement, self._memory, least_gain=self._config.least_gain
        )

    def _move(self, wanted: ExpertPlacement) -> None:
        started = time.perf_counter()
        moved = moved_experts(self._experts.group.placement, wanted)
        for rank in self._followers.ranks:
            self._followers.send(rank, MoveExperts(wanted))
        self._experts.move(wanted)
        self.counters.moves += 1
        self.counters.moved_experts += sum(moved.values())
        self.counters.move_s += time.perf_counter() - started


def moved_experts(present: ExpertPlacement, wanted: ExpertPlacement) -> Mapping[int, int]:
    """How many experts of both banks change their rank, by layer."""

    def ranks(placement: ExpertPlacement, layer: int) -> list[int]:
        return [rank for rank, _ in placement.layout(layer).places()]

    return {
        layer: sum(a != b for a, b in zip(ranks(present, layer), ranks(wanted, layer), strict=True))
        for layer in present.sparse_layers
    }
