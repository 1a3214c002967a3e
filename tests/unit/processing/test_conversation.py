from __future__ import annotations

from typing import Any

import pytest

from actors.errors import InvalidRequest, MediaTooLarge
from actors.processing.config import ProcessingLimits
from actors.processing.conversation import check_conversation, media_parts, protect_json, to_chat
from actors.processing.template import TemplateSupport
from actors.processing.tokenizer import PROTECT_END, PROTECT_START
from actors.types import ImagePart, MediaKind, MediaSource, Message, MessageRole, ToolCall
from tests.unit.processing.samples import image_part, message, user, video_part

SYSTEM, ASSISTANT, TOOL = MessageRole.SYSTEM, MessageRole.ASSISTANT, MessageRole.TOOL
FULL = TemplateSupport(
    media_types={MediaKind.IMAGE: "image", MediaKind.VIDEO: "video"},
    system=True,
    tools=True,
    tool_messages=True,
    tool_calls=True,
    thinking_switches=frozenset(),
)
NONE = TemplateSupport(
    media_types={}, system=False, tools=False, tool_messages=False, tool_calls=False, thinking_switches=frozenset()
)
FORBIDDEN = ("<|IMAGE_START|>", "<|image@placeholder|>")
IMAGE = ImagePart(source=MediaSource(content=b"x"))
BAD = "a <|IMAGE_START|> b"


def call(call_id: str = "1", name: str = "zoom", arguments: str = "{}") -> ToolCall:
    return ToolCall(id=call_id, name=name, arguments=arguments)


def check(*messages: Message, tools: Any = (), support: TemplateSupport = FULL, **limits: int) -> None:
    check_conversation(messages, tools, support=support, limits=ProcessingLimits(**limits), forbidden=FORBIDDEN)


CALLING = message(ASSISTANT, tool_calls=(call(),))


