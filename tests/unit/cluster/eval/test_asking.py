"""What is asked for, as the server's own code reads it, and how replies are followed up."""

from __future__ import annotations

import io
import json
from typing import Any, cast

import pytest
from PIL import Image

from actors.processing.conversation import to_chat
from actors.processing.processor import Processor
from actors.types import ImagePart, MessageRole, PreprocessRequest, TextPart, ThinkingMode, VideoPart
from cluster.client import Client
from cluster.eval.asking import Look, Reply, ask, ask_with_zoom, zoom_call
from cluster.eval.world import zoom
from cluster.grpc_request import generate_call
from ernie_serving.v1 import inference_pb2
from tests.media import mp4, png
from tests.tiny_model import tiny_checkpoint

PICTURE = png(200, 100, 1)
CALL = zoom.call([500, 400, 740, 640])


class FakeClient:
    """Answers with the given texts in turn and keeps what it was asked."""

    def __init__(self, *texts: str, reasoning: str = "") -> None:
        self._texts = list(texts)
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
        choice = inference_pb2.Choice(text=self._texts.pop(0), reasoning_text=self._reasoning)
        return inference_pb2.GenerateResponse(choices=[choice])


def as_client(fake: FakeClient) -> Client:
    return cast(Client, fake)


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
    assert first == Reply("", CALL) and look == Look(
        [500, 400, 740, 640], look.picture if look else b"", Reply("", "42")
    )
    assert look is not None and fake.timeouts == [9.0, 9.0]
    with Image.open(io.BytesIO(PICTURE)) as whole, Image.open(io.BytesIO(look.picture)) as part:
        assert part.format == "PNG" and part.size == (48, 24)
        assert part.tobytes() == whole.convert("RGB").crop((100, 40, 148, 64)).tobytes()
    conversation = generate_call(fake.requests[1]).messages
    assert [m.role for m in conversation] == [
        MessageRole.SYSTEM,
        MessageRole.USER,
        MessageRole.ASSISTANT,
        MessageRole.TOOL,
    ]
    assert conversation[:2] == generate_call(fake.requests[0]).messages
    (seen,) = conversation[3].parts
    assert isinstance(seen, ImagePart) and seen.source.content == look.picture


async def test_zoom_reads_as_the_chat_template_writes_tools() -> None:
    fake = FakeClient(CALL, "42")
    await ask_with_zoom(as_client(fake), "What is the number?", PICTURE)
    processor = Processor(tiny_checkpoint())
    prompts = []
    for request in fake.requests:
        messages = generate_call(request).messages
        # Takes them: roles, order, media and lengths are checked here.
        processor.process(PreprocessRequest(lease="", messages=messages, max_prompt_tokens=4096))
        chat = to_chat(messages, processor.template.support, processor.tokenizer.protect)
        tools = processor.template.render(chat[1:], [zoom.TOOL], ThinkingMode.OFF)
        prompts.append(processor.template.render(chat, [], ThinkingMode.OFF))
        assert processor.tokenizer.encode(prompts[-1]) == processor.tokenizer.encode(tools)
    assert f"\nAssistant: {CALL}\n" in prompts[1]
    assert "<tool_output>\nPicture 2:" in prompts[1]


@pytest.mark.parametrize("text", ["42", "", "<tool_call>\n{}\n</tool_call>", zoom.call([300, 300, 300, 300])])
async def test_zoom_without_a_look(text: str) -> None:
    fake = FakeClient(text)
    assert await ask_with_zoom(as_client(fake), "What is the number?", PICTURE) == (Reply("", text), None)
    assert len(fake.requests) == 1


async def test_zoom_turns_pictures_upright_as_the_server_does() -> None:
    upright = Image.new("RGB", (60, 100), "white")
    upright.paste("black", (0, 0, 60, 50))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    _, look = await ask_with_zoom(as_client(FakeClient(zoom.call([0, 0, 1000, 500]), "7")), "?", buffer.getvalue())
    assert look is not None
    with Image.open(io.BytesIO(look.picture)) as part:
        assert part.size == (60, 50) and part.getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize(
    ("text", "corners"),
    [
        (CALL, [500, 400, 740, 640]),
        (f"Let me look.\n{CALL}\n", [500, 400, 740, 640]),
        (CALL.replace("\n", ""), [500, 400, 740, 640]),
        (CALL.replace("500", "0.5"), [0.5, 400, 740, 640]),
        (CALL.replace(zoom.NAME, "other"), None),
        (CALL.removesuffix("</tool_call>"), None),
        (CALL.replace("bbox_2d", "box"), None),
        (CALL.replace("640]", '"640"]'), None),
        (CALL.replace(", 640]", "]"), None),
        (CALL.replace("640", "NaN"), None),
        (CALL.replace("640", "1" + 400 * "0"), None),
        (CALL.replace("}}", "}"), None),
        ("42", None),
    ],
)
def test_zoom_call(text: str, corners: list[Any] | None) -> None:
    assert zoom_call(text) == corners


def test_the_tool_is_what_the_world_says() -> None:
    listed = zoom.OFFER.removeprefix("\n<tool_list>\n").removesuffix("\n</tool_list>\n")
    assert json.loads(listed) == [zoom.TOOL]
