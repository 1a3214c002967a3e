"""Translations between the public protos and the router's types."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc import StatusCode

from actors.errors import InvalidRequest, Overloaded, ServingError, Status
from actors.types import (
    FinishReason,
    ImagePart,
    MediaSource,
    Message,
    MessageRole,
    Stage,
    TextPart,
    ThinkingMode,
    ToolCall,
    VideoPart,
)
from cluster import grpc_messages
from cluster.generation import Delta, Finished, GenerateCall, ModelCard
from ernie_serving.v1 import content_pb2, inference_pb2
from ernie_serving.v1.content_pb2 import ROLE_ASSISTANT, ROLE_SYSTEM, ROLE_TOOL, ROLE_USER, ChatMessage, ContentPart
from ernie_serving.v1.inference_pb2 import GenerateRequest
from tests.doubles import FINISHED, SCRIPT, STARTED, USAGE

HELLO: dict[str, Any] = {"role": "ROLE_USER", "parts": [{"text": "hello"}]}


def request(**fields: Any) -> GenerateRequest:
    """A request in protobuf's JSON form, its fields spelt as in the protos."""
    return json_format.ParseDict({"messages": [HELLO], **fields}, GenerateRequest())


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling_params": fields}


def test_bare_request_takes_every_default() -> None:
    text = TextPart(text="hello")
    assert grpc_messages.generate_call(request()) == GenerateCall(
        messages=(Message(role=MessageRole.USER, parts=(text,)),)
    )


def test_every_field_is_carried_over() -> None:
    got = grpc_messages.generate_call(
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
            },
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
        thinking=ThinkingMode.ON,
        timeout_s=2.5,
        return_token_ids=True,
        return_timings=True,
    )


