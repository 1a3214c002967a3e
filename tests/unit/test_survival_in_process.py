"""Parts that die or leave under replies of every kind, on all parts without Ray: what clients get stays the same."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest

from actors.errors import ServingError
from actors.types import EngineRole, Stage, Structure, StructureKind, TextPart, ThinkingMode
from cluster.generation import GenerateCall, Tool, ToolChoice, ToolMode
from cluster.router import choice
from cluster.router.choice import ChoiceRun
from cluster.router.output import OutputAssembler
from cluster.router.request import RequestRun
from tests.chaos.mutants import MUTANTS
from tests.chaos.mutation.sitecustomize import MUTATIONS
from tests.in_process import InProcessCluster, in_process_cluster
from tests.tiny_model import tiny_checkpoint
from tests.unit.test_resume_in_process import Reply, ask, pictures, reply

PREFILL, DECODE, COLOCATED = EngineRole.PREFILL, EngineRole.DECODE, EngineRole.COLOCATED
PAIRS = (PREFILL, PREFILL, DECODE, DECODE)

CALLS: list[GenerateCall] = [
    ask(*pictures(0), max_tokens=120),
    ask(*pictures(1), max_tokens=120, temperature=0.9, top_p=0.95, seed=21),
    ask(
        *pictures(2),
        max_tokens=100,
        temperature=0.8,
        seed=22,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    ),
    ask(
        *pictures(3),
        max_tokens=120,
        temperature=1.0,
        seed=23,
        thinking=ThinkingMode.ON,
        reasoning_max_tokens=40,
        structure=Structure(kind=StructureKind.REGEX, text="[a-z ]{60}"),
        ignore_eos=False,
    ),
    ask(
        TextPart(text="What is the weather in Paris?"),
        max_tokens=120,
        temperature=1.0,
        seed=24,
        tools=(Tool(name="weather", parameters={"type": "object", "properties": {"city": {"type": "string"}}}),),
        tool_choice=ToolChoice(mode=ToolMode.REQUIRED),
        ignore_eos=False,
    ),
]

_alone: list[Reply] = []


async def alone() -> list[Reply]:
    """The reference: one request at a time on one engine."""
    if not _alone:
        async with in_process_cluster(tiny_checkpoint(), COLOCATED) as cluster:
            for call in CALLS:
                _alone.append(await reply(cluster, call))
    return _alone


def place_of(victim: str, run: RequestRun) -> str | None:
    """Address or incarnation of the part of that kind which has the request now."""
    leases, choices = run._keeper._leases, run._choices
    route = choices[0]._route if choices else None
    match victim:
        case "preprocessor":
            return next((address for address, _ in leases.patches), None)
        case "encoder":
            return next((address for address, _ in leases.embeddings), None)
        case "colocated":
            return route.prefill.incarnation if route is not None else None
        case "prefill":
            return route.prefill.incarnation if route is not None and route.decode is not None else None
    return route.decode.incarnation if route is not None and route.decode is not None else None


def parts(cluster: InProcessCluster) -> dict[str, Any]:
    return (
        {engine._incarnation: engine for engine in cluster.engines}
        | {encoder.identity.address: encoder for encoder in cluster.encoders}
        | {preprocessor.address: preprocessor for preprocessor in cluster.preprocessors}
    )


async def kill_one(cluster: InProcessCluster, victim: str, stage: Stage, tokens: int = 0) -> None:
    """Kills the part that a request is on, as soon as one is in that stage and has so many tokens."""
    async with asyncio.timeout(60):
        while True:
            for run in cluster.parts.router._active.values():
                count = len(run._choices[0].output.token_ids) if run._choices else 0
                place = place_of(victim, run)
                if run.timeline.stage is stage and count >= tokens and place in parts(cluster):
                    await cluster.kill(parts(cluster)[place])
                    return
            await asyncio.sleep(0)


def check(found: list[Reply], expected: list[Reply]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.choices == other.choices
        assert one.prompt_ids == other.prompt_ids


CELLS = [
    ("prefill", Stage.PREFILL, 0),
    ("decode", Stage.DECODE, 30),
    ("encoder", Stage.ENCODE, 0),
    ("preprocessor", Stage.ENCODE, 0),
    ("decode", Stage.TRANSFER, 0),
    ("prefill", Stage.DECODE, 5),
]


async def test_replies_are_the_same_whatever_dies_under_them(caplog: pytest.LogCaptureFixture) -> None:
    expected = await alone()
    caplog.set_level(logging.INFO, "cluster.router")
    roles = (PREFILL,) * 3 + (DECODE,) * 3
    async with in_process_cluster(tiny_checkpoint(), *roles, encoders=2, preprocessors=2) as cluster:
        for number, (victim, stage, tokens) in enumerate(CELLS):
            fresh = [replace(call, cache_salt=f"{number}") for call in CALLS]  # no stage is left out
            replies = [asyncio.create_task(reply(cluster, call)) for call in fresh]
            await kill_one(cluster, victim, stage, tokens)
            check(await asyncio.gather(*replies), expected)
            await cluster.wait_clean()
        assert len(cluster.engines) == 2 and len(cluster.encoders) == len(cluster.preprocessors) == 1
    assert "ENGINE_LOST after" in caplog.text


async def test_what_a_colocated_engine_loses_goes_on_behind_its_tokens() -> None:
    expected = await alone()
    async with in_process_cluster(tiny_checkpoint(), COLOCATED, COLOCATED) as cluster:
        replies = [asyncio.create_task(reply(cluster, call)) for call in CALLS]
        await kill_one(cluster, "colocated", Stage.DECODE, 40)
        check(await asyncio.gather(*replies), expected)
        await cluster.wait_clean()


@pytest.mark.parametrize("mutant", [name for name in MUTANTS if MUTATIONS[name].keys() == {choice.__name__}])
async def test_a_broken_router_is_seen(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that ``make chaos`` knows; ``no_epoch`` is seen where roles change."""
    expected = await alone()
    for holder, name in ((choice, "judge"), (ChoiceRun, "_request"), (OutputAssembler, "push")):
        monkeypatch.setattr(holder, name, getattr(holder, name))  # so that it is as before afterwards
    MUTATIONS[mutant][choice.__name__](choice)
    async with in_process_cluster(tiny_checkpoint(), COLOCATED, COLOCATED) as cluster:
        replies = [asyncio.create_task(reply(cluster, call)) for call in CALLS]
        await kill_one(cluster, "colocated", Stage.DECODE, 40)
        with pytest.raises((AssertionError, ServingError)):
            check(await asyncio.gather(*replies), expected)
        await asyncio.wait(replies)
        await cluster.wait_clean()


