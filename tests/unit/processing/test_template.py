from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.errors import InternalError, InvalidRequest
from actors.processing.template import ChatTemplate, opens_thinking
from actors.types import MediaKind, ThinkingMode

PLACEHOLDERS = {
    MediaKind.IMAGE: ("<|IMAGE_PLACEHOLDER|>", "<|image@placeholder|>"),
    MediaKind.VIDEO: ("<|VIDEO_PLACEHOLDER|>", "<|video@placeholder|>"),
}
IMAGE = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
VIDEO = "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"
USER = {"role": "user", "content": "hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "zoom", "arguments": {"bbox_2d": [1, 2], "l": "\u00e9"}}}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A"}, {"type": "video"}]},
    {"role": "assistant", "content": "", "reasoning_content": "look\n", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "image"}, {"type": "text", "text": "zoomed"}]},
    {"role": "assistant", "content": "a cat", "reasoning_content": "sure"},
    {"role": "user", "content": "Why?"},
]
TOOL = {"type": "function", "function": {"name": "zoom"}}


def built_in(name: str) -> ChatTemplate:
    return ChatTemplate.from_dir(Path("/nonexistent"), placeholders=PLACEHOLDERS, built_in=name)


def make(source: str) -> ChatTemplate:
    return ChatTemplate(source, "test", placeholders=PLACEHOLDERS)


def test_pt() -> None:
    assert built_in("pt").render(CONVERSATION, [], ThinkingMode.AUTO) == (
        "<|begin_of_sentence|>Be brief.\n"
        f"User: Picture 1:{IMAGE}AVideo 1:{VIDEO}"
        "\nAssistant: <think>\nlook\n</think>\n"
        '<tool_call>\n{"name": "zoom", "arguments": {"bbox_2d": [1, 2], "l": "\u00e9"}}\n</tool_call>\n'
        "<|end_of_sentence|>"
        f"User: \n<tool_output>\nPicture 2:{IMAGE}zoomed\n</tool_output>\n"
        "\nAssistant: <think>\nsure\n</think>\na cat<|end_of_sentence|>"
        "User: Why?"
        "\nAssistant: <think>\n\n</think>\n\n"
    )


def test_thinking() -> None:
    assert built_in("thinking").render(CONVERSATION[1:], [TOOL], ThinkingMode.AUTO) == (
        "<|begin_of_sentence|>"
        "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework."
        '\n<tool_list>\n[{"type": "function", "function": {"name": "zoom"}}]\n</tool_list>\n\n'
        f"User: Picture 1:{IMAGE}AVideo 1:{VIDEO}"
        "\nAssistant: \n<think>\nlook\n</think>\n\n"
        '<tool_call>\n{"name": "zoom", "arguments": {"bbox_2d": [1, 2], "l": "\u00e9"}}\n</tool_call>\n'
        "<|end_of_sentence|>"
        f"User: \n<tool_output>\nPicture 2:{IMAGE}zoomed\n</tool_output>\n"
        "\nAssistant: \n<think>\nsure\n</think>\n\na cat<|end_of_sentence|>"
        "User: Why?"
        "\nAssistant: \n<think>\n"
    )


@pytest.mark.parametrize(
    ("name", "thinking", "tail", "opens"),
    [
        ("pt", ThinkingMode.AUTO, "hello\nAssistant: <think>\n\n</think>\n\n", False),
        ("pt", ThinkingMode.OFF, "hello\nAssistant: <think>\n\n</think>\n\n", False),
        ("pt", ThinkingMode.ON, "hello\nAssistant: <think>", True),
        ("thinking", ThinkingMode.AUTO, "hello\nAssistant: \n<think>\n", True),
        ("thinking", ThinkingMode.ON, "hello\nAssistant: \n<think>\n", True),
        ("thinking", ThinkingMode.OFF, "hello\nAssistant: \n<think>\n\n</think>\n\n", False),
    ],
)
def test_thinking_modes(name: str, thinking: ThinkingMode, tail: str, opens: bool) -> None:
    prompt = built_in(name).render([USER], [], thinking)
    assert prompt.endswith(tail)
    assert opens_thinking(prompt) is opens


@pytest.mark.parametrize("name", ["pt", "thinking"])
def test_built_in_ones_support_everything(name: str) -> None:
    support = built_in(name).support
    assert support.media_types == {MediaKind.IMAGE: "image", MediaKind.VIDEO: "video"}
    assert support.system and support.tools and support.tool_messages and support.tool_calls
    assert support.thinking_switches == {"enable_thinking"}


