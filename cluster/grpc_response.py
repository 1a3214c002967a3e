"""From the router's events and errors to public protobuf messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from google.protobuf import duration_pb2, timestamp_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import StatusCode

from actors.errors import InternalError, ServingError, Status
from actors.processing.tool_calls import joined
from actors.types import FinishReason, Stage, Timings, ToolCallDelta
from cluster.generation import (
    ChoiceFinished,
    Delta,
    Event,
    Finished,
    ModelCard,
    PositionScores,
    PromptScored,
    Started,
    TokenScore,
    Usage,
)
from cluster.grpc_request import client_field
from cluster.request_checks import told
from ernie_serving.v1 import content_pb2, inference_pb2

ERROR_DOMAIN = "ernie-serving"
MAX_STATUS_MESSAGE_BYTES = 1024
"""Status text travels twice in HTTP/2 trailers, percent-encoded and in base64, which together may have 8 KiB."""

_FINISH: Mapping[FinishReason, inference_pb2.FinishReason.ValueType] = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: inference_pb2.FINISH_REASON_TOOL_CALLS,
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


def stream_response(event: Event) -> inference_pb2.StreamGenerateResponse:
    """Translates an event."""
    match event:
        case Started():
            return inference_pb2.StreamGenerateResponse(
                started=inference_pb2.GenerationStarted(
                    request_id=event.request_id,
                    model=event.model,
                    prompt_token_count=event.prompt_tokens,
                    prompt_token_ids=event.prompt_token_ids or (),
                )
            )
        case PromptScored():
            return inference_pb2.StreamGenerateResponse(
                prompt_scored=inference_pb2.PromptScored(logprobs=_positions(event.entries))
            )
        case Delta():
            return inference_pb2.StreamGenerateResponse(
                delta=inference_pb2.ChoiceDelta(
                    choice_index=event.choice,
                    text=event.text,
                    reasoning_text=event.reasoning,
                    token_ids=event.token_ids,
                    logprobs=_positions(event.logprobs),
                    tool_calls=[
                        inference_pb2.ToolCallDelta(
                            index=call.index, id=call.id, name=call.name, arguments_json=call.arguments
                        )
                        for call in event.tool_calls
                    ],
                )
            )
        case ChoiceFinished():
            return inference_pb2.StreamGenerateResponse(
                choice_finished=inference_pb2.ChoiceFinished(
                    choice_index=event.choice,
                    finish_reason=_FINISH[event.reason],
                    stop_cause=_stop_cause(event.stop_reason),
                )
            )
        case Finished():
            return inference_pb2.StreamGenerateResponse(
                finished=inference_pb2.GenerationFinished(usage=_usage(event.usage), timings=_timings(event.timings))
            )


def whole_response(choice_count: int, events: Iterable[Event]) -> inference_pb2.GenerateResponse:
    """Puts the events of a request together. Raises InternalError when one is missing."""
    choices = [inference_pb2.Choice(index=index) for index in range(choice_count)]
    texts: list[list[str]] = [[] for _ in choices]
    thoughts: list[list[str]] = [[] for _ in choices]
    calls: list[list[ToolCallDelta]] = [[] for _ in choices]
    response = inference_pb2.GenerateResponse()
    for event in events:
        match event:
            case Started():
                response.request_id = event.request_id
                response.model = event.model
                response.prompt_token_ids.extend(event.prompt_token_ids or ())
            case PromptScored():
                response.prompt_logprobs.extend(_positions(event.entries))
            case Delta():
                texts[event.choice].append(event.text)
                thoughts[event.choice].append(event.reasoning)
                calls[event.choice].extend(event.tool_calls)
                choices[event.choice].token_ids.extend(event.token_ids)
                choices[event.choice].logprobs.extend(_positions(event.logprobs))
            case ChoiceFinished():
                choices[event.choice].finish_reason = _FINISH[event.reason]
                if (cause := _stop_cause(event.stop_reason)) is not None:
                    choices[event.choice].stop_cause.CopyFrom(cause)
            case Finished():
                response.usage.CopyFrom(_usage(event.usage))
                if (timings := _timings(event.timings)) is not None:
                    response.timings.CopyFrom(timings)
    for choice, text, thought, called in zip(choices, texts, thoughts, calls, strict=True):
        if choice.finish_reason == inference_pb2.FINISH_REASON_UNSPECIFIED:
            raise InternalError(f"the request ended before its choice {choice.index}")
        choice.text = "".join(text)
        choice.reasoning_text = "".join(thought)
        choice.tool_calls.extend(
            content_pb2.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments) for call in joined(called)
        )
    response.choices.extend(choices)
    return response


def _positions(entries: Iterable[PositionScores | None]) -> list[inference_pb2.PositionLogprobs]:
    return [
        inference_pb2.PositionLogprobs()
        if entry is None
        else inference_pb2.PositionLogprobs(chosen=_score(entry.chosen), top=[_score(score) for score in entry.top])
        for entry in entries
    ]


def _score(score: TokenScore) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(
        token_id=score.token_id, token=score.token, logprob=score.logprob, rank=score.rank
    )


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
        video_token_count=usage.video_tokens,
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
