"""Trials against a real cluster: a fault under running requests, whose replies must stay what they are without it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from actors.types import Stage
from cluster.client import AsyncClient, ClientError
from ernie_serving.v1 import inference_pb2
from tests.chaos.calls import Expected
from tests.chaos.plan import Fault, Trial, Victim
from tests.chaos.victims import Processes
from tests.cluster.launcher import LaunchedCluster

CLUSTER: dict[str, Any] = {
    "max_model_len": 4096,
    "drain_timeout_s": 2.0,
    "engines": [
        {
            "roles": {"prefill": 2, "decode": 2},
            "kv_cache_gib": 0.05,
            "max_num_seqs": 16,
            "max_batched_tokens": 64,
        }
    ],
    "vision_encoder": {"replicas": 2, "embedding_bytes": 64 << 20, "cache_bytes": 32 << 20},
    "preprocessor": {"replicas": 2, "patch_bytes": 128 << 20},
}
"""Fields over those of tests/cluster. Prompts are computed in small pieces, so that a fault meets them there."""

HOLDS = {Stage.PREPROCESS: Victim.PREPROCESSOR, Stage.ENCODE: Victim.ENCODER, Stage.TRANSFER: Victim.DECODE}
"""Who stands still so that requests stay in a stage until the fault has fallen."""

REPLY_LIMIT_S = 120.0
STAGE_LIMIT_S = 30.0


@dataclass(slots=True)
class Reply:
    """What a client saw."""

    expected: Expected
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str = ""

    def pause_s(self, since: float) -> float:
        """The longest time without an event that was not over when the fault fell."""
        times = [time for time in self.times if time > since]
        before = max((time for time in self.times if time <= since), default=since)
        return max((later - earlier for earlier, later in zip([before, *times], times, strict=False)), default=0.0)

    @property
    def duplicated(self) -> bool:
        return not self.error and len(self.tokens) > len(self.expected.tokens)

    @property
    def missing(self) -> bool:
        return not self.error and not self.duplicated and tuple(self.tokens) != self.expected.tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a trial. ``landed``: the fault fell before the stage it was meant for had ended."""

    trial: Trial
    replies: list[Reply]
    landed: bool
    pause_s: float


