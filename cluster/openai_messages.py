"""Messages of a chat request in OpenAI's shape: what a body may say in them, and their translation.

Parts are OpenAI's (``text``, ``image_url``), vLLM's (``video_url``, ``input_image``) and those of Hugging Face chat
templates (``image``, ``video``). Beside a picture or a video stand the options of the model's processors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, FiniteFloat, Tag

from actors.errors import InvalidRequest
from actors.types import ContentPart, ImagePart, MediaSource, Message, MessageRole, TextPart, ToolCall, VideoPart
from cluster.openai_media import one_target
from cluster.openai_structure import JsonText, Strict
from cluster.request_checks import (
    check_messages,
    check_pixels,
    check_sampling,
    check_span,
    media_from_base64,
    media_from_uri,
)

Detail = Literal["auto", "low", "high"]


class TextBody(Strict):
    type: Literal["text", "input_text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Detail | None = None


class VideoUrl(Strict):
    url: str


class MediaBody(Strict):
    """``uuid`` names the medium for the caches of vLLM and FastDeploy. Ours go by content: it changes nothing."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    uuid: str | None = None


class ImageUrlBody(MediaBody):
    """OpenAI's picture part."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputImageBody(MediaBody):
    """The picture part of OpenAI's Responses API, which vLLM takes in chats too."""

    type: Literal["input_image"]
    image_url: str
    detail: Detail | None = None


class ImageBody(MediaBody):
    """The picture part of Hugging Face chat templates: one of ``url``, ``image`` (the same) and ``base64``."""

    type: Literal["image"]
    url: str | None = None
    image: str | None = None
    base64: str | None = None


class VideoOptions(MediaBody):
    """FastDeploy's names; the span is in seconds and has the names of Qwen's utilities."""

    fps: FiniteFloat | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    target_frames: int | None = None
    frames_sample: Literal["leading"] | None = None
    video_start: FiniteFloat | None = None
    video_end: FiniteFloat | None = None


class VideoUrlBody(VideoOptions):
    """vLLM's video part."""

    type: Literal["video_url"]
    video_url: VideoUrl


class VideoBody(VideoOptions):
    """The video part of Hugging Face chat templates: one of ``url``, ``video`` (the same) and ``base64``."""

    type: Literal["video"]
    url: str | None = None
    video: str | None = None
    base64: str | None = None


def _part_tag(value: Any) -> str | None:
    # The parentheses tell tags from field names in error locations.
    return f"({value['type']})" if isinstance(value, dict) and isinstance(value.get("type"), str) else None


PartBody = Annotated[
    Annotated[TextBody, Tag("(text)")]
    | Annotated[TextBody, Tag("(input_text)")]
    | Annotated[ImageUrlBody, Tag("(image_url)")]
    | Annotated[InputImageBody, Tag("(input_image)")]
    | Annotated[VideoUrlBody, Tag("(video_url)")]
    | Annotated[ImageBody, Tag("(image)")]
    | Annotated[VideoBody, Tag("(video)")],
    Discriminator(
        _part_tag,
        custom_error_type="part_type",
        custom_error_message=(
            "must be an object whose type is text, image_url, video_url, image, video, input_text or input_image"
        ),
    ),
]


