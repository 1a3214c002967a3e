"""POST /v1/responses over a scripted service, mostly through OpenAI's own client."""

from __future__ import annotations

import base64
import json
from typing import Any

import openai
import pydantic
import pytest

from actors.errors import InvalidRequest, Overloaded, Unavailable
from actors.types import (
    FinishReason,
    ImagePart,
    MediaSource,
    Message,
    MessageRole,
    StructureKind,
    TextPart,
    ThinkingMode,
    ToolCall,
    ToolCallDelta,
)
from cluster import http_exchange
from cluster.generation import ChoiceFinished, Delta, GenerateCall, Tool, ToolChoice, ToolMode
from cluster.openai_request import parse_body
from cluster.openai_responses_request import ResponsesCall, ResponsesRequest
from tests.doubles import ENDED, FINISHED, SCRIPT, STARTED, Pause, ScriptedService
from tests.unit.cluster.test_http_api import plain, sdk

NAN = float("nan")
RESPONSES = "/v1/responses"
CALLS = (
    STARTED,
    Delta(reasoning="hm"),
    Delta(text="Let me see."),
    Delta(tool_calls=(ToolCallDelta(index=0, id="call_a", name="look", arguments='{"x"'),)),
    Delta(text="And", tool_calls=(ToolCallDelta(index=0, arguments=": 1}"),)),
    Delta(tool_calls=(ToolCallDelta(index=1, id="call_b", name="look", arguments="{}"),)),
    ChoiceFinished(reason=FinishReason.TOOL_CALLS),
    FINISHED,
)
PICTURE = "data:image/png;base64," + base64.b64encode(b"png").decode()


def asked(**fields: Any) -> ResponsesCall:
    return ResponsesCall(parse_body(ResponsesRequest, json.dumps({"input": "hi"} | fields).encode()))


async def test_a_whole_reply() -> None:
    service = ScriptedService()
    async with sdk(service) as client:
        reply = await client.responses.create(
            model="ernie",
            input="What is this?",
            instructions="Be brief.",
            temperature=0,
            max_output_tokens=9,
            reasoning={"effort": "low"},
            metadata={"a": "b"},
            extra_body={"return_timings": True},
        )
    assert (reply.id, reply.object, reply.model, reply.status) == ("resp_r-1", "response", "ernie", "completed")
    thinking, message = reply.output
    assert thinking.type == "reasoning" and thinking.content and thinking.content[0].text == "hmm."
    assert message.type == "message" and reply.output_text == "A cät" and message.status == "completed"
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.total_tokens) == (12, 5, 17)
    assert reply.usage.input_tokens_details.cached_tokens == 4
    assert reply.usage.output_tokens_details.reasoning_tokens == 2
    assert (reply.instructions, reply.temperature, reply.metadata) == ("Be brief.", 0, {"a": "b"})
    assert reply.model_dump()["timings"]["time_to_first_token"] == 0.25
    (call,) = service.calls
    assert call == GenerateCall(
        messages=(
            Message(role=MessageRole.SYSTEM, parts=(TextPart(text="Be brief."),)),
            Message(role=MessageRole.USER, parts=(TextPart(text="What is this?"),)),
        ),
        model="ernie",
        temperature=0,
        max_tokens=9,
        thinking=ThinkingMode.ON,
        return_timings=True,
    )


async def test_a_stream_builds_up_what_a_whole_reply_has() -> None:
    async with sdk(ScriptedService(script=CALLS)) as client:
        tools: Any = [{"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}]
        whole = await client.responses.create(model="m", input="hi", tools=tools)
        async with client.responses.stream(model="m", input="hi", tools=tools) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    done = [event.item.model_dump() for event in events if event.type == "response.output_item.done"]
    assert [item.model_dump() for item in whole.output] == done
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "message", "function_call"]
    calls = [item for item in final.output if item.type == "function_call"]
    assert [(call.call_id, call.name, call.arguments) for call in calls] == [
        ("call_a", "look", '{"x": 1}'),
        ("call_b", "look", "{}"),
    ]
    assert final.output_text == whole.output_text == "Let me see.And"


async def test_a_reply_that_runs_into_its_bound_is_incomplete() -> None:
    script = (STARTED, Delta(reasoning="hm"), ChoiceFinished(reason=FinishReason.LENGTH), FINISHED)
    async with sdk(ScriptedService(script=script)) as client:
        reply = await client.responses.create(model="m", input="hi")
        stream = await client.responses.create(model="m", input="hi", stream=True)
        last = [event async for event in stream][-1]
    assert reply.status == "incomplete" and reply.output[0].type == "reasoning"
    assert reply.incomplete_details is not None and reply.incomplete_details.reason == "max_output_tokens"
    assert reply.output[0].status == "incomplete"
    assert last.type == "response.incomplete" and last.response.status == "incomplete"


async def test_a_reply_cancelled_elsewhere_says_so() -> None:
    script = (*SCRIPT[:3], ChoiceFinished(reason=FinishReason.CANCELLED), FINISHED)
    async with sdk(ScriptedService(script=script)) as client:
        assert (await client.responses.create(model="m", input="hi")).status == "cancelled"
        stream = await client.responses.create(model="m", input="hi", stream=True)
        last = [event async for event in stream][-1]
    assert last.type == "response.incomplete" and last.response.status == "cancelled"


async def test_an_error_inside_a_stream_fails_the_response() -> None:
    script = (*SCRIPT[:3], Unavailable("engine lost", reason="ENGINE_LOST"))
    async with sdk(ScriptedService(script=script)) as client:
        stream = await client.responses.create(model="m", input="hi", stream=True)
        events = [event async for event in stream]
        last = events[-1]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert last.type == "response.failed" and last.response.status == "failed"
        assert last.response.error is not None and last.response.error.code == "server_error"
        assert "engine lost" in last.response.error.message
        assert [item.type for item in last.response.output] == ["reasoning", "message"]
        done = [event.item for event in events if event.type == "response.output_item.done"]
        assert done == last.response.output and done[-1].status == "incomplete"
        with pytest.raises(openai.APIStatusError, match="engine lost"):
            await client.responses.create(model="m", input="hi")


async def test_silence_is_bridged_and_an_error_behind_it_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_exchange, "KEEP_ALIVE_S", 0.01)
    service = ScriptedService(script=(Pause(), Overloaded("full")))
    async with (
        plain(service) as client,
        client.stream("POST", RESPONSES, json={"input": "hi", "stream": True}) as reply,
    ):
        pieces = reply.aiter_text()
        assert (await anext(pieces)).startswith(": keep-alive\n\n")
        service.resume.set()
        rest = "".join([piece async for piece in pieces])
    last = rest.rstrip("\n").rsplit("\n\n", 1)[-1]
    name, data = last.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error",
        "sequence_number": 0,
        "code": "queue_full",
        "message": "full",
        "param": None,
    }


