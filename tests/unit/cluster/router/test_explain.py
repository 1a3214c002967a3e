"""A request can tell what became of it and why, while it runs and for a while after."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from actors.errors import InvalidRequest, NotFound, ServingError
from actors.types import EngineRole, FinishReason, MilestoneKind, Stage
from cluster.cli_explain import explanation_lines
from cluster.router import story as module
from cluster.router.stages import StageLost
from cluster.router.story import FIRST_NOTES, LAST_NOTES, Stories, Story, What
from cluster.router.timeline import Timeline
from tests.unit.cluster.router.world import CALL, IMAGE, World, world
from tests.waiting import eventually

PREFILL, DECODE, COLOCATED = EngineRole.PREFILL, EngineRole.DECODE, EngineRole.COLOCATED


def kinds(told: dict[str, Any]) -> list[str]:
    return [note["what"] for note in told["notes"]]


def notes(told: dict[str, Any], what: What) -> list[dict[str, Any]]:
    return [note for note in told["notes"] if note["what"] == what]


async def ended(w: World) -> dict[str, Any]:
    await eventually(lambda: w.router.active_count == 0)
    return w.router.explain("mine")


async def test_a_request_that_lost_an_engine_tells_all_of_it() -> None:
    async with world(PREFILL, DECODE, DECODE) as w:
        w.stages.media, w.stages.prompt_ids = (IMAGE,), (5, 91, 7)
        w.stages.losses = w.stages.misses = 1
        task = w.ask(replace(CALL, request_id="mine"))
        prefill, *decodes = w.engines
        key, _, _ = await prefill.taken()
        await eventually(lambda: any(not engine.submits.empty() for engine in decodes))
        (decode,) = (engine for engine in decodes if not engine.submits.empty())
        (other,) = (engine for engine in decodes if engine is not decode)
        prefill.links.deliver_milestone(key, MilestoneKind.PREFILL_STARTED, 0.0, 2)
        prefill.say(key, 0, 0)
        decode.links.deliver_milestone(key, MilestoneKind.TRANSFERRED, 0.25)
        decode.say(key, 1, 1)
        await eventually(lambda: w.router.explain("mine")["stage"] == Stage.DECODE)
        running = w.router.explain("mine")
        assert running["running"] and running["request_id"] == key.request_id
        assert running == running | {"alias": "mine", "notes_dropped": 0}
        await decode.server.stop(None)
        again, request, _ = await prefill.taken()
        assert request.output_ids == (0, 1) and again.attempt == 1
        prefill.say(again, 2, 2)
        other.links.deliver_milestone(again, MilestoneKind.TRANSFERRED, 0.25)
        other.say(again, 3, 3, finish=FinishReason.LENGTH)
        await task
        told = await ended(w)
    assert not told["running"] and w.router.explain(key.request_id) == told
    of_two_engines = [What.FIRST_TOKEN, What.TRANSFERRED]  # in no order between them
    assert [kind for kind in kinds(told) if kind not in (*of_two_engines, "waited")] == [
        "admitted",
        "stage_lost",
        "preprocessed",
        "encoder",
        "stage_lost",
        "preprocessed",
        "encoder",
        "encoded",
        "route",
        "prefill_started",
        "attempt_ended",
        "route",
        "choice_finished",
        "finished",
    ]
    for what in of_two_engines:
        assert [note["attempt"] for note in notes(told, what)] == [0, 1]
    first, second = notes(told, What.ROUTE)
    names = [engine.info.engine_id for engine in w.engines]
    assert (first["prefill"], first["decode"]) == (names[0], decode.info.engine_id)
    assert (second["decode"], second["attempt"], second["tokens"]) == (other.info.engine_id, 1, 5)
    assert first["candidates"][0]["name"] == f"{names[0]} -> {decode.info.engine_id}"
    assert first["candidates"][1]["name"] == f"{names[0]} -> {other.info.engine_id}"
    assert {"name": decode.info.engine_id, "excluded": "no link to it"} in second["candidates"]
    (lost,) = notes(told, What.ATTEMPT_ENDED)
    assert (lost["reason"], lost["tokens"], lost["verdict"]) == ("ENGINE_LOST", 2, "lost")
    assert notes(told, What.PREFILL_STARTED)[0]["cached_tokens"] == 2
    assert notes(told, What.ENCODER)[0]["candidates"][0]["name"] == "v"
    assert [note["at_s"] for note in told["notes"]] == sorted(note["at_s"] for note in told["notes"])
    assert sum(told["exposed_s"].values()) == pytest.approx(told["elapsed_s"])
    json.dumps(told)
    text = "\n".join(explanation_lines(told))
    for part in ("(mine): ended after", "choice 0/1: route: prefill", "no link to it", "handover 64"):
        assert part in text, text


async def test_requests_that_do_not_finish_tell_why() -> None:
    async with world(COLOCATED) as w:
        task = w.ask(replace(CALL, request_id="mine"))
        await w.engines[0].taken()
        await w.router.cancel("mine")
        await task
        assert kinds(await ended(w))[-3:] == ["cancelled", "choice_finished", "finished"]
        task = w.ask(replace(CALL, request_id="mine"))
        await w.engines[0].taken()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (left,) = notes(await ended(w), What.CANCELLED)
        assert left["by"] == "its client, who left"
        w.stages.error = InvalidRequest("messages: no", field="messages")
        with pytest.raises(ServingError):
            await w.ask(replace(CALL, request_id="mine"))
        (failed,) = notes(await ended(w), What.FAILED)
        assert (failed["reason"], failed["message"]) == ("INVALID_FIELD", "messages: no")
        w.stages.error, w.stages.gate = None, asyncio.Event()
        with pytest.raises(ServingError):
            await w.ask(replace(CALL, request_id="mine", timeout_s=0.05))
        (failed,) = notes(await ended(w), What.FAILED)
        assert failed["reason"] == "DEADLINE_EXCEEDED"
        with pytest.raises(NotFound, match="never"):
            w.router.explain("never")
        w.stages.gate.set()


async def test_a_choice_that_waits_tells_what_for() -> None:
    async with world(COLOCATED) as w:
        engine = w.engines[0]
        task = w.ask(replace(CALL, request_id="mine"))
        key, _, _ = await engine.taken()
        engine.end(key, StageLost("a test"))
        key, _, _ = await engine.taken()
        engine.free_blocks = 0
        engine.end(key, ServingError("no", reason="NO_BLOCKS"))
        await asyncio.sleep(0.1)
        engine.free_blocks = 100
        key, _, _ = await engine.taken()
        engine.say(key, 0, 0, finish=FinishReason.LENGTH)
        await task
        told = await ended(w)
    assert [note["verdict"] for note in notes(told, What.ATTEMPT_ENDED)] == ["lost", "room"]
    (waited,) = notes(told, What.WAITED)
    assert waited["reason"] == "room" and waited["waited_s"] > 0.05


def a_story(name: str, alias: str | None = None) -> Story:
    return Story(name, alias, Timeline(lambda: 0.0), 0.0)


def test_a_story_without_end_keeps_its_first_and_last_notes() -> None:
    story = a_story("r")
    for number in range(1000):
        story.note(What.ROUTE, attempt=number)
    told = story.told()
    assert told["notes_dropped"] == 1000 - FIRST_NOTES - LAST_NOTES
    attempts = [note["attempt"] for note in told["notes"]]
    assert attempts == [*range(FIRST_NOTES), *range(1000 - LAST_NOTES, 1000)]
    assert f"{told['notes_dropped']} notes" in "\n".join(explanation_lines(told))


def test_stories_are_forgotten_by_time_and_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ENDED", 3)
    now = [0.0]
    stories = Stories(lambda: now[0])
    for number in range(4):
        stories.add(a_story(f"r{number}", "mine"))
    assert [stories.find(f"r{number}") is not None for number in range(4)] == [False, True, True, True]
    found = stories.find("mine")
    assert found is not None and found.request_id == "r3", "the latest of a name"
    now[0] = module.REMEMBER_S + 1
    assert stories.find("r3") is None and stories.find("mine") is None