class Chaos:
    """Runs trials one after the other against one cluster with two parts of every kind."""

    def __init__(self, cluster: LaunchedCluster, calls: Sequence[Expected], say: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._calls = calls
        self._say = say

    async def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        outcomes = []
        async with (
            AsyncClient(self._cluster.grpc_address, retries=0) as client,
            httpx.AsyncClient(base_url=self._cluster.http_url, timeout=10) as http,
        ):
            processes = Processes(self._cluster, http)
            for trial in trials:
                began = time.monotonic()
                await processes.wait_whole()
                outcome = await self._try(trial, client, processes)
                outcomes.append(outcome)
                await asyncio.to_thread(self._cluster.wait_clean, 20.0)
                self._say(_line(outcome, time.monotonic() - began))
            await processes.wait_whole()
        return outcomes

    async def _try(self, trial: Trial, client: AsyncClient, processes: Processes) -> Outcome:
        replies = [Reply(self._calls[index]) for index in trial.calls]
        holder = HOLDS.get(trial.stage)
        early = holder if trial.stage is not Stage.TRANSFER else None
        with processes.held(early) as held:
            tasks = [
                asyncio.create_task(_stream(client, reply, f"{trial.salt}-{index}"))
                for index, reply in enumerate(replies)
            ]
            if trial.stage is Stage.TRANSFER:
                await _until(processes, trial, lambda where: where["stage"] == Stage.PREFILL, tasks[0])
                with processes.held(holder) as held_late:
                    outcome = await self._hit(trial, processes, tasks[0], held_late)
            else:
                outcome = await self._hit(trial, processes, tasks[0], held)
        fell_at, landed, pid = outcome
        await asyncio.gather(*tasks)
        if trial.fault is Fault.FREEZE:
            await asyncio.sleep(max(0.0, fell_at + trial.thaw_after_s - time.monotonic()))
            processes.send(pid, signal.SIGCONT)
        return Outcome(
            trial=trial,
            replies=replies,
            landed=landed,
            pause_s=max(reply.pause_s(fell_at) for reply in replies),
        )

    async def _hit(
        self, trial: Trial, processes: Processes, task: asyncio.Task[None], held: set[int]
    ) -> tuple[float, bool, int]:
        """Lets the fault fall; returns when, whether the stage had not ended, and on whom."""

        def there(where: dict[str, Any]) -> bool:
            return where["stage"] == trial.stage and (
                trial.stage is not Stage.DECODE or where["output_tokens"] >= trial.tokens
            )

        where = await _until(processes, trial, there, task)
        pid = processes.pid_of(trial.victim, None if where is None else where.get(trial.victim))
        held.discard(pid)
        processes.send(pid, signal.SIGKILL if trial.fault is Fault.KILL else signal.SIGSTOP)
        fell_at = time.monotonic()
        after = await _where(processes, trial)
        landed = where is not None and after is not None and after["stage"] == trial.stage
        return fell_at, landed, pid


async def _where(processes: Processes, trial: Trial) -> dict[str, Any] | None:
    requests = (await processes.status())["requests"]
    return next((where for where in requests if where["alias"] == f"{trial.salt}-0"), None)


async def _until(
    processes: Processes, trial: Trial, there: Callable[[dict[str, Any]], bool], task: asyncio.Task[None]
) -> dict[str, Any] | None:
    """Where the first request is, once it is ``there``; None if it never was."""
    deadline = time.monotonic() + STAGE_LIMIT_S
    while not task.done() and time.monotonic() < deadline:
        where = await _where(processes, trial)
        if where is not None and there(where):
            return where
    return None


async def _stream(client: AsyncClient, reply: Reply, name: str) -> None:
    request = inference_pb2.GenerateRequest()
    request.CopyFrom(reply.expected.request)
    request.request_id = name
    request.cache_salt = name
    try:
        async for event in client.stream_generate(request, timeout_s=REPLY_LIMIT_S):
            reply.times.append(time.monotonic())
            reply.tokens += event.delta.token_ids
    except ClientError as error:
        reply.error = f"{error.code.name} {error.reason}: {error.message}"


def _line(outcome: Outcome, took_s: float) -> str:
    trial = outcome.trial
    state = "ok" if outcome.landed else "ok, missed its stage"
    for reply in outcome.replies:
        if reply.error:
            state = f"FAILED {reply.expected.name}: {reply.error}"
        elif reply.duplicated or reply.missing:
            state = f"WRONG {reply.expected.name}: {len(reply.tokens)} of {len(reply.expected.tokens)} tokens"
    names = ", ".join(reply.expected.name for reply in outcome.replies)
    what = f"{trial.fault} {trial.victim} in {trial.stage}"
    return f"trial {trial.number:3}: {what:<34} pause {outcome.pause_s:5.2f} s  {took_s:5.1f} s  {state}  ({names})"


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Faults that landed, by victim and stage: kills + freezes."""
    counts = Counter((o.trial.victim, o.trial.stage, o.trial.fault) for o in outcomes if o.landed)
    stages = [stage for stage in Stage if any(o.trial.stage is stage for o in outcomes)]
    lines = ["landed (kill+freeze)  " + "".join(f"{stage:>12}" for stage in stages)]
    for victim in Victim:
        cells = [f"{counts[victim, stage, Fault.KILL]}+{counts[victim, stage, Fault.FREEZE]}" for stage in stages]
        lines.append(f"{victim:<22}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def summary(outcomes: Sequence[Outcome]) -> str:
    """The last line. Replies that differ from the expected are missing tokens unless they are longer."""
    replies = [reply for outcome in outcomes for reply in outcome.replies]
    failed, duplicated, missing = (
        sum(bool(getattr(reply, name)) for reply in replies) for name in ("error", "duplicated", "missing")
    )
    pauses = {fault: [o.pause_s for o in outcomes if o.trial.fault is fault] for fault in Fault}
    p99 = {fault: f"{_quantile(found, 0.99):.1f} s" if found else "-" for fault, found in pauses.items()}
    return (
        f"chaos: {len(outcomes)} trials, {failed} failed, {duplicated} duplicated, {missing} missing, "
        f"pause p99 kill {p99[Fault.KILL]} freeze {p99[Fault.FREEZE]}"
    )


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def passed(outcomes: Sequence[Outcome]) -> bool:
    return not any(reply.error or reply.duplicated or reply.missing for o in outcomes for reply in o.replies)