class Animal(pydantic.BaseModel):
    name: str
    legs: int


async def test_openais_client_parses_structured_answers() -> None:
    service = ScriptedService(script=(STARTED, Delta(text='{"name": "cat", "legs": 4}'), ENDED, FINISHED))
    async with sdk(service) as client:
        reply = await client.responses.parse(model="m", input="hi", text_format=Animal)
        async with client.responses.stream(model="m", input="hi", text_format=Animal) as stream:
            streamed = await stream.get_final_response()
    assert reply.output_parsed == streamed.output_parsed == Animal(name="cat", legs=4)
    for call in service.calls:
        assert call.structure is not None and call.structure.kind is StructureKind.JSON_SCHEMA
        assert list(json.loads(call.structure.text)["properties"]) == ["name", "legs"]
    told = reply.text.format if reply.text is not None else None
    assert told is not None and told.type == "json_schema" and told.name == "Animal"


async def test_a_reply_and_the_results_of_its_calls_go_back_as_they_are() -> None:
    service = ScriptedService(script=CALLS)
    tools: Any = [{"type": "function", "name": "look", "parameters": None, "strict": None}]
    async with sdk(service) as client:
        history: list[Any] = [{"role": "user", "content": "look"}]
        reply = await client.responses.create(model="m", input=history, tools=tools)
        history += reply.output
        for item in reply.output:
            if item.type == "function_call":
                picture: Any = [{"type": "input_image", "image_url": PICTURE, "detail": "auto"}]
                output = {"type": "function_call_output", "call_id": item.call_id, "output": picture}
                history.append(output)
        history.append({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "so?"}]})
        await client.responses.create(model="m", input=history, tools=tools)
    image = ImagePart(source=MediaSource(content=b"png"))
    assert service.calls[1].messages == (
        Message(role=MessageRole.USER, parts=(TextPart(text="look"),)),
        Message(
            role=MessageRole.ASSISTANT,
            parts=(TextPart(text="Let me see."), TextPart(text="And")),
            reasoning="hm",
            tool_calls=(
                ToolCall(id="call_a", name="look", arguments='{"x": 1}'),
                ToolCall(id="call_b", name="look", arguments="{}"),
            ),
        ),
        Message(role=MessageRole.TOOL, parts=(image,), tool_call_id="call_a"),
        Message(role=MessageRole.TOOL, parts=(image,), tool_call_id="call_b"),
        Message(role=MessageRole.USER, parts=(TextPart(text="so?"),)),
    )
    assert service.calls[1].tools == (Tool(name="look"),)


