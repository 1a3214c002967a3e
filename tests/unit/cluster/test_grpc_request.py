"""What a gRPC request may hold, and what becomes of it."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format

from actors.errors import InvalidRequest
from actors.types import (
    ImagePart,
    MediaOptions,
    MediaSource,
    Message,
    MessageRole,
    Structure,
    StructureKind,
    TextPart,
    ThinkingMode,
    ToolCall,
    VideoPart,
)
from cluster import grpc_request
from cluster.generation import GenerateCall
from ernie_serving.v1 import content_pb2, inference_pb2
from ernie_serving.v1.content_pb2 import ROLE_ASSISTANT, ROLE_SYSTEM, ROLE_TOOL, ROLE_USER, ChatMessage, ContentPart
from ernie_serving.v1.inference_pb2 import GenerateRequest

HELLO: dict[str, Any] = {"role": "ROLE_USER", "parts": [{"text": "hello"}]}


def request(**fields: Any) -> GenerateRequest:
    """A request in protobuf's JSON form, its fields spelt as in the protos."""
    return json_format.ParseDict({"messages": [HELLO], **fields}, GenerateRequest())


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling_params": fields}


def test_bare_request_takes_every_default() -> None:
    text = TextPart(text="hello")
    assert grpc_request.generate_call(request()) == GenerateCall(
        messages=(Message(role=MessageRole.USER, parts=(text,)),)
    )


def test_every_field_is_carried_over() -> None:
    got = grpc_request.generate_call(
        request(
            model="ernie",
            sampling_params={
                "temperature": 0,
                "top_p": 0.5,
                "top_k": 0,
                "seed": 0,
                "max_output_token_count": 16,
                "stop_sequences": ["END"],
                "stop_token_ids": [5, 6],
                "ignore_eos": True,
                "min_p": 0,
                "repetition_penalty": 1.5,
                "presence_penalty": -2,
                "frequency_penalty": 2,
                "logit_bias": {"7": -100, "3": 0.5},
                "allowed_token_ids": [3, 7],
                "bad_words": ["bad"],
                "min_output_token_count": 16,
                "max_reasoning_token_count": 0,
            },
            choice_count=2,
            structured_output={"regex": "a+"},
            top_logprob_count=0,
            prompt_top_logprob_count=20,
            priority=-5,
            cache_salt="tenant",
            thinking_mode="THINKING_MODE_ENABLED",
            request_id="mine-1",
            timeout="2.5s",
            return_token_ids=True,
            return_timings=True,
        )
    )
    assert got == GenerateCall(
        messages=(Message(role=MessageRole.USER, parts=(TextPart(text="hello"),)),),
        model="ernie",
        request_id="mine-1",
        temperature=0,
        top_p=0.5,
        top_k=0,
        seed=0,
        max_tokens=16,
        stop=("END",),
        stop_token_ids=(5, 6),
        ignore_eos=True,
        min_p=0,
        repetition_penalty=1.5,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias=((3, 0.5), (7, -100)),
        allowed_token_ids=(3, 7),
        bad_words=("bad",),
        min_tokens=16,
        reasoning_max_tokens=0,
        n=2,
        structure=Structure(kind=StructureKind.REGEX, text="a+"),
        logprobs=0,
        prompt_logprobs=20,
        priority=-5,
        cache_salt="tenant",
        thinking=ThinkingMode.ON,
        timeout_s=2.5,
        return_token_ids=True,
        return_timings=True,
    )


IMAGE = {"source": {"content": "cG5n"}}


