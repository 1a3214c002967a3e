"""Token ids to text as they come, never cutting a character.

Text is settled once it ends in a whole character. Settled tokens are never decoded again; one fixed ordinary token
stands in for them, because all a decoder needs to know of the past is that this is not the start. So a push costs the
same at the end of a long answer as at its start.

The concatenated output equals ``TextTokenizer.decode`` of all ids whenever the ids spell valid UTF-8. Where they do not
(a model cut off inside a character, stray bytes), each piece that does is kept and the rest becomes U+FFFD.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.processing.tokenizer import TextTokenizer

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 32
"""Tokens held back at most. A character is four bytes; more than this only happens with bytes that are no text."""


class IncrementalDetokenizer:
    """State of one output. Not shared between threads."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor = _anchor(tokenizer)
        self._anchor_text = tokenizer.decode([self._anchor])
        self._pending: list[int] = []
        self._started = False

    def push(self, ids: Sequence[int]) -> str:
        """Text that is now certain, possibly empty."""
        return "".join(self._push_one(token_id) for token_id in ids)

    def flush(self) -> str:
        """What is held back, at the end of the output; an unfinished character shows as U+FFFD."""
        text = self._text()
        self._settle()
        return text

    def _push_one(self, token_id: int) -> str:
        if self._tokenizer.is_hidden(token_id):
            return ""
        self._pending.append(token_id)
        text = self._text()
        if text.endswith(_REPLACEMENT) and len(self._pending) < _MAX_PENDING:
            return ""
        self._settle()
        return text

    def _text(self) -> str:
        if not self._pending:
            return ""
        if not self._started:
            return self._tokenizer.decode(self._pending)
        return self._tokenizer.decode([self._anchor, *self._pending])[len(self._anchor_text) :]

    def _settle(self) -> None:
        self._started = self._started or bool(self._pending)
        self._pending.clear()


def _anchor(tokenizer: TextTokenizer) -> int:
    for text in ("a", "\u2581a", "A", "0", "."):
        token_id = tokenizer.token_id(text)
        if token_id is not None and not tokenizer.is_hidden(token_id):
            return token_id
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token_id).decode(errors="ignore")
        if text.strip() == text and text.isprintable() and text and not tokenizer.is_hidden(token_id):
            return token_id
    raise ValueError("the tokenizer has no token that is text by itself")
