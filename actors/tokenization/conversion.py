"""A SentencePiece model as tokenizer.json: the same pieces for the same text, the same text for the same ids.

* BPE: the library merges any two neighbours whose union is a piece, best score first. So every split of a piece into
  two is a merge, in the order of scores.
* Unigram: the same best path. A user-defined piece gets the score that the library gives it.
* User-defined pieces of BPE models are cut out before anything is merged: added tokens that are not special.
* Control pieces, bytes, unknown and unused ones never match text. As in transformers, control pieces and the unknown
  one are special tokens, which templates may spell.

What cannot be said in tokenizer.json is refused by name.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.tokenization.sentencepiece_model import ModelType, Piece, PieceType, SentencePieceModel
from actors.tokenization.sentencepiece_normalizer import SPACE_MARK

log = logging.getLogger(__name__)

FILLER = "\U000f1e03"
"""Begins the names of ids that no file names: text never spells them."""

_MATCHING = (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED)


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedToken:
    """A token that is cut out of a text before the model sees it."""

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def convert(model: SentencePieceModel, added: Sequence[AddedToken]) -> dict[str, Any]:
    """The contents of tokenizer.json. ``added``: of the files beside the model.

    In the result ``normalized`` tells user-defined pieces (True, looked for in marked text) from other added tokens.
    Raises ValueError for a model that it cannot stand for.
    """
    _check_supported(model, added)
    tokens = {token.id: _entry(token) for token in added}
    for token_id, piece in enumerate(model.pieces):
        if token_id in tokens:
            continue
        if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN):
            tokens[token_id] = _entry(AddedToken(id=token_id, content=piece.text, special=True))
        elif piece.type is PieceType.USER_DEFINED and model.model_type is ModelType.BPE:
            piece_token = AddedToken(id=token_id, content=piece.text, special=False)
            tokens[token_id] = _entry(piece_token) | {"normalized": True}
    names = [piece.text for piece in model.pieces]
    names += [f"{FILLER}{token_id}" for token_id in range(len(names), max(tokens, default=-1) + 1)]
    for token in added:
        names[token.id] = token.content
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [tokens[token_id] for token_id in sorted(tokens)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": list(_decoders(model))},
        "model": _bpe(model, names) if model.model_type is ModelType.BPE else _unigram(model, names),
    }


def document_of_runs(model: SentencePieceModel, document: Mapping[str, Any]) -> dict[str, Any]:
    """What cuts the runs of text between added tokens: without those, and with nothing that has their names.

    A unigram model leaves bytes to its caller: under their names, text could spell them.
    """
    inner = {**document, "added_tokens": [token for token in document["added_tokens"] if token["normalized"]]}
    if model.model_type is ModelType.UNIGRAM:
        matching = [piece.type in (PieceType.NORMAL, PieceType.USER_DEFINED) for piece in model.pieces]
        vocab = [
            [name if i < len(matching) and matching[i] else f"{FILLER}{i}", score]
            for i, (name, score) in enumerate(document["model"]["vocab"])
        ]
        inner["model"] = {**document["model"], "vocab": vocab, "byte_fallback": False}
    return inner


def _check_supported(model: SentencePieceModel, added: Sequence[AddedToken]) -> None:
    if model.model_type not in (ModelType.BPE, ModelType.UNIGRAM):
        raise ValueError(f"model_type {model.model_type.name} is not supported; known: UNIGRAM, BPE")
    if not model.escape_whitespaces:
        raise ValueError("escape_whitespaces = false is not supported")
    if model.treat_whitespace_as_suffix:
        raise ValueError("treat_whitespace_as_suffix = true is not supported")
    if model.denormalizes:
        raise ValueError("a denormalizer is not supported")
    if model.byte_fallback and sum(piece.type is PieceType.BYTE for piece in model.pieces) != 256:
        raise ValueError("byte_fallback without all 256 byte pieces")
    if sum(piece.type is PieceType.UNKNOWN for piece in model.pieces) != 1:
        raise ValueError("not exactly one unknown piece")
    names = Counter(piece.text for piece in model.pieces)
    twice = [name for name, count in names.items() if count > 1]
    twice += [t.content for t in added if t.content in names and not _is_piece(model, t)]
    if twice:
        raise ValueError(f"{twice[0]!r} is the name of two ids")
    for token in added:
        if token.id < len(model.pieces) and not _is_piece(model, token):
            raise ValueError(f"{token.content!r} has id {token.id}, which is {model.pieces[token.id].text!r}")


def _is_piece(model: SentencePieceModel, token: AddedToken) -> bool:
    return token.id < len(model.pieces) and model.pieces[token.id].text == token.content


def _entry(token: AddedToken) -> dict[str, Any]:
    return {
        "id": token.id,
        "content": token.content,
        "single_word": token.single_word,
        "lstrip": token.lstrip,
        "rstrip": token.rstrip,
        "normalized": False,
        "special": token.special,
    }


def _decoders(model: SentencePieceModel) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}]
    if model.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if model.add_dummy_prefix or model.remove_extra_whitespaces:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def _unknown(model: SentencePieceModel) -> tuple[int, Piece]:
    return next((i, piece) for i, piece in enumerate(model.pieces) if piece.type is PieceType.UNKNOWN)


def _bpe(model: SentencePieceModel, names: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": _unknown(model)[1].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {name: token_id for token_id, name in enumerate(names)},
        "merges": _merges(model),
    }


def _merges(model: SentencePieceModel) -> list[list[str]]:
    ids = {
        p.text: i for i, p in enumerate(model.pieces) if p.type in _MATCHING and p.type is not PieceType.USER_DEFINED
    }
    found: list[tuple[float, int, int, str, str]] = []
    lost, reached = 0, None
    for text, token_id in ids.items():
        if len(text) == 1:
            continue
        piece = model.pieces[token_id]
        lost += any(character not in ids for character in text)
        splits = [(text[:at], text[at:]) for at in range(1, len(text))]
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        if known and piece.type is PieceType.UNUSED:
            reached = reached or text
        found += [(-piece.score, token_id, -len(left), left, right) for left, right in known]
    if reached is not None:
        raise ValueError(
            f"the unused piece {reached!r} is what others merge into: such text would have to be cut again"
        )
    if lost:
        log.warning("%d pieces hold characters that are no pieces themselves: text never merges into them", lost)
    found.sort()
    return [[left, right] for _, _, _, left, right in found]


def _unigram(model: SentencePieceModel, names: Sequence[str]) -> dict[str, Any]:
    """Entries that must never match cost so much that any other way is taken. A user-defined piece is worth more the
    longer it is, whatever its score: so the library has it since 0.2.3.
    """
    worst = min((piece.score for piece in model.pieces if piece.type is PieceType.NORMAL), default=0.0)
    never = (min(worst, 0.0) - 10.0) * 1000.0
    vocab: list[list[Any]] = []
    for token_id, name in enumerate(names):
        kind = model.pieces[token_id].type if token_id < len(model.pieces) else PieceType.CONTROL
        if kind is PieceType.NORMAL:
            vocab.append([name, model.pieces[token_id].score])
        elif kind is PieceType.USER_DEFINED:
            vocab.append([name, 0.1 * (len(name.encode()) - 1)])
        else:
            vocab.append([name, never])
    return {"type": "Unigram", "unk_id": _unknown(model)[0], "byte_fallback": model.byte_fallback, "vocab": vocab}