IMAGE = {"source": {"content": "cG5n"}}


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
        (sampling(repetition_penalty=1), "sampling_params.repetition_penalty"),
        ({"tools": [{"name": "f"}]}, "tools"),
        ({"timeout": "0s"}, "timeout"),
        ({"timeout": "-1s"}, "timeout"),
        ({"timeout": "100000s"}, "timeout"),
        ({"thinking_mode": 9}, "thinking_mode"),
        ({"request_id": "has space"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "chatcmpl-1"}, "request_id"),
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
        grpc_messages.generate_call(request(**fields))
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
        ({"video": IMAGE | {"start_offset": "-1s"}}, ".video.start_offset"),
        ({"video": IMAGE | {"end_offset": "0s"}}, ".video.end_offset"),
        ({"video": IMAGE | {"start_offset": "2s", "end_offset": "1s"}}, ".video.end_offset"),
        ({"video": {"source": {"content": "cG5n", "mime_type": "image/png"}}}, ".video.source.mime_type"),
    ],
)
def test_wrong_parts_name_their_field(part: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grpc_messages.generate_call(request(messages=[{"role": "ROLE_USER", "parts": [{"text": "a"}, part]}]))
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
    (message,) = grpc_messages.messages(
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
    assert grpc_messages.messages(protos) == (
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


def test_a_stream_says_what_a_whole_response_says() -> None:
    deltas = [event for event in SCRIPT if isinstance(event, Delta)]
    whole = grpc_messages.whole_response(STARTED, deltas, FINISHED)
    stream = [response for event in SCRIPT for response in grpc_messages.stream_responses(event)]
    assert "".join(response.text_delta for response in stream) == whole.text == "A c\u00e4t"
    assert "".join(response.reasoning_text_delta for response in stream) == whole.reasoning_text == "hmm."
    assert [token for response in stream for token in response.token_ids] == list(whole.token_ids)
    assert list(whole.token_ids) == [10, 11, 12, 13, 14]
    started, finished = stream[0].started, stream[-1].finished
    assert list(started.prompt_token_ids) == list(whole.prompt_token_ids) == [1, 2, 3]
    assert (started.request_id, started.model) == (whole.request_id, whole.model) == ("r-1", "ernie")
    assert finished.usage == whole.usage and finished.timings == whole.timings
    assert finished.stop_cause == whole.stop_cause
    assert [response.WhichOneof("event") for response in stream] == [
        "started", "reasoning_text_delta", "reasoning_text_delta", "text_delta", None, "text_delta", "finished",
    ]  # fmt: skip


def test_accounting() -> None:
    whole = grpc_messages.whole_response(STARTED, [], FINISHED)
    usage = whole.usage
    assert (usage.prompt_token_count, usage.media_token_count, usage.cached_token_count) == (12, 6, 4)
    assert (usage.output_token_count, usage.reasoning_token_count) == (5, 2)
    assert usage.time_to_first_token == Duration(nanos=250_000_000)
    assert [
        (stage.stage, grpc_messages.seconds(stage.exposed_duration), stage.HasField("busy_duration"))
        for stage in whole.timings.stages
    ] == [
        (inference_pb2.STAGE_QUEUED, 0.001, False),
        (inference_pb2.STAGE_ENCODE, 0.0, True),
        (inference_pb2.STAGE_PREFILL, 0.2, True),
        (inference_pb2.STAGE_DECODE, 1.5, False),
    ]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [(None, inference_pb2.StopCause()), ("END", inference_pb2.StopCause(stop_sequence="END")),
     (0, inference_pb2.StopCause(stop_token_id=0))],
)  # fmt: skip
def test_stop_causes(reason: str | int | None, expected: inference_pb2.StopCause) -> None:
    finished = Finished(reason=FinishReason.STOP, usage=USAGE, stop_reason=reason)
    whole = grpc_messages.whole_response(STARTED, [], finished)
    assert whole.stop_cause == expected
    assert whole.HasField("stop_cause") == (reason is not None)
    assert not whole.HasField("timings")


def test_every_enum_value_has_a_translation() -> None:
    for reason in FinishReason:
        grpc_messages.whole_response(STARTED, [], Finished(reason=reason, usage=USAGE))
    assert set(grpc_messages._STAGE) == set(Stage)
    assert set(grpc_messages.STATUS_CODE.values()) == {StatusCode[status.name] for status in Status}
    assert set(grpc_messages._THINKING) == set(inference_pb2.ThinkingMode.values())
    assert {0, *grpc_messages._FINISH.values()} == set(inference_pb2.FinishReason.values())


@pytest.mark.parametrize("value", [0, 1e-9, 0.1, 1.999999999, 600, 3600.25])
def test_durations_keep_nanoseconds(value: float) -> None:
    assert grpc_messages.seconds(grpc_messages.duration(value)) == pytest.approx(value, abs=1e-9)


def test_models() -> None:
    card = ModelCard(name="m", source="/w", max_model_len=10, created=5)
    assert json_format.MessageToDict(grpc_messages.model(card), preserving_proto_field_name=True) == {
        "name": "m",
        "source_uri": "/w",
        "context_token_limit": 10,
        "input_modalities": ["MODALITY_TEXT", "MODALITY_IMAGE", "MODALITY_VIDEO"],
        "create_time": "1970-01-01T00:00:05Z",
    }


def details(error: ServingError) -> tuple[Any, Any, Any]:
    status = grpc_messages.status(error)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    has_retry = len(status.details) > 1 and status.details[1].Unpack(retry)
    return status, info, retry if has_retry else None


def test_errors_become_status_details() -> None:
    status, info, retry = details(Overloaded("full", retry_after_s=1.5))
    assert (status.code, status.message) == (8, "full")
    assert (info.reason, info.domain, dict(info.metadata)) == ("QUEUE_FULL", "ernie-serving", {})
    assert retry.retry_delay == Duration(seconds=1, nanos=500_000_000)


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
        ("messages[0].content[1].video_url.start_s", "messages[0].parts[1].video.start_offset"),
        ("messages[10].reasoning", "messages[10].reasoning_text"),
        ("messages", "messages"),
        ("sampling_params.top_p", "sampling_params.top_p"),
        ("model", "model"),
    ],
)
def test_fields_named_by_later_stages(ours: str, theirs: str) -> None:
    status, info, retry = details(InvalidRequest("no", field=ours))
    assert info.metadata["field"] == theirs
    assert status.message == f"{theirs}: no"
    assert retry is None


def test_long_messages_fit_into_trailers() -> None:
    status, info, _ = details(InvalidRequest("f" * 5000 + "\u00e4" * 5000, field="f" * 5000))
    assert status.message.startswith("fff") and status.message.endswith("...")
    assert status.ByteSize() < 2500 and info.metadata["field"].endswith("...")
