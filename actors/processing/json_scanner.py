"""Reads one JSON object a character at a time: whether what came so far can still become one, and where it stands."""

from __future__ import annotations

import enum
import json

JSON_SPACE = " \t\n\r"
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_HEX = frozenset("0123456789abcdefABCDEF")
_DIGITS = frozenset("0123456789")


class _Want(enum.Enum):
    OBJECT = enum.auto()
    """The first character: nothing but an object is read."""
    VALUE = enum.auto()
    VALUE_OR_END = enum.auto()
    KEY = enum.auto()
    KEY_OR_END = enum.auto()
    COLON = enum.auto()
    COMMA_OR_END = enum.auto()
    STRING = enum.auto()
    ESCAPE = enum.auto()
    HEX = enum.auto()
    LITERAL = enum.auto()
    NUMBER = enum.auto()
    NOTHING = enum.auto()
    """The object has ended."""


class _Number(enum.Enum):
    """What was read last of a number."""

    MINUS = enum.auto()
    ZERO = enum.auto()
    INTEGER = enum.auto()
    POINT = enum.auto()
    FRACTION = enum.auto()
    E = enum.auto()
    SIGN = enum.auto()
    EXPONENT = enum.auto()

    def next(self, character: str) -> _Number | None:
        """None: the number does not go on with that."""
        kind = "digit" if character in _DIGITS else "e" if character in "eE" else character
        if self is _Number.MINUS and character == "0":
            return _Number.ZERO
        return _NUMBERS[self].get(kind)


_NUMBERS: dict[_Number, dict[str, _Number]] = {
    _Number.MINUS: {"digit": _Number.INTEGER},
    _Number.ZERO: {".": _Number.POINT, "e": _Number.E},
    _Number.INTEGER: {"digit": _Number.INTEGER, ".": _Number.POINT, "e": _Number.E},
    _Number.POINT: {"digit": _Number.FRACTION},
    _Number.FRACTION: {"digit": _Number.FRACTION, "e": _Number.E},
    _Number.E: {"digit": _Number.EXPONENT, "+": _Number.SIGN, "-": _Number.SIGN},
    _Number.SIGN: {"digit": _Number.EXPONENT},
    _Number.EXPONENT: {"digit": _Number.EXPONENT},
}
_WHOLE_NUMBERS = (_Number.ZERO, _Number.INTEGER, _Number.FRACTION, _Number.EXPONENT)


class JsonScanner:
    """State of one object. A character costs the same however long the object is."""

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._want = _Want.OBJECT
        self._is_key = False
        self._key: list[str] = []
        self._missing = ""
        """What is left of a literal, or so many digits of an escape."""
        self._number = _Number.MINUS
        self.key = ""
        """The last key of the outer object, as it reads."""

    @property
    def depth(self) -> int:
        """Objects and arrays that are open."""
        return len(self._stack)

    @property
    def done(self) -> bool:
        return self._want is _Want.NOTHING

    @property
    def wants_value(self) -> bool:
        """A value begins with the next character that is no space."""
        return self._want is _Want.VALUE

    @property
    def behind_value(self) -> bool:
        """A string, literal, object or array has ended and nothing came behind it but space. Where a number ends is
        only known by what comes behind it."""
        return self._want in (_Want.COMMA_OR_END, _Want.NOTHING)

    def push(self, character: str) -> bool:
        """False: no JSON object reads so. The scanner must not be used after that."""
        match self._want:
            case _Want.STRING:
                return self._in_string(character)
            case _Want.ESCAPE:
                return self._escaped(character)
            case _Want.HEX:
                return self._hex(character)
            case _Want.LITERAL:
                return self._literal(character)
            case _Want.NUMBER if (number := self._number.next(character)) is not None:
                self._number = number
                return True
            case _Want.NUMBER:
                if self._number not in _WHOLE_NUMBERS:
                    return False
                self._want = _Want.COMMA_OR_END
        return character in JSON_SPACE or self._structural(character)

    def _structural(self, character: str) -> bool:
        match self._want, character:
            case ((_Want.OBJECT | _Want.VALUE | _Want.VALUE_OR_END), "{"):
                self._stack.append("}")
                self._want = _Want.KEY_OR_END
            case ((_Want.VALUE | _Want.VALUE_OR_END), "["):
                self._stack.append("]")
                self._want = _Want.VALUE_OR_END
            case ((_Want.VALUE | _Want.VALUE_OR_END), _) if character != "]":
                return self._scalar(character)
            case ((_Want.KEY | _Want.KEY_OR_END), '"'):
                self._is_key = True
                self._key = []
                self._want = _Want.STRING
            case _Want.COLON, ":":
                self._want = _Want.VALUE
            case _Want.COMMA_OR_END, ",":
                self._want = _Want.KEY if self._stack[-1] == "}" else _Want.VALUE
            case ((_Want.KEY_OR_END | _Want.VALUE_OR_END | _Want.COMMA_OR_END), _) if character == self._stack[-1]:
                self._stack.pop()
                self._want = _Want.COMMA_OR_END if self._stack else _Want.NOTHING
            case _:
                return False
        return True

    def _scalar(self, character: str) -> bool:
        if character == '"':
            self._is_key = False
            self._want = _Want.STRING
        elif character in _LITERALS:
            self._missing = _LITERALS[character][1:]
            self._want = _Want.LITERAL
        elif character == "-":
            self._number = _Number.MINUS
            self._want = _Want.NUMBER
        elif character in _DIGITS:
            self._number = _Number.ZERO if character == "0" else _Number.INTEGER
            self._want = _Want.NUMBER
        else:
            return False
        return True

    def _in_string(self, character: str) -> bool:
        if character < " ":
            return False
        if character == '"':
            self._end_string()
            return True
        self._keep(character)
        if character == "\\":
            self._want = _Want.ESCAPE
        return True

    def _escaped(self, character: str) -> bool:
        if character not in '"\\/bfnrtu':
            return False
        self._keep(character)
        self._missing = "0000" if character == "u" else ""
        self._want = _Want.HEX if character == "u" else _Want.STRING
        return True

    def _hex(self, character: str) -> bool:
        if character not in _HEX:
            return False
        self._keep(character)
        self._missing = self._missing[1:]
        if not self._missing:
            self._want = _Want.STRING
        return True

    def _literal(self, character: str) -> bool:
        if character != self._missing[0]:
            return False
        self._missing = self._missing[1:]
        if not self._missing:
            self._want = _Want.COMMA_OR_END
        return True

    def _keep(self, character: str) -> None:
        if self._is_key and self.depth == 1:
            self._key.append(character)

    def _end_string(self) -> None:
        if not self._is_key:
            self._want = _Want.COMMA_OR_END
            return
        if self.depth == 1:
            self.key = json.loads(f'"{"".join(self._key)}"')
        self._want = _Want.COLON