@pytest.mark.parametrize("leaver", [DECODE, PREFILL])
async def test_an_engine_that_leaves_moves_what_it_cannot_finish(
    leaver: EngineRole, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no time to finish at all."""
    expected = await alone()
    caplog.set_level(logging.INFO, "cluster.router")
    async with in_process_cluster(tiny_checkpoint(), *PAIRS) as cluster:
        replies = [asyncio.create_task(reply(cluster, call)) for call in CALLS]
        engine = await busy_one(cluster, leaver)
        engine._config = replace(engine._config, drain_timeout_s=0.0)
        cluster.engines.remove(engine)
        await engine.close()
        assert (await engine.audit()).clean
        check(await asyncio.gather(*replies), expected)
        await cluster.wait_clean()
    assert "ENGINE_LOST" not in caplog.text
    assert leaver is PREFILL or "MOVED after" in caplog.text


async def busy_one(cluster: InProcessCluster, role: EngineRole) -> Any:
    async with asyncio.timeout(60):
        while True:
            for engine in cluster.engines:
                if engine._info.role is role and engine._attempts and engine._engine.load().step >= 20 * role.decodes:
                    return engine
            await asyncio.sleep(0.001)  # not 0: engines need the interpreter, too


async def test_the_last_engine_that_leaves_finishes_what_it_has() -> None:
    expected = (await alone())[:2]
    async with in_process_cluster(tiny_checkpoint(), COLOCATED) as cluster:
        replies = [asyncio.create_task(reply(cluster, call)) for call in CALLS[:2]]
        engine = await busy_one(cluster, COLOCATED)
        cluster.engines.remove(engine)
        engine._config = replace(engine._config, drain_timeout_s=60.0)
        await engine.close()
        check(await asyncio.gather(*replies), expected)


async def test_nothing_of_a_reply_needs_the_planner() -> None:
    expected = (await alone())[:3]
    async with in_process_cluster(tiny_checkpoint(), *PAIRS) as cluster:
        assert cluster.parts.fleet._follow is not None
        cluster.parts.fleet._follow.cancel()  # nothing more is heard of it
        replies = [asyncio.create_task(reply(cluster, call)) for call in CALLS[:3]]
        await kill_one(cluster, "decode", Stage.DECODE, 10)
        check(await asyncio.gather(*replies), expected)
