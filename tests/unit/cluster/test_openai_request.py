"""What a chat completion body may hold, and what becomes of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

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
from cluster.generation import GenerateCall
from cluster.openai_request import client_field, parse_chat_request, spelling, to_call

HELLO = {"role": "user", "content": "hello"}
PIXEL = base64.b64encode(b"png bytes").decode()


def call(**fields: Any) -> GenerateCall:
    return to_call(parse_chat_request(json.dumps({"messages": [HELLO], **fields}).encode()))


def message(**fields: Any) -> Message:
    return call(messages=[fields]).messages[0]


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        call(**fields)
    return caught.value


def test_bare_request_takes_every_default() -> None:
    text = TextPart(text="hello")
    assert call() == GenerateCall(messages=(Message(role=MessageRole.USER, parts=(text,)),))


def test_every_field_is_carried_over() -> None:
    got = call(
        model="ernie",
        stream=True,
        temperature=0,
        top_p=0.5,
        top_k=40,
        seed=7,
        max_tokens=16,
        stop="END",
        stop_token_ids=[5, 6],
        ignore_eos=True,
        stream_options={"include_usage": True},
        n=2,
        min_p=0,
        repetition_penalty=1.5,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={"7": -100, "3": 0.5},
        allowed_token_ids=[3, 7],
        bad_words=["bad"],
        min_tokens=16,
        reasoning_max_tokens=0,
        logprobs=True,
        top_logprobs=20,
        prompt_logprobs=0,
        guided_regex="a+",
        priority=-5,
        cache_salt="tenant",
        enable_thinking=False,
        timeout=2,
        return_token_ids=True,
        return_timings=True,
    )
    assert got == GenerateCall(
        messages=call().messages,
        model="ernie",
        temperature=0,
        top_p=0.5,
        top_k=40,
        seed=7,
        max_tokens=16,
        stop=("END",),
        stop_token_ids=(5, 6),
        ignore_eos=True,
        n=2,
        min_p=0,
        repetition_penalty=1.5,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias=((3, 0.5), (7, -100)),
        allowed_token_ids=(3, 7),
        bad_words=("bad",),
        min_tokens=16,
        reasoning_max_tokens=0,
        logprobs=20,
        prompt_logprobs=0,
        structure=Structure(kind=StructureKind.REGEX, text="a+"),
        priority=-5,
        cache_salt="tenant",
        thinking=ThinkingMode.OFF,
        timeout_s=2,
        return_token_ids=True,
        return_timings=True,
    )


@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"max_completion_tokens": 9}, "max_tokens", 9),
        ({"max_tokens": 9, "max_completion_tokens": 9}, "max_tokens", 9),
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 0}, "top_k", 0),
        ({"stop": ["a", "b"]}, "stop", ("a", "b")),
        ({"stop": None}, "stop", ()),
        ({"temperature": 2}, "temperature", 2.0),
        ({"top_p": 1}, "top_p", 1.0),
        ({"seed": 2**63 - 1}, "seed", 2**63 - 1),
        ({"enable_thinking": True}, "thinking", ThinkingMode.ON),
        ({"enable_thinking": None}, "thinking", ThinkingMode.AUTO),
        ({"max_tokens": None}, "max_tokens", None),
        ({"n": None}, "n", 1),
        ({"logprobs": True}, "logprobs", 0),
        ({"logprobs": False}, "logprobs", None),
        ({"logprobs": True, "top_logprobs": 0}, "logprobs", 0),
        ({"presence_penalty": None}, "presence_penalty", 0.0),
        ({"logit_bias": {}}, "logit_bias", ()),
        ({"logit_bias": None}, "logit_bias", ()),
        ({"bad_words": None}, "bad_words", ()),
        ({"allowed_token_ids": None}, "allowed_token_ids", None),
        ({"stream": True, "stream_options": None}, "n", 1),
        ({"request_id": "mine"}, "request_id", "mine"),
    ],
)
def test_spellings(fields: dict[str, Any], attribute: str, value: object) -> None:
    assert getattr(call(**fields), attribute) == value


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("inf")}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["x" * 1025]}, "stop[0]"),
        ({"stop": ["a"] * 33}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": 1}, "stop"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [0] * 1025}, "stop_token_ids"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 10.1}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"01": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {str(2**31): 1}}, "logit_bias"),
        ({"logit_bias": {"5": 100.5}}, "logit_bias[5]"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
        ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [1, 2**31]}, "allowed_token_ids[1]"),
        ({"bad_words": "x"}, "bad_words"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": ["x"] * 129}, "bad_words"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"reasoning_max_tokens": -1}, "reasoning_max_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 0}, "top_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"priority": 2**31}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}},
         "stream_options.continuous_usage_stats"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": "yes"}, "stream"),
        ({"request_id": "no spaces"}, "request_id"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": 1e9}, "timeout"),
        ({"model": 5}, "model"),
        ({"enable_thinking": "on"}, "enable_thinking"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [HELLO, {"role": "function", "content": "hi"}]}, "messages[1].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "tool"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [HELLO | {"tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [HELLO | {"reasoning": "x"}]}, "messages[0].reasoning"),
        ({"messages": [HELLO | {"tool_calls": [{"id": "", "function": {"name": "", "arguments": ""}}]}]},
         "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "reasoning": "a", "reasoning_content": "b"}]},
         "messages[0].reasoning_content"),
        ({"messages": [HELLO | {"weight": 1}]}, "messages[0].weight"),
        ({"messages": [HELLO | {"audio": {"id": "a"}}]}, "messages[0].audio"),
    ],
)  # fmt: skip
def test_wrong_values_name_their_field(fields: dict[str, Any], field: str) -> None:
    error = refused(**fields)
    assert error.field == field
    assert field in error.message


@pytest.mark.parametrize(
    "field",
    ["functions", "function_call", "best_of", "guided_decoding_backend", "chat_template", "documents", "extra",
     "(odd)"],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, 1, {}])
def test_fields_outside_the_list_are_refused_by_name(field: str, value: object) -> None:
    error = refused(**{field: value})
    assert (error.field, error.reason) == (field, "UNSUPPORTED_FIELD")
    assert error.message == f"{field} is not supported"


THINKING_FIELDS = [
    lambda on: {"enable_thinking": on},
    lambda on: {"chat_template_kwargs": {"enable_thinking": on}},
    lambda on: {"metadata": {"enable_thinking": on, "who": "me"}},
    lambda on: {"metadata": {"enable_thinking": str(on)}},
    lambda on: {"reasoning_effort": "low" if on else "none"},
]


@pytest.mark.parametrize("say", THINKING_FIELDS, ids=range(len(THINKING_FIELDS)))
def test_thinking_in_every_spelling(say: Callable[[bool], dict[str, Any]]) -> None:
    assert call(**say(True)).thinking is ThinkingMode.ON
    assert call(**say(False)).thinking is ThinkingMode.OFF
    # Said twice alike is said once; said twice otherwise is an error that names both.
    for other in THINKING_FIELDS:
        assert call(**(other(True) | say(True))).thinking is ThinkingMode.ON
        if not set(other(True)) & set(say(True)):
            error = refused(**other(True), **say(False))
            fields = [next(iter(fields)) for fields in (other(True), say(False))]
            assert error.field is not None and error.field.partition(".")[0] in fields
            assert all(field in error.message for field in fields)


@pytest.mark.parametrize(
    "fields", [{"metadata": {"a": "b"}}, {"chat_template_kwargs": {}}, {"metadata": None, "reasoning_effort": None}]
)
def test_thinking_that_nobody_spoke_of(fields: dict[str, Any]) -> None:
    assert call(**fields) == call()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"chat_template_kwargs": {"options": {"thinking_mode": "close"}}}, "chat_template_kwargs.options"),
        ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"metadata": {"enable_thinking": "maybe"}}, "metadata.enable_thinking"),
        ({"metadata": {"enable_thinking": 1}}, "metadata.enable_thinking"),
        ({"metadata": {"a": True}}, "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"metadata": {"x" * 65: "a"}}, "metadata"),
        ({"metadata": {str(index): "a" for index in range(17)}}, "metadata"),
        ({"metadata": "a"}, "metadata"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
    ],
)
def test_wrong_thinking_and_metadata(fields: dict[str, Any], field: str) -> None:
    error = refused(**fields)
    assert error.field == field and field in error.message


NEUTRAL: dict[str, tuple[list[Any], list[Any]]] = {
    "user": (["u"], [1]),
    "safety_identifier": (["u"], [{}]),
    "prompt_cache_key": (["u"], [True]),
    "store": ([False], [True]),
    "service_tier": (["auto", "default"], ["flex", "priority"]),
    "verbosity": (["medium"], ["low"]),
    "modalities": ([["text"]], [["text", "audio"]]),
    "include_reasoning": ([True], [False]),
    "skip_special_tokens": ([True], [False]),
    "include_stop_str_in_output": ([False], [True]),
    "use_beam_search": ([False], [True]),
    "echo": ([False], [True]),
    "add_generation_prompt": ([True], [False]),
    "continue_final_message": ([False], [True]),
    "disable_chat_template": ([False], [True]),
}


@pytest.mark.parametrize("field", NEUTRAL)
def test_fields_that_ask_for_what_is_done_anyway(field: str) -> None:
    done, others = NEUTRAL[field]
    for value in [None, *done]:
        assert call(**{field: value}) == call()
    for value in others:
        error = refused(**{field: value})
        assert (error.field or "").startswith(field) and field in error.message
    if isinstance(others[0], type(done[0])):
        assert error.reason == "UNSUPPORTED_FIELD"


@pytest.mark.parametrize(
    ("kwargs", "options"),
    [
        ({}, {}),
        ({"image_max_pixels": 12845056}, {"image_max_pixels": 12845056}),
        ({"min_pixels": 784, "max_pixels": 1568}, {"image_min_pixels": 784, "image_max_pixels": 1568}),
        ({"size": {"shortest_edge": 784, "longest_edge": 999}}, {"image_min_pixels": 784, "image_max_pixels": 999}),
        ({"max_pixels": 999, "image_max_pixels": 999}, {"image_max_pixels": 999}),
        ({"video_min_pixels": 784, "video_max_pixels": 999}, {"video_min_pixels": 784, "video_max_pixels": 999}),
        ({"video_fps": 1, "video_max_frames": 8}, {"video_fps": 1, "video_max_frames": 8}),
        ({"fps": 0.5, "min_frames": 2, "max_frames": 4},
         {"video_fps": 0.5, "video_min_frames": 2, "video_max_frames": 4}),
        ({"video_target_frames": 8, "video_fps": -1}, {"video_min_frames": 8, "video_max_frames": 8}),
        ({"num_frames": 8}, {"video_min_frames": 8, "video_max_frames": 8}),
        ({"video_target_frames": -1, "video_frames_sample": "leading", "spatial_conv_size": 2}, {}),
    ],
)  # fmt: skip
def test_how_media_are_prepared(kwargs: dict[str, Any], options: dict[str, Any]) -> None:
    assert call(mm_processor_kwargs=kwargs).media_options == MediaOptions(**options)


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"image_max_pixels": 0}, "image_max_pixels"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"image_max_pixels": 999, "max_pixels": 998}, "max_pixels"),
        ({"image_max_pixels": "999"}, "image_max_pixels"),
        ({"image_min_pixels": 5, "image_max_pixels": 4}, "image_min_pixels"),
        ({"video_fps": 0}, "video_fps"),
        ({"fps": -1}, "fps"),
        ({"fps": 1, "video_fps": 2}, "fps"),
        ({"video_min_frames": 5, "video_max_frames": 4}, "video_min_frames"),
        ({"video_target_frames": 4, "max_frames": 4}, "max_frames"),
        ({"num_frames": 0}, "num_frames"),
        ({"video_frames_sample": "rand"}, "video_frames_sample"),
        ({"temporal_conv_size": 1}, "temporal_conv_size"),
    ],
)
def test_wrong_processor_options(kwargs: dict[str, Any], field: str) -> None:
    error = refused(mm_processor_kwargs=kwargs)
    assert error.field == f"mm_processor_kwargs.{field}" and error.field in error.message


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"messages": [}', b"[]", b"3", b"null"])
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="JSON"):
        parse_chat_request(body)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "text", "text": "hi"}, TextPart(text="hi")),
        (
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}", "detail": "auto"}},
            ImagePart(source=MediaSource(content=b"png bytes")),
        ),
        (
            {"type": "image_url", "image_url": {"url": "https://a/b.png"}, "min_pixels": 1, "max_pixels": 2},
            ImagePart(source=MediaSource(uri="https://a/b.png"), min_pixels=1, max_pixels=2),
        ),
        (
            {"type": "image", "url": "HTTP://a/b.png", "max_pixels": 3},
            ImagePart(source=MediaSource(uri="HTTP://a/b.png"), max_pixels=3),
        ),
        (
            {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{PIXEL}"}},
            VideoPart(source=MediaSource(content=b"png bytes")),
        ),
        ({"type": "video", "url": "http://a/b.mp4"}, VideoPart(source=MediaSource(uri="http://a/b.mp4"))),
        (
            {"type": "image_url", "image_url": {"url": "https://a", "detail": "low"}, "uuid": "u"},
            ImagePart(source=MediaSource(uri="https://a"), low_detail=True),
        ),
        (
            {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}", "detail": "high"},
            ImagePart(source=MediaSource(content=b"png bytes")),
        ),
        ({"type": "image", "image": "https://a"}, ImagePart(source=MediaSource(uri="https://a"))),
        ({"type": "image", "base64": PIXEL}, ImagePart(source=MediaSource(content=b"png bytes"))),
        (
            {"type": "video", "base64": PIXEL, "fps": 1, "min_frames": 2, "max_frames": 4},
            VideoPart(source=MediaSource(content=b"png bytes"), frames_per_second=1, min_frames=2, max_frames=4),
        ),
        (
            {"type": "video_url", "video_url": {"url": "https://a"}, "target_frames": 8, "frames_sample": "leading"},
            VideoPart(source=MediaSource(uri="https://a"), min_frames=8, max_frames=8),
        ),
        (
            {"type": "video", "video": "https://a", "max_pixels": 9, "video_start": 0, "video_end": 1.5},
            VideoPart(source=MediaSource(uri="https://a"), max_pixels=9, start_s=0, end_s=1.5),
        ),
    ],
)
def test_parts(part: dict[str, Any], expected: object) -> None:
    assert message(role="user", content=[part, {"type": "text", "text": "?"}]).parts == (
        expected,
        TextPart(text="?"),
    )


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"type": "audio"}, ""),
        ({"text": "no type"}, ""),
        ("text", ""),
        ({"type": 5}, ""),
        ({"type": "text"}, ".text"),
        ({"type": "text", "text": 1}, ".text"),
        ({"type": "image_url", "image_url": "https://a"}, ".image_url"),
        ({"type": "image_url", "image_url": {}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,a?b"}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,\u00e9"}}, ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": "https://a", "detail": "best"}}, ".image_url.detail"),
        ({"type": "image_url", "image_url": {"url": "https://a"}, "min_pixels": 0}, ".min_pixels"),
        ({"type": "image_url", "image_url": {"url": "https://a"}, "max_pixels": 0}, ".max_pixels"),
        ({"type": "image", "url": "https://a", "min_pixels": 5, "max_pixels": 4}, ".min_pixels"),
        ({"type": "image", "url": "https://a", "fps": 1}, ".fps"),
        ({"type": "video_url", "video_url": {"url": "ftp://a"}}, ".video_url.url"),
        ({"type": "video_url", "video_url": {"url": "https://a"}, "min_pixels": 0}, ".min_pixels"),
        ({"type": "video_url", "video_url": {"url": "https://a"}, "fps": 0}, ".fps"),
        ({"type": "video_url", "video_url": {"url": "https://a"}, "min_frames": 3, "max_frames": 2}, ".min_frames"),
        ({"type": "video_url", "video_url": {"url": "https://a"}, "target_frames": 3, "fps": 2}, ".fps"),
        ({"type": "video_url", "video_url": {"url": "https://a"}, "target_frames": 0}, ".target_frames"),
        ({"type": "video_url", "video_url": {"url": "https://a"}, "frames_sample": "rand"}, ".frames_sample"),
        ({"type": "video", "url": "https://a", "video_start": -1}, ".video_start"),
        ({"type": "video", "url": "https://a", "video_start": 3, "video_end": 3}, ".video_end"),
        ({"type": "image"}, ".url"),
        ({"type": "image", "url": "https://a", "image": "https://a"}, ".url"),
        ({"type": "image", "image": "a.png"}, ".image"),
        ({"type": "image", "base64": "?"}, ".base64"),
        ({"type": "video", "base64": ""}, ".base64"),
        ({"type": "input_image", "image_url": {"url": "https://a"}}, ".image_url"),
        ({"type": "input_image", "file_id": "f", "image_url": "https://a"}, ".file_id"),
        ({"type": "video", "url": "gopher:x"}, ".url"),
    ],
)
def test_wrong_parts_name_their_field(part: object, field: str) -> None:
    error = refused(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, part]}])
    assert error.field == f"messages[0].content[1]{field}"


@pytest.mark.parametrize(
    ("role", "expected"),
    [("system", MessageRole.SYSTEM), ("developer", MessageRole.SYSTEM), ("user", MessageRole.USER)],
)
def test_roles(role: str, expected: MessageRole) -> None:
    assert message(role=role, content="x", name="n") == Message(role=expected, parts=(TextPart(text="x"),), name="n")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_assistant_history_keeps_thinking_and_calls(name: str) -> None:
    tool_call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert message(role="assistant", content=None, tool_calls=[tool_call], **{name: "hm"}) == Message(
        role=MessageRole.ASSISTANT,
        parts=(),
        reasoning="hm",
        tool_calls=(ToolCall(id="c1", name="f", arguments="{}"),),
    )


def test_arguments_may_be_an_object() -> None:
    called = {"id": "c1", "function": {"name": "f", "arguments": {"a": "\u00e9"}}}
    assert message(role="assistant", tool_calls=[called]).tool_calls[0].arguments == '{"a": "\u00e9"}'
    called["function"] = {"name": "f", "arguments": {"a": float("nan")}}
    with pytest.raises(InvalidRequest, match="finite") as caught:
        message(role="assistant", tool_calls=[called])
    assert caught.value.field == "messages[0].tool_calls[0].function.arguments"


def test_tool_results_may_be_empty_text() -> None:
    assert message(role="tool", tool_call_id="c1", name="f", content="") == Message(
        role=MessageRole.TOOL, parts=(TextPart(text=""),), tool_call_id="c1", name="f"
    )


def test_a_dumped_reply_is_accepted_as_history() -> None:
    dumped = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls", "name", "tool_call_id"))
    assert message(role="assistant", content="", **dumped).parts == (TextPart(text=""),)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("messages[3].parts[1]", "messages[3].content[1]"),
        ("messages[3].parts[1].source", "messages[3].content[1].source"),
        ("timeout_s", "timeout"),
        ("thinking", "enable_thinking"),
        ("bad_words_ids", "bad_words"),
        ("stop[1]", "stop[1]"),
        ("max_tokens", "max_tokens"),
        ("messages[0].content[1].image_url.url", "messages[0].content[1].image_url.url"),
    ],
)
def test_fields_named_by_later_stages(ours: str, theirs: str) -> None:
    assert client_field(ours) == theirs


@pytest.mark.parametrize(
    ("fields", "ours", "theirs"),
    [
        ({}, "max_tokens", "max_completion_tokens"),
        ({"max_tokens": 1}, "max_tokens", "max_tokens"),
        ({"logprobs": True}, "logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 1}, "logprobs", "top_logprobs"),
        ({}, "structure", "response_format"),
        ({"guided_json": {}}, "structure", "guided_json"),
        ({"structured_outputs": {"choice": ["a"]}}, "structure", "structured_outputs.choice"),
        ({}, "logit_bias[5]", "logit_bias[5]"),
        ({}, "thinking", "enable_thinking"),
        ({"metadata": {"enable_thinking": True}}, "enable_thinking", "metadata.enable_thinking"),
        ({"reasoning_effort": "high"}, "enable_thinking", "reasoning_effort"),
        ({}, "media_options.image_max_pixels", "mm_processor_kwargs.image_max_pixels"),
        (
            {"mm_processor_kwargs": {"max_pixels": 9}},
            "media_options.image_max_pixels",
            "mm_processor_kwargs.max_pixels",
        ),
        (
            {"mm_processor_kwargs": {"num_frames": 9}},
            "media_options.video_max_frames",
            "mm_processor_kwargs.num_frames",
        ),
    ],
)
def test_fields_named_as_this_client_did(fields: dict[str, Any], ours: str, theirs: str) -> None:
    chat = parse_chat_request(json.dumps({"messages": [HELLO], **fields}).encode())
    assert client_field(ours, spelling(chat)) == theirs
