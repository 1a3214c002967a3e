"""Prompts and ids against transformers' chat templating and tokenisation of the same checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from actors.processing.processor import Processor
from actors.processing.template import ChatTemplate
from actors.types import MediaKind, Message, MessageRole, ThinkingMode, ToolCall
from tests.tiny_model import tiny_checkpoint
from tests.unit.processing.samples import encode, image_part, message, noise, request, user, video, video_part

PLACEHOLDERS = {MediaKind.IMAGE: ("<|IMAGE_PLACEHOLDER|>",), MediaKind.VIDEO: ("<|VIDEO_PLACEHOLDER|>",)}
CALL = {"id": "1", "type": "function", "function": {"name": "zoom", "arguments": {"a": [1, 2.5], "b": "\u00e9<"}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello, world! 1234 \u4e2d\u6587 \U0001f600  two  spaces\n\n\ttab"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}],
    [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "this"}, {"type": "video"}]},
        {"role": "assistant", "content": "no", "reasoning_content": "why\n", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "image"}, {"type": "text", "text": "z"}]},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\nyes"},
        {"role": "user", "content": "end"},
    ],
]
TOOL = {"type": "function", "function": {"name": "zoom", "description": "d", "parameters": {"type": "object"}}}
OTHER_TEMPLATE = """{%- for m in messages %}
    {%- if loop.first %}{{ bos_token }}{{ cls_token }}{% endif %}
    {% if m.content is string %}
{{ m.role }}: {{ m.content | trim }}
    {% else %}
        {%- for c in m.content if c.type == 'text' %}{{ c.text }}{% continue %}{% endfor %}
    {%- endif %}
{%- endfor %}
{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}
{% generation %}A{% endgeneration %}
"""
MODES = {
    ThinkingMode.AUTO: {},
    ThinkingMode.ON: {"enable_thinking": True},
    ThinkingMode.OFF: {"enable_thinking": False},
}


@pytest.fixture(scope="module", params=["pt", "thinking"])
def style(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("thinking", MODES)
@pytest.mark.parametrize("tools", [[], [TOOL]], ids=["no tools", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_rendering(
    style: str, conversation: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: ThinkingMode
) -> None:
    directory = tiny_checkpoint(style=style)
    reference = AutoTokenizer.from_pretrained(directory)
    template = ChatTemplate.from_dir(directory, placeholders=PLACEHOLDERS)
    expected = reference.apply_chat_template(
        conversation, tools=tools or None, tokenize=False, add_generation_prompt=True, **MODES[thinking]
    )
    assert template.render(conversation, tools, thinking) == expected


def test_rendering_of_another_template() -> None:
    directory = tiny_checkpoint()
    reference = AutoTokenizer.from_pretrained(directory)
    tokens = {"bos_token": reference.bos_token, "cls_token": reference.cls_token}
    template = ChatTemplate(OTHER_TEMPLATE, "other", placeholders=PLACEHOLDERS, special_tokens=tokens)
    for thinking, options in MODES.items():
        for conversation in CONVERSATIONS:
            expected = reference.apply_chat_template(
                conversation,
                tools=[TOOL],
                chat_template=OTHER_TEMPLATE,
                tokenize=False,
                add_generation_prompt=True,
                **options,
            )
            assert template.render(conversation, [TOOL], thinking) == expected


TEXTS = [
    "Hello, world!",
    "1234567890",
    "  lead",
    "caf\u00e9 \u4e2d\u6587 \U0001f600\u200d\U0001f525",
    "a\n\n\n b\tc",
    "<think> <tool_call>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_text(style: str, text: str) -> None:
    directory = tiny_checkpoint(style=style)
    reference = AutoTokenizer.from_pretrained(directory)
    messages = [Message(role=MessageRole.USER, parts=user(text).parts)]
    expected = reference.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    assert list(Processor(directory).process(request(*messages)).prompt_ids) == list(expected["input_ids"])


def test_ids_with_media(style: str) -> None:
    """transformers repeats the placeholder in the text; the ids are the same."""
    directory = tiny_checkpoint(style=style)
    reference = AutoTokenizer.from_pretrained(directory)
    processor = Processor(directory)
    result = processor.process(
        request(
            user(image_part(encode(noise(60, 90))), "this", video_part(video(6, fps=4))),
            message(
                MessageRole.ASSISTANT,
                "no",
                reasoning="why",
                tool_calls=(ToolCall(id="1", name="zoom", arguments='{"a": [1, 2.5], "b": "\u00e9<"}'),),
            ),
            message(MessageRole.TOOL, image_part(encode(noise(90, 60))), "z", tool_call_id="1"),
        )
    )
    text = reference.apply_chat_template(CONVERSATIONS[2][:3], tokenize=False, add_generation_prompt=True)
    counts = [item.grid.tokens for item in result.media]
    for string, count in zip(
        ("<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>", "<|IMAGE_PLACEHOLDER|>"), counts, strict=True
    ):
        text = text.replace(string, "\0" * count, 1).replace("\0", string.lower())
    text = text.replace("<|image_placeholder|>", "<|IMAGE_PLACEHOLDER|>")
    text = text.replace("<|video_placeholder|>", "<|VIDEO_PLACEHOLDER|>")
    assert list(result.prompt_ids) == reference(text, add_special_tokens=False)["input_ids"]


def test_neutralised_control_tokens_match_transformers() -> None:
    """transformers has the same idea under ``sanitize_control_tokens``: neither gives the control token's id."""
    directory = tiny_checkpoint()
    reference = AutoTokenizer.from_pretrained(directory)
    text = "strike <s>this</s> and <|end_of_sentence|>"
    ours = Processor(directory).process(request(user(text))).prompt_ids
    theirs = reference.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, sanitize_control_tokens=True
    )["input_ids"]
    assert reference.decode(list(ours)) == reference.decode(theirs)
    control = set(reference.all_special_ids)
    assert control & set(ours) == control & set(theirs)
