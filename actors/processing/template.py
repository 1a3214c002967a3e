"""Chat templates: a checkpoint's own jinja, or one of the two built-in ones, rendered in a sandbox.

The environment matches the one transformers renders templates in: immutable sandbox, ``trim_blocks`` and
``lstrip_blocks``, loop controls, ``{% generation %}`` blocks, ``raise_exception``, ``strftime_now``, ``tojson`` that
leaves HTML and non-ASCII characters alone, and the special tokens of ``tokenizer_config.json`` by name.

What a template can express is found out once, by rendering small probes, so that a request it would silently drop a
part of (a tool result, a picture) is refused instead.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from actors.errors import InternalError, InvalidRequest
from actors.model_files import read_json
from actors.types import MediaKind, ThinkingMode

log = logging.getLogger(__name__)

BUILT_IN = ("pt", "thinking")

_SWITCHES = frozenset(("enable_thinking", "thinking_mode"))
_PROBE = "zqprobe"
_DIALECTS = {MediaKind.IMAGE: ("image", "image_url"), MediaKind.VIDEO: ("video", "video_url")}

Chat = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateSupport:
    """What a template renders."""

    media_types: Mapping[MediaKind, str]
    """Content item type that yields exactly one placeholder, per kind that the template knows."""
    system: bool
    tools: bool
    tool_messages: bool
    tool_calls: bool
    thinking_switches: frozenset[str]
    """Variables that turn thinking on or off."""


class ChatTemplate:
    """A compiled template. Safe for use from many threads."""

    def __init__(
        self,
        source: str,
        origin: str,
        *,
        placeholders: Mapping[MediaKind, Sequence[str]],
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """``placeholders``: strings that stand for one media item. Raises ValueError naming ``origin``."""
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ValueError(f"{origin}: {error}") from error
        self.origin = origin
        self._special_tokens = dict(special_tokens or {})
        self.support = self._probe(placeholders, frozenset(names))

    @classmethod
    def from_dir(
        cls, model_dir: Path, *, placeholders: Mapping[MediaKind, Sequence[str]], built_in: str = "pt"
    ) -> ChatTemplate:
        """``chat_template.jinja``, else the chat_template of ``chat_template.json`` or ``tokenizer_config.json``, else
        the built-in named."""
        if built_in not in BUILT_IN:
            raise ValueError(f"built-in template must be one of {', '.join(BUILT_IN)}, got {built_in!r}")
        config_path = model_dir / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        source, origin = _own_template(model_dir) or (None, f"built-in {built_in}")
        if source is None:
            log.warning("%s has no chat template of its own: the %s one is used", model_dir, origin)
            source = (Path(__file__).parent / "templates" / f"{built_in}.jinja").read_text(encoding="utf-8")
        return cls(source, origin, placeholders=placeholders, special_tokens=_special_tokens(config))

    def render(self, messages: Chat, tools: Sequence[Mapping[str, Any]], thinking: ThinkingMode) -> str:
        """A prompt that ends where the assistant's turn begins.

        Raises InvalidRequest for what the template refuses, or for a thinking mode it has no form for.
        """
        switches: dict[str, Any] = {}
        if thinking is not ThinkingMode.AUTO:
            names = self.support.thinking_switches or frozenset(("enable_thinking",))
            switches = dict.fromkeys(names, thinking is ThinkingMode.ON)
        try:
            prompt = self._render(messages, tools, switches)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template refused the messages: {error}", field="messages") from error
        except Exception as error:
            raise InternalError("the chat template failed on these messages") from error
        if switches and not self.support.thinking_switches and opens_thinking(prompt) != (thinking is ThinkingMode.ON):
            raise InvalidRequest(
                f"this model's chat template cannot turn thinking {thinking.value}", field="enable_thinking"
            )
        return prompt

    def _render(self, messages: Chat, tools: Sequence[Mapping[str, Any]], switches: Mapping[str, Any]) -> str:
        values = {**self._special_tokens, **switches}
        return self._template.render(
            messages=messages, tools=list(tools) or None, documents=None, add_generation_prompt=True, **values
        )

    def _try(self, messages: Chat, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        try:
            return self._render(messages, tools, {})
        except Exception:
            # A template may fail in any way on a form it does not know; then it does not support it.
            return ""

    def _probe(self, placeholders: Mapping[MediaKind, Sequence[str]], names: frozenset[str]) -> TemplateSupport:
        user = {"role": "user", "content": "hello"}
        system = {"role": "system", "content": _PROBE}
        call = {"id": "0", "type": "function", "function": {"name": _PROBE, "arguments": {}}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": "0", "content": _PROBE}
        tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {}}}
        plain_call = {**calling, "tool_calls": [{**call, "function": {"name": "f", "arguments": {}}}]}
        return TemplateSupport(
            media_types={
                kind: item_type
                for kind, item_types in _DIALECTS.items()
                if (item_type := self._media_type(item_types, placeholders[kind])) is not None
            },
            system=_PROBE in self._try([system, user]),
            tools=_PROBE in self._try([user], [tool]),
            tool_messages=_PROBE in self._try([user, plain_call, result]),
            tool_calls=_PROBE in self._try([user, calling, {**result, "content": "ok"}]),
            thinking_switches=names & _SWITCHES,
        )

    def _media_type(self, item_types: Sequence[str], placeholders: Sequence[str]) -> str | None:
        for item_type in item_types:
            content = [{"type": item_type}, {"type": "text", "text": _PROBE}]
            text = self._try([{"role": "user", "content": content}])
            if _PROBE in text and sum(text.count(placeholder) for placeholder in placeholders) == 1:
                return item_type
        return None


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends inside a think block that the template opened."""
    return prompt.rstrip().endswith("<think>")


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks assistant text for training; serving renders what is inside."""

    tags = {"generation"}  # noqa: RUF012  (declared as a set by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _own_template(model_dir: Path) -> tuple[str, str] | None:
    """A checkpoint's template and the file it is from, in transformers' order of precedence."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8"), str(path)
    for path in (model_dir / "chat_template.json", model_dir / "tokenizer_config.json"):
        if path.is_file() and (value := read_json(path).get("chat_template")):
            return _default_template(value, path), str(path)
    return None


def _default_template(value: Any, path: Path) -> str:
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if not isinstance(value, str):
        raise ValueError(f"{path}: chat_template must be a string, or a list with an entry named default")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    extra = config.get("extra_special_tokens")
    for key, value in {**config, **(extra if isinstance(extra, dict) else {})}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found
