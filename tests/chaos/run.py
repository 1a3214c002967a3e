"""Trials against a real cluster: a fault under running requests, whose replies must stay what they are without it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from actors.types import Stage
from cluster.client import AsyncClient, ClientError
from ernie_serving.v1 import inference_pb2
from tests.chaos.calls import Expected
from tests.chaos.plan import Fault, Trial, Victim
from tests.chaos.report import Outcome, passed
from tests.chaos.victims import OTHER_ROLE, Processes
from tests.cluster.launcher import LaunchedCluster

ENGINE = {
    "roles": {"prefill": 1, "decode": 1},
    "kv_cache_gib": 0.05,
    "max_num_seqs": 16,
    "max_batched_tokens": 64,
    "rebalance_steps": 50,
}
CLUSTER: dict[str, Any] = {
    "max_model_len": 4096,
    "drain_timeout_s": 2.0,
    "role_drain_s": 0.2,
    "router": {"alone_tokens": 0},
    "engines": [ENGINE | {"name": "single"}, ENGINE | {"name": "group", "expert_parallel": 2}],
    "vision_encoder": {"replicas": 2, "embedding_bytes": 64 << 20, "cache_bytes": 32 << 20},
    "preprocessor": {"replicas": 2, "patch_bytes": 128 << 20},
}
"""Fields over those of tests/cluster: two engines of each role, one a group of two ranks. Prompts are computed in small
pieces, and sent however much of them is cached, so that a fault meets them there; an engine that changes its role moves
what it has."""

HOLDS = {Stage.PREPROCESS: Victim.PREPROCESSOR, Stage.ENCODE: Victim.ENCODER, Stage.TRANSFER: Victim.DECODE}
"""Who stands still so that requests stay in a stage until the fault has fallen."""

REPLY_LIMIT_S = 120.0
STAGE_LIMIT_S = 30.0
LOOK_S = 0.01
CLEAN_EVERY = 10
"""After so many trials all parts are let come back, and must hold nothing then."""
CLEAN_LIMIT_S = 20.0


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


class Chaos:
    """Runs trials one after the other against one cluster with two parts of every kind."""

    def __init__(
        self,
        cluster: LaunchedCluster,
        calls: Sequence[Expected],
        say: Callable[[str], None],
        keep: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        """``say`` gets a line for people after each trial, ``keep`` its outcome."""
        self._cluster = cluster
        self._calls = calls
        self._say = say
        self._keep = keep

    async def run(
        self, trials: Sequence[Trial], *, within_s: float = float("inf"), until_failure: bool = False
    ) -> list[Outcome]:
        """Begins no trial after ``within_s``. With ``until_failure`` the first that fails is the last, and nobody waits
        for the cluster to recover.
        """
        outcomes: list[Outcome] = []
        until = time.monotonic() + within_s
        async with (
            AsyncClient(self._cluster.grpc_address, retries=0) as client,
            httpx.AsyncClient(base_url=self._cluster.http_url, timeout=10) as http,
        ):
            processes = Processes(self._cluster, http)
            for trial in trials:
                if time.monotonic() > until:
                    break
                began = time.monotonic()
                await processes.wait_whole(trial)
                waited_s = time.monotonic() - began
                hit, replies = await self._try(trial, client, processes)
                outcome = outcome_of(trial, hit, replies, took_s=time.monotonic() - began)
                outcomes.append(outcome)
                self._keep(outcome)
                self._say(_line(outcome, replies, waited_s))
                if until_failure and not passed([outcome]):
                    return outcomes
                if len(outcomes) % CLEAN_EVERY == 0:
                    await self._wait_clean(processes)
            await self._wait_clean(processes)
        return outcomes

    async def _wait_clean(self, processes: Processes) -> None:
        await processes.wait_whole()
        await asyncio.to_thread(self._cluster.wait_clean, CLEAN_LIMIT_S)

    async def _try(self, trial: Trial, client: AsyncClient, processes: Processes) -> tuple[Hit, list[Reply]]:
        """All replies, those that had begun when the fault fell first."""
        replies = [Reply(self._calls[index]) for index in trial.calls]
        late = [Reply(self._calls[index]) for index in trial.late_calls]
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
                    hit = await self._hit(trial, processes, tasks[0], held_late)
            else:
                hit = await self._hit(trial, processes, tasks[0], held)
        if trial.fault is Fault.SWITCH:
            hit.died = not await processes.wait_role(hit.address, OTHER_ROLE[trial.victim], hit.pid)
        tasks += [
            asyncio.create_task(_stream(client, reply, f"{trial.salt}-late-{index}"))
            for index, reply in enumerate(late)
        ]
        await asyncio.gather(*tasks)
        await _undo(trial, processes, hit)
        return hit, [*replies, *late]

    async def _hit(self, trial: Trial, processes: Processes, task: asyncio.Task[None], held: set[int]) -> Hit:
        """Lets the fault fall."""

        def there(where: dict[str, Any]) -> bool:
            return where["stage"] == trial.stage and (
                trial.stage is not Stage.DECODE or where["output_tokens"] >= trial.tokens
            )

        where = await _until(processes, trial, there, task)
        address = processes.pick(trial, where)
        pid = processes.pids[trial.victim][address]
        if trial.fault is not Fault.SWITCH:
            held.discard(pid)
        await processes.hit(trial, address)
        fell_at = time.monotonic()
        after = await _where(processes, trial)
        landed = where is not None and after is not None and after["stage"] == trial.stage
        return Hit(fell_at=fell_at, landed=landed, address=address, pid=pid)


@dataclass(kw_only=True, slots=True)
class Hit:
    """A fault that fell. ``landed``: the stage it was meant for had not ended; ``died``: see ``Outcome``."""

    fell_at: float
    landed: bool
    address: str
    pid: int
    died: bool = False


async def _undo(trial: Trial, processes: Processes, hit: Hit) -> None:
    """What was killed comes back by itself."""
    if trial.fault is Fault.FREEZE and trial.thaw_after_s is not None:
        await asyncio.sleep(max(0.0, hit.fell_at + trial.thaw_after_s - time.monotonic()))
        processes.send(hit.pid, signal.SIGCONT)
    if trial.fault is Fault.SWITCH and not hit.died and processes.lives(hit.pid):
        await processes.order(hit.address, trial.victim)
        hit.died = not await processes.wait_role(hit.address, trial.victim, hit.pid)
    hit.died |= trial.fault is Fault.SWITCH and not processes.lives(hit.pid)


def outcome_of(trial: Trial, hit: Hit, replies: Sequence[Reply], *, took_s: float) -> Outcome:
    begun = replies[: len(trial.calls)]
    return Outcome(
        seed=trial.seed,
        number=trial.number,
        victim=trial.victim,
        stage=trial.stage,
        fault=trial.fault,
        landed=hit.landed,
        pause_s=max(reply.pause_s(hit.fell_at) for reply in begun),
        took_s=took_s,
        failed=sum(bool(reply.error) for reply in replies),
        duplicated=sum(reply.duplicated for reply in replies),
        missing=sum(reply.missing for reply in replies),
        died=hit.died,
    )


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
        await asyncio.sleep(LOOK_S)
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


def _line(outcome: Outcome, replies: Sequence[Reply], waited_s: float) -> str:
    state = "ok" if outcome.landed else "ok, missed its stage"
    for reply in replies:
        if reply.error:
            state = f"FAILED {reply.expected.name}: {reply.error}"
        elif reply.duplicated or reply.missing:
            state = f"WRONG {reply.expected.name}: {len(reply.tokens)} of {len(reply.expected.tokens)} tokens"
    if outcome.died:
        state = "ENGINE LOST in its change of roles"
    names = ", ".join(reply.expected.name for reply in replies)
    what = f"{outcome.fault} {outcome.victim} in {outcome.stage}"
    times = f"pause {outcome.pause_s:5.2f} s  {outcome.took_s:5.1f} s, {waited_s:4.1f} s of it for parts to come back"
    return f"{time.strftime('%H:%M:%S')}  trial {outcome.number:3}: {what:<34} {times}  {state}  ({names})"
