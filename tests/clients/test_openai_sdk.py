"""OpenAI's own SDK: the requests of the model cards, streams, parsed replies, tools."""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any

import openai
import pytest
from pydantic import BaseModel, Field

from cluster.client.looking import ZOOM, tools
from cluster.demo import Sample
from cluster.pictures import crop, enlarged, open_upright, png
from tests.clients.conftest import data_url, question
from tests.clients.site import FOLDER, HOST, Site

CARD = f"https://{HOST}{FOLDER}example1.jpg"
Corners = Annotated[list[int], Field(min_length=4, max_length=4)]


class Box(BaseModel):
    """Where a thing is, in thousandths of the sides."""

    bbox_2d: Corners


@pytest.fixture
def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)


@pytest.fixture
def async_client(base_url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)


def test_the_example_of_the_model_card(client: openai.OpenAI, site: Site) -> None:
    messages: list[Any] = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What color clothes is the girl in the picture wearing?"},
                {"type": "image_url", "image_url": {"url": CARD}},
            ],
        },
    ]
    reply = client.chat.completions.create(model="nano", messages=messages, max_tokens=1024)
    assert reply.choices[0].message.content and reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None and reply.usage.prompt_tokens > reply.usage.completion_tokens > 0
    assert FOLDER + "example1.jpg" in site.asked


SPELLINGS: list[dict[str, Any]] = [
    {"enable_thinking": True},
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"metadata": {"enable_thinking": True}},
]


@pytest.mark.parametrize("extra", SPELLINGS, ids=str)
def test_thinking_in_every_spelling(client: openai.OpenAI, samples: dict[str, Sample], extra: dict[str, Any]) -> None:
    sample = samples["thought"]
    reply = client.chat.completions.create(
        model="nano", messages=question(sample), temperature=0, extra_body=extra, max_tokens=200
    )
    message: Any = reply.choices[0].message
    assert message.content.strip() == sample.question.answer
    assert message.reasoning_content and message.reasoning_content == message.reasoning
    details = reply.usage.completion_tokens_details if reply.usage is not None else None
    assert details is not None and details.reasoning_tokens


@pytest.mark.parametrize("name", ["picture", "http", "clip"])
def test_true_answers(client: openai.OpenAI, samples: dict[str, Sample], name: str) -> None:
    sample = samples[name]
    reply = client.chat.completions.create(model="nano", messages=question(sample), temperature=0)
    assert (reply.choices[0].message.content or "").strip() == sample.question.answer


def test_a_stream(client: openai.OpenAI, samples: dict[str, Sample]) -> None:
    sample = samples["picture"]
    stream = client.chat.completions.create(
        model="nano", messages=question(sample), temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.strip() == sample.question.answer
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0


async def test_asyncio(async_client: openai.AsyncOpenAI, samples: dict[str, Sample]) -> None:
    sample = samples["picture"]
    async with async_client as client:
        whole = await client.chat.completions.create(model="nano", messages=question(sample), temperature=0)
        stream = await client.chat.completions.create(
            model="nano", messages=question(sample), temperature=0, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert text == whole.choices[0].message.content and text.strip() == sample.question.answer


def test_the_streaming_helper(client: openai.OpenAI, samples: dict[str, Sample]) -> None:
    sample = samples["picture"]
    with client.chat.completions.stream(model="nano", messages=question(sample), temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content
    assert "".join(deltas).strip() == sample.question.answer


async def test_the_streaming_helper_of_asyncio(async_client: openai.AsyncOpenAI, samples: dict[str, Sample]) -> None:
    sample = samples["picture"]
    async with (
        async_client as client,
        client.chat.completions.stream(model="nano", messages=question(sample), temperature=0) as stream,
    ):
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert (final.choices[0].message.content or "").strip() == sample.question.answer


def test_a_parsed_reply(client: openai.OpenAI, samples: dict[str, Sample]) -> None:
    messages = asked(samples["thought"], "Give the box of the square as JSON.")
    reply = client.chat.completions.parse(model="nano", messages=messages, response_format=Box, temperature=0)
    parsed = reply.choices[0].message.parsed
    assert parsed is not None
    x1, y1, x2, y2 = parsed.bbox_2d
    assert 500 < x1 < x2 < 720 and 690 < y1 < y2 < 960


def asked(sample: Sample, text: str) -> list[Any]:
    image = {"type": "image_url", "image_url": {"url": data_url(sample)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def test_a_tool_loop(client: openai.OpenAI, samples: dict[str, Sample]) -> None:
    sample = samples["number"]
    messages = question(sample)
    offered: Any = tools()
    for _ in range(4):
        reply = client.chat.completions.create(model="nano", messages=messages, tools=offered, temperature=0)
        message = reply.choices[0].message
        if reply.choices[0].finish_reason != "tool_calls":
            break
        messages.append(message)
        for call in message.tool_calls or []:
            assert call.type == "function" and call.function.name == ZOOM
            corners = json.loads(call.function.arguments)["bbox_2d"]
            part = base64.b64encode(png(enlarged(crop(open_upright(sample.content), corners)))).decode()
            seen = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{part}"}}
            messages.append({"role": "tool", "tool_call_id": call.id, "content": [seen]})
    assert len(messages) >= 3 and (message.content or "").strip() == sample.question.answer


def test_a_forced_call_that_is_parsed(client: openai.OpenAI, samples: dict[str, Sample]) -> None:
    reply = client.chat.completions.parse(
        model="nano",
        messages=asked(samples["thought"], "Give the box of the square as JSON."),
        tools=[openai.pydantic_function_tool(Box)],
        tool_choice="required",
        temperature=0,
    )
    (call,) = reply.choices[0].message.tool_calls or []
    assert reply.choices[0].finish_reason == "tool_calls"
    assert isinstance(call.function.parsed_arguments, Box)


def test_several_choices_and_log_probabilities(client: openai.OpenAI, samples: dict[str, Sample]) -> None:
    reply = client.chat.completions.create(
        model="nano", messages=question(samples["picture"]), n=2, seed=3, temperature=0.5, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    for choice in reply.choices:
        assert choice.logprobs is not None and choice.logprobs.content
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_models_and_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nano"]
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "hi"}], temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])
