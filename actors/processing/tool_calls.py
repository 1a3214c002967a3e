"""Streaming parser of tool calls in an answer.

    answer := text? ( "<tool_call>" space object space "</tool_call>" text? )*
    object := {"name": a string, "arguments": an object}          in any order, other members are ignored

* A block is a call once its name is known and its arguments have begun, or once it is a whole object with a name and no
  arguments, which means none. From there on it stays one: what the model writes of the arguments is passed on as it is,
  also where it breaks off or is no JSON. A call that is never closed ends with the output, or where its object has
  ended and something else follows.
* Any other block is text, marker and all: no JSON, no name, arguments that are no object. A marker inside such a block
  may begin a call.
* Text may stand before, between and behind calls, unless calls must lead: then everything behind text is text.
  Whitespace that only separated calls from it is dropped at its start and its end.

vLLM's ernie45 parser reads the same calls. It differs where a block is no call: there one bad block makes all of them
text, and text behind a call is lost; and it passes arguments on only when the block is closed.

The result is the same however the text is cut into pushes. Nothing that was given out is taken back, and only what may
still become a marker or a call is held.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterable
from dataclasses import replace

from actors.processing.json_scanner import JSON_SPACE, JsonScanner
from actors.processing.parsers import prefix_at_end
from actors.types import ToolCallDelta

OPEN_CALL = "<tool_call>"
CLOSE_CALL = "</tool_call>"


class _State(enum.Enum):
    TEXT = enum.auto()
    OBJECT = enum.auto()
    """Inside a block, which may yet turn out to be text."""
    BEHIND_OBJECT = enum.auto()
    """Inside a call whose object has ended."""
    BROKEN = enum.auto()
    """Inside a call that is no JSON any more: everything up to the next marker."""
    FULL = enum.auto()
    """As many calls as may be: what follows is dropped."""
    PLAIN = enum.auto()
    """Behind text where calls must lead: no more calls."""


class _Block:
    """What is known of the object in a block."""

    def __init__(self) -> None:
        self.scanner = JsonScanner()
        self.name: str | None = None
        self.arguments = ""
        """What was read of them and not given out."""
        self.arguments_ended = False
        self._member: str | None = None
        self._value: list[str] = []

    def push(self, character: str) -> bool:
        """False: this is no call, or no JSON any more."""
        scanner = self.scanner
        begins = scanner.depth == 1 and scanner.wants_value and character not in JSON_SPACE
        if not scanner.push(character):
            return False
        if begins:
            self._member, self._value = self._wanted(scanner.key), []
            opening = {"name": '"', "arguments": "{"}.get(self._member or "", character)
            if character != opening:
                return False
        if self._member == "arguments":
            self.arguments += character
        elif self._member == "name":
            self._value.append(character)
        if self._member is not None and scanner.depth == 1 and scanner.behind_value:
            return self._end_member()
        return True

    @property
    def begun(self) -> bool:
        """Enough is known to tell of a call."""
        return self.name is not None and (bool(self.arguments) or self.scanner.done)

    def take_arguments(self) -> str:
        text, self.arguments = self.arguments, ""
        return text

    def _wanted(self, key: str) -> str | None:
        """The first of each counts."""
        if key == "name" and self.name is None:
            return key
        if key == "arguments" and not self.arguments and not self.arguments_ended:
            return key
        return None

    def _end_member(self) -> bool:
        member, self._member = self._member, None
        if member == "arguments":
            self.arguments_ended = True
            return True
        self.name = json.loads("".join(self._value))
        return bool(self.name) and _is_text(self.name)


class ToolCallParser:
    """Splits an answer into text and calls. Not shared between threads.

    Args:
        new_id: makes the id of a call, a new one each time.
        most: calls after which the answer is over; None for any number.
        leading: only what stands before all text is a call; behind text everything is text.
    """

    def __init__(self, new_id: Callable[[], str], *, most: int | None = None, leading: bool = False) -> None:
        self._new_id = new_id
        self._most = most
        self._leading = leading
        self._state = _State.TEXT
        self._held = ""
        self._block = _Block()
        self._scanned = 0
        """Characters of what is held that the block has read."""
        self._told = False
        """The block is a call that the client knows of."""
        self._space = ""
        self._wrote = False
        self._text: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self.count = 0
        """Calls begun."""

    @property
    def unfinished(self) -> bool:
        """The last call's arguments have begun and not ended."""
        return self._told and not self._block.arguments_ended

    @property
    def full(self) -> bool:
        """``most`` calls have ended."""
        return self._state is _State.FULL

    def push(self, text: str) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """Certain deltas of text and of calls, one per call."""
        self._held += text
        return self._drain(final=False)

    def flush(self) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """What was held back, at the end of the output."""
        return self._drain(final=True)

    def _drain(self, *, final: bool) -> tuple[str, tuple[ToolCallDelta, ...]]:
        while self._step(final=final):
            pass
        if final and not self.count:
            self._text.append(self._space)
            self._space = ""
        text, deltas = "".join(self._text), joined(self._deltas)
        self._text, self._deltas = [], []
        return text, deltas

    def _step(self, *, final: bool) -> bool:
        """Consumes held text in one state. False: more text is needed."""
        match self._state:
            case _State.TEXT:
                return self._read_text(final)
            case _State.OBJECT:
                return self._read_object(final)
            case _State.BEHIND_OBJECT:
                return self._read_end(final)
            case _State.BROKEN:
                return self._read_broken(final)
            case _State.FULL:
                self._held = ""
                return False
            case _State.PLAIN:
                self._write(self._held)
                self._held = ""
                return False

    def _read_text(self, final: bool) -> bool:
        text, found, rest = self._held.partition(OPEN_CALL)
        keep = 0 if final or found else prefix_at_end(text, OPEN_CALL)
        if self._leading and (self._wrote or text[: len(text) - keep].strip(JSON_SPACE)):
            self._state = _State.PLAIN
            return True
        if found:
            self._write(text)
            self._held = rest
            self._block, self._scanned, self._told = _Block(), 0, False
            self._state = _State.OBJECT
            return True
        self._write(text[: len(text) - keep])
        self._held = text[len(text) - keep :]
        return False

    def _read_object(self, final: bool) -> bool:
        block = self._block
        while self._scanned < len(self._held) and not block.scanner.done:
            if not block.push(self._held[self._scanned]):
                return self._leave_object()
            self._scanned += 1
            self._tell()
        if block.scanner.done:
            if not self._told:
                return self._leave_object()
            self._held = self._held[self._scanned :]
            self._state = _State.BEHIND_OBJECT
            return True
        if self._told:
            self._held, self._scanned = "", 0
        elif final:
            return self._leave_object()
        return False

    def _tell(self) -> None:
        block = self._block
        if not self._told and block.begun:
            assert block.name is not None
            if block.scanner.done and not block.arguments_ended:
                block.arguments, block.arguments_ended = "{}", True
            self._told = True
            self._deltas.append(ToolCallDelta(index=self.count, id=self._new_id(), name=block.name))
            self.count += 1
        if self._told and block.arguments:
            self._deltas.append(ToolCallDelta(index=self.count - 1, arguments=block.take_arguments()))

    def _leave_object(self) -> bool:
        """The block is no call, or the call no JSON."""
        if self._told:
            self._held = self._held[self._scanned :]
            self._state = _State.BROKEN
        else:
            self._write(OPEN_CALL)
            self._state = _State.TEXT
        return True

    def _read_end(self, final: bool) -> bool:
        rest = self._held.lstrip(JSON_SPACE)
        if not rest.startswith(CLOSE_CALL) and CLOSE_CALL.startswith(rest) and not final:
            return False
        self._held = rest.removeprefix(CLOSE_CALL)
        return self._end_call()

    def _read_broken(self, final: bool) -> bool:
        at = min((at for marker in (OPEN_CALL, CLOSE_CALL) if (at := self._held.find(marker)) >= 0), default=-1)
        if at >= 0:
            self._write_broken(self._held[:at].rstrip(JSON_SPACE))
            self._held = self._held[at:].removeprefix(CLOSE_CALL)
            self._block.arguments_ended = True
            return self._end_call()
        keep = 0 if final else max(prefix_at_end(self._held, marker) for marker in (OPEN_CALL, CLOSE_CALL))
        certain = self._held[: len(self._held) - keep].rstrip(JSON_SPACE)
        self._write_broken(certain)
        self._held = "" if final else self._held[len(certain) :]
        return False

    def _write_broken(self, text: str) -> None:
        if text and not self._block.arguments_ended:
            self._deltas.append(ToolCallDelta(index=self.count - 1, arguments=text))

    def _end_call(self) -> bool:
        self._told = False
        self._state = _State.FULL if self.count == self._most else _State.TEXT
        return True

    def _write(self, text: str) -> None:
        """Holds whitespace at the end back until more text shows that it is not the end."""
        text = self._space + text
        certain = text.rstrip(JSON_SPACE)
        self._space = text[len(certain) :]
        if certain:
            self._text.append(certain.lstrip(JSON_SPACE) if self.count and not self._wrote else certain)
            self._wrote = True


def joined(deltas: Iterable[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    """One delta per call, the pieces of its arguments put together."""
    found: dict[int, ToolCallDelta] = {}
    for delta in deltas:
        before = found.get(delta.index)
        found[delta.index] = delta if before is None else replace(before, arguments=before.arguments + delta.arguments)
    return tuple(found.values())


def _is_text(text: str) -> bool:
    """Whether it can be sent: an escape may spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
