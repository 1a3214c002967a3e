"""Bounds every facade checks before a request goes to the router. Each error names the field as the client wrote it."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from actors.errors import InvalidRequest
from actors.types import (
    MediaOptions,
    MediaSource,
    Message,
    MessageRole,
    Structure,
    StructureKind,
    TextPart,
    ThinkingMode,
)
from cluster.generation import GenerateCall
from cluster.tools import answer_structure, parse_json

MAX_TEMPERATURE = 2.0
MAX_INT32 = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_STOP_STRINGS = 32
MAX_STOP_STRING_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_TIMEOUT_S = 86_400.0
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 10.0
MAX_LOGIT_BIAS = 100.0
MAX_LOGIT_BIASES = 1024
MAX_ALLOWED_TOKEN_IDS = 2**18
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 128
MAX_CACHE_SALT_LENGTH = 256
MAX_STRUCTURE_BYTES = 64 * 1024
MAX_STRUCTURE_CHOICES = 1024
MAX_MESSAGES = 10_000

COMPLETION_PREFIX = "chatcmpl-"
TEXT_COMPLETION_PREFIX = "cmpl-"
RESPONSE_PREFIX = "resp_"
NAME_PREFIXES = (COMPLETION_PREFIX, TEXT_COMPLETION_PREFIX, RESPONSE_PREFIX)
"""What the HTTP facade puts before a request's name; every place that takes a name also takes it with a prefix."""

