"""Requests and messages from plain Python: text, files, OpenAI's names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import duration_pb2

from cluster.client.events import Choice, Reply, ToolCall
from cluster.client.media import Media, media_source
from ernie_serving.v1 import content_pb2, inference_pb2


def generate_request(
    messages: str | content_pb2.ChatMessage | Iterable[content_pb2.ChatMessage],
    *,
    images: Iterable[Media] = (),
    videos: Iterable[Media] = (),
    model: str | None = None,
    request_id: str | None = None,
    n: int = 1,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    allowed_token_ids: Iterable[int] | None = None,
    bad_words: Iterable[str] = (),
    seed: int | None = None,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    reasoning_max_tokens: int | None = None,
    stop: Iterable[str] = (),
    stop_token_ids: Iterable[int] = (),
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    json_schema: str | Mapping[str, Any] | None = None,
    json_object: bool = False,
    regex: str | None = None,
    grammar: str | None = None,
    choice: Iterable[str] | None = None,
    tools: Iterable[Mapping[str, Any]] = (),
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool | None = None,
    enable_thinking: bool | None = None,
    mm_processor_kwargs: Mapping[str, float] | None = None,
    priority: int = 0,
    cache_salt: str | None = None,
    return_token_ids: bool = False,
    return_timings: bool = False,
    timeout_s: float | None = None,
) -> inference_pb2.GenerateRequest:
    """A request from the names the HTTP API uses, but for a few. None leaves the choice to the model or the cluster.

    ``messages`` may be one question as plain text, which ``images`` and ``videos`` belong to; those of longer
    conversations are in their messages (``user_message`` ...). ``logprobs`` and ``prompt_logprobs`` are counts of most
    likely tokens. The text of a stop string must come as a list of one. ``tools`` and ``tool_choice`` are as OpenAI has
    them: {"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}, and "auto", "none",
    "required" or {"type": "function", "function": {"name": ...}}.

    ``mm_processor_kwargs`` is how media are prepared where their parts do not say: image_min_pixels, image_max_pixels,
    video_min_pixels, video_max_pixels, video_fps, video_min_frames, video_max_frames.

    ``timeout_s`` is the time the whole request may take, attempts together.

    Raises:
        ValueError: more than one structure, or something that has no wire form.
        OSError: a file of ``images`` or ``videos`` cannot be read.
    """
    messages = _conversation(messages, images, videos)
    for name, texts in (("stop", stop), ("bad_words", bad_words), ("choice", choice)):
        if isinstance(texts, str):
            raise ValueError(f"{name} must be a list of texts")
    if n == 0:
        raise ValueError("n must not be 0")
    # On the wire these would say nothing.
    allowed_token_ids = None if allowed_token_ids is None else list(allowed_token_ids)
    for name, given in (
        ("model", model),
        ("request_id", request_id),
        ("cache_salt", cache_salt),
        ("allowed_token_ids", allowed_token_ids),
    ):
        if given is not None and not given:
            raise ValueError(f"{name} must not be empty")
    params = inference_pb2.SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=logit_bias or {},
        allowed_token_ids=allowed_token_ids or (),
        bad_words=bad_words,
        seed=seed,
        min_output_token_count=min_tokens,
        max_output_token_count=max_tokens,
        max_reasoning_token_count=reasoning_max_tokens,
        stop_sequences=stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
    )
    request = inference_pb2.GenerateRequest(
        messages=messages,
        model=model or "",
        request_id=request_id or "",
        sampling_params=params,
        structured_output=_structured_output(json_schema, json_object, regex, grammar, choice),
        tools=[declared_tool(tool) for tool in tools],
        tool_choice=_tool_choice(tool_choice),
        parallel_tool_calls=parallel_tool_calls,
        choice_count=n,
        top_logprob_count=logprobs,
        prompt_top_logprob_count=prompt_logprobs,
        thinking_mode=_THINKING[enable_thinking],
        media_options=_media_options(mm_processor_kwargs),
        priority=priority,
        cache_salt=cache_salt or "",
        return_token_ids=return_token_ids,
        return_timings=return_timings,
    )
    if timeout_s is not None:
        set_timeout(request, timeout_s)
    return request


def count_request(
    messages: str | content_pb2.ChatMessage | Iterable[content_pb2.ChatMessage],
    *,
    images: Iterable[Media] = (),
    videos: Iterable[Media] = (),
    model: str | None = None,
    tools: Iterable[Mapping[str, Any]] = (),
    enable_thinking: bool | None = None,
    mm_processor_kwargs: Mapping[str, float] | None = None,
) -> inference_pb2.CountTokensRequest:
    """A request to count tokens; arguments as of ``generate_request``."""
    return inference_pb2.CountTokensRequest(
        model=model or "",
        messages=_conversation(messages, images, videos),
        thinking_mode=_THINKING[enable_thinking],
        tools=[declared_tool(tool) for tool in tools],
        media_options=_media_options(mm_processor_kwargs),
    )


def set_timeout(request: inference_pb2.GenerateRequest, timeout_s: float) -> None:
    """Sets the time a request may take, to the nanosecond."""
    nanos = round(timeout_s * 1e9)
    request.timeout.CopyFrom(duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9))


def _conversation(
    messages: str | content_pb2.ChatMessage | Iterable[content_pb2.ChatMessage],
    images: Iterable[Media],
    videos: Iterable[Media],
) -> list[content_pb2.ChatMessage]:
    images, videos = list(images), list(videos)
    if isinstance(messages, str):
        return [user_message(messages, images=images, videos=videos)]
    if images or videos:
        raise ValueError("images and videos belong to a question of plain text: put them into user_message")
    return [messages] if isinstance(messages, content_pb2.ChatMessage) else list(messages)


_THINKING = {
    None: inference_pb2.THINKING_MODE_UNSPECIFIED,
    True: inference_pb2.THINKING_MODE_ENABLED,
    False: inference_pb2.THINKING_MODE_DISABLED,
}


_MEDIA_OPTIONS = {
    "image_min_pixels": "image_min_pixels",
    "image_max_pixels": "image_max_pixels",
    "video_min_pixels": "video_min_pixels",
    "video_max_pixels": "video_max_pixels",
    "video_fps": "video_frames_per_second",
    "video_min_frames": "video_min_frame_count",
    "video_max_frames": "video_max_frame_count",
}


def _media_options(kwargs: Mapping[str, float] | None) -> content_pb2.MediaOptions | None:
    if kwargs is None:
        return None
    options = content_pb2.MediaOptions()
    for name, value in kwargs.items():
        if name not in _MEDIA_OPTIONS:
            raise ValueError(f"mm_processor_kwargs: {name} is not among {', '.join(_MEDIA_OPTIONS)}")
        try:
            setattr(options, _MEDIA_OPTIONS[name], value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"mm_processor_kwargs: {name}: {error}") from None
    return options


def _structured_output(
    json_schema: str | Mapping[str, Any] | None,
    json_object: bool,
    regex: str | None,
    grammar: str | None,
    choice: Iterable[str] | None,
) -> inference_pb2.StructuredOutput | None:
    given = [json_schema is not None, json_object, regex is not None, grammar is not None, choice is not None]
    if sum(given) > 1:
        raise ValueError("give one of json_schema, json_object, regex, grammar and choice")
    if json_schema is not None:
        text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema, ensure_ascii=False)
        return inference_pb2.StructuredOutput(json_schema=text)
    if json_object:
        return inference_pb2.StructuredOutput(json_object=inference_pb2.JsonObject())
    if regex is not None:
        return inference_pb2.StructuredOutput(regex=regex)
    if grammar is not None:
        return inference_pb2.StructuredOutput(grammar=grammar)
    if choice is not None:
        return inference_pb2.StructuredOutput(choices=inference_pb2.TextChoices(texts=choice))
    return None


def declared_tool(tool: Mapping[str, Any]) -> content_pb2.Tool:
    """A function the model may call, from OpenAI's form. Raises ValueError."""
    function = _function(tool, "a tool", {"name", "description", "parameters", "strict"})
    parameters = function.get("parameters")
    return content_pb2.Tool(
        name=function["name"],
        description=function.get("description") or "",
        parameters_json="" if parameters is None else json.dumps(parameters, ensure_ascii=False),
    )


_TOOL_MODES = {
    "auto": inference_pb2.TOOL_CHOICE_MODE_AUTO,
    "none": inference_pb2.TOOL_CHOICE_MODE_NONE,
    "required": inference_pb2.TOOL_CHOICE_MODE_REQUIRED,
}


def _tool_choice(choice: str | Mapping[str, Any] | None) -> inference_pb2.ToolChoice | None:
    if choice is None:
        return None
    if isinstance(choice, str):
        if choice not in _TOOL_MODES:
            raise ValueError(f"tool_choice must be {', '.join(_TOOL_MODES)} or name a function, not {choice!r}")
        return inference_pb2.ToolChoice(mode=_TOOL_MODES[choice])
    return inference_pb2.ToolChoice(function_name=_function(choice, "tool_choice", {"name"})["name"])


def _function(value: Mapping[str, Any], what: str, known: set[str]) -> Mapping[str, Any]:
    """The inner object of OpenAI's two."""
    function = value.get("function") if set(value) == {"type", "function"} and value["type"] == "function" else None
    if not isinstance(function, Mapping) or "name" not in function or not set(function) <= known:
        raise ValueError(f'{what} must be {{"type": "function", "function": {{...}}}} with {", ".join(sorted(known))}')
    return function


def system_message(text: str) -> content_pb2.ChatMessage:
    """Instructions to the model."""
    return content_pb2.ChatMessage(role=content_pb2.ROLE_SYSTEM, parts=[content_pb2.ContentPart(text=text)])


def user_message(text: str, *, images: Iterable[Media] = (), videos: Iterable[Media] = ()) -> content_pb2.ChatMessage:
    """A user's turn: pictures, then videos, then the text. Files are read at once (OSError when they cannot be)."""
    return content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=_parts(text, images, videos))


