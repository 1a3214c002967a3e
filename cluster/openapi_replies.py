"""Replies and stream events of the HTTP API as the published document describes them. Nothing is built from these:
tests hold real replies to them, and a key that is not here is wrong.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

_exact = with_config(ConfigDict(extra="forbid"))


@_exact
class ErrorDetail(TypedDict):
    """``param`` names the field at fault, ``code`` the reason."""

    message: str
    type: str
    param: str | None
    code: str | None


@_exact
class ErrorReply(TypedDict):
    """OpenAI's error object."""

    error: ErrorDetail


@_exact
class PromptTokensDetails(TypedDict):
    """Tokens from the prefix cache, of images and of video; the last two together are ``media_tokens``."""

    cached_tokens: int
    image_tokens: int
    video_tokens: int
    media_tokens: int


@_exact
class OutputTokensDetails(TypedDict):
    """Tokens of thinking."""

    reasoning_tokens: int


@_exact
class UsageReply(TypedDict):
    """Token accounting over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: OutputTokensDetails


@_exact
class TimingsReply(TypedDict):
    """Seconds per stage: those that held the request up, those of work beside, and to the first token."""

    exposed: dict[str, float]
    busy: dict[str, float]
    time_to_first_token: float | None


@_exact
class TokenReply(TypedDict):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


@_exact
class ScoredTokenReply(TokenReply):
    """The token drawn, and the most likely ones."""

    top_logprobs: list[TokenReply]


@_exact
class LogprobsReply(TypedDict):
    """One entry per generated token, thinking included."""

    content: list[ScoredTokenReply]
    refusal: None


@_exact
class PromptTokenReply(TypedDict):
    """vLLM's entry, by token id."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobsReply = list[dict[str, PromptTokenReply] | None]


@_exact
class FunctionReply(TypedDict):
    """``arguments`` is what the model wrote, JSON where it was made to."""

    name: str
    arguments: str


@_exact
class ToolCallReply(TypedDict):
    """A call the model makes."""

    id: str
    type: Literal["function"]
    function: FunctionReply


@_exact
class AssistantReply(TypedDict):
    """``reasoning`` and ``reasoning_content`` are the same text."""

    role: Literal["assistant"]
    content: str | None
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallReply]]


FinishReply = Literal["stop", "length", "tool_calls", "abort"]


@_exact
class ChatChoiceReply(TypedDict):
    """``stop_reason`` is the stop string or stop token that ended the choice."""

    index: int
    message: AssistantReply
    logprobs: LogprobsReply | None
    finish_reason: FinishReply
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


@_exact
class ChatReply(TypedDict):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoiceReply]
    usage: UsageReply
    metadata: NotRequired[dict[str, Any]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobsReply]
    timings: NotRequired[TimingsReply]


@_exact
class FunctionDelta(TypedDict):
    """``name`` comes with the first delta of a call."""

    name: NotRequired[str]
    arguments: str


@_exact
class ToolCallDeltaReply(TypedDict):
    """More of a call."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


@_exact
class AssistantDelta(TypedDict):
    """More of a message. ``reasoning`` and ``reasoning_content`` are the same text."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDeltaReply]]


@_exact
class ChatChunkChoice(TypedDict):
    """The last chunk of a choice has its finish reason."""

    index: int
    delta: AssistantDelta
    finish_reason: FinishReply | None
    stop_reason: NotRequired[str | int | None]
    logprobs: NotRequired[LogprobsReply | None]
    token_ids: NotRequired[list[int]]


@_exact
class ChatChunk(TypedDict):
    """What the request asked for of the prompt comes with the first, usage and timings with the last."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[UsageReply | None]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobsReply]
    timings: NotRequired[TimingsReply]


@_exact
class LegacyLogprobsReply(TypedDict):
    """Parallel lists, one entry per token; null where a prompt's token has none."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


@_exact
class CompletionChoiceReply(TypedDict):
    """Choice ``c`` of prompt ``p`` has the index ``p * n + c``."""

    index: int
    text: str
    logprobs: LegacyLogprobsReply | None
    finish_reason: FinishReply
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobsReply]


@_exact
class CompletionReply(TypedDict):
    """A text completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoiceReply]
    usage: UsageReply
    timings: NotRequired[TimingsReply]


@_exact
class CompletionChunkChoice(TypedDict):
    """More of a choice."""

    index: int
    text: str
    logprobs: LegacyLogprobsReply | None
    finish_reason: FinishReply | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobsReply]


@_exact
class CompletionChunk(TypedDict):
    """Usage and timings come with the last."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: NotRequired[UsageReply | None]
    timings: NotRequired[TimingsReply]


ItemStatus = Literal["completed", "incomplete"]


@_exact
class ReasoningTextReply(TypedDict):
    """Thinking."""

    type: Literal["reasoning_text"]
    text: str


@_exact
class OutputTextReply(TypedDict):
    """Answer text."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]


@_exact
class ReasoningItemReply(TypedDict):
    """Thinking, whole; ``summary`` is empty."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningTextReply]


@_exact
class MessageItemReply(TypedDict):
    """Answer."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputTextReply]


@_exact
class FunctionCallItemReply(TypedDict):
    """A call the model makes."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


@_exact
class ResponsesUsageReply(TypedDict):
    """Token accounting."""

    input_tokens: int
    input_tokens_details: PromptTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


@_exact
class ResponsesReply(TypedDict):
    """A response. What the request said comes back as it was given."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "cancelled"]
    background: Literal[False]
    error: None
    incomplete_details: dict[Literal["reason"], Literal["max_output_tokens"]] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[ReasoningItemReply | MessageItemReply | FunctionCallItemReply]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[Literal["effort", "summary"], str | None]
    store: Literal[False]
    temperature: float | None
    text: dict[Literal["format"], dict[str, Any]]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponsesUsageReply
    user: str | None
    timings: NotRequired[TimingsReply]


class ResponsesEvent(TypedDict):
    """One of OpenAI's events; what else it has depends on its type, which is also the name of the event."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.output_item.done",
        "response.content_part.added",
        "response.content_part.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.output_text.delta",
        "response.output_text.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "error",
    ]
    sequence_number: int


@_exact
class ModelReply(TypedDict):
    """A served model; ``root`` is where its weights came from."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


@_exact
class ModelsReply(TypedDict):
    """All served models."""

    object: Literal["list"]
    data: list[ModelReply]


@_exact
class TokenizeReply(TypedDict):
    """Tokens of a prompt; ``token_strs`` on request."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


@_exact
class DetokenizeReply(TypedDict):
    """Text of tokens, special ones spelled out."""

    prompt: str


@_exact
class HealthReply(TypedDict):
    """This process answers."""

    status: Literal["alive"]


@_exact
class ReadyReply(TypedDict):
    """Whether a request could be served now, and what is missing if not."""

    status: Literal["ready", "not ready"]
    missing: NotRequired[str]


@_exact
class VersionReply(TypedDict):
    """Of the server."""

    version: str