def _listed_content(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class FunctionBody(Strict):
    """``arguments`` may also be an object, as in FastDeploy's examples."""

    name: str
    arguments: JsonText


class ToolCallBody(Strict):
    """A call as a reply told it. ``index`` is what is left over when it was put together from a stream."""

    index: int | None = None
    id: str
    type: Literal["function"] = "function"
    function: FunctionBody


class MessageBody(Strict):
    """One turn. ``reasoning`` (vLLM) and ``reasoning_content`` (FastDeploy, DeepSeek) are the same thing.

    The last five are what clients write as null when they dump an earlier reply; they must be null.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[list[PartBody], BeforeValidator(_listed_content, json_schema_input_type=str | list[PartBody])] | None
    ) = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    multimodal_content: None = None


_ROLES: Mapping[str, MessageRole] = {
    "system": MessageRole.SYSTEM,
    "developer": MessageRole.SYSTEM,
    "user": MessageRole.USER,
    "assistant": MessageRole.ASSISTANT,
    "tool": MessageRole.TOOL,
}


def to_messages(bodies: Sequence[MessageBody]) -> tuple[Message, ...]:
    """Translates a conversation. Raises InvalidRequest naming the first wrong field."""
    messages = tuple(to_message(body, f"messages[{index}]") for index, body in enumerate(bodies))
    check_messages(messages, "content")
    return messages


def to_message(body: MessageBody, field: str) -> Message:
    """Translates a turn; ``field`` is its path. Raises InvalidRequest for what does not go together."""
    role = _ROLES[body.role]
    if body.reasoning is not None and body.reasoning_content not in (None, body.reasoning):
        raise InvalidRequest(
            f"{field}.reasoning and {field}.reasoning_content differ: give one", field=f"{field}.reasoning_content"
        )
    reasoning = body.reasoning if body.reasoning is not None else body.reasoning_content
    if role is not MessageRole.ASSISTANT:
        for name in ("reasoning", "reasoning_content", "tool_calls"):
            if getattr(body, name):
                raise _misplaced(f"{field}.{name}", "assistant")
        if body.content is None:
            raise InvalidRequest(f"{field}.content is required", field=f"{field}.content")
    if role is not MessageRole.TOOL and body.tool_call_id is not None:
        raise _misplaced(f"{field}.tool_call_id", "tool")
    return Message(
        role=role,
        parts=tuple(_part(part, f"{field}.content[{index}]") for index, part in enumerate(body.content or ())),
        reasoning=reasoning or None,
        tool_calls=tuple(
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in body.tool_calls or ()
        ),
        tool_call_id=body.tool_call_id,
        name=body.name,
    )


def part_names(messages: Sequence[MessageBody]) -> dict[str, str]:
    """Where pictures and videos of ``image`` and ``video`` parts stand. Later stages know all as ``image_url`` and
    ``video_url``, by which the names go."""
    names: dict[str, str] = {}
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content or ()):
            if isinstance(part, ImageBody | VideoBody):
                given = next(name for name in ("url", part.type, "base64") if getattr(part, name) is not None)
                names[f"messages[{i}].content[{j}].{part.type}_url"] = f"messages[{i}].content[{j}].{given}"
    return names


def _misplaced(field: str, role: str) -> InvalidRequest:
    return InvalidRequest(f"{field} belongs to messages of role {role}", field=field)


def _part(body: PartBody, field: str) -> ContentPart:
    match body:
        case TextBody():
            return TextPart(text=body.text)
        case ImageUrlBody():
            picture = body.image_url
            return _image(media_from_uri(picture.url, f"{field}.image_url.url"), body, field, picture.detail)
        case InputImageBody():
            return _image(media_from_uri(body.image_url, f"{field}.image_url"), body, field, body.detail)
        case ImageBody():
            return _image(_source(body, field, ("url", "image")), body, field)
        case VideoUrlBody():
            return _video(media_from_uri(body.video_url.url, f"{field}.video_url.url"), body, field)
        case VideoBody():
            return _video(_source(body, field, ("url", "video")), body, field)


def _source(body: ImageBody | VideoBody, field: str, uris: tuple[str, str]) -> MediaSource:
    given = [name for name in (*uris, "base64") if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidRequest(f"{field} must have one of {', '.join(uris)} and base64", field=f"{field}.{uris[0]}")
    value: str = getattr(body, given[0])
    if given[0] == "base64":
        return media_from_base64(value, f"{field}.base64")
    return media_from_uri(value, f"{field}.{given[0]}")


def _image(source: MediaSource, body: MediaBody, field: str, detail: Detail | None = None) -> ImagePart:
    check_pixels(body.min_pixels, body.max_pixels, field)
    return ImagePart(source=source, min_pixels=body.min_pixels, max_pixels=body.max_pixels, low_detail=detail == "low")


def _video(source: MediaSource, body: VideoOptions, field: str) -> VideoPart:
    check_sampling(body.fps, body.min_frames, body.max_frames, field)
    check_pixels(body.min_pixels, body.max_pixels, field)
    check_span(body.video_start, body.video_end, field, names=("video_start", "video_end"))
    least, most = one_target(body.target_frames, body.fps, body.min_frames, body.max_frames, field)
    return VideoPart(
        source=source,
        frames_per_second=body.fps,
        min_frames=least,
        max_frames=most,
        min_pixels=body.min_pixels,
        max_pixels=body.max_pixels,
        start_s=body.video_start,
        end_s=body.video_end,
    )
