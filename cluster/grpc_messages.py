"""Pure translations between the public protobuf messages and the router's types. Fields are named as in the protos."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from google.protobuf import duration_pb2, timestamp_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import StatusCode

from actors.errors import InvalidRequest, ServingError, Status
from actors.types import (
    ContentPart,
    FinishReason,
    ImagePart,
    MediaSource,
    Message,
    MessageRole,
    Stage,
    TextPart,
    ThinkingMode,
    Timings,
    ToolCall,
    VideoPart,
)
from cluster.generation import Delta, Event, Finished, GenerateCall, ModelCard, Started, Usage
from cluster.request_checks import (
    MAX_INT32,
    check_call,
    check_finite,
    check_messages,
    check_pixels,
    media_from_uri,
    told,
)
from ernie_serving.v1 import content_pb2, inference_pb2

ERROR_DOMAIN = "ernie-serving"
MAX_STATUS_MESSAGE_BYTES = 1024
"""Status text travels twice in HTTP/2 trailers, percent-encoded and in base64, which together may have 8 KiB."""

SPELLING = {
    "temperature": "sampling_params.temperature",
    "top_p": "sampling_params.top_p",
    "top_k": "sampling_params.top_k",
    "seed": "sampling_params.seed",
    "max_tokens": "sampling_params.max_output_token_count",
    "stop": "sampling_params.stop_sequences",
    "stop_token_ids": "sampling_params.stop_token_ids",
    "ignore_eos": "sampling_params.ignore_eos",
    "thinking": "thinking_mode",
    "timeout_s": "timeout",
}
"""Attributes of GenerateCall as the protos spell them."""

_ROLES: Mapping[int, MessageRole] = {
    content_pb2.ROLE_SYSTEM: MessageRole.SYSTEM,
    content_pb2.ROLE_USER: MessageRole.USER,
    content_pb2.ROLE_ASSISTANT: MessageRole.ASSISTANT,
    content_pb2.ROLE_TOOL: MessageRole.TOOL,
}
_THINKING: Mapping[int, ThinkingMode] = {
    inference_pb2.THINKING_MODE_UNSPECIFIED: ThinkingMode.AUTO,
    inference_pb2.THINKING_MODE_ENABLED: ThinkingMode.ON,
    inference_pb2.THINKING_MODE_DISABLED: ThinkingMode.OFF,
}
_FINISH: Mapping[FinishReason, inference_pb2.FinishReason.ValueType] = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
}
_STAGE: Mapping[Stage, inference_pb2.Stage.ValueType] = {
    Stage.QUEUED: inference_pb2.STAGE_QUEUED,
    Stage.PREPROCESS: inference_pb2.STAGE_PREPROCESS,
    Stage.ENCODE: inference_pb2.STAGE_ENCODE,
    Stage.PREFILL: inference_pb2.STAGE_PREFILL,
    Stage.TRANSFER: inference_pb2.STAGE_TRANSFER,
    Stage.DECODE: inference_pb2.STAGE_DECODE,
    Stage.FINISHED: inference_pb2.STAGE_FINISHED,
}
STATUS_CODE: Mapping[Status, StatusCode] = {status: StatusCode[status.name] for status in Status}


# ---- requests ----


def generate_call(request: inference_pb2.GenerateRequest) -> GenerateCall:
    """Translates and checks a request. Raises InvalidRequest naming the first wrong field."""
    params = request.sampling_params
    if request.tools:
        raise _not_yet("tools")
    if params.HasField("repetition_penalty"):
        raise _not_yet("sampling_params.repetition_penalty")
    call = GenerateCall(
        messages=messages(request.messages),
        model=request.model or None,
        request_id=request.request_id or None,
        temperature=params.temperature if params.HasField("temperature") else None,
        top_p=params.top_p if params.HasField("top_p") else None,
        top_k=params.top_k if params.HasField("top_k") else None,
        seed=params.seed if params.HasField("seed") else None,
        max_tokens=params.max_output_token_count if params.HasField("max_output_token_count") else None,
        stop=tuple(params.stop_sequences),
        stop_token_ids=tuple(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        thinking=thinking_mode(request.thinking_mode),
        timeout_s=seconds(request.timeout) if request.HasField("timeout") else None,
        return_token_ids=request.return_token_ids,
        return_timings=request.return_timings,
    )
    check_call(call, SPELLING)
    return call


def messages(protos: Iterable[content_pb2.ChatMessage]) -> tuple[Message, ...]:
    """Translates and checks a conversation."""
    turns = tuple(_message(proto, f"messages[{index}]") for index, proto in enumerate(protos))
    check_messages(turns, "parts")
    return turns


def thinking_mode(value: int) -> ThinkingMode:
    """Translates a mode; numbers this version does not know are refused."""
    if value not in _THINKING:
        raise _wrong("thinking_mode", f"has the unknown value {value}")
    return _THINKING[value]


def seconds(span: duration_pb2.Duration) -> float:
    """Length of a span."""
    return span.seconds + span.nanos / 1e9


def _message(proto: content_pb2.ChatMessage, field: str) -> Message:
    role = _ROLES.get(proto.role)
    if role is None:
        raise _wrong(f"{field}.role", "must be ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT or ROLE_TOOL")
    if role is not MessageRole.ASSISTANT:
        if proto.reasoning_text:
            raise _wrong(f"{field}.reasoning_text", "belongs to messages of ROLE_ASSISTANT")
        if proto.tool_calls:
            raise _wrong(f"{field}.tool_calls", "belongs to messages of ROLE_ASSISTANT")
    if role is not MessageRole.TOOL and proto.tool_call_id:
        raise _wrong(f"{field}.tool_call_id", "belongs to messages of ROLE_TOOL")
    return Message(
        role=role,
        parts=tuple(_part(part, f"{field}.parts[{index}]") for index, part in enumerate(proto.parts)),
        reasoning=proto.reasoning_text or None,
        tool_calls=tuple(
            ToolCall(id=call.id, name=call.name, arguments=call.arguments_json) for call in proto.tool_calls
        ),
        tool_call_id=proto.tool_call_id or None,
        name=proto.name or None,
    )


def _part(proto: content_pb2.ContentPart, field: str) -> ContentPart:
    match proto.WhichOneof("part"):
        case "text":
            return TextPart(text=proto.text)
        case "image":
            return _image(proto.image, f"{field}.image")
        case "video":
            return _video(proto.video, f"{field}.video")
        case _:
            raise _wrong(field, "must have text, an image or a video")


def _image(proto: content_pb2.ImagePart, field: str) -> ImagePart:
    low = proto.min_pixels if proto.HasField("min_pixels") else None
    high = proto.max_pixels if proto.HasField("max_pixels") else None
    check_pixels(low, high, field)
    return ImagePart(source=_source(proto.source, f"{field}.source", "image"), min_pixels=low, max_pixels=high)


def _video(proto: content_pb2.VideoPart, field: str) -> VideoPart:
    rate = proto.frames_per_second if proto.HasField("frames_per_second") else None
    if rate is not None and check_finite(rate, f"{field}.frames_per_second") <= 0:
        raise _wrong(f"{field}.frames_per_second", f"must be above 0, not {rate}")
    frames = proto.max_frame_count if proto.HasField("max_frame_count") else None
    if frames is not None and frames < 1:
        raise _wrong(f"{field}.max_frame_count", f"must be between 1 and {MAX_INT32}, not {frames}")
    start = seconds(proto.start_offset) if proto.HasField("start_offset") else None
    end = seconds(proto.end_offset) if proto.HasField("end_offset") else None
    if start is not None and start < 0:
        raise _wrong(f"{field}.start_offset", f"must not be negative, it is {start:g} s")
    if end is not None and end <= (start or 0):
        raise _wrong(f"{field}.end_offset", f"must come after the start at {start or 0:g} s, it is {end:g} s")
    return VideoPart(
        source=_source(proto.source, f"{field}.source", "video"),
        frames_per_second=rate,
        max_frames=frames,
        start_s=start,
        end_s=end,
    )


def _source(proto: content_pb2.MediaSource, field: str, kind: str) -> MediaSource:
    if proto.mime_type and not proto.mime_type.lower().startswith(f"{kind}/"):
        raise _wrong(f"{field}.mime_type", f'must begin with "{kind}/"')
    match proto.WhichOneof("source"):
        case "content":
            if not proto.content:
                raise _wrong(f"{field}.content", "holds no bytes")
            return MediaSource(content=proto.content)
        case "uri":
            return media_from_uri(proto.uri, f"{field}.uri")
        case _:
            raise _wrong(field, "must have content or a uri")


def _wrong(field: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {rule}", field=field)


def _not_yet(field: str) -> InvalidRequest:
    return InvalidRequest(f"{field} is not supported yet", field=field, reason="UNSUPPORTED_FIELD")


# ---- responses ----


def stream_responses(event: Event) -> Iterator[inference_pb2.StreamGenerateResponse]:
    """Translates an event. A delta with thinking and answer text becomes two responses, its token ids in the first."""
    match event:
        case Started():
            yield inference_pb2.StreamGenerateResponse(
                started=inference_pb2.GenerationStarted(
                    request_id=event.request_id,
                    model=event.model,
                    prompt_token_count=event.prompt_tokens,
                    prompt_token_ids=event.prompt_token_ids or (),
                )
            )
        case Delta():
            token_ids: tuple[int, ...] = event.token_ids
            if event.reasoning:
                yield inference_pb2.StreamGenerateResponse(reasoning_text_delta=event.reasoning, token_ids=token_ids)
                token_ids = ()
            if event.text:
                yield inference_pb2.StreamGenerateResponse(text_delta=event.text, token_ids=token_ids)
            elif token_ids:
                yield inference_pb2.StreamGenerateResponse(token_ids=token_ids)
        case Finished():
            yield inference_pb2.StreamGenerateResponse(
                finished=inference_pb2.GenerationFinished(
                    finish_reason=_FINISH[event.reason],
                    usage=_usage(event.usage),
                    stop_cause=_stop_cause(event.stop_reason),
                    timings=_timings(event.timings),
                )
            )


def whole_response(started: Started, deltas: Iterable[Delta], finished: Finished) -> inference_pb2.GenerateResponse:
    """Puts the events of a request together."""
    response = inference_pb2.GenerateResponse(
        request_id=started.request_id,
        model=started.model,
        prompt_token_ids=started.prompt_token_ids or (),
        finish_reason=_FINISH[finished.reason],
        usage=_usage(finished.usage),
        stop_cause=_stop_cause(finished.stop_reason),
        timings=_timings(finished.timings),
    )
    text, reasoning = [], []
    for delta in deltas:
        text.append(delta.text)
        reasoning.append(delta.reasoning)
        response.token_ids.extend(delta.token_ids)
    response.text = "".join(text)
    response.reasoning_text = "".join(reasoning)
    return response


def model(card: ModelCard) -> inference_pb2.Model:
    """Translates a served model. All accept text, images and video."""
    return inference_pb2.Model(
        name=card.name,
        source_uri=card.source,
        context_token_limit=card.max_model_len,
        input_modalities=[
            inference_pb2.MODALITY_TEXT,
            inference_pb2.MODALITY_IMAGE,
            inference_pb2.MODALITY_VIDEO,
        ],
        create_time=timestamp_pb2.Timestamp(seconds=card.created),
    )


def duration(value: float) -> duration_pb2.Duration:
    """A span of ``value`` seconds to the nanosecond."""
    nanos = round(value * 1e9)
    return duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)


def _usage(usage: Usage) -> inference_pb2.Usage:
    first = usage.time_to_first_token_s
    return inference_pb2.Usage(
        prompt_token_count=usage.prompt_tokens,
        media_token_count=usage.media_tokens,
        cached_token_count=usage.cached_tokens,
        output_token_count=usage.output_tokens,
        reasoning_token_count=usage.reasoning_tokens,
        time_to_first_token=None if first is None else duration(first),
    )


def _stop_cause(reason: str | int | None) -> inference_pb2.StopCause | None:
    match reason:
        case None:
            return None
        case str():
            return inference_pb2.StopCause(stop_sequence=reason)
        case _:
            return inference_pb2.StopCause(stop_token_id=reason)


def _timings(timings: Timings | None) -> inference_pb2.Timings | None:
    if timings is None:
        return None
    return inference_pb2.Timings(
        stages=[
            inference_pb2.StageTiming(
                stage=_STAGE[stage],
                exposed_duration=duration(timings.exposed.get(stage, 0.0)),
                busy_duration=duration(timings.busy[stage]) if stage in timings.busy else None,
            )
            for stage in Stage
            if stage in timings.exposed or stage in timings.busy
        ]
    )


# ---- errors ----


_INNER_SPELLING = {
    "content": "parts",
    "image_url": "image",
    "video_url": "video",
    "reasoning": "reasoning_text",
    "max_frames": "max_frame_count",
    "start_s": "start_offset",
    "end_s": "end_offset",
}
_NAME = re.compile(r"^\w+|(?<=\.)\w+")


def client_field(field: str) -> str:
    """Turns a field as a later stage names it, in the terms of ``GenerateCall`` or OpenAI's, into the protos' terms."""
    if field.startswith("messages"):
        return _NAME.sub(lambda name: _INNER_SPELLING.get(name[0], name[0]), field)
    return _NAME.sub(lambda name: SPELLING.get(name[0], name[0]) if name.start() == 0 else name[0], field)


def status(error: ServingError) -> status_pb2.Status:
    """Writes an error as google.rpc.Status with an ErrorInfo and, when known, a RetryInfo."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)
    field = client_field(error.field) if error.field else None
    if field:
        info.metadata["field"] = _cut(field)
    code: int = STATUS_CODE[error.status].value[0]
    result = status_pb2.Status(code=code, message=_cut(told(error.message, field)))
    result.details.add().Pack(info)
    if error.retry_after_s is not None:
        result.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=duration(error.retry_after_s)))
    return result


def _cut(text: str) -> str:
    raw = text.encode()
    if len(raw) <= MAX_STATUS_MESSAGE_BYTES:
        return text
    return raw[: MAX_STATUS_MESSAGE_BYTES - 3].decode(errors="ignore") + "..."