def test_good_conversations() -> None:
    check(user("hello"))
    check(message(SYSTEM, "a"), message(SYSTEM, "b"), user("hello", IMAGE))
    check(user("hello"), CALLING, message(TOOL, "of the one call there is"))
    check(
        user("hello"),
        message(ASSISTANT, "x", tool_calls=(call("1"), call("2")), reasoning="why"),
        message(TOOL, "one", tool_call_id="2"),
        message(TOOL, IMAGE, tool_call_id="1"),
        message(ASSISTANT, "done"),
        user("more"),
        tools=({"type": "function"},),
    )


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ((), "messages"),
        ((message(SYSTEM, "a"),), "messages[0].role"),
        ((user("a"), message(ASSISTANT, "b")), "messages[1].role"),
        ((user("a"), message(SYSTEM, "b"), user("c")), "messages[1].role"),
        ((message("developer", "a"), user("b")), "messages[0].role"),  # type: ignore[arg-type]
        ((user(),), "messages[0].content"),
        ((user("a"), message(ASSISTANT), user("b")), "messages[1].content"),
        ((user("a"), message(TOOL, "b")), "messages[1].tool_call_id"),
        (
            (user("a"), message(ASSISTANT, tool_calls=(call("1"), call("2"))), message(TOOL, "b")),
            "messages[2].tool_call_id",
        ),
        ((user("a"), CALLING, message(TOOL, "b", tool_call_id="9")), "messages[2].tool_call_id"),
        ((user("a"), message(TOOL, "b", tool_call_id="1")), "messages[1].tool_call_id"),
        ((CALLING, message(TOOL, "b", tool_call_id="1")), "messages"),
        ((user("a", tool_call_id="1"),), "messages[0].tool_call_id"),
        ((user("a", reasoning="b"),), "messages[0].reasoning"),
        ((user("a", tool_calls=(call(),)),), "messages[0].tool_calls"),
        ((message(SYSTEM, IMAGE), user("b")), "messages[0].content[0].image_url"),
        ((user("a"), message(ASSISTANT, "x", IMAGE), user("b")), "messages[1].content[1].image_url"),
        (
            (user("a"), message(ASSISTANT, tool_calls=(call(arguments="{"),)), user("b")),
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            (user("a"), message(ASSISTANT, tool_calls=(call(arguments="[1]"),)), user("b")),
            "messages[1].tool_calls[0].function.arguments",
        ),
        ((user("a"), message(ASSISTANT, tool_calls=(call(name=""),)), user("b")), "messages[1].tool_calls[0]"),
    ],
)
def test_wrong_roles_and_order(messages: tuple[Message, ...], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(*messages)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("messages", "tools", "field"),
    [
        ((user(BAD),), (), "messages[0].content"),
        ((user(IMAGE, BAD),), (), "messages[0].content[1].text"),
        ((user("a <|IMAGE_", "START|> b", IMAGE),), (), "messages[0].content[0].text"),
        ((user("<|image@placeholder|>"),), (), "messages[0].content"),
        ((message(SYSTEM, BAD), user("x")), (), "messages[0].content"),
        ((user("x", name=BAD),), (), "messages[0].name"),
        ((user("x"), message(ASSISTANT, BAD), user("y")), (), "messages[1].content"),
        ((user("x"), message(ASSISTANT, "z", reasoning=BAD), user("y")), (), "messages[1].reasoning_content"),
        ((user("x"), CALLING, message(TOOL, BAD, tool_call_id="1")), (), "messages[2].content"),
        (
            (user("x"), message(ASSISTANT, tool_calls=(call(BAD),)), user("y")),
            (),
            "messages[1].tool_calls[0].id",
        ),
        (
            (user("x"), message(ASSISTANT, tool_calls=(call(name=BAD),)), user("y")),
            (),
            "messages[1].tool_calls[0].function.name",
        ),
        (
            (user("x"), message(ASSISTANT, tool_calls=(call(arguments=f'{{"{BAD}": 1}}'),)), user("y")),
            (),
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            (
                user("x"),
                message(ASSISTANT, tool_calls=(call(arguments='{"a": ["\\u003c|IMAGE_START|>"]}'),)),
                user("y"),
            ),
            (),
            "messages[1].tool_calls[0].function.arguments",
        ),
        ((user("x"),), ({"function": {"description": BAD}},), "tools[0]"),
        ((user("x"),), ({}, {"function": {"parameters": {BAD: 1}}}), "tools[1]"),
    ],
)
def test_media_tokens_in_client_text(messages: tuple[Message, ...], tools: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(*messages, tools=tools)
    assert caught.value.field == field
    assert any(string in caught.value.message for string in FORBIDDEN)


def test_lone_surrogates() -> None:
    with pytest.raises(InvalidRequest, match="Unicode") as caught:
        check(user("a\ud800"))
    assert caught.value.field == "messages[0].content"


def test_counts() -> None:
    check(user(*[IMAGE] * 3), max_images=3)
    with pytest.raises(MediaTooLarge, match="limit of 3 images") as caught:
        check(user(*[IMAGE] * 2), message(ASSISTANT, "x"), user("a", IMAGE, IMAGE), max_images=3)
    assert caught.value.field == "messages[2].content[2].image_url"
    with pytest.raises(MediaTooLarge, match="limit of 0 videos"):
        check(user(video_part(b"x")), max_videos=0)


@pytest.mark.parametrize(
    ("messages", "tools", "field"),
    [
        ((message(SYSTEM, "a"), user("b")), (), "messages[0].role"),
        ((user("a"), CALLING, user("b")), (), "messages[1].tool_calls"),
        ((user(IMAGE),), (), "messages[0].content[0].image_url"),
        ((user("a"),), ({},), "tools"),
    ],
)
def test_forms_the_template_lacks(messages: tuple[Message, ...], tools: Any, field: str) -> None:
    with pytest.raises(InvalidRequest, match="template has no form") as caught:
        check(*messages, tools=tools, support=NONE)
    assert caught.value.field == field


def test_chat_form() -> None:
    chat = to_chat(
        [
            user("a", "b"),
            message(ASSISTANT, reasoning="why", tool_calls=(call(arguments='{"k": ["v"]}'),)),
            message(TOOL, image_part(), "c", "d", tool_call_id="1"),
        ],
        FULL,
        str.upper,
    )
    function = {"name": "ZOOM", "arguments": {"K": ["V"]}}
    assert chat == [
        {"role": "user", "content": "AB"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "WHY",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": [{"type": "image"}, {"type": "text", "text": "CD"}], "tool_call_id": "1"},
    ]


def test_media_in_order() -> None:
    video = video_part(b"v")
    assert media_parts([user("a", IMAGE), user(video, "b", IMAGE)]) == [
        ("messages[0].content[1].image_url", IMAGE),
        ("messages[1].content[0].video_url", video),
        ("messages[1].content[2].image_url", IMAGE),
    ]


def test_protect_json() -> None:
    assert protect_json({"a": [1, None, True, "b", {"c": 2.5}]}, str.upper) == {"A": [1, None, True, "B", {"C": 2.5}]}


@pytest.mark.parametrize("depth", [63, 65, 900, 100_000])
def test_nesting_is_bounded(depth: int) -> None:
    arguments = '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)
    conversation = (user("x"), message(ASSISTANT, tool_calls=(call(arguments=arguments),)), user("y"))
    if depth < 64:
        check(*conversation)
        return
    with pytest.raises(InvalidRequest) as caught:
        check(*conversation)
    assert caught.value.field == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize("mark", [PROTECT_START, PROTECT_END])
def test_marks_that_will_be_dropped_hide_no_media_token(mark: str) -> None:
    with pytest.raises(InvalidRequest, match="image@placeholder"):
        check(user(f"<|image{mark}@placeholder|>"))
