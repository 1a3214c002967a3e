"""What is asked for, as the server's own code reads it, and how replies are followed up."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from actors.processing.conversation import to_chat
from actors.processing.processor import Processor
from actors.types import ImagePart, Message, MessageRole, PreprocessRequest, TextPart, ThinkingMode, VideoPart
from cluster.client import AsyncClient
from cluster.eval.asking import Look, Reply, ask, ask_with_zoom, zoom_call
from cluster.eval.world import zoom
from cluster.grpc_request import generate_call
from cluster.tools import template_form
from ernie_serving.v1 import content_pb2, inference_pb2
from tests.media import mp4, png
from tests.nano_model import nano_checkpoint
from tests.tiny_model import tiny_checkpoint

PICTURE = png(200, 100, 1)
CALL = content_pb2.ToolCall(id="call_9", name=zoom.NAME, arguments_json='{"bbox_2d": [500, 400, 740, 640]}')


class FakeClient:
    """Answers with the given texts and calls in turn and keeps what it was asked."""

    def __init__(self, *answers: str | content_pb2.ToolCall, reasoning: str = "") -> None:
        self._answers = list(answers)
        self._reasoning = reasoning
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.timeouts: list[float | None] = []

    async def generate(
        self, request: inference_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> inference_pb2.GenerateResponse:
        copied = inference_pb2.GenerateRequest()
        copied.CopyFrom(request)
        self.requests.append(copied)
        self.timeouts.append(timeout_s)
        answer = self._answers.pop(0)
        said = {"text": answer} if isinstance(answer, str) else {"tool_calls": [answer]}
        choice = inference_pb2.Choice(reasoning_text=self._reasoning, **said)  # type: ignore[arg-type]
        return inference_pb2.GenerateResponse(choices=[choice])


def as_client(fake: FakeClient) -> AsyncClient:
    return cast(AsyncClient, fake)


@pytest.mark.parametrize("thinking", [False, True])
async def test_ask(thinking: bool) -> None:
    fake = FakeClient("red", reasoning="hm")
    film = mp4(64, 48, 8, 4)
    reply = await ask(as_client(fake), "Which?", images=[PICTURE], videos=[film], thinking=thinking, timeout_s=7.0)
    assert reply == Reply("hm", "red") and fake.timeouts == [7.0]
    call = generate_call(fake.requests[0])
    assert call.temperature == 0 and call.max_tokens is not None
    assert call.thinking is (ThinkingMode.ON if thinking else ThinkingMode.OFF)
    (message,) = call.messages
    image, video, text = message.parts
    assert isinstance(image, ImagePart) and image.source.content == PICTURE
    assert isinstance(video, VideoPart) and video.source.content == film
    assert text == TextPart(text="Which?")


async def test_ask_question_first() -> None:
    fake = FakeClient("red")
    await ask(as_client(fake), "Which?", images=[PICTURE, png(50, 50)], question_first=True)
    (message,) = generate_call(fake.requests[0]).messages
    assert [type(part) for part in message.parts] == [TextPart, ImagePart, ImagePart]
    assert isinstance(message.parts[1], ImagePart) and message.parts[1].source.content == PICTURE


async def test_zoom_shows_the_part_that_was_asked_for() -> None:
    fake = FakeClient(CALL, "42")
    first, look = await ask_with_zoom(as_client(fake), "What is the number?", PICTURE, timeout_s=9.0)
    assert first == Reply("", "", (CALL,)) and look == Look(
        [500, 400, 740, 640], look.picture if look else b"", Reply("", "42")
    )
    assert look is not None and fake.timeouts == [9.0, 9.0]
    with Image.open(io.BytesIO(PICTURE)) as whole, Image.open(io.BytesIO(look.picture)) as part:
        assert part.format == "PNG" and part.size == (48, 24)
        assert part.tobytes() == whole.convert("RGB").crop((100, 40, 148, 64)).tobytes()
    conversation = generate_call(fake.requests[1]).messages
    assert [m.role for m in conversation] == [MessageRole.USER, MessageRole.ASSISTANT, MessageRole.TOOL]
    assert conversation[:1] == generate_call(fake.requests[0]).messages
    assert conversation[2].tool_call_id == conversation[1].tool_calls[0].id == "call_9"
    (seen,) = conversation[2].parts
    assert isinstance(seen, ImagePart) and seen.source.content == look.picture


@pytest.mark.parametrize("checkpoint", [tiny_checkpoint, nano_checkpoint])
async def test_the_model_reads_what_it_was_trained_on(checkpoint: Callable[[], Path]) -> None:
    """Training offered the tool by a system message of ``zoom.OFFER`` and wrote calls as ``zoom.call`` does."""
    fake = FakeClient(CALL, "42")
    await ask_with_zoom(as_client(fake), "What is the number?", PICTURE)
    processor = Processor(checkpoint())
    prompts = []
    for request in fake.requests:
        call = generate_call(request)
        tools = tuple(map(template_form, call.offered_tools))
        offer = Message(role=MessageRole.SYSTEM, parts=(TextPart(text=zoom.OFFER),))
        asked = PreprocessRequest(lease="", messages=call.messages, tools=tools, max_prompt_tokens=4096)
        trained = replace(asked, messages=(offer, *call.messages), tools=())
        assert processor.process(asked).prompt_ids == processor.process(trained).prompt_ids
        chat = to_chat(call.messages, processor.template.support, processor.tokenizer.protect)
        prompts.append(processor.template.render(chat, tools, call.thinking))
    assert all(zoom.OFFER in prompt for prompt in prompts)
    assert f"\nAssistant: {zoom.call([500, 400, 740, 640])}\n" in prompts[1]
    assert "<tool_output>\nPicture 2:" in prompts[1]


def zoom_in(corners: list[int]) -> content_pb2.ToolCall:
    return content_pb2.ToolCall(id="c", name=zoom.NAME, arguments_json=json.dumps({"bbox_2d": corners}))


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        ("42", Reply("", "42")),
        ("", Reply("", "")),
        ("<tool_call>\n{}\n</tool_call>", Reply("", "<tool_call>\n{}\n</tool_call>")),
        (zoom_in([300, 300, 300, 300]), Reply("", "", (zoom_in([300, 300, 300, 300]),))),
    ],
)
async def test_zoom_without_a_look(answer: str | content_pb2.ToolCall, reply: Reply) -> None:
    fake = FakeClient(answer)
    assert await ask_with_zoom(as_client(fake), "What is the number?", PICTURE) == (reply, None)
    assert len(fake.requests) == 1


async def test_zoom_turns_pictures_upright_as_the_server_does() -> None:
    upright = Image.new("RGB", (60, 100), "white")
    upright.paste("black", (0, 0, 60, 50))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    _, look = await ask_with_zoom(as_client(FakeClient(zoom_in([0, 0, 1000, 500]), "7")), "?", buffer.getvalue())
    assert look is not None
    with Image.open(io.BytesIO(look.picture)) as part:
        assert part.size == (60, 50) and part.getextrema() == ((0, 0),) * 3


BOX = '{"bbox_2d": [500, 400, 740, 640]}'


@pytest.mark.parametrize(
    ("name", "arguments", "corners"),
    [
        (zoom.NAME, BOX, [500, 400, 740, 640]),
        (zoom.NAME, BOX.replace("500", "0.5"), [0.5, 400, 740, 640]),
        ("other", BOX, None),
        (zoom.NAME, BOX.replace("bbox_2d", "box"), None),
        (zoom.NAME, BOX.replace("640]", '"640"]'), None),
        (zoom.NAME, BOX.replace(", 640]", "]"), None),
        (zoom.NAME, BOX.replace("640", "NaN"), None),
        (zoom.NAME, BOX.replace("640", "1" + 400 * "0"), None),
        (zoom.NAME, BOX.removesuffix("}"), None),
        (zoom.NAME, "", None),
        (zoom.NAME, "[]", None),
    ],
)
def test_zoom_call(name: str, arguments: str, corners: list[Any] | None) -> None:
    assert zoom_call(content_pb2.ToolCall(id="c", name=name, arguments_json=arguments)) == corners


def test_the_tool_is_what_the_world_says() -> None:
    listed = zoom.OFFER.removeprefix("\n<tool_list>\n").removesuffix("\n</tool_list>\n")
    assert json.loads(listed) == [zoom.TOOL]
