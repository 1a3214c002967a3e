"""Groups of real processes whose ranks each hold a share of the experts of a small model."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any

import torch

from actors.engine.execution.expert_steps import ExpertSteps
from actors.engine.execution.runner import Runner
from actors.engine.group.balance import BalanceConfig, Balancer
from actors.engine.group.channel import GroupConfig
from actors.engine.group.followers import Followers
from actors.engine.group.rank_process import Loaded
from actors.engine.plan import RankPlan, StepPlan, StepResult
from actors.ernie.config import ErnieConfig
from actors.ernie.text import LanguageModel
from actors.ernie.weights import Progress
from actors.parallel.group import ExpertGroup
from actors.parallel.layout import ExpertShare
from actors.parallel.world import MeetingPlace, Seat, WorldConfig
from tests.unit.engine.engine_requests import IMAGE
from tests.unit.engine.group.rank_group import (
    CONTEXT,
    HOST,
    PATIENT,
    Fault,
    RankGroup,
    RankLoader,
    WatchedGroup,
    small_model,
)
from tests.unit.parallel.group_steps import even, share_of

NEVER = WorldConfig(join_timeout_s=120.0, collective_timeout_s=3600.0)
"""No collective ends because of its limit."""


@dataclass(frozen=True, kw_only=True)
class SharingLoader(RankLoader):
    """Makes the runner of a rank that joins the world first."""

    seat: Seat

    def share(self, rank: int) -> tuple[ExpertSteps, ErnieConfig]:
        whole, config = self.model()
        share = ExpertShare(even(whole.config, self.seat.size), rank)
        world = replace(self.seat, rank=rank).join(torch.device("cpu"))
        model = share_of(whole, share, bank=whole.vision_bank is not None)
        steps = ExpertSteps(model, ExpertGroup(world, share.placement))
        steps.meet("loaded", 120.0)
        assert steps.largest(7 * rank) == 7 * (self.seat.size - 1)
        return steps, config

    def load(self, rank: int, progress: Progress) -> Loaded:
        steps, config = self.share(rank)
        return Loaded(self.runner(rank, steps._model, config, experts=steps), ())


class AtOnce(Executor):
    """Plans where it is asked to, so that moves do not depend on time."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*args, **options))
        return done


class KindsSeen(WatchedGroup):
    """Remembers what kinds of steps there were."""

    def __init__(self, runner: Runner, followers: Followers, balancer: Balancer | None = None) -> None:
        super().__init__(runner, followers, balancer)
        self.kinds: set[str] = set()
        self._vision: dict[int, list[bool]] = {}

    def run(self, plan: StepPlan) -> StepResult:
        for part in plan.parts:
            for new in part.new:
                self._vision[new.id] = [token >= IMAGE for token in new.token_ids]
        if plan.shape.max_tokens:
            self.kinds |= self._kinds(plan)
        return super().run(plan)

    def _kinds(self, plan: StepPlan) -> set[str]:
        parts = [self._tokens(part) for part in plan.parts]
        found = {"fixed shapes" if plan.shape.decodes else "variable shapes"}
        if not all(parts):
            found.add("a rank without tokens")
        if plan.shape.vision and any(tokens and not any(tokens) for tokens in parts):
            found.add("a rank without vision tokens")
        if any(tokens and all(tokens) for tokens in parts):
            found.add("a rank of vision tokens only")
        return found

    def _tokens(self, part: RankPlan) -> list[bool]:
        """Whether each is of a picture or a video."""
        return [
            at < len(self._vision[one.id]) and self._vision[one.id][at]
            for one in part.slices
            for at in range(one.first, one.first + one.count)
        ]


ALL_KINDS = {
    "fixed shapes",
    "variable shapes",
    "a rank without tokens",
    "a rank without vision tokens",
    "a rank of vision tokens only",
}


class SharingGroup(RankGroup):
    """A group whose world the test's process joins as rank 0. Rigs take ``model`` and ``join``, one after the other."""

    def __init__(
        self,
        size: int,
        *,
        model: Callable[[], tuple[LanguageModel, ErnieConfig]] = small_model,
        config: GroupConfig = PATIENT,
        world: WorldConfig = NEVER,
        fault: Fault | None = None,
        context: Any = CONTEXT,
    ) -> None:
        self._place = MeetingPlace(HOST)
        name = uuid.uuid4().hex
        seat = Seat(address=self._place.address, name=name, rank=0, size=size, host=HOST, config=world)
        loader = SharingLoader(seat=seat, model=model, fault=fault)
        super().__init__(size, loader.main, config, context)
        self.experts, self.config = loader.share(0)

    @property
    def model(self) -> LanguageModel:
        return self.experts._model

    def join(self, runner: Runner, balance: BalanceConfig | None = None) -> KindsSeen:
        runner.experts = self.experts
        balancer = None if balance is None else Balancer(self.experts, self.followers, balance, AtOnce())
        return KindsSeen(runner, self.followers, balancer)

    def rebalanced(self, runner: Runner) -> KindsSeen:
        """``join``, with experts that move whenever it helps at all."""
        return self.join(runner, BalanceConfig(every_steps=3, least_gain=0.0))

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.experts.close()
        self._place.close()