def test_turns_of_the_assistant_end_where_another_begins() -> None:
    items = [
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "s"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "ok"},
    ]
    turns = asked(input=items).call.messages
    assert [(turn.role.value, turn.reasoning, len(turn.parts), len(turn.tool_calls)) for turn in turns] == [
        ("assistant", None, 1, 0),
        ("assistant", None, 1, 0),
        ("assistant", "s", 0, 1),
        ("tool", None, 1, 0),
    ]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("messages", "input"),
        ("messages[0].content", "instructions"),
        ("messages[1].content[1].image_url", "input[0].content[1].image_url"),
        ("messages[2].role", "input[1].role"),
        ("messages[2].reasoning_content", "input[1].content"),
        ("messages[2].content[0].text", "input[2].content[0].text"),
        ("messages[2].content", "input[2].content"),
        ("messages[2].tool_calls[0].function.arguments", "input[3].arguments"),
        ("messages[3].content[0].image_url", "input[4].output[0].image_url"),
        ("messages[3].tool_call_id", "input[4].call_id"),
        ("structure", "text.format"),
        ("max_tokens", "max_output_tokens"),
        ("enable_thinking", "reasoning.effort"),
        ("timeout_s", "timeout"),
        ("tools", "tools"),
    ],
)
def test_fields_named_by_later_stages(theirs: str, ours: str) -> None:
    picture = {"type": "input_image", "image_url": PICTURE}
    call = asked(
        instructions="be",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, picture]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [picture]},
        ],
    )
    assert call.client_field(theirs) == ours


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_later_stages_name_the_clients_field(stream: bool) -> None:
    script = (InvalidRequest("no picture", field="messages[0].content[1].image_url"),)
    async with plain(ScriptedService(script=script)) as client:
        response = await client.post(RESPONSES, json={"input": "hi", "stream": stream})
    assert response.status_code == 400 and response.json()["error"]["param"] == "input[1].image_url"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": ""}, "input"),
    ({"input": 5}, "input"),
    ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
    (
        {"input": [{"role": "user", "content": [{"type": "output_text", "text": "x"}]}]},
        "input[0].content[0]",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///x"}]}]},
        "input[0].content[0].image_url",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u", "file_id": "f"}]}]},
        "input[0].content[0].file_id",
    ),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "mcp", "name": "f"}}, "tool_choice.type"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"background": True}, "background"),
    ({"store": True}, "store"),
    ({"truncation": "auto"}, "truncation"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_tool_calls": 2}, "max_tool_calls"),
    ({"include": ["message.output_text.logprobs"]}, "include[0]"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}, "temperature": 9}, "temperature"),
    ({"mm_processor_kwargs": {"image_max_pixels": 0}}, "mm_processor_kwargs.image_max_pixels"),
    ({"request_id": "resp_a"}, "request_id"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"metadata": {"k": "v" * 513}}, "metadata"),
    ({"messages": []}, "messages"),
    ({"n": 2}, "n"),
]


@pytest.mark.parametrize(("fields", "field"), REFUSED, ids=lambda value: str(value)[:40])
async def test_what_is_refused_is_named(fields: dict[str, Any], field: str) -> None:
    service = ScriptedService()
    async with plain(service) as client:
        response = await client.post(RESPONSES, json={"input": "hi"} | fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == field and field in error["message"]
    assert service.calls == []


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [{"type": "function", "name": "f", "parameters": {"default": NAN}}]}, "tools[0].parameters"),
        ({"text": {"format": {"type": "json_schema", "schema": {"default": NAN}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": '{"default": NaN}'}}}, "text.format"),
    ],
)
def test_what_is_told_back_must_be_json(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match="finite") as caught:
        asked(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("effort", "mode"),
    [
        (None, ThinkingMode.AUTO),
        ("none", ThinkingMode.OFF),
        ("low", ThinkingMode.ON),
        ("max", ThinkingMode.ON),
    ],
)
def test_effort_switches_thinking(effort: str | None, mode: ThinkingMode) -> None:
    assert asked(reasoning={"effort": effort}).call.thinking is mode


def test_every_field_is_carried_over() -> None:
    call = asked(
        model="m",
        temperature=0.5,
        top_p=0.5,
        top_k=4,
        min_p=0.1,
        seed=3,
        repetition_penalty=1.5,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"5": 1},
        allowed_token_ids=[5],
        bad_words=["x"],
        min_tokens=1,
        max_output_tokens=4,
        stop="S",
        stop_token_ids=[7],
        ignore_eos=True,
        reasoning_max_tokens=2,
        reasoning={"effort": "high", "summary": "auto"},
        tools=[{"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}}],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        priority=1,
        cache_salt="s",
        timeout=2,
        return_timings=True,
        store=False,
        background=False,
        include=["reasoning.encrypted_content"],
        truncation="disabled",
        service_tier="auto",
        safety_identifier="i",
        prompt_cache_key="k",
        user="u",
        request_id="mine",
        mm_processor_kwargs={"image_max_pixels": 100_000},
    ).call
    bare = asked(input="other").call
    same = {name for name in call.__dataclass_fields__ if getattr(call, name) == getattr(bare, name)}
    assert same == {
        "prompt",
        "add_special_tokens",
        "n",
        "logprobs",
        "prompt_logprobs",
        "structure",
        "return_token_ids",
    }
    assert call.tools == (Tool(name="f", description="d", parameters={"type": "object"}),)
    assert call.tool_choice == ToolChoice(mode=ToolMode.REQUIRED, function="f")


async def test_a_service_that_breaks_its_contract_is_an_error() -> None:
    for script in (SCRIPT[:2], SCRIPT[1:]):
        async with plain(ScriptedService(script=script)) as client:
            reply = await client.post(RESPONSES, json={"input": "a"})
            stream = await client.post(RESPONSES, json={"input": "a", "stream": True})
        assert reply.status_code == 500 and "response.completed" not in stream.text
        assert "response.failed" in stream.text or "event: error" in stream.text