@pytest.mark.parametrize("name", ["pt", "thinking"])
def test_reasoning_inside_content_is_set_apart(name: str) -> None:
    history = [USER, {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nyes"}, USER]
    apart = [USER, {"role": "assistant", "content": "yes", "reasoning_content": "why"}, USER]
    template = built_in(name)
    assert template.render(history, [], ThinkingMode.AUTO) == template.render(apart, [], ThinkingMode.AUTO)


def test_own_template_wins(tmp_path: Path) -> None:
    def origin() -> str:
        return ChatTemplate.from_dir(tmp_path, placeholders=PLACEHOLDERS).origin

    assert origin() == "built-in pt"
    config: dict[str, Any] = {"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_dir(tmp_path, placeholders=PLACEHOLDERS)
    assert (template.render([USER], [], ThinkingMode.AUTO), template.origin) == (
        "y",
        str(tmp_path / "tokenizer_config.json"),
    )
    (tmp_path / "chat_template.jinja").write_text("z")
    assert origin() == str(tmp_path / "chat_template.jinja")
    with pytest.raises(ValueError, match="pt, thinking"):
        ChatTemplate.from_dir(tmp_path, placeholders=PLACEHOLDERS, built_in="other")


def test_special_tokens_are_known_by_name(tmp_path: Path) -> None:
    config = {
        "cls_token": {"content": "<|begin|>"},
        "eos_token": "</s>",
        "extra_special_tokens": {"image_token": "<img>"},
        "chat_template": "{{ cls_token }}{{ eos_token }}{{ image_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_dir(tmp_path, placeholders=PLACEHOLDERS)
    assert template.render([USER], [], ThinkingMode.AUTO) == "<|begin|></s><img>"


def test_support_is_what_probes_show() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{% if c.type == 'image_url' %}<|image@placeholder|>{% else %}{{ c.text }}{% endif %}"
        "{% endfor %}{% endif %}{% endif %}{% endfor %}"
    )
    support = make(source).support
    assert support.media_types == {MediaKind.IMAGE: "image_url"}
    assert not (support.system or support.tools or support.tool_messages or support.tool_calls)
    assert not support.thinking_switches


def test_thinking_without_a_switch() -> None:
    closed = make("{{ messages[0].content }}\nAssistant: ")
    assert closed.render([USER], [], ThinkingMode.OFF)
    with pytest.raises(InvalidRequest, match="cannot turn thinking on") as caught:
        closed.render([USER], [], ThinkingMode.ON)
    assert caught.value.field == "enable_thinking"
    other = make("{{ messages[0].content }}{% if thinking_mode %}<think>{% endif %}")
    assert opens_thinking(other.render([USER], [], ThinkingMode.ON))


def test_errors() -> None:
    with pytest.raises(ValueError, match="test"):
        make("{% if %}")
    with pytest.raises(InvalidRequest, match="no thanks") as caught:
        make("{{ raise_exception('no thanks') }}").render([USER], [], ThinkingMode.AUTO)
    assert caught.value.field == "messages"
    with pytest.raises(InternalError):
        make("{{ 1 // 0 }}").render([USER], [], ThinkingMode.AUTO)


def test_sandbox() -> None:
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ):
        with pytest.raises(InvalidRequest):
            make(source).render([USER], [], ThinkingMode.AUTO)


def test_environment_details() -> None:
    source = (
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}\n"
        "  {% generation %}inner{% endgeneration %}\n"
        "{{ strftime_now('%Y') | length }}{{ {'b': '<\u00e9>', 'a': 1} | tojson }}"
    )
    prompt = make(source).render([USER], [], ThinkingMode.AUTO)
    assert prompt == '13inner4{"b": "<\u00e9>", "a": 1}'


@pytest.mark.parametrize("name", ["pt", "thinking"])
def test_an_answer_that_speaks_of_the_marker_loses_nothing(name: str) -> None:
    template = built_in(name)

    def prompt(**answer: str) -> str:
        return template.render([USER, {"role": "assistant", **answer}, USER], [], ThinkingMode.AUTO)

    apart = prompt(content="close with </think> here", reasoning_content="why")
    assert "why\n</think>" in apart and "close with </think> here<|end_of_sentence|>" in apart
    assert "say </think> so<|end_of_sentence|>" in prompt(content="<think>why</think>\nsay </think> so")


def test_template_files_of_processors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """chat_template.json goes before tokenizer_config.json; a directory without either says what it gets."""
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert ChatTemplate.from_dir(tmp_path, placeholders=PLACEHOLDERS).origin == "built-in pt"
    assert "no chat template of its own: the built-in pt one" in caplog.text
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "chat_template": "a"}')
    (tmp_path / "chat_template.json").write_text('{"chat_template": "b{{ eos_token }}"}')
    template = ChatTemplate.from_dir(tmp_path, placeholders=PLACEHOLDERS)
    assert template.render([USER], [], ThinkingMode.AUTO) == "b</s>"
    assert template.origin == str(tmp_path / "chat_template.json")
