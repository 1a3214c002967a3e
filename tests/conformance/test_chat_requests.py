"""Chat requests as OpenAI's clients write them, to ids: against transformers with the checkpoint's own template."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from actors.errors import InvalidRequest
from actors.processing.processor import Processor
from actors.types import PreprocessRequest
from cluster.openai_request import parse_chat_request, to_call
from cluster.tools import template_form
from tests.tiny_model import tiny_checkpoint
from tests.unit.processing.samples import encode, noise, video

PICTURE, OTHER = (base64.b64encode(encode(noise(60, side))).decode() for side in (90, 40))
CLIP = base64.b64encode(video(6, fps=4)).decode()
PLACEHOLDERS = ("<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>")


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(data: str = PICTURE) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def clip() -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{CLIP}"}}


def call(number: int, **arguments: Any) -> dict[str, Any]:
    function = {"name": "zoom", "arguments": json.dumps(arguments)}
    return {"id": f"c{number}", "type": "function", "function": function}


TOOL = {
    "type": "function",
    "function": {
        "name": "zoom",
        "description": "d <\u00e9>",
        "parameters": {"type": "object", "properties": {"b": {}}},
    },
}
PLAIN: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [{"role": "user", "content": "Hello  there\n"}]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    "developer": {
        "messages": [{"role": "developer", "content": [text("Be"), text(" brief.")]}, {"role": "user", "content": "Hi"}]
    },
    "media": {
        "messages": [{"role": "user", "content": [text("First"), image(), text(" a"), text("b"), clip(), image(OTHER)]}]
    },
    "turns": {
        "messages": [
            {"role": "user", "content": [image(), text("What is it?")]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": [image(OTHER), text("And that?"), clip()]},
            {"role": "assistant", "content": "A dog.", "reasoning_content": "Ears.\n"},
            {"role": "user", "content": "Why?"},
        ]
    },
    "thinking inside": {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
            {"role": "user", "content": "Hi"},
        ]
    },
}
TOOLS: dict[str, dict[str, Any]] = {
    "offered": {"messages": PLAIN["media"]["messages"], "tools": [TOOL]},
    "offered under a system": {"messages": PLAIN["system"]["messages"], "tools": [TOOL]},
    "not offered": {"messages": PLAIN["one turn"]["messages"], "tools": [TOOL], "tool_choice": "none"},
    "results with pictures": {
        "messages": [
            {"role": "user", "content": [image(), text("Look closer.")]},
            {
                "role": "assistant",
                "content": None,
                "reasoning": "small",
                "tool_calls": [call(1, b=[1, 2]), call(2, b="\u00e9")],
            },
            {"role": "tool", "tool_call_id": "c1", "content": [image(OTHER), text("closer")]},
            {"role": "tool", "tool_call_id": "c2", "content": [clip()]},
            {"role": "assistant", "content": "There.", "tool_calls": [call(3)]},
            {"role": "tool", "tool_call_id": "c3", "content": "nothing"},
            {"role": "assistant", "content": "A bee."},
            {"role": "user", "content": [image(), text("And here?")]},
        ],
        "tools": [TOOL],
    },
}
MODES: dict[str, dict[str, Any]] = {
    "auto": {},
    "on": {"enable_thinking": True},
    "off": {"chat_template_kwargs": {"enable_thinking": False}},
}
SWITCHES: dict[str, dict[str, Any]] = {"auto": {}, "on": {"enable_thinking": True}, "off": {"enable_thinking": False}}


def own_ids(directory: Path, body: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids, and tokens of each medium, of a body."""
    asked = to_call(parse_chat_request(json.dumps(body).encode()))
    processed = Processor(directory).process(
        PreprocessRequest(
            lease="",
            messages=asked.messages,
            thinking=asked.thinking,
            tools=tuple(map(template_form, asked.offered_tools)),
            max_prompt_tokens=100_000,
        )
    )
    return list(processed.prompt_ids), [item.grid.tokens for item in processed.media]


def their_ids(directory: Path, body: dict[str, Any], counts: list[int], switch: dict[str, Any]) -> list[int]:
    """transformers repeats the placeholder in the rendered text."""
    reference = AutoTokenizer.from_pretrained(directory)
    offered = body.get("tools") if body.get("tool_choice") != "none" else None
    rendered = reference.apply_chat_template(
        [_their_message(message) for message in body["messages"]],
        tools=offered,
        tokenize=False,
        add_generation_prompt=True,
        **switch,
    )
    pieces, left = [rendered], list(counts)
    for placeholder in PLACEHOLDERS:
        pieces = [part for piece in pieces for part in _split(piece, placeholder)]
    grown = "".join(piece * left.pop(0) if piece in PLACEHOLDERS else piece for piece in pieces)
    assert not left
    ids: list[int] = reference(grown, add_special_tokens=False)["input_ids"]
    return ids