def test_how_media_are_prepared() -> None:
    options = {
        "image_min_pixels": 1,
        "image_max_pixels": 2,
        "video_min_pixels": 3,
        "video_max_pixels": 4,
        "video_frames_per_second": 0.5,
        "video_min_frame_count": 6,
        "video_max_frame_count": 7,
    }
    assert grpc_request.generate_call(request(media_options=options)).media_options == MediaOptions(
        image_min_pixels=1,
        image_max_pixels=2,
        video_min_pixels=3,
        video_max_pixels=4,
        video_fps=0.5,
        video_min_frames=6,
        video_max_frames=7,
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (sampling(temperature=-1), "sampling_params.temperature"),
        (sampling(temperature=2.1), "sampling_params.temperature"),
        (sampling(temperature="NaN"), "sampling_params.temperature"),
        (sampling(temperature="Infinity"), "sampling_params.temperature"),
        (sampling(top_p=0), "sampling_params.top_p"),
        (sampling(top_p=1.1), "sampling_params.top_p"),
        (sampling(top_k=-1), "sampling_params.top_k"),
        (sampling(seed=-1), "sampling_params.seed"),
        (sampling(max_output_token_count=0), "sampling_params.max_output_token_count"),
        (sampling(stop_sequences=["a", ""]), "sampling_params.stop_sequences[1]"),
        (sampling(stop_sequences=["a"] * 33), "sampling_params.stop_sequences"),
        (sampling(stop_token_ids=[-1]), "sampling_params.stop_token_ids[0]"),
        (sampling(min_p=1.1), "sampling_params.min_p"),
        (sampling(repetition_penalty=0), "sampling_params.repetition_penalty"),
        (sampling(repetition_penalty="NaN"), "sampling_params.repetition_penalty"),
        (sampling(presence_penalty=2.1), "sampling_params.presence_penalty"),
        (sampling(frequency_penalty="-Infinity"), "sampling_params.frequency_penalty"),
        (sampling(logit_bias={"4": 101}), "sampling_params.logit_bias[4]"),
        (sampling(logit_bias={"-1": 1}), "sampling_params.logit_bias"),
        (sampling(logit_bias={str(i): 1 for i in range(1025)}), "sampling_params.logit_bias"),
        (sampling(allowed_token_ids=[2, -1]), "sampling_params.allowed_token_ids[1]"),
        (sampling(bad_words=[""]), "sampling_params.bad_words[0]"),
        (sampling(min_output_token_count=-1), "sampling_params.min_output_token_count"),
        (sampling(min_output_token_count=5, max_output_token_count=4), "sampling_params.min_output_token_count"),
        (sampling(max_reasoning_token_count=-1), "sampling_params.max_reasoning_token_count"),
        ({"choice_count": 129}, "choice_count"),
        ({"choice_count": -1}, "choice_count"),
        ({"top_logprob_count": 21}, "top_logprob_count"),
        ({"prompt_top_logprob_count": -1}, "prompt_top_logprob_count"),
        ({"priority": -(2**31)}, "priority"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"structured_output": {}}, "structured_output"),
        ({"structured_output": {"json_schema": "{"}}, "structured_output"),
        ({"structured_output": {"json_schema": "[1]"}}, "structured_output"),
        ({"structured_output": {"json_schema": "[" * 50_000}}, "structured_output"),
        ({"structured_output": {"json_schema": '{"a": "' + "x" * 65_536 + '"}'}}, "structured_output"),
        ({"structured_output": {"regex": ""}}, "structured_output"),
        ({"structured_output": {"grammar": ""}}, "structured_output"),
        ({"structured_output": {"choices": {}}}, "structured_output"),
        ({"structured_output": {"choices": {"texts": ["a", ""]}}}, "structured_output"),
        ({"timeout": "0s"}, "timeout"),
        ({"timeout": "-1s"}, "timeout"),
        ({"timeout": "100000s"}, "timeout"),
        ({"thinking_mode": 9}, "thinking_mode"),
        ({"request_id": "has space"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "chatcmpl-1"}, "request_id"),
        ({"media_options": {"image_max_pixels": 0}}, "media_options.image_max_pixels"),
        ({"media_options": {"image_min_pixels": 2, "image_max_pixels": 1}}, "media_options.image_min_pixels"),
        ({"media_options": {"video_frames_per_second": "NaN"}}, "media_options.video_frames_per_second"),
        ({"media_options": {"video_max_frame_count": -1}}, "media_options.video_max_frame_count"),
        ({"media_options": {"video_max_pixels": 2**31}}, "media_options.video_max_pixels"),
        ({"messages": []}, "messages"),
        ({"messages": [{"parts": [{"text": "a"}]}]}, "messages[0].role"),
        ({"messages": [HELLO, {"role": 9, "parts": [{"text": "a"}]}]}, "messages[1].role"),
        ({"messages": [{"role": "ROLE_USER"}]}, "messages[0].parts"),
        ({"messages": [{"role": "ROLE_USER", "parts": [{"text": ""}]}]}, "messages[0].parts"),
        ({"messages": [{"role": "ROLE_USER", "parts": [{}]}]}, "messages[0].parts[0]"),
        ({"messages": [HELLO | {"reasoning_text": "x"}]}, "messages[0].reasoning_text"),
        ({"messages": [HELLO | {"tool_calls": [{"id": "c"}]}]}, "messages[0].tool_calls"),
        ({"messages": [HELLO | {"tool_call_id": "c"}]}, "messages[0].tool_call_id"),
    ],
)
def test_wrong_values_name_their_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grpc_request.generate_call(request(**fields))
    assert caught.value.field == field
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"image": {}}, ".image.source"),
        ({"image": {"source": {}}}, ".image.source"),
        ({"image": {"source": {"content": ""}}}, ".image.source.content"),
        ({"image": {"source": {"uri": ""}}}, ".image.source.uri"),
        ({"image": {"source": {"uri": "file:///etc/passwd"}}}, ".image.source.uri"),
        ({"image": {"source": {"uri": "data:image/png;base64,?"}}}, ".image.source.uri"),
        ({"image": {"source": {"content": "cG5n", "mime_type": "video/mp4"}}}, ".image.source.mime_type"),
        ({"image": IMAGE | {"min_pixels": 0}}, ".image.min_pixels"),
        ({"image": IMAGE | {"min_pixels": 2, "max_pixels": 1}}, ".image.min_pixels"),
        ({"image": IMAGE | {"max_pixels": 2**40}}, ".image.max_pixels"),
        ({"video": IMAGE | {"frames_per_second": 0}}, ".video.frames_per_second"),
        ({"video": IMAGE | {"frames_per_second": "NaN"}}, ".video.frames_per_second"),
        ({"video": IMAGE | {"max_frame_count": 0}}, ".video.max_frame_count"),
        ({"video": IMAGE | {"min_frame_count": 3, "max_frame_count": 2}}, ".video.min_frame_count"),
        ({"video": IMAGE | {"min_pixels": 3, "max_pixels": 2}}, ".video.min_pixels"),
        ({"video": IMAGE | {"start_offset": "-1s"}}, ".video.start_offset"),
        ({"video": IMAGE | {"end_offset": "0s"}}, ".video.end_offset"),
        ({"video": IMAGE | {"start_offset": "2s", "end_offset": "1s"}}, ".video.end_offset"),
        ({"video": {"source": {"content": "cG5n", "mime_type": "image/png"}}}, ".video.source.mime_type"),
    ],
)
def test_wrong_parts_name_their_field(part: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grpc_request.generate_call(request(messages=[{"role": "ROLE_USER", "parts": [{"text": "a"}, part]}]))
    assert caught.value.field == f"messages[0].parts[1]{field}"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"text": "a"}, TextPart(text="a")),
        (
            {"image": {"source": {"content": "cG5n", "mime_type": "IMAGE/png"}, "min_pixels": 1, "max_pixels": 1}},
            ImagePart(source=MediaSource(content=b"png"), min_pixels=1, max_pixels=1),
        ),
        (
            {"image": {"source": {"uri": "data:image/png;base64,cG5n"}}},
            ImagePart(source=MediaSource(content=b"png")),
        ),
        (
            {"video": {"source": {"uri": "https://a/b.mp4"}, "frames_per_second": 0.5, "max_frame_count": 8,
                       "start_offset": "1s", "end_offset": "2.5s"}},
            VideoPart(source=MediaSource(uri="https://a/b.mp4"), frames_per_second=0.5, max_frames=8, start_s=1,
                      end_s=2.5),
        ),
    ],
)  # fmt: skip
def test_parts(part: dict[str, Any], expected: object) -> None:
    proto = ChatMessage(role=ROLE_USER, parts=[json_format.ParseDict(part, ContentPart())])
    (message,) = grpc_request.messages(
        [
            proto,
        ]
    )
    assert message.parts == (expected,)


