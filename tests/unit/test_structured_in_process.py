"""Structured output and thinking budgets through router and engines: the same tokens on every route, all valid."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from typing import Any

import jsonschema
import pytest

from actors.errors import InvalidRequest
from actors.processing.tokenizer import TextTokenizer
from actors.types import (
    EngineRole,
    FinishReason,
    Message,
    MessageRole,
    Structure,
    StructureKind,
    TextPart,
    ThinkingMode,
)
from cluster.generation import ChoiceFinished, Delta, Finished, GenerateCall
from tests.in_process import InProcessCluster, in_process_cluster
from tests.media import image_part
from tests.tiny_model import tiny_checkpoint

COLOCATED = (EngineRole.COLOCATED,)
SPLIT = (EngineRole.PREFILL, EngineRole.DECODE)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["größer", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA = Structure(kind=StructureKind.JSON_SCHEMA, text=json.dumps(PERSON, ensure_ascii=False))
CHOICE = Structure(kind=StructureKind.CHOICE, text='["red", "green", "blue and green"]')


@dataclass
class Reply:
    """What a client got."""

    text: str = ""
    reasoning: str = ""
    ids: tuple[int, ...] = ()
    reason: FinishReason | None = None
    reasoning_tokens: int = 0


async def reply(cluster: InProcessCluster, call: GenerateCall) -> Reply:
    found = Reply()
    async for event in cluster.parts.router.generate(call):
        match event:
            case Delta():
                found.text += event.text
                found.reasoning += event.reasoning
                found.ids += event.token_ids
            case ChoiceFinished():
                found.reason = event.reason
            case Finished():
                found.reasoning_tokens = event.usage.reasoning_tokens
    return found


def closers() -> tuple[tuple[int, float], ...]:
    """Makes a model that says anything come to an end."""
    tokenizer = TextTokenizer.from_dir(tiny_checkpoint())
    bias = {'"': 3.0, "}": 3.0, "]": 3.0, " ": -6.0, "\t": -6.0, "\n": -6.0, "\r": -6.0}
    return tuple((tokenizer.encode(text)[0], value) for text, value in bias.items())


def call(**fields: Any) -> GenerateCall:
    message = Message(role=MessageRole.USER, parts=(image_part(90, 60, 1), TextPart(text="Who is this?")))
    given = {"temperature": 1.0, "seed": 5, "max_tokens": 200, "return_token_ids": True, "thinking": ThinkingMode.OFF}
    return GenerateCall(messages=(message,), logit_bias=closers(), **(given | fields))


def calls() -> list[GenerateCall]:
    kinds = (
        call(structure=SCHEMA),
        call(structure=CHOICE),
        call(structure=SCHEMA, thinking=ThinkingMode.ON, reasoning_max_tokens=9),
        call(structure=CHOICE, thinking=ThinkingMode.ON, reasoning_max_tokens=0),
        call(thinking=ThinkingMode.ON, reasoning_max_tokens=5, max_tokens=30, ignore_eos=True),
    )
    return [replace(kind, seed=seed) for kind in kinds for seed in range(3)]


def check(wanted: GenerateCall, found: Reply) -> bool:
    """Whether it ended of itself, and is then what was asked for."""
    if wanted.thinking is ThinkingMode.ON:
        assert "</think>" not in found.text and found.reasoning_tokens
    else:
        assert not found.reasoning
    if found.reason is not FinishReason.STOP:
        return False
    if wanted.structure is SCHEMA:
        jsonschema.validate(json.loads(found.text), PERSON)
    elif wanted.structure is CHOICE:
        assert found.text in ("red", "green", "blue and green")
    return True


_alone: list[Reply] = []


async def alone() -> list[Reply]:
    """One request at a time, one engine."""
    if not _alone:
        async with in_process_cluster(tiny_checkpoint(), *COLOCATED) as cluster:
            for wanted in calls():
                _alone.append(await reply(cluster, wanted))
    return _alone


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT, (*SPLIT, EngineRole.DECODE)])
async def test_constrained_tokens_do_not_depend_on_the_route(roles: tuple[EngineRole, ...]) -> None:
    expected = await alone()
    async with in_process_cluster(tiny_checkpoint(), *roles, max_num_seqs=8, max_batched_tokens=32) as cluster:
        found = await asyncio.gather(*(reply(cluster, wanted) for wanted in calls()))
        await cluster.wait_clean()
    assert [one.ids for one in found] == [one.ids for one in expected]
    assert len({one.ids for one in found}) > len(calls()) // 2
    structured = [check(wanted, one) for wanted, one in zip(calls(), found, strict=True) if wanted.structure]
    assert sum(structured) >= 0.75 * len(structured)


async def test_a_budget_ends_the_reasoning_and_nothing_else() -> None:
    async with in_process_cluster(tiny_checkpoint(), *COLOCATED) as cluster:
        for budget in (0, 1, 7):
            wanted = call(thinking=ThinkingMode.ON, reasoning_max_tokens=budget, max_tokens=40, ignore_eos=True)
            found = await reply(cluster, wanted)
            assert found.reason is FinishReason.LENGTH and len(found.ids) == 40
            assert (found.reasoning == "") == (budget == 0) and found.text
        short = await reply(cluster, replace(wanted, reasoning_max_tokens=30, max_tokens=10))
        assert short.reason is FinishReason.LENGTH and not short.text
        await cluster.wait_clean()


async def test_stop_strings_and_stop_tokens_do_not_cut_a_structured_answer() -> None:
    """The strings stand in nearly every answer; no answer needs the tokens."""
    letters = tuple(TextTokenizer.from_dir(tiny_checkpoint()).encode(text)[0] for text in ("o", "Z", "7", " "))
    async with in_process_cluster(tiny_checkpoint(), *COLOCATED) as cluster:
        ended = 0
        for seed in range(6):
            for mode in (ThinkingMode.OFF, ThinkingMode.ON):
                wanted = call(
                    structure=SCHEMA,
                    stop=('"', "age", "}"),
                    stop_token_ids=letters,
                    seed=seed,
                    thinking=mode,
                    reasoning_max_tokens=6,
                )
                ended += check(wanted, await reply(cluster, wanted))
        assert ended >= 8
        await cluster.wait_clean()


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT])
async def test_a_structure_that_cannot_be_used_is_the_callers_error(roles: tuple[EngineRole, ...]) -> None:
    bad = Structure(kind=StructureKind.JSON_SCHEMA, text='{"type": "array", "uniqueItems": true}')
    async with in_process_cluster(tiny_checkpoint(), *roles) as cluster:
        with pytest.raises(InvalidRequest, match="uniqueItems") as caught:
            await reply(cluster, call(structure=bad))
        assert caught.value.field == "structure"
        await cluster.wait_clean()
        assert check(call(structure=CHOICE), await reply(cluster, call(structure=CHOICE)))
        await cluster.wait_clean()


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT])
async def test_leaving_while_structures_are_compiled_leaves_nothing(roles: tuple[EngineRole, ...]) -> None:
    async with in_process_cluster(tiny_checkpoint(), *roles, max_num_seqs=4) as cluster:
        for trial in range(12):
            own = Structure(kind=StructureKind.REGEX, text=f"[a-z]{{1,{trial + 5}}}|{'a?' * 300}{trial}")
            tasks = [asyncio.ensure_future(reply(cluster, call(structure=own, seed=seed))) for seed in range(3)]
            await asyncio.sleep(0.01 * trial)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await cluster.wait_clean()
