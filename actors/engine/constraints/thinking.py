"""Where an output is with respect to its thinking, and what it may write there.

    OPENING ----> THINKING ----> CLOSING ----> SEPARATORS ----> ANSWER
       |             +--------------^-------------^               ^
       +----------------------------------------------------------+

* OPENING: the prompt left no think block open, and the output may still begin with ``<think>`` of its own. Only without
  a structure, which begins at once.
* THINKING: at most ``budget`` tokens. ``</think>`` counts as text, as the parsers of replies read it: spelt by other
  tokens it closes too, except before a structure, where other tokens cannot spell it.
* CLOSING: the budget is used up. Token by token the frame of the templates is forced: a newline (or what lacks of an
  empty line, if nothing was thought), ``</think>``, an empty line.
* SEPARATORS: before a structure, newlines that parsers drop. What belongs to the structure begins with none.

The state follows from the prompt and the outputs alone.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from actors.engine.constraints.constraint import PackedMask
from actors.engine.constraints.vocabulary import (
    CLOSING_MARKER,
    MAX_SEPARATORS,
    OPENING_MARKER,
    ConstraintVocabulary,
    ThinkTokens,
)


class Phase(enum.Enum):
    OPENING = enum.auto()
    THINKING = enum.auto()
    CLOSING = enum.auto()
    SEPARATORS = enum.auto()
    ANSWER = enum.auto()


class Thinking:
    """One output's. ``vocabulary.think`` must not be None.

    Args:
        prompt_ids: end inside an open think block if ``starts_thinking``.
        budget: most tokens before the closing; None leaves it to the model.
        ends: ids that end the sequence: not to be drawn before ``structured`` answers.
    """

    def __init__(
        self,
        vocabulary: ConstraintVocabulary,
        prompt_ids: Sequence[int],
        *,
        starts_thinking: bool,
        budget: int | None,
        structured: bool,
        ends: Sequence[int],
    ) -> None:
        if vocabulary.think is None:
            raise ValueError("the vocabulary has no think tokens")
        self._vocabulary = vocabulary
        self._tokens: ThinkTokens = vocabulary.think
        self._budget = budget
        self._structured = structured
        self._free_W = vocabulary.all_W & ~vocabulary.pack(ends) & ~vocabulary.completing_W[0]
        self._text = b""
        """OPENING: all so far. THINKING: newlines while there is nothing else, then the last characters."""
        self._count = 0
        self._forced: list[int] = []
        self._separators = MAX_SEPARATORS
        self.phase = Phase.OPENING
        if starts_thinking:
            self._begin(_since(prompt_ids, self._tokens.open_id, vocabulary))
        elif structured:
            self.phase = Phase.ANSWER

    def allowed(self) -> PackedMask | None:
        """Row of bits in phases other than ANSWER and SEPARATORS; None: everything."""
        if self.phase is Phase.CLOSING:
            return self._vocabulary.pack(self._forced[:1])
        if self.phase is not Phase.THINKING or not self._structured:
            return None
        row_W = self._free_W
        for done in range(1, len(CLOSING_MARKER)):
            if self._text.endswith(CLOSING_MARKER[:done]):
                row_W = row_W & ~self._vocabulary.completing_W[done]
        return row_W

    def with_separators(self, structure_W: PackedMask) -> PackedMask:
        """SEPARATORS: newlines, or the structure's first token."""
        vocabulary = self._vocabulary
        return (structure_W & ~vocabulary.newline_first_W) | vocabulary.newlines_W[self._separators]

    def accept(self, token: int) -> bool:
        """Whether the token belongs to the answer."""
        match self.phase:
            case Phase.OPENING:
                self._open(token)
            case Phase.THINKING:
                self._think(token)
            case Phase.CLOSING:
                self._close(token)
            case Phase.SEPARATORS:
                text = self._vocabulary.text((token,))
                if text.strip(b"\n") or len(text) > self._separators:
                    self.phase = Phase.ANSWER
                else:
                    self._separators -= len(text)
            case Phase.ANSWER:
                pass
        return self.phase is Phase.ANSWER

    def _open(self, token: int) -> None:
        self._text += self._vocabulary.text((token,))
        text = self._text.lstrip(b"\n")
        if text.startswith(OPENING_MARKER):
            self._begin(text[len(OPENING_MARKER) :])
        elif not OPENING_MARKER.startswith(text):
            self.phase = Phase.ANSWER

    def _begin(self, written: bytes) -> None:
        self.phase = Phase.THINKING
        self._text = written
        self._check_budget()

    def _think(self, token: int) -> None:
        self._count += 1
        self._text += self._vocabulary.text((token,))
        if CLOSING_MARKER in self._text:
            self.phase = Phase.SEPARATORS if self._structured else Phase.ANSWER
            return
        if self._text.strip(b"\n"):
            self._text = self._text[1 - len(CLOSING_MARKER) :]
        self._check_budget()

    def _check_budget(self) -> None:
        if self._budget is None or self._count < self._budget:
            return
        if self._text.strip(b"\n"):
            before = () if self._text.endswith(b"\n") else self._tokens.newline
        else:
            before = (self._tokens.blank_line, self._tokens.newline, ())[min(2, len(self._text))]
        self._forced = [*before, self._tokens.close_id, *self._tokens.blank_line]
        self.phase = Phase.CLOSING

    def _close(self, token: int) -> None:
        if token != self._forced[0] and self._tokens.close_id in self._forced:
            # Replayed from where the budget was not watched.
            self.phase = Phase.THINKING
            self._think(token)
            return
        del self._forced[0]
        if not self._forced:
            self._separators = 0
            self.phase = Phase.SEPARATORS if self._structured else Phase.ANSWER


def _since(prompt_ids: Sequence[int], marker: int | None, vocabulary: ConstraintVocabulary) -> bytes:
    """What the prompt writes behind its last ``<think>``; nothing if it has none."""
    for at in range(len(prompt_ids) - 1, -1, -1):
        if prompt_ids[at] == marker:
            return vocabulary.text(prompt_ids[at + 1 :])
    return b""
