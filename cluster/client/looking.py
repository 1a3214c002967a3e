"""Thinking with images: carries out the tools with which a model looks closer at the pictures of a conversation.

    looking = Looking(generate_request("What does the sign say?", images=["street.jpg"]))
    reply = look(client, looking)  # or: await look_async(client, looking)

Nothing is built into the server: tools are declared in the request, the model calls them, and the client answers with
pictures in ``tool`` messages, which the server numbers on ("Picture 2: ..."). The tools:

``image_zoom_in_tool(bbox_2d, label?, img_idx?)``
    Cuts out a part. ``bbox_2d`` is x1, y1, x2, y2 in thousandths of the sides of the picture as it was sent, whatever
    size the model saw it in. Without ``img_idx`` that is the last picture the caller gave, never a part that was cut
    out before; ``img_idx`` counts all pictures of the conversation, parts too, from 0 ("Picture 1" is 0), and is
    offered only where there are several. Corners outside are moved to the edge; small parts are enlarged.
``image_search(img_idx)``
    Hands a picture to the caller's ``search``.

Arguments that make no sense are answered to the model with what is wrong: it may try again. Videos are not looked into.
Needs pillow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.boxes import LARGEST, SCALE, LabelledBox
from cluster.client.aio import AsyncClient
from cluster.client.events import FinishReason, Reply, ToolCall, reply_of
from cluster.client.media import Media, picture_bytes
from cluster.client.requests import declared_tool, reply_message, tool_message
from cluster.client.sync import Client
from cluster.pictures import crop, enlarged, open_upright, png
from ernie_serving.v1 import content_pb2, inference_pb2

ZOOM = "image_zoom_in_tool"
SEARCH = "image_search"
MAX_ROUNDS = 8
_BOX = {"type": "array", "items": {"type": "number"}}
_IMG_IDX = {"type": "integer", "description": "Which picture of the conversation, from 0."}


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a search came back with."""

    text: str = ""
    images: tuple[Media, ...] = ()