def test_a_conversation_with_tool_results() -> None:
    text = ContentPart(text="x")
    protos = [
        ChatMessage(role=ROLE_SYSTEM, parts=[text]),
        ChatMessage(role=ROLE_USER, parts=[text], name="kim"),
        ChatMessage(
            role=ROLE_ASSISTANT,
            reasoning_text="hm",
            tool_calls=[content_pb2.ToolCall(id="c", name="f", arguments_json="{")],
        ),
        ChatMessage(role=ROLE_TOOL, parts=[ContentPart(text="")], tool_call_id="c", name="f"),
    ]
    assert grpc_request.messages(protos) == (
        Message(role=MessageRole.SYSTEM, parts=(TextPart(text="x"),)),
        Message(role=MessageRole.USER, parts=(TextPart(text="x"),), name="kim"),
        Message(
            role=MessageRole.ASSISTANT,
            parts=(),
            reasoning="hm",
            tool_calls=(ToolCall(id="c", name="f", arguments="{"),),
        ),
        Message(role=MessageRole.TOOL, parts=(TextPart(text=""),), tool_call_id="c", name="f"),
    )


@pytest.mark.parametrize(
    ("proto", "expected"),
    [
        ({"json_schema": '{"type": "object"}'}, Structure(kind=StructureKind.JSON_SCHEMA, text='{"type": "object"}')),
        ({"json_object": {}}, Structure(kind=StructureKind.JSON_OBJECT)),
        ({"grammar": "start: /a/"}, Structure(kind=StructureKind.GRAMMAR, text="start: /a/")),
        ({"choices": {"texts": ["ja", "nö"]}}, Structure(kind=StructureKind.CHOICE, text='["ja", "nö"]')),
    ],
)
def test_structures(proto: dict[str, Any], expected: Structure) -> None:
    assert grpc_request.generate_call(request(structured_output=proto)).structure == expected


