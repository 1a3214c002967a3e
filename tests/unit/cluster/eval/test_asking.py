"""What is asked for, as the server's own code reads it, and how replies are followed up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from actors.processing.conversation import to_chat
from actors.processing.processor import Processor
from actors.types import ImagePart, Message, MessageRole, PreprocessRequest, TextPart, ThinkingMode, VideoPart
from cluster.client import AsyncClient
from cluster.client.requests import declared_tool
from cluster.eval.asking import ask, ask_with_zoom
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
        choice = inference_pb2.Choice(reasoning_text=self._reasoning, finish_reason=inference_pb2.FINISH_REASON_STOP)
        if isinstance(answer, str):
            choice.text = answer
        else:
            choice.tool_calls.append(answer)
            choice.finish_reason = inference_pb2.FINISH_REASON_TOOL_CALLS
        return inference_pb2.GenerateResponse(choices=[choice])


def as_client(fake: FakeClient) -> AsyncClient:
    return cast(AsyncClient, fake)


@pytest.mark.parametrize("thinking", [False, True])
async def test_ask(thinking: bool) -> None:
    fake = FakeClient("red", reasoning="hm")
    film = mp4(64, 48, 8, 4)
    reply = await ask(as_client(fake), "Which?", images=[PICTURE], videos=[film], thinking=thinking, timeout_s=7.0)
    assert (reply.reasoning, reply.text) == ("hm", "red")
    call = generate_call(fake.requests[0])
    assert call.timeout_s == 7
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
    reply, (look,) = await ask_with_zoom(as_client(fake), "What is the number?", PICTURE, timeout_s=9.0)
    assert reply.text == "42" and look.box is not None and look.box.corners == (500, 400, 740, 640)
    conversation = generate_call(fake.requests[1]).messages
    assert [generate_call(request).timeout_s for request in fake.requests] == [9, 9]
    assert [m.role for m in conversation] == [MessageRole.USER, MessageRole.ASSISTANT, MessageRole.TOOL]
    assert conversation[:1] == generate_call(fake.requests[0]).messages
    (seen,) = conversation[2].parts
    assert isinstance(seen, ImagePart) and (seen.source.content,) == look.shown


def without_label(tool: content_pb2.Tool) -> dict[str, Any]:
    parameters = json.loads(tool.parameters_json)
    assert parameters["properties"].pop("label") == {"type": "string"}
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }


@pytest.mark.parametrize("checkpoint", [tiny_checkpoint, nano_checkpoint])
async def test_the_model_reads_what_it_was_trained_on(checkpoint: Callable[[], Path]) -> None:
    """Training offered the tool by a system message of ``zoom.OFFER`` and wrote calls as ``zoom.call`` does. The client
    declares one argument more, which training never saw."""
    fake = FakeClient(CALL, "42")
    await ask_with_zoom(as_client(fake), "What is the number?", PICTURE)
    for request in fake.requests:
        request.tools[0].CopyFrom(declared_tool(without_label(request.tools[0])))
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
