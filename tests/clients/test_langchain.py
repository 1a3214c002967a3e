"""langchain-openai: chat, streams, structured output, tools."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from cluster.demo import Sample
from cluster.pictures import crop, enlarged, open_upright, png
from tests.clients.conftest import data_url
from tests.clients.site import FOLDER, HOST

CARD = f"https://{HOST}{FOLDER}example1.jpg"


class Box(BaseModel):
    """Where a thing is, in thousandths of the sides."""

    bbox_2d: Annotated[list[int], Field(min_length=4, max_length=4)]


@tool
def image_zoom_in_tool(bbox_2d: list[float]) -> str:
    """Zooms into a part of a picture."""
    raise AssertionError("it is carried out below")


@pytest.fixture
def chat(base_url: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=base_url, api_key="none", model="nano", temperature=0, max_retries=0)  # type: ignore[arg-type]


def human(url: str, text: str) -> HumanMessage:
    return HumanMessage([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}])


def test_the_example_of_the_model_card(chat: ChatOpenAI) -> None:
    reply = chat.invoke([human(CARD, "What color clothes is the girl in the picture wearing?")])
    assert reply.content and reply.usage_metadata is not None and reply.usage_metadata["output_tokens"] > 0


async def test_true_answers(chat: ChatOpenAI, samples: dict[str, Sample]) -> None:
    sample = samples["picture"]
    asked = [human(data_url(sample), sample.question.text)]
    streamed = "".join(str(chunk.content) for chunk in chat.stream(asked))
    async_streamed = "".join([str(chunk.content) async for chunk in chat.astream(asked)])
    answers = [chat.invoke(asked).content, (await chat.ainvoke(asked)).content, streamed, async_streamed]
    assert [str(answer).strip() for answer in answers] == [sample.question.answer] * 4


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, samples: dict[str, Sample], method: Any) -> None:
    asked = [human(data_url(samples["thought"]), "Give the box of the square as JSON.")]
    box = chat.with_structured_output(Box, method=method).invoke(asked)
    assert isinstance(box, Box) and len(box.bbox_2d) == 4


def test_a_tool_loop(chat: ChatOpenAI, samples: dict[str, Sample]) -> None:
    sample = samples["number"]
    messages: list[Any] = [human(data_url(sample), sample.question.text)]
    with_tools = chat.bind_tools([image_zoom_in_tool])
    for _ in range(4):
        reply = with_tools.invoke(messages)
        if not reply.tool_calls:
            break
        messages.append(reply)
        for call in reply.tool_calls:
            part = png(enlarged(crop(open_upright(sample.content), call["args"]["bbox_2d"])))
            url = f"data:image/png;base64,{base64.b64encode(part).decode()}"
            seen = [{"type": "image_url", "image_url": {"url": url}}]
            messages.append(ToolMessage(seen, tool_call_id=call["id"]))
    assert len(messages) >= 3 and str(reply.content).strip() == sample.question.answer
