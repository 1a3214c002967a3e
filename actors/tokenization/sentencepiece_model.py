"""Reads a SentencePiece ``tokenizer.model``: a ModelProto, of which only what cuts and joins text is kept.

The wire format is read by hand: a dozen fields need no generated code, and the sentencepiece package is no dependency.
Field numbers and defaults are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn


class PieceType(enum.IntEnum):
    """What a piece is for. Only normal, user-defined and unused ones ever match text."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelType(enum.IntEnum):
    """How text is cut."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its index."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, kw_only=True, slots=True)
class SentencePieceModel:
    """A model file. The flags have the meaning of the fields of that name in trainer_spec and normalizer_spec."""

    pieces: tuple[Piece, ...]
    model_type: ModelType = ModelType.UNIGRAM
    byte_fallback: bool = False
    treat_whitespace_as_suffix: bool = False
    precompiled_charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    denormalizes: bool = False
    """Decoded text is rewritten by a map of its own."""


def read_model(content: bytes) -> SentencePieceModel:
    """Raises ValueError for what is no ModelProto."""
    pieces: list[Piece] = []
    settings: dict[str, bool | bytes | ModelType] = {}
    try:
        for number, value in _fields(content):
            if number == 1:
                pieces.append(_piece(_message(value)))
            elif number == 2:
                settings |= _trainer(_message(value))
            elif number == 3:
                settings |= _normalizer(_message(value))
            elif number == 5:
                settings["denormalizes"] = bool(_normalizer(_message(value)).get("precompiled_charsmap"))
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"not a SentencePiece model: {error}") from None
    if not pieces:
        raise ValueError("not a SentencePiece model: it has no pieces")
    return SentencePieceModel(pieces=tuple(pieces), **settings)  # type: ignore[arg-type]


def _piece(content: bytes) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(content):
        if number == 1:
            text = _message(value).decode()
        elif number == 2:
            score = struct.unpack("<f", _message(value))[0]
        elif number == 3:
            kind = _integer(value)
    return Piece(text=text, score=score, type=PieceType(kind))


def _trainer(content: bytes) -> dict[str, bool | ModelType]:
    found: dict[str, bool | ModelType] = {}
    for number, value in _fields(content):
        if number == 3:
            found["model_type"] = ModelType(_integer(value))
        elif number == 24:
            found["treat_whitespace_as_suffix"] = bool(_integer(value))
        elif number == 35:
            found["byte_fallback"] = bool(_integer(value))
    return found


_NORMALIZER_FLAGS = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}


def _normalizer(content: bytes) -> dict[str, bool | bytes]:
    found: dict[str, bool | bytes] = {}
    for number, value in _fields(content):
        if number == 2:
            found["precompiled_charsmap"] = _message(value)
        elif number in _NORMALIZER_FLAGS:
            found[_NORMALIZER_FLAGS[number]] = bool(_integer(value))
    return found


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value): an integer for varints, the bytes of anything else."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(content, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"not a SentencePiece model: wire type {kind}")
        if at + size > len(content):
            raise IndexError("it is cut off")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError("a number has no end")


def _message(value: int | bytes) -> bytes:
    return value if isinstance(value, bytes) else _wrong()


def _integer(value: int | bytes) -> int:
    return value if isinstance(value, int) else _wrong()


def _wrong() -> NoReturn:
    raise ValueError("not a SentencePiece model: a field has another type")
