"""Bounds every facade checks before a request goes to the router. Each error names the field as the client wrote it."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping

from actors.errors import InvalidRequest
from actors.types import MediaSource, Message, MessageRole, TextPart
from cluster.generation import GenerateCall

MAX_TEMPERATURE = 2.0
MAX_INT32 = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_STOP_STRINGS = 32
MAX_STOP_STRING_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_TIMEOUT_S = 86_400.0
MAX_MESSAGES = 10_000

COMPLETION_PREFIX = "chatcmpl-"
"""What the HTTP facade puts before a request's name; every place that takes a name also takes it with the prefix."""

_ALIAS = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def check_call(call: GenerateCall, spelling: Mapping[str, str]) -> None:
    """Raises InvalidRequest for the first value out of bounds.

    ``spelling`` gives the client's name of each attribute of ``GenerateCall`` that is spelt otherwise on the wire.
    """

    def bounded(attribute: str, value: float | None, low: float, high: float, *, above: bool = False) -> None:
        if value is None or (low < value <= high if above else low <= value <= high):
            return
        if above:
            wanted = f"above {low:g} and at most {high:g}"
        else:
            wanted = f"between {low} and {high}"
        raise _wrong(spelling.get(attribute, attribute), f"must be {wanted}, not {value}")

    if call.request_id is not None:
        _check_alias(call.request_id, spelling.get("request_id", "request_id"))
    bounded("temperature", call.temperature, 0, MAX_TEMPERATURE)
    bounded("top_p", call.top_p, 0, 1, above=True)
    bounded("top_k", call.top_k, 0, MAX_INT32)
    bounded("seed", call.seed, 0, MAX_SEED)
    bounded("max_tokens", call.max_tokens, 1, MAX_INT32)
    bounded("timeout_s", call.timeout_s, 0, MAX_TIMEOUT_S, above=True)
    _check_stops(call, spelling)


def _check_alias(alias: str, field: str) -> None:
    if _ALIAS.fullmatch(alias) is None:
        raise _wrong(field, 'must be 1 to 128 letters, digits or "._:-"')
    if alias.startswith(COMPLETION_PREFIX):
        raise _wrong(field, f'must not begin with "{COMPLETION_PREFIX}"')


def _check_stops(call: GenerateCall, spelling: Mapping[str, str]) -> None:
    field = spelling.get("stop", "stop")
    if len(call.stop) > MAX_STOP_STRINGS:
        raise _wrong(field, f"has {len(call.stop)} strings, the limit is {MAX_STOP_STRINGS}")
    for index, text in enumerate(call.stop):
        if not 1 <= len(text) <= MAX_STOP_STRING_LENGTH:
            raise _wrong(f"{field}[{index}]", f"must have 1 to {MAX_STOP_STRING_LENGTH} characters, not {len(text)}")
    field = spelling.get("stop_token_ids", "stop_token_ids")
    if len(call.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise _wrong(field, f"has {len(call.stop_token_ids)} ids, the limit is {MAX_STOP_TOKEN_IDS}")
    for index, token_id in enumerate(call.stop_token_ids):
        if not 0 <= token_id <= MAX_INT32:
            raise _wrong(f"{field}[{index}]", f"must be between 0 and {MAX_INT32}, not {token_id}")


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


def check_pixels(low: int | None, high: int | None, field: str) -> None:
    """Raises InvalidRequest unless both bounds are positive and ordered. ``field`` is the part that has them."""
    for name, value in (("min_pixels", low), ("max_pixels", high)):
        if value is not None and not 1 <= value <= MAX_INT32:
            raise _wrong(f"{field}.{name}", f"must be between 1 and {MAX_INT32}, not {value}")
    if low is not None and high is not None and low > high:
        raise _wrong(f"{field}.min_pixels", f"must not be above max_pixels: {low} > {high}")


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
    try:
        content = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise _wrong(field, "is not valid base64") from None
    if not content:
        raise _wrong(field, "holds no bytes")
    return content


def check_finite(value: float, field: str) -> float:
    """Returns ``value``; raises InvalidRequest for NaN and the infinities."""
    if not math.isfinite(value):
        raise _wrong(field, f"must be a finite number, not {value}")
    return value


def not_supported(field: str) -> InvalidRequest:
    """The refusal of a field that exists elsewhere but not here."""
    return InvalidRequest(f"{field} is not supported", field=field, reason="UNSUPPORTED_FIELD")


def told(message: str, field: str | None) -> str:
    """The text of an error for a client: names the field it is about, as that client spells it."""
    return message if not field or field in message else f"{field}: {message}"


def _wrong(field: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {rule}", field=field)
