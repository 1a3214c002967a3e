"""What the demo asks and how it shows answers, right and wrong; the cluster is a double."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image
from rich.console import Console

from actors.types import FinishReason, ThinkingMode, ToolCallDelta
from cluster.demo import GAP, SEEDS, UPPER_HALF, Sample, ask_over_grpc, keep, made_samples, show_images, thumbnails
from cluster.eval.world import zoom
from cluster.generation import ChoiceFinished, Delta, GenerateCall
from cluster.pictures import enlarged
from tests.doubles import FINISHED, STARTED, ScriptedService
from tests.doubles import grpc_serving_in_a_thread as running

CALL = ToolCallDelta(index=0, id="call_1", name=zoom.NAME, arguments='{"bbox_2d": [0, 0, 500, 500]}')


@dataclass
class Answering(ScriptedService):
    """Answers one text or call a request, in turn, after a thought where one was asked for."""

    answers: tuple[str | ToolCallDelta, ...] = ()

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Any, None]:
        answer = self.answers[len(self.calls)]
        self.calls.append(call)
        yield STARTED
        if call.thinking is ThinkingMode.ON:
            yield Delta(reasoning="One here, one there.")
        if isinstance(answer, str):
            yield Delta(text=answer)
            yield ChoiceFinished(reason=FinishReason.STOP)
        else:
            yield Delta(tool_calls=(answer,))
            yield ChoiceFinished(reason=FinishReason.TOOL_CALLS)
        yield FINISHED


@pytest.fixture(scope="module")
def samples() -> dict[str, Sample]:
    return made_samples()


def asked(samples: dict[str, Sample], answers: tuple[str | ToolCallDelta, ...]) -> tuple[str, list[GenerateCall]]:
    out = io.StringIO()
    with running(lambda: Answering(answers=answers)) as (address, service):
        asyncio.run(ask_over_grpc(address, samples, Console(file=out, width=100, highlight=False)))
    return out.getvalue(), service.calls


def test_samples_are_the_same_each_time(samples: dict[str, Sample], tmp_path: Path) -> None:
    again = made_samples()
    assert samples.keys() == SEEDS.keys()
    for name, sample in samples.items():
        assert (again[name].question, again[name].content) == (sample.question, sample.content)
        assert sample.question.text and sample.question.answer
    keep(samples, tmp_path / "new")
    assert {file.stem for file in (tmp_path / "new").iterdir()} == SEEDS.keys()
    with av.open(str(tmp_path / "new" / "clip.mp4")) as clip:
        assert len(list(clip.decode(video=0))) >= len(samples["clip"].shown)
    with Image.open(tmp_path / "new" / "number.png") as picture:
        assert picture.size == samples["number"].shown[0].size


def test_the_number_shown_is_the_true_one(samples: dict[str, Sample]) -> None:
    assert f"the number {samples['number'].question.answer}" in samples["number"].caption


def test_answers_stand_beside_the_truth(samples: dict[str, Sample]) -> None:
    right = {name: sample.question.answer for name, sample in samples.items()}
    out, calls = asked(samples, (right["picture"], right["clip"], right["thought"], CALL, right["number"]))
    for name in ("picture", "clip", "thought", "number"):
        assert f"Q: {samples[name].question.text}\n" in out
        assert f"A: {right[name]}   (truth: {right[name]})\n" in out
    assert "One here, one there.\nA: " in out
    assert f"{CALL.name}({CALL.arguments})\n" in out
    assert [len(call.tools) for call in calls] == [0, 0, 0, 1, 1]
    width, height = samples["number"].shown[0].size
    half = Image.new("RGB", (round(width / 2), round(height / 2)))
    assert f"cut out, enlarged to {enlarged(half).width} x {enlarged(half).height} pixels" in out
    assert "first token after" in out and "decode" in out
    assert [call.thinking for call in calls].count(ThinkingMode.ON) == 1


def test_wrong_answers_are_shown_as_they_are(samples: dict[str, Sample]) -> None:
    out, calls = asked(samples, ("[b]mauve[/b]", "", "never", "12345"))
    assert len(calls) == 4
    for name, answer in (("picture", "[b]mauve[/b]"), ("clip", ""), ("thought", "never"), ("number", "12345")):
        assert f"A: {answer}   (truth: {samples[name].question.answer})\n" in out
    assert "cut out" not in out


def test_a_reply_that_was_cancelled_is_a_failure(samples: dict[str, Sample]) -> None:
    script = (STARTED, Delta(text="re"), ChoiceFinished(reason=FinishReason.CANCELLED), FINISHED)
    with running(lambda: ScriptedService(script=script)) as (address, _), pytest.raises(ConnectionError):
        asyncio.run(ask_over_grpc(address, samples, Console(file=io.StringIO())))


def test_a_thumbnail_has_two_pixels_a_character() -> None:
    image = Image.new("RGB", (80, 40), (255, 0, 0))
    image.paste((0, 0, 255), (0, 10, 80, 40))
    text = thumbnails([image, image], 8)
    assert text.plain.splitlines() == [UPPER_HALF * 8 + " " * GAP + UPPER_HALF * 8] * 2
    assert text.spans[0].style == "rgb(255,0,0) on rgb(0,0,255)"


@pytest.mark.parametrize(("terminal", "drawn"), [(True, True), (False, False)])
def test_pictures_are_drawn_on_terminals_and_fit(terminal: bool, drawn: bool) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    console = Console(file=out, width=40, color_system="truecolor", force_terminal=terminal)
    show_images([Image.new("RGB", (30, 30), "red")] * 8, console)
    out.seek(0)
    shown = out.read()
    assert bool(shown) == drawn
    if drawn:
        assert shown.splitlines()[0].count(UPPER_HALF) == 8 * 3
