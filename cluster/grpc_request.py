"""From public protobuf messages to the router's types, checked on the way. Fields are named as in the protos."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import duration_pb2

from actors.errors import InvalidRequest
from actors.types import (
    ContentPart,
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
from cluster.generation import GenerateCall, Tool, ToolChoice, ToolMode
from cluster.request_checks import (
    check_call,
    check_media_options,
    check_messages,
    check_pixels,
    check_sampling,
    check_span,
    media_from_uri,
)
from cluster.tools import check_tool_choice, check_tools, parse_parameters
from ernie_serving.v1 import content_pb2, inference_pb2

SPELLING = {
    "n": "choice_count",
    "logprobs": "top_logprob_count",
    "prompt_logprobs": "prompt_top_logprob_count",
    "structure": "structured_output",
    "thinking": "thinking_mode",
    "timeout_s": "timeout",
    "temperature": "sampling_params.temperature",
    "top_p": "sampling_params.top_p",
    "top_k": "sampling_params.top_k",
    "min_p": "sampling_params.min_p",
    "repetition_penalty": "sampling_params.repetition_penalty",
    "presence_penalty": "sampling_params.presence_penalty",
    "frequency_penalty": "sampling_params.frequency_penalty",
    "logit_bias": "sampling_params.logit_bias",
    "allowed_token_ids": "sampling_params.allowed_token_ids",
    "bad_words": "sampling_params.bad_words",
    "bad_words_ids": "sampling_params.bad_words",
    "min_tokens": "sampling_params.min_output_token_count",
    "max_tokens": "sampling_params.max_output_token_count",
    "reasoning_max_tokens": "sampling_params.max_reasoning_token_count",
    "stop": "sampling_params.stop_sequences",
    "stop_token_ids": "sampling_params.stop_token_ids",
    "ignore_eos": "sampling_params.ignore_eos",
    "seed": "sampling_params.seed",
}
"""Names of GenerateCall and of later stages as the protos spell them."""

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
_TOOL_MODES: Mapping[int, ToolMode] = {
    inference_pb2.TOOL_CHOICE_MODE_UNSPECIFIED: ToolMode.AUTO,
    inference_pb2.TOOL_CHOICE_MODE_AUTO: ToolMode.AUTO,
    inference_pb2.TOOL_CHOICE_MODE_NONE: ToolMode.NONE,
    inference_pb2.TOOL_CHOICE_MODE_REQUIRED: ToolMode.REQUIRED,
}
_TOOL_FIELDS = {"name": "name", "parameters": "parameters_json"}


def generate_call(request: inference_pb2.GenerateRequest) -> GenerateCall:
    """Translates and checks a request. Raises InvalidRequest naming the first wrong field."""
    params = request.sampling_params
    offered = tools(request.tools)
    call = GenerateCall(
        **_prompt(request),
        model=request.model or None,
        request_id=request.request_id or None,
        temperature=params.temperature if params.HasField("temperature") else None,
        top_p=params.top_p if params.HasField("top_p") else None,
        top_k=params.top_k if params.HasField("top_k") else None,
        min_p=params.min_p if params.HasField("min_p") else None,
        repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else None,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=tuple(sorted(params.logit_bias.items())),
        allowed_token_ids=tuple(params.allowed_token_ids) or None,
        bad_words=tuple(params.bad_words),
        seed=params.seed if params.HasField("seed") else None,
        n=request.choice_count or 1,
        min_tokens=params.min_output_token_count,
        max_tokens=params.max_output_token_count if params.HasField("max_output_token_count") else None,
        reasoning_max_tokens=(
            params.max_reasoning_token_count if params.HasField("max_reasoning_token_count") else None
        ),
        stop=tuple(params.stop_sequences),
        stop_token_ids=tuple(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        logprobs=request.top_logprob_count if request.HasField("top_logprob_count") else None,
        prompt_logprobs=request.prompt_top_logprob_count if request.HasField("prompt_top_logprob_count") else None,
        structure=_structure(request.structured_output) if request.HasField("structured_output") else None,
        tools=offered,
        tool_choice=_tool_choice(request.tool_choice, offered) if request.HasField("tool_choice") else ToolChoice(),
        parallel_tool_calls=request.parallel_tool_calls if request.HasField("parallel_tool_calls") else True,
        thinking=thinking_mode(request.thinking_mode),
        priority=request.priority,
        cache_salt=request.cache_salt or None,
        timeout_s=seconds(request.timeout) if request.HasField("timeout") else None,
        return_token_ids=request.return_token_ids,
        return_timings=request.return_timings,
        media_options=media_options(request.media_options),
    )
    check_call(call, SPELLING)
    return call


def count_call(request: inference_pb2.CountTokensRequest) -> GenerateCall:
    """The same for a prompt that is only counted."""
    call = GenerateCall(
        **_prompt(request),
        model=request.model or None,
        thinking=thinking_mode(request.thinking_mode),
        tools=tools(request.tools),
        media_options=media_options(request.media_options),
    )
    check_call(call, SPELLING)
    return call


def _prompt(request: inference_pb2.GenerateRequest | inference_pb2.CountTokensRequest) -> dict[str, Any]:
    """The fields of ``GenerateCall`` that are one of a conversation and a raw prompt."""
    match request.WhichOneof("prompt"):
        case None:
            return {"messages": messages(request.messages)}
        case "prompt_text":
            prompt: str | tuple[int, ...] = request.prompt_text
        case _:
            prompt = tuple(request.prompt_token_ids.ids)
    if request.messages:
        raise _wrong("prompt", "does not go together with messages: give one")
    added = request.add_special_tokens if request.HasField("add_special_tokens") else True
    return {"prompt": prompt, "add_special_tokens": added}


def _structure(proto: inference_pb2.StructuredOutput) -> Structure:
    match proto.WhichOneof("structure"):
        case "json_schema":
            return Structure(kind=StructureKind.JSON_SCHEMA, text=proto.json_schema)
        case "json_object":
            return Structure(kind=StructureKind.JSON_OBJECT)
        case "regex":
            return Structure(kind=StructureKind.REGEX, text=proto.regex)
        case "grammar":
            return Structure(kind=StructureKind.GRAMMAR, text=proto.grammar)
        case "choices":
            return Structure(kind=StructureKind.CHOICE, text=json.dumps(list(proto.choices.texts), ensure_ascii=False))
        case _:
            raise _wrong("structured_output", "must have json_schema, json_object, regex, grammar or choices")


def messages(protos: Iterable[content_pb2.ChatMessage]) -> tuple[Message, ...]:
    """Translates and checks a conversation."""
    turns = tuple(_message(proto, f"messages[{index}]") for index, proto in enumerate(protos))
    check_messages(turns, "parts")
    return turns


def tools(protos: Iterable[content_pb2.Tool]) -> tuple[Tool, ...]:
    """Translates and checks functions on offer."""
    offered = tuple(
        Tool(
            name=proto.name,
            description=proto.description or None,
            parameters=(
                parse_parameters(proto.parameters_json, f"tools[{index}].parameters_json")
                if proto.parameters_json
                else None
            ),
        )
        for index, proto in enumerate(protos)
    )
    check_tools(offered, lambda index, part: f"tools[{index}].{_TOOL_FIELDS[part]}")
    return offered


def _tool_choice(proto: inference_pb2.ToolChoice, offered: tuple[Tool, ...]) -> ToolChoice:
    match proto.WhichOneof("choice"):
        case "function_name":
            choice = ToolChoice(mode=ToolMode.REQUIRED, function=proto.function_name)
        case "mode" if proto.mode in _TOOL_MODES:
            choice = ToolChoice(mode=_TOOL_MODES[proto.mode])
        case "mode":
            raise _wrong("tool_choice.mode", f"has the unknown value {proto.mode}")
        case _:
            raise _wrong("tool_choice", "must have a mode or a function_name")
    check_tool_choice(offered, choice, "tool_choice.function_name")
    return choice


def thinking_mode(value: int) -> ThinkingMode:
    """Translates a mode; numbers this version does not know are refused."""
    if value not in _THINKING:
        raise _wrong("thinking_mode", f"has the unknown value {value}")
    return _THINKING[value]


def media_options(proto: content_pb2.MediaOptions) -> MediaOptions:
    """Translates and checks how media are to be prepared."""
    given = {field.name: value for field, value in proto.ListFields()}
    options = MediaOptions(
        image_min_pixels=given.get("image_min_pixels"),
        image_max_pixels=given.get("image_max_pixels"),
        video_min_pixels=given.get("video_min_pixels"),
        video_max_pixels=given.get("video_max_pixels"),
        video_fps=given.get("video_frames_per_second"),
        video_min_frames=given.get("video_min_frame_count"),
        video_max_frames=given.get("video_max_frame_count"),
    )
    check_media_options(options, "media_options", _MEDIA_OPTIONS)
    return options


_MEDIA_OPTIONS = {
    "video_fps": "video_frames_per_second",
    "video_min_frames": "video_min_frame_count",
    "video_max_frames": "video_max_frame_count",
}


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
    return ImagePart(
        source=_source(proto.source, f"{field}.source", "image"),
        min_pixels=low,
        max_pixels=high,
        low_detail=proto.low_detail,
    )


def _video(proto: content_pb2.VideoPart, field: str) -> VideoPart:
    rate = proto.frames_per_second if proto.HasField("frames_per_second") else None
    least = proto.min_frame_count if proto.HasField("min_frame_count") else None
    most = proto.max_frame_count if proto.HasField("max_frame_count") else None
    low = proto.min_pixels if proto.HasField("min_pixels") else None
    high = proto.max_pixels if proto.HasField("max_pixels") else None
    check_sampling(rate, least, most, field, names=("frames_per_second", "min_frame_count", "max_frame_count"))
    check_pixels(low, high, field)
    start = seconds(proto.start_offset) if proto.HasField("start_offset") else None
    end = seconds(proto.end_offset) if proto.HasField("end_offset") else None
    check_span(start, end, field, names=("start_offset", "end_offset"))
    return VideoPart(
        source=_source(proto.source, f"{field}.source", "video"),
        frames_per_second=rate,
        min_frames=least,
        max_frames=most,
        min_pixels=low,
        max_pixels=high,
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


_INNER_SPELLING = {
    "content": "parts",
    "image_url": "image",
    "video_url": "video",
    "reasoning": "reasoning_text",
    "min_frames": "min_frame_count",
    "max_frames": "max_frame_count",
    "start_s": "start_offset",
    "end_s": "end_offset",
}
_NAME = re.compile(r"^\w+|(?<=\.)\w+")


def client_field(field: str) -> str:
    """Turns a field as a later stage names it, in the terms of ``GenerateCall`` or OpenAI's, into the protos' terms."""
    if field.startswith("messages"):
        return _NAME.sub(lambda name: _INNER_SPELLING.get(name[0], name[0]), field)
    if field.startswith("prompt["):
        return "prompt_token_ids.ids" + field.removeprefix("prompt")
    if field.startswith("media_options."):
        return _NAME.sub(lambda name: _MEDIA_OPTIONS.get(name[0], name[0]), field)
    return _NAME.sub(lambda name: SPELLING.get(name[0], name[0]) if name.start() == 0 else name[0], field)
