"""The loop in which the model looks closer, both faces, against the facade and a scripted model."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from actors.types import FinishReason, ImagePart, Message, MessageRole, TextPart, ToolCallDelta
from cluster.boxes import LabelledBox
from cluster.client import AsyncClient, Client, Reply, generate_request, user_message
from cluster.client.looking import SEARCH, ZOOM, Found, Looking, look, look_async
from cluster.generation import ChoiceFinished, Delta, GenerateCall, ToolMode
from cluster.pictures import crop, enlarged, open_upright
from tests.doubles import FINISHED, STARTED, ScriptedService
from tests.doubles import grpc_serving_in_a_thread as running
from tests.media import png

PICTURE, OTHER = png(200, 100, 1), png(120, 160, 2)
Answer = str | list[tuple[str, Any]]


@dataclass
class Model(ScriptedService):
    """Answers each request in turn with a text or with calls (name, arguments)."""

    answers: tuple[Answer, ...] = ()
    ending: FinishReason | None = None

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Any, None]:
        answer = self.answers[len(self.calls)]
        self.calls.append(call)
        yield STARTED
        if isinstance(answer, str):
            yield Delta(text=answer)
            yield ChoiceFinished(reason=FinishReason.STOP)
        else:
            written = [(name, a if isinstance(a, str) else json.dumps(a)) for name, a in answer]
            yield Delta(
                reasoning="Too small.",
                tool_calls=tuple(
                    ToolCallDelta(index=index, id=f"c{index}", name=name, arguments=arguments)
                    for index, (name, arguments) in enumerate(written)
                ),
            )
            yield ChoiceFinished(reason=self.ending or FinishReason.TOOL_CALLS)
        yield FINISHED


def in_threads(address: str, looking: Looking) -> Reply:
    with Client(address) as client:
        return look(client, looking)


def in_a_loop(address: str, looking: Looking) -> Reply:
    async def run() -> Reply:
        async with AsyncClient(address) as client:
            return await look_async(client, looking)

    return asyncio.run(run())


def looked(
    *answers: Answer, images: tuple[Any, ...] = (PICTURE,), **options: Any
) -> tuple[Reply, Looking, list[GenerateCall]]:
    looking = Looking(generate_request("What?", images=images), **options)
    with running(lambda: Model(answers=answers)) as (address, service):
        return in_threads(address, looking), looking, service.calls


def pictures_of(message: Message) -> list[bytes | None]:
    return [part.source.content for part in message.parts if isinstance(part, ImagePart)]


@pytest.mark.parametrize("face", [in_threads, in_a_loop])
def test_the_part_that_was_asked_for_is_shown(face: Callable[[str, Looking], Reply]) -> None:
    looking = Looking(generate_request("What?", images=[PICTURE], timeout_s=9))
    with running(lambda: Model(answers=([(ZOOM, {"bbox_2d": [500, 400, 740, 640], "label": "sign"})], "42"))) as (
        address,
        service,
    ):
        reply = face(address, looking)
    assert reply.text == "42" and looking.reply is reply and looking.request is None
    (seen,) = looking.looks
    assert (seen.picture, seen.error) == (0, None)
    assert seen.box == LabelledBox((500, 400, 740, 640), "sign")
    part = enlarged(crop(open_upright(PICTURE), (500, 400, 740, 640)))
    assert open_upright(seen.shown[0]).tobytes() == part.tobytes()
    assert looking.pictures == [PICTURE, seen.shown[0]]
    question, called, answered = service.calls[1].messages
    assert service.calls[0].messages == (question,)
    assert (called.role, called.reasoning, called.tool_calls[0].name) == (MessageRole.ASSISTANT, "Too small.", ZOOM)
    assert (answered.role, answered.tool_call_id) == (MessageRole.TOOL, "c0")
    assert pictures_of(answered) == [seen.shown[0]] and len(answered.parts) == 1
    assert [tool.name for tool in service.calls[0].tools] == [ZOOM]
    assert [call.timeout_s for call in service.calls] == [pytest.approx(9, abs=1)] * 2


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ({"bbox_2d": [300, 300, 300, 300]}, "holds no pixel"),
        ({"bbox_2d": [600, 0, 400, 1000]}, "holds no pixel"),
        ({"bbox_2d": [1, 2, 3]}, "bbox_2d must be four numbers"),
        ({"bbox_2d": "all"}, "bbox_2d must be four numbers"),
        ({"bbox_2d": [0, 0, 9, True]}, "bbox_2d must be four numbers"),
        ({"bbox_2d": [0, 0, 9, 1e300]}, "bbox_2d must be four numbers"),
        ({}, "bbox_2d must be four numbers"),
        ({"bbox_2d": [0, 0, 9, 9], "img_idx": 1}, "img_idx must be a whole number from 0 to 0"),
        ({"bbox_2d": [0, 0, 9, 9], "img_idx": "0"}, "img_idx must be"),
        ({"bbox_2d": [0, 0, 9, 9], "img_idx": 0.5}, "img_idx must be"),
        ("[1]", "no JSON object"),
        ('{"bbox_2d": [1,', "Expecting"),
    ],
)
def test_wrong_arguments_are_answered_to_the_model(arguments: Any, wrong: str) -> None:
    reply, looking, calls = looked([(ZOOM, arguments)], [(ZOOM, {"bbox_2d": [-9, 0, 2000, 500]})], "42")
    assert reply.text == "42"
    first, second = looking.looks
    assert first.error is not None and wrong in first.error and first.shown == ()
    assert second.box is not None and second.box.corners == (0, 0, 1000, 500)
    (told,) = calls[1].messages[-1].parts
    assert isinstance(told, TextPart) and told.text == f"Error: {first.error}"


def test_which_picture() -> None:
    box = {"bbox_2d": [0, 0, 500, 500]}
    by_uri = "data:image/png;base64," + base64.b64encode(OTHER).decode()
    reply, looking, calls = looked(
        [(ZOOM, box), (ZOOM, box | {"img_idx": 0})],
        [(ZOOM, box | {"img_idx": 2.0}), (ZOOM, box)],
        "done",
        images=(PICTURE, by_uri),
    )
    assert reply.text == "done" and len(looking.looks) == 4 and len(looking.pictures) == 6
    assert [look.picture for look in looking.looks] == [1, 0, 2, 1]
    for seen in looking.looks:
        assert seen.picture is not None
        whole = open_upright(looking.pictures[seen.picture])
        assert open_upright(seen.shown[0]).tobytes() == enlarged(crop(whole, (0, 0, 500, 500))).tobytes()
    assert [m.role for m in calls[2].messages[-3:]] == [MessageRole.ASSISTANT, MessageRole.TOOL, MessageRole.TOOL]
    assert "img_idx" in (calls[0].tools[0].parameters or {})["properties"]


def test_the_conversation_goes_on() -> None:
    box = {"bbox_2d": [0, 0, 500, 500]}
    _, first, _ = looked([(ZOOM, box)], "42")
    assert [message.role for message in first.messages] == [2, 3, 4, 3] and first.messages[-1].parts[0].text == "42"
    again = Looking(generate_request([*first.messages, user_message("And now?")]))
    with running(lambda: Model(answers=([(ZOOM, box)], "43"))) as (address, _):
        in_threads(address, again)
    # The picture that was given, not the part that was cut out of it before.
    assert again.looks[0].picture == 0 and again.looks[0].shown == first.looks[0].shown


def test_search() -> None:
    asked = []

    def search(picture: bytes) -> Found | str:
        asked.append(picture)
        return "A lynx." if len(asked) == 1 else Found(text="Like this:", images=(OTHER,))

    calls = [(SEARCH, {"img_idx": 0}), (SEARCH, {}), (SEARCH, {"img_idx": 7}), (SEARCH, {"img_idx": 0})]
    _, looking, served = looked(calls, "A lynx", search=search)
    assert asked == [PICTURE, PICTURE]
    assert [look.error and look.error[:7] for look in looking.looks] == [None, "img_idx", "img_idx", None]
    assert looking.looks[3].shown == (OTHER,) and looking.pictures == [PICTURE, OTHER]
    assert pictures_of(served[1].messages[-1]) == [OTHER]
    assert [tool.name for tool in served[0].tools] == [ZOOM, SEARCH]


@pytest.mark.parametrize("face", [in_threads, in_a_loop])
def test_what_search_raises_ends_it(face: Callable[[str, Looking], Reply]) -> None:
    def search(picture: bytes) -> str:
        raise RuntimeError("no network")

    looking = Looking(generate_request("What?", images=[PICTURE]), search=search)
    with running(lambda: Model(answers=([(SEARCH, {"img_idx": 0})],))) as (address, _), pytest.raises(RuntimeError):
        face(address, looking)


def test_rounds_are_bounded() -> None:
    again: Answer = [(ZOOM, {"bbox_2d": [0, 0, 500, 500]})]
    reply, looking, calls = looked(again, again, "42", max_rounds=3)
    assert reply.text == "42" and len(looking.looks) == 2
    assert [call.tool_choice.mode for call in calls] == [ToolMode.AUTO, ToolMode.AUTO, ToolMode.NONE]
    reply, looking, calls = looked(again, max_rounds=1)
    assert len(reply.tool_calls) == 1 and looking.looks == []


def test_calls_of_other_tools_are_the_callers() -> None:
    reply, looking, _ = looked([(ZOOM, {"bbox_2d": [0, 0, 500, 500]}), ("weather", {})])
    assert [call.name for call in reply.tool_calls] == [ZOOM, "weather"] and looking.request is None
    reply, _, _ = looked([(SEARCH, {"img_idx": 0})])
    assert len(reply.tool_calls) == 1


def test_calls_that_were_cut_off_are_not_carried_out() -> None:
    looking = Looking(generate_request("What?", images=[PICTURE]))
    service = Model(answers=([(ZOOM, '{"bbox_2d": [0, 0')],), ending=FinishReason.LENGTH)
    with running(lambda: service) as (address, _):
        assert in_threads(address, looking).finish_reason == "length"
    assert looking.looks == []


def test_a_tool_the_request_declares_is_offered_as_it_is() -> None:
    own = {"type": "function", "function": {"name": ZOOM, "description": "Mine."}}
    request = generate_request("What?", images=[PICTURE], tools=[own])
    looking = Looking(request)
    assert looking.request is not None and [tool.description for tool in looking.request.tools] == ["Mine."]
    assert looking.request is not request and len(request.tools) == 1


@pytest.mark.parametrize(
    ("request_", "wrong"),
    [
        (generate_request("What?"), "no picture"),
        (generate_request("What?", images=["https://a/b.png"]), r"messages\[0\].parts\[0\]: .* by its URL"),
        (generate_request("What?", images=["data:image/png;base64,!"]), "not valid base64"),
        (generate_request("What?", images=[PICTURE], n=2), "choice_count"),
    ],
)
def test_what_cannot_be_looked_at(request_: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Looking(request_)


def test_what_is_no_picture() -> None:
    with pytest.raises(OSError):
        Looking(generate_request(user_message("What?", images=[b"no picture"])))
