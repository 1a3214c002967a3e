"""Rows of a batch: a shared beginning, then branches that see the beginning and themselves.

Each branch takes the positions it would have if it alone followed the beginning, so a row trains exactly what separate
conversations would, and its pictures are seen once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from actors.checkpoint.tokens import BEGIN_OF_SENTENCE, END_OF_SENTENCE
from nano.files import documents, tokenizer_document
from nano.frames import Ints

BEGIN, SEP = BEGIN_OF_SENTENCE, END_OF_SENTENCE
END = "</s>"
NOT_THINKING = "<think>\n\n</think>\n\n"
ASSISTANT = "\nAssistant: "


@dataclass(frozen=True, slots=True)
class Media:
    """A picture or a clip in a prompt: its units (a picture has one) and their grid in tokens."""

    units: tuple[int, ...]
    grid: tuple[int, int]
    video: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """Text the model is to write; ``weight`` is the most that its tokens weigh together."""

    text: str
    weight: float = 8.0
    task: str = ""


Segment = str | Media | Answer


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_document()))


@functools.lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text, add_special_tokens=False).ids)


class Source(NamedTuple):
    """Where the embedding of a token comes from: a unit (-1 for delimiters) and a token of it; and what it is to know
    of its medium: frame pair, row and column where it lies, or how far the medium goes for the END (-1: nothing)."""

    unit: int
    token: int = 0
    place: tuple[int, int, int] = (-1, -1, -1)


@dataclass(slots=True)
class Piece:
    """Tokens of the beginning or of one branch."""

    ids: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    """Of the loss at predicting each token."""
    sources: list[Source | None] = field(default_factory=list)
    """None for text."""
    answers: list[tuple[int, int, str]] = field(default_factory=list)
    """First token, token after the last, and task of each answer."""
    end: int = 0


def piece(segments: Sequence[Segment], start: int = 0) -> Piece:
    """Tokens, positions and weights of adjacent segments; texts next to each other are tokenized as one."""
    special = documents().layout.special
    made, cur = Piece(), start

    def text(ids: Sequence[int], weight: float, source: Source | None = None) -> None:
        nonlocal cur
        for token in ids:
            made.ids.append(token)
            made.positions.append((cur, cur, cur))
            made.weights.append(weight)
            made.sources.append(source)
            cur += 1

    pending = ""
    for segment in segments:
        if isinstance(segment, str):
            pending += segment
            continue
        text(encode(pending), 0.0)
        pending = ""
        if isinstance(segment, Answer):
            ids = [token for part in split(segment.text) for token in encode(part)]
            made.answers.append((len(made.ids), len(made.ids) + len(ids), segment.task))
            text(ids, min(1.0, segment.weight / len(ids)))
            continue
        kind = "VIDEO" if segment.video else "IMAGE"
        text([special[f"<|{kind}_START|>"]], 0.0, Source(-1))
        rows, columns = segment.grid
        for t, unit in enumerate(segment.units):
            for i in range(rows * columns):
                made.ids.append(special[f"<|{kind}_PLACEHOLDER|>"])
                made.positions.append((cur + t, cur + i // columns, cur + i % columns))
                made.weights.append(0.0)
                made.sources.append(Source(unit, i, (t, i // columns, i % columns)))
        cur += max(len(segment.units), rows, columns)
        text([special[f"<|{kind}_END|>"]], 0.0, Source(-1, place=(len(segment.units) - 1, rows - 1, columns - 1)))
    text(encode(pending), 0.0)
    made.end = cur
    return made


def split(answer: str) -> list[str]:
    """Parts that a model writes with tokens of their own: around the end of the thought, and the end of the answer."""
    thought, mark, rest = answer.partition("</think>\n\n")
    return [*((thought, "</think>", "\n\n", rest) if mark else (thought,)), END]


@dataclass(slots=True)
class Row:
    """Pieces that fit into ``length`` tokens."""

    length: int
    pieces: list[Piece]

    @classmethod
    def begin(cls, length: int, segments: Sequence[Segment]) -> Row:
        return cls(length, [piece(segments)])

    @property
    def used(self) -> int:
        return sum(len(p.ids) for p in self.pieces)

    def add(self, segments: Sequence[Segment]) -> bool:
        """Adds a branch; False when it does not fit."""
        made = piece(segments, self.pieces[0].end)
        if self.used + len(made.ids) > self.length:
            return False
        self.pieces.append(made)
        return True


@dataclass(frozen=True, slots=True)
class RowBatch:
    ids: Ints
    positions: Ints
    branch: Ints
    targets: Ints
    """The token to predict at each place."""
    weights: npt.NDArray[np.float32]
    source: Ints
    slot: Ints
    places: Ints
    """int [V, 3]: what the token at each slot is to know (see Source)."""
    answers: list[tuple[int, int, int, str]]
    """Row, first place and place after the last at which an answer's tokens are predicted, and its task."""


def batch_rows(rows: Sequence[Row], tokens: int) -> RowBatch:
    """``tokens``: rows of each unit in the resampler's output."""
    length = rows[0].length
    shape = (len(rows), length)
    ids, branch = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    positions = np.zeros((*shape, 3), np.int64)
    targets, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    sources, slots, places, answers = [], [], [], []
    for r, row in enumerate(rows):
        place = 0
        for b, p in enumerate(row.pieces):
            n = len(p.ids)
            at = slice(place, place + n)
            ids[r, at], positions[r, at], branch[r, at] = p.ids, p.positions, b
            # The first token of a branch is never predicted, so shifting within the piece is enough.
            targets[r, place : place + n - 1] = p.ids[1:]
            weights[r, place : place + n - 1] = p.weights[1:]
            for i, source in enumerate(p.sources):
                if source is not None:
                    sources.append(-1 if source.unit < 0 else source.unit * tokens + source.token)
                    places.append(source.place)
                    slots.append(r * length + place + i)
            answers += [(r, place + first - 1, place + last - 1, task) for first, last, task in p.answers]
            place += n
    taken, slot, where = (np.array(x, dtype=np.int64) for x in (sources, slots, places))
    return RowBatch(ids, positions, branch, targets, weights, taken, slot, where, answers)