_BESIDE_CALLS = (StructureKind.JSON_SCHEMA, StructureKind.JSON_OBJECT)
_ALIAS = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def check_call(call: GenerateCall, spelling: Mapping[str, str]) -> None:
    """Raises InvalidRequest for the first value out of bounds.

    ``spelling`` gives the client's name of each attribute of ``GenerateCall`` that is spelt otherwise on the wire.
    """

    def spelt(attribute: str) -> str:
        return spelling.get(attribute, attribute)

    def bounded(attribute: str, value: float | None, low: float, high: float, *, above: bool = False) -> None:
        if value is None or (low < value <= high if above else low <= value <= high):
            return
        if above:
            wanted = f"above {low:g} and at most {high:g}"
        else:
            wanted = f"between {low} and {high}"
        raise _wrong(spelt(attribute), f"must be {wanted}, not {value}")

    _check_prompt(call, spelt)
    if call.request_id is not None:
        _check_alias(call.request_id, spelt("request_id"))
    bounded("temperature", call.temperature, 0, MAX_TEMPERATURE)
    bounded("top_p", call.top_p, 0, 1, above=True)
    bounded("top_k", call.top_k, 0, MAX_INT32)
    bounded("min_p", call.min_p, 0, 1)
    bounded("repetition_penalty", call.repetition_penalty, 0, MAX_REPETITION_PENALTY, above=True)
    bounded("presence_penalty", call.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    bounded("frequency_penalty", call.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    bounded("seed", call.seed, 0, MAX_SEED)
    bounded("n", call.n, 1, MAX_CHOICES)
    bounded("max_tokens", call.max_tokens, 1, MAX_INT32)
    bounded("min_tokens", call.min_tokens, 0, MAX_INT32)
    if call.max_tokens is not None and call.min_tokens > call.max_tokens:
        rule = f"must not be above {spelt('max_tokens')}: {call.min_tokens} > {call.max_tokens}"
        raise _wrong(spelt("min_tokens"), rule)
    bounded("reasoning_max_tokens", call.reasoning_max_tokens, 0, MAX_INT32)
    bounded("logprobs", call.logprobs, 0, MAX_LOGPROBS)
    bounded("prompt_logprobs", call.prompt_logprobs, 0, MAX_LOGPROBS)
    bounded("priority", call.priority, -MAX_INT32, MAX_INT32)
    bounded("timeout_s", call.timeout_s, 0, MAX_TIMEOUT_S, above=True)
    if call.cache_salt is not None and not 1 <= len(call.cache_salt) <= MAX_CACHE_SALT_LENGTH:
        rule = f"must have 1 to {MAX_CACHE_SALT_LENGTH} characters, not {len(call.cache_salt)}"
        raise _wrong(spelt("cache_salt"), rule)
    _check_texts(call.stop, spelt("stop"), MAX_STOP_STRINGS, MAX_STOP_STRING_LENGTH)
    _check_texts(call.bad_words, spelt("bad_words"), MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH)
    _check_ids(call.stop_token_ids, spelt("stop_token_ids"), MAX_STOP_TOKEN_IDS)
    _check_logit_bias(call.logit_bias, spelt("logit_bias"))
    if call.allowed_token_ids is not None:
        if not call.allowed_token_ids:
            raise _wrong(spelt("allowed_token_ids"), "must not be empty")
        _check_ids(call.allowed_token_ids, spelt("allowed_token_ids"), MAX_ALLOWED_TOKEN_IDS)
    if call.structure is not None:
        _check_structure(call.structure, spelt("structure"))
        if call.offered_tools and not call.forces_call and call.structure.kind not in _BESIDE_CALLS:
            rule = "does not go together with tools unless it is a JSON schema or object, or tool_choice is none"
            raise _wrong(spelt("structure"), rule)
    wanted = answer_structure(call)
    if wanted is not None and wanted is not call.structure and len(wanted.text) > MAX_STRUCTURE_BYTES:
        rule = f"are {len(wanted.text)} bytes as a structure of calls, the limit is {MAX_STRUCTURE_BYTES}"
        raise _wrong("tools", rule)


def _check_alias(alias: str, field: str) -> None:
    if _ALIAS.fullmatch(alias) is None:
        raise _wrong(field, 'must be 1 to 128 letters, digits or "._:-"')
    for prefix in NAME_PREFIXES:
        if alias.startswith(prefix):
            raise _wrong(field, f'must not begin with "{prefix}"')


def bare_name(name: str) -> str:
    """A request's name without the prefix HTTP clients see before it."""
    for prefix in NAME_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _check_prompt(call: GenerateCall, spelt: Callable[[str], str]) -> None:
    """A raw prompt stands alone: what shapes a conversation's prompt, or is read out of its reply, means nothing."""
    if call.prompt is None:
        return
    if not call.prompt:
        raise _wrong(spelt("prompt"), "must not be empty")
    for attribute, given in (
        ("messages", bool(call.messages)),
        ("tools", bool(call.tools)),
        ("thinking", call.thinking is not ThinkingMode.AUTO),
        ("reasoning_max_tokens", call.reasoning_max_tokens is not None),
    ):
        if given:
            raise _wrong(spelt(attribute), f"does not go together with {spelt('prompt')}, which is used as it stands")


def _check_texts(texts: tuple[str, ...], field: str, limit: int, length_limit: int) -> None:
    if len(texts) > limit:
        raise _wrong(field, f"has {len(texts)} strings, the limit is {limit}")
    for index, text in enumerate(texts):
        if not 1 <= len(text) <= length_limit:
            raise _wrong(f"{field}[{index}]", f"must have 1 to {length_limit} characters, not {len(text)}")


def _check_ids(ids: tuple[int, ...], field: str, limit: int) -> None:
    """Which ids the model has, and which of them it can generate, is the engine's to say."""
    if len(ids) > limit:
        raise _wrong(field, f"has {len(ids)} ids, the limit is {limit}")
    for index, token_id in enumerate(ids):
        if not 0 <= token_id <= MAX_INT32:
            raise _wrong(f"{field}[{index}]", f"must be between 0 and {MAX_INT32}, not {token_id}")


def _check_logit_bias(biases: tuple[tuple[int, float], ...], field: str) -> None:
    if len(biases) > MAX_LOGIT_BIASES:
        raise _wrong(field, f"has {len(biases)} entries, the limit is {MAX_LOGIT_BIASES}")
    for token_id, bias in biases:
        if not 0 <= token_id <= MAX_INT32:
            raise _wrong(field, f"has the token id {token_id}, ids are between 0 and {MAX_INT32}")
        if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            raise _wrong(
                f"{field}[{token_id}]", f"must be between {-MAX_LOGIT_BIAS:g} and {MAX_LOGIT_BIAS:g}, not {bias}"
            )


def _check_structure(structure: Structure, field: str) -> None:
    """Size and form only: whether a schema, expression or grammar makes sense is for the engine that compiles it."""
    size = len(structure.text.encode())
    if size > MAX_STRUCTURE_BYTES:
        raise _wrong(field, f"has {size} bytes, the limit is {MAX_STRUCTURE_BYTES}")
    match structure.kind:
        case StructureKind.JSON_OBJECT:
            return
        case StructureKind.JSON_SCHEMA:
            if not isinstance(parse_json(structure.text, field), dict):
                raise _wrong(field, "must be a JSON schema, which is an object")
        case StructureKind.CHOICE:
            choices = parse_json(structure.text, field)
            if not (isinstance(choices, list) and 1 <= len(choices) <= MAX_STRUCTURE_CHOICES):
                raise _wrong(field, f"must have 1 to {MAX_STRUCTURE_CHOICES} texts")
            if not all(isinstance(choice, str) and choice for choice in choices):
                raise _wrong(field, "must have texts that are not empty")
        case _:
            if not structure.text:
                raise _wrong(field, "must not be empty")


def check_messages(messages: tuple[Message, ...], parts: str) -> None:
    """Raises InvalidRequest for an empty conversation, an empty user turn, or fields that belong to another role.

    ``parts`` is the client's name of ``Message.parts``. Parsers check what only they see, such as unknown roles.
    """
    if not messages:
        raise _wrong("messages", "must not be empty")
    if len(messages) > MAX_MESSAGES:
        raise _wrong("messages", f"has {len(messages)} messages, the limit is {MAX_MESSAGES}")
    for index, message in enumerate(messages):
        if message.role is MessageRole.USER and all(_is_empty(part) for part in message.parts):
            raise _wrong(f"messages[{index}].{parts}", "must not be empty")


def _is_empty(part: object) -> bool:
    return isinstance(part, TextPart) and not part.text


def check_pixels(
    low: int | None, high: int | None, field: str, *, names: Sequence[str] = ("min_pixels", "max_pixels")
) -> None:
    """Raises InvalidRequest unless both bounds are positive and ordered. ``field`` is the part that has them."""
    least, most = names
    for name, value in zip(names, (low, high), strict=True):
        if value is not None and not 1 <= value <= MAX_INT32:
            raise _wrong(f"{field}.{name}", f"must be between 1 and {MAX_INT32}, not {value}")
    if low is not None and high is not None and low > high:
        raise _wrong(f"{field}.{least}", f"must not be above {most}: {low} > {high}")


def check_sampling(
    rate: float | None,
    least: int | None,
    most: int | None,
    field: str,
    *,
    names: Sequence[str] = ("fps", "min_frames", "max_frames"),
) -> None:
    """Raises InvalidRequest unless a rate is finite and positive and both bounds are positive and ordered."""
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise _wrong(f"{field}.{names[0]}", f"must be a finite number above 0, not {rate}")
    for name, value in zip(names[1:], (least, most), strict=True):
        if value is not None and not 1 <= value <= MAX_INT32:
            raise _wrong(f"{field}.{name}", f"must be between 1 and {MAX_INT32}, not {value}")
    if least is not None and most is not None and least > most:
        raise _wrong(f"{field}.{names[1]}", f"must not be above {names[2]}: {least} > {most}")


def check_span(start: float | None, end: float | None, field: str, *, names: tuple[str, str]) -> None:
    """Raises InvalidRequest unless a span, in seconds, is of finite numbers, not negative and not empty."""
    for name, value in zip(names, (start, end), strict=True):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise _wrong(f"{field}.{name}", f"must not be negative, it is {value:g} s")
    if end is not None and end <= (start or 0):
        raise _wrong(f"{field}.{names[1]}", f"must come after the start at {start or 0:g} s, it is {end:g} s")


def check_media_options(options: MediaOptions, field: str, names: Mapping[str, str] = MappingProxyType({})) -> None:
    """The same for what a request says of all its media. ``names`` are those that its client spells otherwise."""

    def spelt(*options: str) -> list[str]:
        return [names.get(option, option) for option in options]

    image_names, video_names = (
        spelt("image_min_pixels", "image_max_pixels"),
        spelt("video_min_pixels", "video_max_pixels"),
    )
    check_pixels(options.image_min_pixels, options.image_max_pixels, field, names=image_names)
    check_pixels(options.video_min_pixels, options.video_max_pixels, field, names=video_names)
    frames = options.video_fps, options.video_min_frames, options.video_max_frames
    check_sampling(*frames, field, names=spelt("video_fps", "video_min_frames", "video_max_frames"))


def media_from_uri(uri: str, field: str) -> MediaSource:
    """Decodes a base64 data URI; passes http and https on. Any other scheme is refused: files are never read."""
    scheme, colon, rest = uri.partition(":")
    match scheme.lower() if colon else "":
        case "http" | "https":
            return MediaSource(uri=uri)
        case "data":
            return MediaSource(content=_decode_data_uri(rest, field))
        case _:
            message = f"{field} must be an http, https or data URI"
            raise InvalidRequest(message, field=field, reason="MEDIA_NOT_ALLOWED")


def _decode_data_uri(rest: str, field: str) -> bytes:
    header, comma, payload = rest.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise _wrong(field, 'must look like "data:<type>;base64,<bytes>"')
    return _decode(payload, field)


def media_from_base64(text: str, field: str) -> MediaSource:
    """Decodes base64 that stands alone."""
    return MediaSource(content=_decode(text, field))


def _decode(payload: str, field: str) -> bytes:
    try:
        content = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise _wrong(field, "is not valid base64") from None
    if not content:
        raise _wrong(field, "holds no bytes")
    return content


def not_supported(field: str) -> InvalidRequest:
    """The refusal of a field that exists elsewhere but not here."""
    return InvalidRequest(f"{field} is not supported", field=field, reason="UNSUPPORTED_FIELD")


def told(message: str, field: str | None) -> str:
    """The text of an error for a client: names the field it is about, as that client spells it."""
    return message if not field or field in message else f"{field}: {message}"


def _wrong(field: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {rule}", field=field)
