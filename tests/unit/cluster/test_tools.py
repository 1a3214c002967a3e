"""Tools in requests and calls in replies, over HTTP and gRPC."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from llguidance import LLMatcher

from actors.engine.constraints.structure_grammar import grammar_of
from actors.errors import InvalidRequest
from actors.types import FinishReason, StructureKind, ToolCallDelta
from cluster.client import AsyncClient, generate_request
from cluster.generation import ChoiceFinished, Delta, GenerateCall, Tool, ToolChoice, ToolMode
from cluster.grpc_request import generate_call
from cluster.openai_request import parse_chat_request, to_call
from cluster.tools import answer_structure, template_form
from ernie_serving.v1 import inference_pb2
from tests.doubles import FINISHED, STARTED, ScriptedService, grpc_serving, scores
from tests.unit.cluster.test_http_api import sdk

SCHEMA = {"type": "object", "required": ["b"], "properties": {"b": {"type": "integer"}, "a": {"enum": ["x", "é"]}}}


def tool(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


F = tool(description="Does f.", parameters=SCHEMA)
NAMED = {"type": "function", "function": {"name": "f"}}
NAN = {"properties": {"a": {"enum": [float("nan")]}}}


def over_http(**fields: Any) -> GenerateCall:
    body = {"messages": [{"role": "user", "content": "hello"}], **fields}
    return to_call(parse_chat_request(json.dumps(body).encode()))


def over_grpc(**fields: Any) -> GenerateCall:
    return generate_call(generate_request("hello", **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [F]},
        {"tools": [F, tool("g")], "tool_choice": "auto"},
        {"tools": [F], "tool_choice": "none"},
        {"tools": [F], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [F, tool("g", parameters={}, description=None)], "tool_choice": NAMED, "parallel_tool_calls": True},
        {"tools": [tool("_-Z9" * 16, description="", parameters=None)]},
        {"tools": []},
        {"tool_choice": "auto"},
        {"tool_choice": "none", "parallel_tool_calls": False},
        {"tools": [F], "tool_choice": "none", "regex": "a"},
    ],
)
def test_both_apis_say_the_same(fields: dict[str, Any]) -> None:
    grpc = over_grpc(**fields)
    http = over_http(**{("guided_regex" if name == "regex" else name): value for name, value in fields.items()})
    assert grpc == http
    # The model reads members in their order, which equal dicts need not share.
    assert [json.dumps(template_form(t)) for t in grpc.tools] == [json.dumps(template_form(t)) for t in http.tools]


def test_translation() -> None:
    call = over_http(tools=[F, tool("g", strict=True)], tool_choice=NAMED, parallel_tool_calls=False)
    assert call.tools == (Tool(name="f", description="Does f.", parameters=SCHEMA), Tool(name="g"))
    assert call.tool_choice == ToolChoice(mode=ToolMode.REQUIRED, function="f") and call.forces_call
    assert not call.parallel_tool_calls
    assert [template_form(t) for t in call.tools] == [F, tool("g")]
    assert json.dumps(template_form(call.tools[0])) == json.dumps(F)
    assert over_http(tools=[F], tool_choice=None, parallel_tool_calls=None).offered_tools == call.tools[:1]
    assert over_http(tools=[F], tool_choice="none").offered_tools == ()


DEEP: Any = {}
for _ in range(70):
    DEEP = {"properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": F}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [F, {"function": {"name": "g"}}]}, "tools[1].type"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [tool(returns={})]}, "tools[0].function.returns"),
        ({"tools": [{**F, "name": "f"}]}, "tools[0].name"),
        ({"tools": [tool(parameters="{}")]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters=True)]}, "tools[0].function.parameters"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": 1}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": [F], "tool_choice": {"type": "function", "function": {"name": 1}}}, "tool_choice.function.name"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
    ],
)
def test_wrong_bodies_name_their_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        over_http(**fields)
    assert caught.value.field == field and field in caught.value.message


@pytest.mark.parametrize(
    ("fields", "http_field", "grpc_field"),
    [
        ({"tools": [tool(str(index)) for index in range(129)]}, "tools", "tools"),
        ({"tools": [tool("")]}, "tools[0].function.name", "tools[0].name"),
        ({"tools": [F, tool("x" * 65)]}, "tools[1].function.name", "tools[1].name"),
        ({"tools": [tool("get weather")]}, "tools[0].function.name", "tools[0].name"),
        ({"tools": [tool("f\n")]}, "tools[0].function.name", "tools[0].name"),
        ({"tools": [F, tool("g"), tool("f")]}, "tools[2].function.name", "tools[2].name"),
        ({"tools": [tool(parameters={"type": "array"})]}, "tools[0].function.parameters", "tools[0].parameters_json"),
        (
            {"tools": [tool(parameters={"properties": []})]},
            "tools[0].function.parameters.properties",
            "tools[0].parameters_json.properties",
        ),
        (
            {"tools": [tool(parameters={"required": "b"})]},
            "tools[0].function.parameters.required",
            "tools[0].parameters_json.required",
        ),
        (
            {"tools": [tool(parameters={"x-guidance": {}})]},
            "tools[0].function.parameters.x-guidance",
            "tools[0].parameters_json.x-guidance",
        ),
        ({"tools": [tool(parameters=DEEP)]}, "tools[0].function.parameters", "tools[0].parameters_json"),
        ({"tools": [tool(parameters=NAN)]}, "tools[0].function.parameters", "tools[0].parameters_json"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice.function.name", "tool_choice.function_name"),
        ({"tools": [tool("g")], "tool_choice": NAMED}, "tool_choice.function.name", "tool_choice.function_name"),
        (
            {"tools": [tool(parameters={"enum": ["x" * 65536]})], "tool_choice": "required"},
            "tools",
            "tools",
        ),
    ],
)
def test_what_is_out_of_bounds_is_named_as_its_client_wrote_it(
    fields: dict[str, Any], http_field: str, grpc_field: str
) -> None:
    for ask, field in ((over_http, http_field), (over_grpc, grpc_field)):
        with pytest.raises(InvalidRequest) as caught:
            ask(**fields)
        assert caught.value.field == field and field in caught.value.message


@pytest.mark.parametrize("choice", [None, "auto"])
def test_a_free_reply_is_calls_or_what_matches_a_json_schema(choice: Any) -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    for asked in (
        over_http(tools=[F], tool_choice=choice, guided_json=schema, parallel_tool_calls=False),
        over_grpc(tools=[F], tool_choice=choice, json_schema=schema, parallel_tool_calls=False),
    ):
        structure = answer_structure(asked)
        assert structure is not None and structure.kind is StructureKind.TOOL_CALLS
        functions = [{"name": "f", "parameters": F["function"].get("parameters")}]
        assert structure.text == json.dumps({"functions": functions, "several": False, "answer": schema})
    whole = answer_structure(over_http(tools=[F], tool_choice=choice, response_format={"type": "json_object"}))
    assert whole is not None and json.loads(whole.text)["answer"] == {"type": "object"}
    assert json.loads(whole.text)["several"] is True


@pytest.mark.parametrize("choice", [None, "auto"])
def test_other_structures_do_not_go_together_with_tools(choice: Any) -> None:
    for ask, structure, field in (
        (over_http, {"guided_choice": ["a"]}, "guided_choice"),
        (over_http, {"guided_regex": "a"}, "guided_regex"),
        (over_grpc, {"grammar": "start: /a/"}, "structured_output"),
    ):
        with pytest.raises(InvalidRequest, match="tool_choice is none") as caught:
            ask(tools=[F], tool_choice=choice, **structure)
        assert caught.value.field == field
    with pytest.raises(InvalidRequest, match="as a structure of calls") as caught:
        over_http(tools=[tool(parameters={"enum": ["x" * 65530]})], response_format={"type": "json_object"})
    assert caught.value.field == "tools"


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_forced_calls_leave_no_answer_that_could_match(choice: Any) -> None:
    assert answer_structure(over_http(tools=[F], tool_choice=choice, guided_regex="a")) == answer_structure(
        over_http(tools=[F], tool_choice=choice)
    )


@pytest.mark.parametrize(
    ("protos", "field"),
    [
        ({"tools": [{"name": "f", "parameters_json": "{"}]}, "tools[0].parameters_json"),
        ({"tools": [{"name": "f", "parameters_json": "[]"}]}, "tools[0].parameters_json"),
        ({"tools": [{"name": "f", "parameters_json": '{"maximum": 1e999}'}]}, "tools[0].parameters_json"),
        ({"tools": [{"name": "f", "parameters_json": '{"a":' * 50_000}]}, "tools[0].parameters_json"),
        ({"tool_choice": {}}, "tool_choice"),
        ({"tool_choice": {"mode": 9}}, "tool_choice.mode"),
        ({"tools": [{"name": "f"}], "tool_choice": {"function_name": ""}}, "tool_choice.function_name"),
    ],
)
def test_wrong_messages_name_their_field(protos: dict[str, Any], field: str) -> None:
    request = inference_pb2.GenerateRequest(messages=generate_request("hello").messages, **protos)
    with pytest.raises(InvalidRequest) as caught:
        generate_call(request)
    assert caught.value.field == field and field in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"name": "f"}]},
        {"tools": [tool(extra=1)]},
        {"tools": ["f"]},
        {"tool_choice": "any"},
        {"tool_choice": {"type": "function"}},
        {"tool_choice": {"type": "function", "function": {"name": "f", "x": 1}}},
    ],
)
def test_the_client_refuses_what_has_no_wire_form(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tool"):
        generate_request("hello", **fields)


def test_only_forced_calls_bind_the_answer() -> None:
    for choice in (None, "auto", "none"):
        assert answer_structure(over_http(tools=[F], tool_choice=choice)) is None
    bound = answer_structure(over_http(guided_regex="a"))
    assert bound is not None and bound.kind is StructureKind.REGEX
    awkward = {
        "type": "object",
        "properties": {'"</tool_call>\\"': {"const": "// <x> #"}},
        "description": "<b> %llguidance",
    }
    for choice in ("required", NAMED):
        forced = answer_structure(over_http(tools=[F, tool("g", parameters=awkward), tool("h")], tool_choice=choice))
        assert forced is not None and forced.kind is StructureKind.TOOL_CALLS
        for marker in (None, 7):
            assert not LLMatcher.validate_grammar(grammar_of(forced, lambda _, marker=marker: marker))  # type: ignore[misc]
        wanted = json.loads(forced.text)
        assert [function["name"] for function in wanted["functions"]] == (
            ["f", "g", "h"] if choice == "required" else ["f"]
        )
        assert wanted["several"] == (choice == "required")


LOOKED = (
    STARTED,
    Delta(reasoning="hm", token_ids=(1,), logprobs=(scores(b"hm"),)),
    Delta(text="Let me look.", tool_calls=(ToolCallDelta(index=0, id="call_a", name="f", arguments='{"b'),)),
    Delta(tool_calls=(ToolCallDelta(index=0, arguments='": 1}'), ToolCallDelta(index=1, id="call_b", name="g"))),
    Delta(choice=1, text="no"),
    Delta(tool_calls=(ToolCallDelta(index=1, arguments="{}"),), token_ids=(2,), logprobs=(scores(b"}"),)),
    ChoiceFinished(reason=FinishReason.TOOL_CALLS),
    ChoiceFinished(choice=1, reason=FinishReason.STOP),
    FINISHED,
)
ASK: list[Any] = [{"role": "user", "content": "What is this?"}]
CALLS = [("call_a", "f", '{"b": 1}'), ("call_b", "g", "{}")]


async def test_whole_replies_through_openais_client() -> None:
    async with sdk(ScriptedService(script=LOOKED)) as client:
        reply = await client.chat.completions.create(
            model="ernie", messages=ASK, n=2, tools=[F], logprobs=True, extra_body={"return_token_ids": True}
        )
    first, second = reply.choices
    assert (first.finish_reason, second.finish_reason) == ("tool_calls", "stop")
    assert (first.message.content, second.message.content) == ("Let me look.", "no")
    assert second.message.tool_calls is None
    found: Any = first.message.tool_calls
    assert [(call.id, call.function.name, call.function.arguments) for call in found] == CALLS
    assert {call.type for call in found} == {"function"}
    assert first.model_dump()["token_ids"] == [1, 2]
    assert first.logprobs is not None and [score.token for score in first.logprobs.content or ()] == ["hm", "}"]
    assert reply.usage is not None and reply.usage.completion_tokens == 5
    # The reply can be sent back as it is.
    again = to_call(
        parse_chat_request(
            json.dumps(
                {
                    "messages": [
                        *ASK,
                        first.message.model_dump(),
                        {"role": "tool", "tool_call_id": "call_a", "content": "1"},
                        {
                            "role": "tool",
                            "tool_call_id": "call_b",
                            "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,cG5n"}}],
                        },
                    ]
                }
            ).encode()
        )
    )
    assert [(call.id, call.name, call.arguments) for call in again.messages[1].tool_calls] == CALLS


async def test_calls_alone_have_no_content() -> None:
    script = (STARTED, Delta(tool_calls=(ToolCallDelta(index=0, id="c", name="f"),)), LOOKED[6], FINISHED)
    async with sdk(ScriptedService(script=script)) as client:
        (choice,) = (await client.chat.completions.create(model="ernie", messages=ASK, tools=[F])).choices
    assert choice.message.content is None and choice.message.tool_calls is not None


async def test_streams_through_openais_client() -> None:
    async with sdk(ScriptedService(script=LOOKED)) as client:
        stream = await client.chat.completions.create(
            model="ernie", messages=ASK, n=2, tools=[F], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        with_state = client.chat.completions.stream(model="ernie", messages=ASK, n=2, tools=[F])
        async with with_state as events:
            final = await events.get_final_completion()
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices if choice.delta.tool_calls]
    assert [delta.model_dump(exclude_unset=True)["tool_calls"] for delta in deltas] == [
        [{"index": 0, "id": "call_a", "type": "function", "function": {"name": "f", "arguments": '{"b'}}],
        [
            {"index": 0, "function": {"arguments": '": 1}'}},
            {"index": 1, "id": "call_b", "type": "function", "function": {"name": "g", "arguments": ""}},
        ],
        [{"index": 1, "function": {"arguments": "{}"}}],
    ]
    endings = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert endings == ["tool_calls", "stop"]
    found: Any = final.choices[0].message.tool_calls
    assert [(call.id, call.function.name, call.function.arguments) for call in found] == CALLS
    assert final.choices[0].message.content == "Let me look."


async def test_replies_over_grpc() -> None:
    request = generate_request("What?", n=2, tools=[F], return_token_ids=True)
    async with grpc_serving(ScriptedService(script=LOOKED)) as address, AsyncClient(address) as client:
        whole = await client.generate(request)
        stream = [response async for response in client.stream_generate(request)]
    first, second = whole.choices
    assert [(call.id, call.name, call.arguments_json) for call in first.tool_calls] == CALLS
    assert (first.text, first.reasoning_text, second.text) == ("Let me look.", "hm", "no")
    assert first.finish_reason == inference_pb2.FINISH_REASON_TOOL_CALLS and not second.tool_calls
    told = [call for response in stream for call in response.delta.tool_calls]
    assert [(call.index, call.id, call.name, call.arguments_json) for call in told] == [
        (0, "call_a", "f", '{"b'),
        (0, "", "", '": 1}'),
        (1, "call_b", "g", ""),
        (1, "", "", "{}"),
    ]
    endings = [response.choice_finished.finish_reason for response in stream if response.HasField("choice_finished")]
    assert endings == [inference_pb2.FINISH_REASON_TOOL_CALLS, inference_pb2.FINISH_REASON_STOP]


async def test_openais_client_sees_refusals() -> None:
    service = ScriptedService()
    async with sdk(service) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="m", messages=ASK, tools=[tool("a b")])  # type: ignore[list-item]
    assert caught.value.param == "tools[0].function.name" and service.calls == []
