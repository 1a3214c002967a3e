"""Replies and the events of a stream as plain values, and their translation from protobuf."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import duration_pb2

from cluster.client.errors import ClientError
from ernie_serving.v1 import inference_pb2


class FinishReason(enum.StrEnum):
    """Why a reply ended: ``stop`` is an end token or a stop sequence, ``length`` a bound."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call the model made. ``arguments`` is JSON as the model wrote it, which may be wrong or broken off."""

    id: str
    name: str
    arguments: str

    def parsed(self) -> dict[str, Any]:
        """The arguments. Raises ValueError when they are no JSON object."""
        try:
            value = json.loads(self.arguments)
        except RecursionError:
            raise ValueError("the arguments are nested too deeply") from None
        if not isinstance(value, dict):
            raise ValueError("the arguments are no JSON object")
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCallDelta:
    """More of a call. ``id`` and ``name`` come with its first piece and are empty after."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """``token`` may be a part of a UTF-8 character; ``rank`` is 1 for the most likely token."""

    token_id: int
    token: bytes
    logprob: float
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLogprobs:
    """The token that stands at a position (None where a prompt has none to tell), and the most likely ones."""

    chosen: TokenLogprob | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Token accounting over all choices. Media tokens are among the prompt's, those of videos among these."""

    prompt_tokens: int = 0
    media_tokens: int = 0
    video_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    time_to_first_token_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Seconds by stage ("queued", "preprocess", "encode", "prefill", "transfer", "decode"), in the order of the stages.

    ``exposed``: only this stage held the request up; sums to wall time. ``busy``: some place worked on the stage, also
    beside others.
    """

    exposed: Mapping[str, float]
    busy: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCount:
    """Tokens of a conversation, and how many of them are of media."""

    tokens: int
    media_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A served model: its name, where its weights came from, and the longest prompt and reply together."""

    name: str
    source: str
    context_tokens: int
    created: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """First event."""

    request_id: str
    model: str
    prompt_tokens: int
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptScored:
    """Log-probabilities of the prompt, where they were asked for."""

    logprobs: tuple[PositionLogprobs, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """More of a choice. ``reasoning`` comes before ``text``, also inside one delta."""

    choice: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceFinished:
    """Last event of a choice. ``stop`` is the stop sequence or stop token that ended it, if one did."""

    choice: int = 0
    reason: FinishReason
    stop: str | int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """Last event."""

    usage: Usage
    timings: Timings | None = None


Event = Started | PromptScored | Delta | ChoiceFinished | Finished


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of the replies to a request."""

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason
    stop: str | int | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A whole reply. ``text``, ``reasoning``, ``tool_calls`` and ``finish_reason`` are those of the first choice."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings | None = None
    prompt_token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.choices[0].tool_calls

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason


@dataclass(slots=True)
class _Growing:
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, tuple[str, str, list[str]]] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)


class ReplyBuilder:
    """Gathers the events of a stream into the reply that the same request would have had whole."""

    def __init__(self) -> None:
        self._started: Started | None = None
        self._scored: tuple[PositionLogprobs, ...] = ()
        self._growing: dict[int, _Growing] = {}
        self._ended: dict[int, ChoiceFinished] = {}
        self._finished: Finished | None = None

    def add(self, event: Event) -> None:
        match event:
            case Started():
                self._started = event
            case PromptScored():
                self._scored = event.logprobs
            case Delta():
                grown = self._growing.setdefault(event.choice, _Growing())
                grown.text.append(event.text)
                grown.reasoning.append(event.reasoning)
                grown.token_ids.extend(event.token_ids)
                grown.logprobs.extend(event.logprobs)
                for call in event.tool_calls:
                    _, _, arguments = grown.calls.setdefault(call.index, (call.id, call.name, []))
                    arguments.append(call.arguments)
            case ChoiceFinished():
                self._ended[event.choice] = event
            case Finished():
                self._finished = event

    def whole(self) -> Reply:
        """The reply. Raises ClientError when the stream ended before its last event."""
        reply = self.reply()
        if reply is None:
            raise ClientError(grpc.StatusCode.UNKNOWN, "the reply ended early")
        return reply

    def reply(self) -> Reply | None:
        """None before the last event."""
        if self._started is None or self._finished is None:
            return None
        return Reply(
            request_id=self._started.request_id,
            model=self._started.model,
            choices=tuple(self._choice(self._ended[index]) for index in sorted(self._ended)),
            usage=self._finished.usage,
            timings=self._finished.timings,
            prompt_token_ids=self._started.prompt_token_ids,
            prompt_logprobs=self._scored,
        )

    def _choice(self, ended: ChoiceFinished) -> Choice:
        grown = self._growing.get(ended.choice, _Growing())
        return Choice(
            index=ended.choice,
            text="".join(grown.text),
            reasoning="".join(grown.reasoning),
            tool_calls=tuple(
                ToolCall(id=id_, name=name, arguments="".join(arguments))
                for _, (id_, name, arguments) in sorted(grown.calls.items())
            ),
            finish_reason=ended.reason,
            stop=ended.stop,
            token_ids=tuple(grown.token_ids),
            logprobs=tuple(grown.logprobs),
        )


def event_of(response: inference_pb2.StreamGenerateResponse) -> Event | None:
    """Translates a response of a stream; None for one that only keeps the connection alive."""
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(
                request_id=started.request_id,
                model=started.model,
                prompt_tokens=started.prompt_token_count,
                prompt_token_ids=tuple(started.prompt_token_ids),
            )
        case "prompt_scored":
            return PromptScored(logprobs=_positions(response.prompt_scored.logprobs))
        case "delta":
            delta = response.delta
            return Delta(
                choice=delta.choice_index,
                text=delta.text,
                reasoning=delta.reasoning_text,
                tool_calls=tuple(
                    ToolCallDelta(index=call.index, id=call.id, name=call.name, arguments=call.arguments_json)
                    for call in delta.tool_calls
                ),
                token_ids=tuple(delta.token_ids),
                logprobs=_positions(delta.logprobs),
            )
        case "choice_finished":
            ended = response.choice_finished
            return ChoiceFinished(
                choice=ended.choice_index, reason=_reason(ended.finish_reason), stop=_stop(ended.stop_cause)
            )
        case "finished":
            return Finished(usage=_usage(response.finished.usage), timings=_timings(response.finished))
        case _:
            return None


def reply_of(response: inference_pb2.GenerateResponse) -> Reply:
    """Translates a whole response."""
    return Reply(
        request_id=response.request_id,
        model=response.model,
        choices=tuple(
            Choice(
                index=choice.index,
                text=choice.text,
                reasoning=choice.reasoning_text,
                tool_calls=tuple(
                    ToolCall(id=call.id, name=call.name, arguments=call.arguments_json) for call in choice.tool_calls
                ),
                finish_reason=_reason(choice.finish_reason),
                stop=_stop(choice.stop_cause),
                token_ids=tuple(choice.token_ids),
                logprobs=_positions(choice.logprobs),
            )
            for choice in response.choices
        ),
        usage=_usage(response.usage),
        timings=_timings(response),
        prompt_token_ids=tuple(response.prompt_token_ids),
        prompt_logprobs=_positions(response.prompt_logprobs),
    )


def model_of(model: inference_pb2.Model) -> Model:
    """Translates a served model."""
    return Model(
        name=model.name,
        source=model.source_uri,
        context_tokens=model.context_token_limit,
        created=model.create_time.seconds,
    )


def _reason(value: inference_pb2.FinishReason.ValueType) -> FinishReason:
    return FinishReason(inference_pb2.FinishReason.Name(value).removeprefix("FINISH_REASON_").lower())


def _stop(cause: inference_pb2.StopCause) -> str | int | None:
    match cause.WhichOneof("cause"):
        case "stop_sequence":
            return cause.stop_sequence
        case "stop_token_id":
            return cause.stop_token_id
        case _:
            return None


def _positions(entries: Iterable[inference_pb2.PositionLogprobs]) -> tuple[PositionLogprobs, ...]:
    return tuple(
        PositionLogprobs(
            chosen=_token(entry.chosen) if entry.HasField("chosen") else None,
            top=tuple(_token(token) for token in entry.top),
        )
        for entry in entries
    )


def _token(token: inference_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=token.token_id, token=token.token, logprob=token.logprob, rank=token.rank)


def _usage(usage: inference_pb2.Usage) -> Usage:
    known = usage.HasField("time_to_first_token")
    return Usage(
        prompt_tokens=usage.prompt_token_count,
        media_tokens=usage.media_token_count,
        video_tokens=usage.video_token_count,
        cached_tokens=usage.cached_token_count,
        output_tokens=usage.output_token_count,
        reasoning_tokens=usage.reasoning_token_count,
        time_to_first_token_s=_seconds(usage.time_to_first_token) if known else None,
    )


def _timings(carrier: inference_pb2.GenerateResponse | inference_pb2.GenerationFinished) -> Timings | None:
    if not carrier.HasField("timings"):
        return None
    exposed, busy = {}, {}
    for stage in carrier.timings.stages:
        name = inference_pb2.Stage.Name(stage.stage).removeprefix("STAGE_").lower()
        exposed[name] = _seconds(stage.exposed_duration)
        if stage.HasField("busy_duration"):
            busy[name] = _seconds(stage.busy_duration)
    return Timings(exposed=exposed, busy=busy)


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
