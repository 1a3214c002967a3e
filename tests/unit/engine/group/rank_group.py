"""Groups of real processes on small models: every rank holds all experts, so that nothing but data is parallel."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from actors.engine.execution.kv_cache import KvCache
from actors.engine.execution.runner import Runner
from actors.engine.group.balance import Balancer
from actors.engine.group.channel import GroupConfig
from actors.engine.group.followers import Followers
from actors.engine.group.group_runner import GroupRunner
from actors.engine.group.meeting import Invitation, Meeting
from actors.engine.group.rank_process import Loaded, follow
from actors.engine.plan import RankPlan, StepPlan, StepResult
from actors.engine_rank import kv_rank
from actors.ernie.config import ErnieConfig, Rules
from actors.ernie.text import LanguageModel
from actors.ernie.weights import Progress
from actors.parallel.kv_threads import LocalKvRank
from tests.small_models import language_model, text_config
from tests.unit.engine.harness import ernie_config, kv_layout

HOST = "127.0.0.1"
PATIENT = GroupConfig(silence_s=30.0, serving_silence_s=30.0, step_timeout_s=120.0, join_timeout_s=120.0)
"""For tests in which nothing is lost."""

CONTEXT = multiprocessing.get_context("forkserver")
"""Its server imports torch once: a rank's process starts in no time."""
CONTEXT.set_forkserver_preload(["torch", "actors.engine_rank"])


def small_model() -> tuple[LanguageModel, ErnieConfig]:
    model = language_model(text_config())
    return model, ernie_config(model.config)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What one rank does wrong, and at which of its steps with tokens anywhere."""

    rank: int
    kind: str
    step: int = 1

    def happen(self) -> None:
        match self.kind:
            case "raise":
                raise RuntimeError("a kernel broke")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                threading.Event().wait(3600)
            case _:
                raise ValueError(self.kind)


class FaultyRunner(Runner):
    """Goes wrong in a step."""

    def __init__(self, *args: Any, fault: Fault, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fault = fault
        self.steps = 0

    def run(self, plan: RankPlan) -> StepResult:
        self.steps += bool(plan.shape.max_tokens)
        if self.steps == self.fault.step:
            self.fault.happen()
        return super().run(plan)


@dataclass(frozen=True, kw_only=True)
class RankLoader:
    """Makes the runner of a rank, in whichever process."""

    model: Callable[[], tuple[LanguageModel, ErnieConfig]] = small_model
    blocks: int = 400
    block_size: int = 4
    fault: Fault | None = None

    def load(self, rank: int, progress: Progress) -> Loaded:
        progress(1, 2)
        model, config = self.model()
        return Loaded(self.runner(rank, model, config), (f"rank {rank} is here",))

    def runner(self, rank: int, model: LanguageModel, config: ErnieConfig, **options: Any) -> Runner:
        cache = KvCache.allocate(kv_layout(model, self.block_size), self.blocks, model.device)
        kind = Runner
        if self.fault is not None and self.fault.rank == rank:
            kind = partial(FaultyRunner, fault=self.fault)  # type: ignore[assignment]
        return kind(model, config, Rules.original(), cache, **options)

    def main(self, invitation: Invitation, rank: int) -> None:
        """Of a rank's process."""
        follow(invitation, rank, partial(self.load, rank), self.kv_rank)

    def kv_rank(self, runner: Runner) -> LocalKvRank:
        return kv_rank(runner.cache, HOST)


def start_rank(
    main: Callable[[Invitation, int], None], invitation: Invitation, rank: int, context: Any = CONTEXT
) -> BaseProcess:
    process: BaseProcess = context.Process(target=_run, args=(main, invitation, rank), daemon=True)
    process.start()
    return process


def _run(main: Callable[[Invitation, int], None], invitation: Invitation, rank: int) -> None:
    torch.set_num_threads(1)
    main(invitation, rank)


class WatchedGroup(GroupRunner):
    """Remembers which ranks had tokens."""

    def __init__(self, runner: Runner, followers: Followers, balancer: Balancer | None = None) -> None:
        super().__init__(runner, followers, balancer)
        self.lived_on: set[int] = set()

    def run(self, plan: StepPlan) -> StepResult:
        self.lived_on |= {rank for rank, part in enumerate(plan.parts) if part.slices}
        return super().run(plan)


class RankGroup:
    """Ranks 1 .. size - 1 in processes of their own; use as a context manager."""

    def __init__(
        self,
        size: int,
        main: Callable[[Invitation, int], None] = RankLoader().main,
        config: GroupConfig = PATIENT,
        context: Any = CONTEXT,
    ) -> None:
        meeting = Meeting(HOST, size, config)
        self.processes: dict[int, BaseProcess] = {
            rank: start_rank(main, meeting.invitation, rank, context) for rank in range(1, size)
        }
        self.followers = Followers(meeting.wait(self._check), config)

    def _check(self) -> None:
        dead = [rank for rank, process in self.processes.items() if not process.is_alive()]
        assert not dead, f"ranks {dead} died at once"

    def join(self, runner: Runner) -> WatchedGroup:
        """The whole group, for ``Rig``; ``runner`` is rank 0."""
        return WatchedGroup(runner, self.followers)

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.followers.close()
        for process in self.processes.values():
            process.join(60)
            if process.exitcode is None:
                process.kill()
                raise AssertionError("a rank outlives its group")

    def wait_gone(self, *, but: tuple[int, ...] = (), within_s: float = 60.0) -> float:
        """Seconds until the processes have ended."""
        started = time.monotonic()
        for rank, process in self.processes.items():
            if rank not in but:
                process.join(within_s)
                assert process.exitcode is not None, f"rank {rank} lives on"
        return time.monotonic() - started