def assistant_message(
    text: str, *, reasoning: str = "", tool_calls: Iterable[ToolCall] = ()
) -> content_pb2.ChatMessage:
    """An earlier turn of the model's."""
    calls = [content_pb2.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments) for call in tool_calls]
    return content_pb2.ChatMessage(
        role=content_pb2.ROLE_ASSISTANT, parts=_parts(text, (), ()), reasoning_text=reasoning, tool_calls=calls
    )


def reply_message(reply: Reply | Choice) -> content_pb2.ChatMessage:
    """A reply as a turn of the conversation that goes on."""
    return assistant_message(reply.text, reasoning=reply.reasoning, tool_calls=reply.tool_calls)


def tool_message(call: ToolCall, text: str = "", *, images: Iterable[Media] = ()) -> content_pb2.ChatMessage:
    """The result of a call, which may be pictures."""
    parts = _parts(text, images, ())
    return content_pb2.ChatMessage(role=content_pb2.ROLE_TOOL, tool_call_id=call.id, parts=parts)


def _parts(text: str, images: Iterable[Media], videos: Iterable[Media]) -> list[content_pb2.ContentPart]:
    parts = [content_pb2.ContentPart(image=content_pb2.ImagePart(source=media_source(image))) for image in images]
    parts += [content_pb2.ContentPart(video=content_pb2.VideoPart(source=media_source(video))) for video in videos]
    if text:
        parts.append(content_pb2.ContentPart(text=text))
    return parts
