"""The checkpoint's tokenizer, and how text from clients is kept from passing for control tokens.

A prompt is rendered to one string and tokenised as one string, as in training. Inside that string a special token is
whatever spells one, so text from clients needs care:

* Strings of media tokens (placeholders, START, END) are refused: see ``media_strings`` and ``conversation``.
* Any other special token a client spells out (``</s>`` is also HTML) is legitimate text. ``protect`` wraps it in two
  private-use characters before rendering; ``encode`` removes them and tokenises what is between as ordinary text.

A prompt without protected text takes one plain pass over the whole string, so ordinary text gives exactly the ids that
transformers gives. With protected text the prompt is cut at its genuine special tokens, as the tokenizer itself does,
and the runs in between are tokenised one by one with special tokens switched off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from actors.processing.config import ModelTokens
from actors.processing.token_bytes import piece_reader
from actors.tokenization.files import load_tokenizer, read_tokenizer

PROTECT_START = "\U000f1e00"
PROTECT_END = "\U000f1e01"
_PROTECTED = re.compile(f"{PROTECT_START}(.*?){PROTECT_END}|[{PROTECT_START}{PROTECT_END}]", re.DOTALL)

ORIGINAL_PLACEHOLDERS = ("<|image@placeholder|>", "<|video@placeholder|>")
_MEDIA_STRINGS = (
    *ORIGINAL_PLACEHOLDERS,
    *(f"<|{kind}_{what}|>" for kind in ("IMAGE", "VIDEO", "AUDIO") for what in ("PLACEHOLDER", "START", "END")),
)

MARKERS = ("<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>")
"""Tokens of the output grammar: they stay in decoded text, where the parsers read them, special or not."""


class TextTokenizer:
    """The tokenizer of a model directory. Safe for use from many threads."""

    def __init__(self, path: Path) -> None:
        """``path``: a tokenizer.json or a SentencePiece model. Raises ValueError naming the file."""
        source = read_tokenizer(path)
        self._runs = source.runs
        try:
            self._tokenizer = Tokenizer.from_str(source.document)
            self._plain = Tokenizer.from_str(source.document)
        except Exception as error:
            # The library raises bare Exception for every kind of bad file.
            raise ValueError(f"{path}: {error}") from error
        for tokenizer in (self._tokenizer, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        # Normalized ones are pieces of a SentencePiece model, and spelled as those are.
        self._spelled = {token_id: token.content for token_id, token in added.items() if not token.normalized}
        self._special = {token.content: token_id for token_id, token in added.items() if token.special}
        self._hidden = frozenset(token_id for text, token_id in self._special.items() if text not in MARKERS)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._newline = self._encode_plain("\n")
        self._read_piece = piece_reader(json.loads(self._tokenizer.to_str())["decoder"])
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_dir(cls, model_dir: Path) -> TextTokenizer:
        """Raises ValueError when there is no tokenizer, or a broken one."""
        return cls(load_tokenizer(model_dir).path)

    def token_id(self, text: str) -> int | None:
        """Id of one token by its exact string."""
        return self._tokenizer.token_to_id(text)

    def token_text(self, token_id: int) -> str | None:
        """Exact string of one token."""
        return self._tokenizer.id_to_token(token_id)

    def protect(self, text: str) -> str:
        """Marks special tokens spelled in text from a client, and drops marks that were already there."""
        return self._special_pattern.sub(
            lambda match: f"{PROTECT_START}{match.group()}{PROTECT_END}", without_marks(text)
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered prompt. Template text spells special tokens, protected text never does."""
        if PROTECT_START not in text and PROTECT_END not in text:
            return self._encode_whole(text)
        ids: list[int] = []
        run = ""
        for piece, genuine in self._pieces(text):
            if genuine is None:
                run += piece
                continue
            ids += self._encode_run(run, first=not ids)
            ids.append(genuine)
            run = ""
        return ids + self._encode_run(run, first=not ids)

    def encode_raw(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text that is a prompt as it stands: special tokens spelled in it are special tokens."""
        if self._runs is not None:
            # Nothing goes around the text: a SentencePiece model has no post-processor.
            return self._encode_whole(text)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def spell(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens spelled out: of ``encode_raw`` the text again."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids: special tokens left out, except the markers of the output grammar."""
        visible = [token_id for token_id in ids if token_id not in self._hidden]
        return self._tokenizer.decode(visible, skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds in the middle of a text; an added token's own spelling; nothing for an unused id."""
        if (added := self._spelled.get(token_id)) is not None:
            return added.encode()
        piece = self.token_text(token_id)
        return b"" if piece is None else self._read_piece(piece)

    def longest_token(self) -> int:
        """Most bytes of text that one token stands for, but for text that a tokenizer rewrites or leaves out."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return max(len(self.token_bytes(token_id)) for token_id in ids)

    def spellings(self, text: str) -> tuple[tuple[int, ...], ...]:
        """Ids of a text wherever it may stand in an output: at its start, after a space, inside a word. Special tokens
        spelled in it are ordinary text.
        """
        forms = (
            self._encode_run(text, first=True),
            self._encode_run(" " + text, first=False),
            self._encode_run(text, first=False),
        )
        return tuple(dict.fromkeys(tuple(ids) for ids in forms if ids))

    def is_hidden(self, token_id: int) -> bool:
        """Whether ``decode`` leaves the token out."""
        return token_id in self._hidden

    def _pieces(self, text: str) -> list[tuple[str, int | None]]:
        """The prompt cut at genuine special tokens: (text, None) or (token string, its id)."""
        pieces: list[tuple[str, int | None]] = []
        position = 0
        for match in _PROTECTED.finditer(text):
            pieces += self._cut(text[position : match.start()])
            # A template that cut a protected string apart leaves a lone mark: it goes, and still separates.
            pieces.append((match.group(1) or "", None))
            position = match.end()
        return pieces + self._cut(text[position:])

    def _cut(self, text: str) -> list[tuple[str, int | None]]:
        pieces: list[tuple[str, int | None]] = []
        position = 0
        for match in self._special_pattern.finditer(text):
            pieces.append((text[position : match.start()], None))
            pieces.append((match.group(), self._special[match.group()]))
            position = match.end()
        pieces.append((text[position:], None))
        return pieces

    def _encode_run(self, text: str, *, first: bool) -> list[int]:
        if not text:
            return []
        if first or self._runs is not None:
            return self._encode_plain(text)
        # Behind a newline the run is not the start of a string, where some tokenizers add a space.
        ids = self._encode_plain("\n" + text)
        if ids[: len(self._newline)] == self._newline:
            return ids[len(self._newline) :]
        return self._encode_plain(text)

    def _encode_whole(self, text: str) -> list[int]:
        """A text that may spell special tokens."""
        if self._runs is not None:
            return self._runs.encode(text, special=True)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode_plain(self, text: str) -> list[int]:
        """A text in which nothing is a special token."""
        if self._runs is not None:
            return self._runs.encode(text, special=False)
        return list(self._plain.encode(text, add_special_tokens=False).ids)


def without_marks(text: str) -> str:
    """Text as ``protect`` spells it: the marks never come from a client."""
    return text.replace(PROTECT_START, "").replace(PROTECT_END, "")


def media_strings(tokenizer: TextTokenizer, tokens: ModelTokens) -> tuple[str, ...]:
    """Strings no client text may contain: every known media token, and what this checkpoint calls them."""
    ids = (tokens.image, tokens.video, tokens.image_start, tokens.image_end, tokens.video_start, tokens.video_end)
    own = (tokenizer.token_text(token_id) for token_id in ids)
    return tuple(dict.fromkeys((*_MEDIA_STRINGS, *(text for text in own if text))))
