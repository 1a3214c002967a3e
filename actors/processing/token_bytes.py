"""What single tokens add to a text, in bytes: a token may be part of a character.

Three spellings of pieces are known, told apart by the tokenizer's own decoder: byte-level (each character of a piece
stands for a byte, the alphabet of GPT-2), byte fallback (``<0x0A>`` is a byte, a replacement character a space) and
plain text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def piece_reader(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    """``decoder``: of tokenizer.json. The bytes of an ordinary piece, as it reads in the middle of a text."""
    steps = list(_steps(decoder))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        byte_of = {character: byte for byte, character in enumerate(_byte_alphabet())}
        return lambda piece: _byte_level(piece, byte_of)
    replaced = [(step["pattern"]["String"], step["content"]) for step in steps if _replaces_string(step)]
    replaced += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
    falls_back = "ByteFallback" in kinds

    def read(piece: str) -> bytes:
        if falls_back and (match := _BYTE.fullmatch(piece)):
            return bytes([int(match.group(1), 16)])
        for old, new in replaced:
            piece = piece.replace(old, new)
        return piece.encode()

    return read


def _steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _replaces_string(step: Mapping[str, Any]) -> bool:
    return step["type"] == "Replace" and "String" in step["pattern"]


def _byte_level(piece: str, byte_of: Mapping[str, int]) -> bytes:
    """A piece outside the alphabet is text as it stands, which is how the decoder takes it."""
    found = [byte_of.get(character) for character in piece]
    return piece.encode() if None in found else bytes(byte for byte in found if byte is not None)


def _byte_alphabet() -> list[str]:
    """Printable Latin-1 characters stand for themselves, the other bytes in order for U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
