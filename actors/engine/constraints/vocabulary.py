"""What constraints need to know of a checkpoint's tokens: what each writes, which may stand in an answer, which end it.

V ids of the tokenizer, W words of 32 ids. Rows of bits are int32, bit ``id % 32`` of word ``id // 32``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from actors.ernie.vocabulary import GENERATED_TOKENS
from actors.tokenization.files import load_tokenizer

OPEN_THINK = "<think>"
CLOSE_THINK = "</think>"
OPENING_MARKER = OPEN_THINK.encode()
CLOSING_MARKER = CLOSE_THINK.encode()
HIDDEN = "\U000f1e02"
MAX_SEPARATORS = 2
"""Newlines allowed between the end of thinking and a structured answer: the templates write two."""


class ThinkTokens:
    """How a checkpoint writes the frame of its thinking.

    Raises ValueError if the tokenizer does not write newlines beside ``</think>`` as newlines.
    """

    def __init__(self, tokenizer: Tokenizer, close_id: int, text_of: Callable[[Sequence[int]], bytes]) -> None:
        self.open_id = tokenizer.token_to_id(OPEN_THINK)
        self.close_id = close_id
        # Between markers newlines stand as in a reply: neither at its start nor behind text.
        ids = tokenizer.encode(f"{CLOSE_THINK}\n{CLOSE_THINK}\n\n", add_special_tokens=False).ids
        marks = [at for at, token in enumerate(ids) if token == self.close_id]
        self.newline: tuple[int, ...] = ()
        self.blank_line: tuple[int, ...] = ()
        """Two newlines."""
        if len(marks) == 2 and marks[0] == 0:
            self.newline, self.blank_line = tuple(ids[1 : marks[1]]), tuple(ids[marks[1] + 1 :])
        if text_of(self.newline) != b"\n" or text_of(self.blank_line) != b"\n\n":
            raise ValueError(f"the tokenizer encodes newlines beside {CLOSE_THINK} as {ids}, which do not read so")


class ConstraintVocabulary:
    """Immutable; shared by all sequences of an engine.

    Args:
        tokenizer_json: contents of tokenizer.json, or what a SentencePiece model was made into.
        limit: ids from here up (media) are never generated.
        end_ids: the checkpoint's end tokens.

    Raises ValueError if the tokenizer cannot be used for constraints.
    """

    def __init__(self, tokenizer_json: str, *, limit: int, end_ids: Iterable[int]) -> None:
        document = json.loads(tokenizer_json)
        specials = _mark_special(document)
        backend = Tokenizer.from_str(json.dumps(document))
        size = backend.get_vocab_size(with_added_tokens=True)
        self.end_ids = tuple(token for token in dict.fromkeys(end_ids) if token < min(limit, size))
        if not self.end_ids:
            raise ValueError("none of the checkpoint's end tokens is in the tokenizer")
        _rename(document, specials)
        self.tokenizer = LLTokenizer(json.dumps(document), eos_token=list(self.end_ids))
        self.words = (self.tokenizer.vocab_size + 31) // 32
        texts = [self.tokenizer.decode_bytes([token]) for token in range(self.tokenizer.vocab_size)]
        # What writes nothing is shown by its number.
        texts = [text if text != b"<[%d]>" % token else b"" for token, text in enumerate(texts)]
        for content, token in specials.items():
            texts[token] = content.encode()
        self._texts = texts
        self._specials = specials
        plain = [
            token
            for token, text in enumerate(texts[:limit])
            if text and token not in self.end_ids and not self.tokenizer.is_special_token(token)
        ]
        self.ends_W = self.pack(self.end_ids)
        self.all_W = self.pack(range(min(limit, len(texts))))
        self.plain_W = self.pack(plain)
        """Ordinary text: what may stand in a structured answer."""
        newline_first = [token for token in plain if texts[token].startswith(b"\n")]
        self.newline_first_W = self.pack(newline_first)
        self.newlines_W = tuple(
            self.pack(
                token for token in newline_first if len(texts[token]) <= longest and not texts[token].strip(b"\n")
            )
            for longest in range(MAX_SEPARATORS + 1)
        )
        """Tokens of at most so many newlines and nothing else, by that number."""
        close_id = backend.token_to_id(CLOSE_THINK)
        self.think = None if close_id is None else ThinkTokens(backend, close_id, self.text)
        """None: the checkpoint has no token to close a thinking with."""
        self.completing_W = tuple(self.pack(ids) for ids in _completing(texts, close_id))
        """By how much of ``</think>`` the text ends with: the tokens, but for its own, that would complete it."""

    @classmethod
    def from_model_dir(cls, directory: str | Path, *, limit: int, end_ids: Iterable[int]) -> ConstraintVocabulary:
        """Raises ValueError naming the file of the tokenizer."""
        source = load_tokenizer(directory)
        try:
            return cls(source.document, limit=limit, end_ids=end_ids)
        except Exception as error:
            # Both libraries raise bare Exception for a bad file.
            raise ValueError(f"{source.path}: {error}") from error

    def special_id(self, content: str) -> int | None:
        """Id of a token that no ordinary text spells; None where the checkpoint has none of that name."""
        return self._specials.get(content)

    def text(self, ids: Sequence[int]) -> bytes:
        """What tokens write, special ones their own names; unknown ids nothing."""
        texts = self._texts
        return b"".join(texts[token] for token in ids if 0 <= token < len(texts))

    def pack(self, ids: Iterable[int]) -> NDArray[np.int32]:
        """A row [W] with the bits of these ids set. Ids outside the tokenizer are left out."""
        bits = np.zeros(self.words * 32, dtype=np.uint8)
        known = [token for token in ids if 0 <= token < self.tokenizer.vocab_size]
        bits[known] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


def _completing(texts: Sequence[bytes], close_id: int | None) -> list[list[int]]:
    rests = tuple(CLOSING_MARKER[done:] for done in range(1, len(CLOSING_MARKER)))
    able = [
        token
        for token, text in enumerate(texts)
        if token != close_id and (text.startswith(rests) or CLOSING_MARKER in text)
    ]
    return [
        [token for token in able if CLOSING_MARKER in texts[token]],
        *([token for token in able if texts[token].startswith(rest)] for rest in rests),
    ]


def _mark_special(document: dict[str, Any]) -> dict[str, int]:
    """Makes markers of thinking, tools and ends special, whatever the file says: no structure may have them as text.

    Returns the ids of all tokens that are special to llguidance, by content.
    """
    document["truncation"] = document["padding"] = document["post_processor"] = None
    vocab = document["model"]["vocab"]
    pieces = vocab if isinstance(vocab, dict) else {entry[0]: token for token, entry in enumerate(vocab)}
    added = {token["content"]: token for token in document.get("added_tokens") or []}
    for content in GENERATED_TOKENS:
        if content in added:
            added[content]["special"] = True
        elif content in pieces:
            added[content] = {
                "id": pieces[content],
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
    document["added_tokens"] = sorted(added.values(), key=lambda token: int(token["id"]))
    return {
        content: int(token["id"])
        for content, token in added.items()
        if token["special"] or (content.startswith("<") and content.endswith(">"))
    }


def _rename(document: dict[str, Any], specials: Mapping[str, int]) -> None:
    """Gives special tokens names that no text has: text that spells one, as HTML does ``</s>``, is ordinary text."""

    def name(content: str) -> str:
        return HIDDEN + content if content in specials else content

    model = document["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        known = {*vocab.values(), *(int(token["id"]) for token in document["added_tokens"])}
        # The library takes ids to be as many as there are tokens.
        gaps = {f"{HIDDEN}{token}": token for token in set(range(max(known, default=0))) - known}
        model["vocab"] = {name(piece): token for piece, token in vocab.items()} | gaps
    else:
        model["vocab"] = [[name(piece), score] for piece, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = name(model["unk_token"])
    if model.get("merges"):
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if not specials.keys() & {*pair, "".join(pair)}]
    for token in document["added_tokens"]:
        token["content"] = name(token["content"])
