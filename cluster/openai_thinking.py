"""Whether the model thinks, in the spellings clients have for it: at the top level, inside ``chat_template_kwargs``
(vLLM, FastDeploy), inside ``metadata`` (FastDeploy, the model cards), and OpenAI's ``reasoning_effort``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from actors.errors import InvalidRequest
from actors.types import ThinkingMode
from cluster.openai_structure import Strict

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_LENGTH = 64
MAX_METADATA_VALUE_LENGTH = 512
_KEY = "enable_thinking"
_WORDS = {"true": True, "false": False}


class ChatTemplateKwargs(Strict):
    """Variables of the chat template a request may set."""

    enable_thinking: bool | None = None


class HasThinking(Protocol):
    """The fields of a chat request that may say whether the model thinks."""

    @property
    def enable_thinking(self) -> bool | None: ...
    @property
    def chat_template_kwargs(self) -> ChatTemplateKwargs | None: ...
    @property
    def metadata(self) -> Mapping[str, Any] | None: ...
    @property
    def reasoning_effort(self) -> Effort | None: ...


def find_thinking(chat: HasThinking) -> tuple[str | None, ThinkingMode]:
    """Returns the field that says whether the model thinks, and what it says; (None, AUTO) where there is none.

    Raises:
        InvalidRequest: two fields differ, or ``metadata`` is not what OpenAI allows.
    """
    found: list[tuple[str, bool]] = []

    def add(field: str, value: bool | None) -> None:
        if value is not None:
            found.append((field, value))

    add(_KEY, chat.enable_thinking)
    if chat.chat_template_kwargs is not None:
        add(f"chat_template_kwargs.{_KEY}", chat.chat_template_kwargs.enable_thinking)
    add(f"metadata.{_KEY}", _from_metadata(chat.metadata or {}))
    if chat.reasoning_effort is not None:
        # How much the model thinks is its own affair, up to reasoning_max_tokens; "none" is the one effort it knows.
        add("reasoning_effort", chat.reasoning_effort != "none")
    if not found:
        return None, ThinkingMode.AUTO
    (first, wanted), *others = found
    for field, value in others:
        if value is not wanted:
            raise InvalidRequest(
                f"{first} turns thinking {_word(wanted)} and {field} turns it {_word(value)}: give one", field=field
            )
    return first, ThinkingMode.ON if wanted else ThinkingMode.OFF


def _from_metadata(metadata: Mapping[str, Any]) -> bool | None:
    """OpenAI's map of short texts, of which we read one entry: that of FastDeploy, which is a boolean."""
    if len(metadata) > MAX_METADATA_PAIRS:
        raise InvalidRequest(
            f"metadata has {len(metadata)} entries, the limit is {MAX_METADATA_PAIRS}", field="metadata"
        )
    for key, value in metadata.items():
        if not 1 <= len(key) <= MAX_METADATA_KEY_LENGTH:
            raise InvalidRequest(
                f"metadata has a key of {len(key)} characters, allowed are 1 to {MAX_METADATA_KEY_LENGTH}",
                field="metadata",
            )
        if key == _KEY:
            continue
        if not isinstance(value, str):
            raise InvalidRequest(f"metadata.{key} must be a text", field=f"metadata.{key}")
        if len(value) > MAX_METADATA_VALUE_LENGTH:
            raise InvalidRequest(
                f"metadata.{key} has {len(value)} characters, the limit is {MAX_METADATA_VALUE_LENGTH}",
                field=f"metadata.{key}",
            )
    wanted = metadata.get(_KEY)
    if wanted is None or isinstance(wanted, bool):
        return wanted
    if not isinstance(wanted, str) or wanted.lower() not in _WORDS:
        raise InvalidRequest(f"metadata.{_KEY} must be true or false, not {wanted!r}", field=f"metadata.{_KEY}")
    return _WORDS[wanted.lower()]


def _word(on: bool) -> str:
    return "on" if on else "off"
