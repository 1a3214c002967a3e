"""Encodes text where tokenizer.json cannot say how: added tokens are cut out first, then every run is cut by itself.

So do the slow tokenizers of transformers that a SentencePiece checkpoint comes with: each run between added tokens is a
text of its own to the library, rewritten and trimmed as one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from actors.tokenization.conversion import document_of_runs
from actors.tokenization.sentencepiece_model import ModelType, PieceType, SentencePieceModel
from actors.tokenization.sentencepiece_normalizer import SentencePieceNormalizer


class RunEncoder:
    """Immutable; safe for use from many threads."""

    def __init__(self, model: SentencePieceModel, document: Mapping[str, Any]) -> None:
        """``document``: what ``convert`` made of the model. Raises ValueError for added tokens with stripping rules."""
        outer = [token for token in document["added_tokens"] if not token["normalized"]]
        for token in outer:
            if token["lstrip"] or token["rstrip"] or token["single_word"]:
                raise ValueError(f"added token {token['content']!r}: lstrip, rstrip and single_word are not supported")
        self._normalizer = SentencePieceNormalizer(model)
        self._tokenizer = Tokenizer.from_str(json.dumps(document_of_runs(model, document)))
        self._ids = {token["content"]: int(token["id"]) for token in outer}
        self._any = _pattern(token["content"] for token in outer)
        self._ordinary = _pattern(token["content"] for token in outer if not token["special"])
        self._unknown = next(i for i, piece in enumerate(model.pieces) if piece.type is PieceType.UNKNOWN)
        self._bytes = [i for i, piece in enumerate(model.pieces) if piece.type is PieceType.BYTE]
        self._falls_back = model.byte_fallback and model.model_type is ModelType.UNIGRAM

    @classmethod
    def needed(cls, model: SentencePieceModel) -> bool:
        """Whether tokenizer.json would cut some text otherwise than the library."""
        return SentencePieceNormalizer.needed(model) or model.model_type is ModelType.UNIGRAM

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text; ``special`` tells whether it may spell special tokens."""
        pattern = self._any if special else self._ordinary
        ids: list[int] = []
        position = 0
        for match in pattern.finditer(text):
            ids += self._run(text[position : match.start()])
            ids.append(self._ids[match.group()])
            position = match.end()
        return ids + self._run(text[position:])

    def _run(self, text: str) -> list[int]:
        if not text:
            return []
        normal = self._normalizer(text)
        encoding = self._tokenizer.encode(normal, add_special_tokens=False)
        if not self._falls_back or self._unknown not in encoding.ids:
            return list(encoding.ids)
        ids: list[int] = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id == self._unknown:
                ids += [self._bytes[byte] for byte in normal[start:end].encode()]
            else:
                ids.append(token_id)
        return ids


def _pattern(texts: Any) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