Search = Callable[[bytes], Found | str]
"""From an encoded picture to what is known about it. What it raises ends the conversation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """A call that was carried out, or whose arguments made no sense (``error`` says why; the model was told).

    ``picture`` is the index of the picture it refers to, ``box`` the part that was cut out, ``shown`` what the model
    sees.
    """

    call: ToolCall
    picture: int | None = None
    box: LabelledBox | None = None
    shown: tuple[bytes, ...] = ()
    error: str | None = None


class Looking:
    """The conversation that follows a request: what to send next, and what came of it.

    ``search`` offers ``image_search``. A tool the request itself declares under one of these names is offered as it is
    declared there. After ``max_rounds`` - 1 rounds of calls the model must answer without tools. Calls of other tools
    end it: they are the caller's.

    Raises:
        ValueError: the request has several choices, no picture, or one of its pictures is a URL, whose bytes are not at
            hand.
        OSError: a picture is none.
    """

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        *,
        search: Search | None = None,
        max_rounds: int = MAX_ROUNDS,
    ) -> None:
        if request.choice_count > 1:
            raise ValueError("choice_count: looking closer needs a single choice")
        if max_rounds < 1:
            raise ValueError(f"max_rounds must be at least 1, it is {max_rounds}")
        self._request = inference_pb2.GenerateRequest()
        self._request.CopyFrom(request)
        self._search = search
        self._rounds_left = max_rounds
        self._pictures: list[bytes] = []
        self._given = -1
        for index, message in enumerate(request.messages):
            for place, part in enumerate(message.parts):
                if part.HasField("image"):
                    if message.role != content_pb2.ROLE_TOOL:
                        self._given = len(self._pictures)
                    self._pictures.append(picture_bytes(part.image.source, f"messages[{index}].parts[{place}]"))
        if self._given < 0:
            raise ValueError("messages: there is no picture to look at")
        for content in self._pictures:
            open_upright(content)
        self._own = {ZOOM} | ({SEARCH} if search is not None else set())
        declared = {tool.name for tool in request.tools}
        for tool in tools(several=len(self._pictures) > 1, search=search is not None):
            if tool["function"]["name"] not in declared:
                self._request.tools.append(declared_tool(tool))
        self.looks: list[Look] = []
        """All calls so far, in their order."""
        self.reply: Reply | None = None
        """The last reply."""
        self._ended = False
        self._bound()

    @property
    def request(self) -> inference_pb2.GenerateRequest | None:
        """What to send next; None at the end."""
        return None if self._ended else self._request

    @property
    def pictures(self) -> list[bytes]:
        """All pictures of the conversation, those that were shown on calls too."""
        return list(self._pictures)

    @property
    def messages(self) -> list[content_pb2.ChatMessage]:
        """The conversation so far, calls and what they showed included, to be gone on with."""
        last = [reply_message(self.reply)] if self._ended and self.reply is not None else []
        return [*self._request.messages, *last]

    def take(self, reply: Reply) -> list[Look]:
        """Carries out what a reply asks for and prepares the next request. Returns the new looks."""
        self.reply = reply
        self._rounds_left -= 1
        calls = reply.tool_calls
        theirs = any(call.name not in self._own for call in calls)
        if self._rounds_left <= 0 or reply.finish_reason is not FinishReason.TOOL_CALLS or theirs:
            self._ended = True
            return []
        self._request.messages.append(reply_message(reply))
        looks = []
        for call in calls:
            look, message = self._answer(call)
            looks.append(look)
            self._request.messages.append(message)
        self.looks += looks
        self._bound()
        return looks

    def _bound(self) -> None:
        if self._rounds_left == 1:
            self._request.tool_choice.mode = inference_pb2.TOOL_CHOICE_MODE_NONE

    def _answer(self, call: ToolCall) -> tuple[Look, content_pb2.ChatMessage]:
        try:
            arguments = call.parsed()
            return self._zoom(call, arguments) if call.name == ZOOM else self._find(call, arguments)
        except ValueError as error:
            return Look(call=call, error=str(error)), tool_message(call, f"Error: {error}")

    def _zoom(self, call: ToolCall, arguments: Mapping[str, Any]) -> tuple[Look, content_pb2.ChatMessage]:
        picture = self._index(arguments.get("img_idx", self._given))
        label = arguments.get("label")
        corners = _corners(arguments.get("bbox_2d"))
        part = enlarged(crop(open_upright(self._pictures[picture]), corners))
        content = png(part)
        self._pictures.append(content)
        box = LabelledBox(corners, label if isinstance(label, str) else "")
        return Look(call=call, picture=picture, box=box, shown=(content,)), tool_message(call, images=[content])

    def _find(self, call: ToolCall, arguments: Mapping[str, Any]) -> tuple[Look, content_pb2.ChatMessage]:
        if "img_idx" not in arguments:
            raise ValueError("img_idx is required")
        picture = self._index(arguments["img_idx"])
        assert self._search is not None
        found = self._search(self._pictures[picture])
        if isinstance(found, str):
            found = Found(text=found)
        message = tool_message(call, found.text, images=found.images)
        shown = tuple(
            picture_bytes(part.image.source, "what search returned") for part in message.parts if part.HasField("image")
        )
        self._pictures += shown
        return Look(call=call, picture=picture, shown=shown), message

    def _index(self, value: object) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(self._pictures):
            raise ValueError(f"img_idx must be a whole number from 0 to {len(self._pictures) - 1}")
        return value


def tools(*, several: bool = False, search: bool = False) -> list[dict[str, Any]]:
    """The tools as a request declares them, in OpenAI's form: for one picture or several, with search or without."""
    which = {"img_idx": _IMG_IDX} if several else {}
    zoom = {"bbox_2d": _BOX, "label": {"type": "string"}, **which}
    listed = [_declared(ZOOM, "Zooms into a part of a picture.", zoom, ["bbox_2d"])]
    if search:
        listed.append(_declared(SEARCH, "Searches for what a picture shows.", {"img_idx": _IMG_IDX}, ["img_idx"]))
    return listed


def _declared(name: str, description: str, properties: Mapping[str, Any], required: Iterable[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": dict(properties), "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _corners(value: object) -> tuple[float, float, float, float]:
    """Four numbers, moved inside. Raises ValueError."""
    if isinstance(value, list) and len(value) == 4:
        numbers = [n for n in value if isinstance(n, int | float) and not isinstance(n, bool) and abs(n) <= LARGEST]
        if len(numbers) == 4:
            x1, y1, x2, y2 = (min(SCALE, max(0, n)) for n in numbers)
            return x1, y1, x2, y2
    raise ValueError(f"bbox_2d must be four numbers from 0 to {SCALE}: x1, y1, x2, y2")


def look(client: Client, looking: Looking) -> Reply:
    """Asks until the model has answered. Each round may take the request's own ``timeout``."""
    while (request := looking.request) is not None:
        looking.take(reply_of(client.generate(request)))
    assert looking.reply is not None
    return looking.reply


async def look_async(client: AsyncClient, looking: Looking) -> Reply:
    """``look`` for asyncio. ``search`` runs in a thread."""
    while (request := looking.request) is not None:
        await asyncio.to_thread(looking.take, reply_of(await client.generate(request)))
    assert looking.reply is not None
    return looking.reply