def _split(piece: str, at: str) -> list[str]:
    if piece in PLACEHOLDERS:
        return [piece]
    first, *others = piece.split(at)
    return [first, *(part for other in others for part in (at, other))]


def _their_message(message: dict[str, Any]) -> dict[str, Any]:
    theirs = dict(message)
    if theirs["role"] == "developer":
        theirs["role"] = "system"
    if "reasoning" in theirs:
        theirs["reasoning_content"] = theirs.pop("reasoning")
    if isinstance(theirs["content"], list):
        theirs["content"] = [
            part if part["type"] == "text" else {"type": part["type"].removesuffix("_url")}
            for part in theirs["content"]
        ]
    if "tool_calls" in theirs:
        theirs["tool_calls"] = [
            {**c, "function": {**c["function"], "arguments": json.loads(c["function"]["arguments"])}}
            for c in theirs["tool_calls"]
        ]
        theirs["content"] = theirs["content"] or ""
    return theirs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("style", ["pt", "thinking"])
@pytest.mark.parametrize("name", [*PLAIN, *TOOLS])
def test_ids(name: str, style: str, mode: str) -> None:
    directory = tiny_checkpoint(style=style)
    body = {**PLAIN, **TOOLS}[name] | MODES[mode]
    ours, counts = own_ids(directory, body)
    assert ours == their_ids(directory, body, counts, SWITCHES[mode])


CONVERTED = """
{%- set seen = namespace(pictures=0, clips=0) -%}
{{- '<|begin_of_sentence|>' }}
{%- for m in messages -%}
    {%- if m.role == 'assistant' -%}
        {%- macro words(field) -%}
            {%- if field is string -%}{{- field -}}
            {%- elif field is iterable -%}
                {%- set ns = namespace(parts=[]) -%}
                {%- for item in field if item.type == 'text' -%}
                    {%- set ns.parts = ns.parts + [item.text] -%}
                {%- endfor -%}
                {{- ns.parts | join('') -}}
            {%- else -%}{{- '' -}}
            {%- endif -%}
        {%- endmacro -%}
        {%- set thought, said = words(m.reasoning_content), words(m.content) -%}
        {%- if '</think>' in said %}
            {%- set thought = said.split('</think>')[0].rstrip('
                ').split('<think>')[-1].lstrip('
                ') %}
            {%- set said = said.split('</think>')[-1].lstrip('
                ') %}
        {%- endif %}
        {{- '
        ' + 'Assistant: ' + ('<think>
        ' + thought.strip('
        ') + '
        </think>
        ' if thought else '') + said }}
        {{- '<|end_of_sentence |>' }}
    {%- else -%}
        {%- if m.role == 'user' -%}{{- 'User: ' -}}{%- endif -%}
        {%- if m.content is string -%}{{- m.content -}}
        {%- else -%}
            {%- for item in m.content -%}
                {%- if item.type == 'text' -%}{{- item.text -}}
                {%- elif item.type in ['image_url', 'image'] -%}
                    {%- set seen.pictures = seen.pictures + 1 -%}
                    Picture {{ seen.pictures }}:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>
                {%- elif item.type in ['video_url', 'video'] -%}
                    {%- set seen.clips = seen.clips + 1 -%}
                    Video {{ seen.clips }}:<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {%- if m.role == 'system' -%}{{- '
        ' -}}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt is not defined or add_generation_prompt is true %}
    {{- '\\nAssistant: ' -}}
    {%- if (enable_thinking is defined and enable_thinking is false) or enable_thinking is not defined %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {%- if enable_thinking is defined and enable_thinking is true %}{{- '<think>' }}{%- endif %}
{%- endif %}"""
"""What the template that transformers' conversion gives to -PT does, its stray line ends and its "<|end_of_sentence |>"
among it: right or wrong, it is the checkpoint's to say."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "model"
    shutil.copytree(tiny_checkpoint(), directory, ignore=shutil.ignore_patterns("*.safetensors", "chat_template*"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CONVERTED}))
    return directory


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PLAIN)
def test_ids_with_the_template_of_the_conversion(name: str, mode: str, converted: Path) -> None:
    body = PLAIN[name] | MODES[mode]
    ours, counts = own_ids(converted, body)
    assert ours == their_ids(converted, body, counts, SWITCHES[mode])


@pytest.mark.parametrize("name", TOOLS)
def test_what_a_template_has_no_form_for_is_refused(name: str, converted: Path) -> None:
    if name == "not offered":
        assert own_ids(converted, TOOLS[name]) == own_ids(converted, PLAIN["one turn"])
    else:
        with pytest.raises(InvalidRequest, match="no form for tool"):
            own_ids(converted, TOOLS[name])