def test_every_attribute_has_a_field() -> None:
    """What SPELLING does not rename must be a field or a oneof of the request."""
    fields = {field.name for field in (*GenerateRequest.DESCRIPTOR.fields, *GenerateRequest.DESCRIPTOR.oneofs)}
    params = {f"sampling_params.{field.name}" for field in inference_pb2.SamplingParams.DESCRIPTOR.fields}
    for attribute in GenerateCall.__dataclass_fields__:
        assert grpc_request.SPELLING.get(attribute, attribute) in fields | params
    assert set(grpc_request.SPELLING.values()) <= fields | params


@pytest.mark.parametrize(
    ("fields", "prompt", "added"),
    [
        ({"prompt_text": "<s>a"}, "<s>a", True),
        ({"prompt_text": "a", "add_special_tokens": False}, "a", False),
        ({"prompt_token_ids": {"ids": [3, 1]}}, (3, 1), True),
    ],
)
def test_raw_prompts(fields: dict[str, Any], prompt: str | tuple[int, ...], added: bool) -> None:
    for call in (
        grpc_request.generate_call(GenerateRequest(**fields)),
        grpc_request.count_call(inference_pb2.CountTokensRequest(**fields)),
    ):
        assert (call.messages, call.prompt, call.add_special_tokens) == ((), prompt, added)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt_text": ""}, "prompt"),
        ({"prompt_token_ids": {}}, "prompt"),
        ({"prompt_text": "a", "messages": [ChatMessage(role=ROLE_USER)]}, "prompt"),
        ({"prompt_text": "a", "tools": [{"name": "f"}]}, "tools"),
        ({"prompt_text": "a", "thinking_mode": inference_pb2.THINKING_MODE_ENABLED}, "thinking_mode"),
        (
            {"prompt_text": "a", "sampling_params": {"max_reasoning_token_count": 3}},
            "sampling_params.max_reasoning_token_count",
        ),
    ],
)
def test_a_raw_prompt_stands_alone(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        grpc_request.generate_call(GenerateRequest(**fields))
    assert caught.value.field == field


def test_every_thinking_mode_has_a_translation() -> None:
    assert set(grpc_request._THINKING) == set(inference_pb2.ThinkingMode.values())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("max_tokens", "sampling_params.max_output_token_count"),
        ("stop", "sampling_params.stop_sequences"),
        ("stop[1]", "sampling_params.stop_sequences[1]"),
        ("timeout_s", "timeout"),
        ("messages[0].parts[1].image", "messages[0].parts[1].image"),
        ("messages[0].content[1].image_url", "messages[0].parts[1].image"),
        ("messages[0].content[1].video_url.max_frames", "messages[0].parts[1].video.max_frame_count"),
        ("media_options.video_fps", "media_options.video_frames_per_second"),
        ("media_options.image_max_pixels", "media_options.image_max_pixels"),
        ("messages[0].content[1].video_url.start_s", "messages[0].parts[1].video.start_offset"),
        ("messages[10].reasoning", "messages[10].reasoning_text"),
        ("messages", "messages"),
        ("sampling_params.top_p", "sampling_params.top_p"),
        ("model", "model"),
        ("structure", "structured_output"),
        ("bad_words_ids", "sampling_params.bad_words"),
        ("allowed_token_ids", "sampling_params.allowed_token_ids"),
        ("logit_bias[3]", "sampling_params.logit_bias[3]"),
        ("reasoning_max_tokens", "sampling_params.max_reasoning_token_count"),
        ("prompt_logprobs", "prompt_top_logprob_count"),
        ("n", "choice_count"),
        ("prompt", "prompt"),
        ("prompt[3]", "prompt_token_ids.ids[3]"),
    ],
)
def test_fields_named_by_later_stages(ours: str, theirs: str) -> None:
    assert grpc_request.client_field(ours) == theirs
