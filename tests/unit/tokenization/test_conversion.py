from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from actors.tokenization.conversion import AddedToken, convert
from actors.tokenization.sentencepiece_model import ModelType, Piece, PieceType, SentencePieceModel, read_model
from tests.sentencepiece_made import ERNIE_LIKE, train

UNKNOWN = Piece(text="<unk>", score=0.0, type=PieceType.UNKNOWN)


def model(*pieces: tuple[str, float, PieceType]) -> SentencePieceModel:
    listed = tuple(Piece(text=text, score=score, type=kind) for text, score, kind in pieces)
    return SentencePieceModel(pieces=(UNKNOWN, *listed), model_type=ModelType.BPE)


N, U = PieceType.NORMAL, PieceType.UNUSED
PLAIN = model(("a", -3, N), ("b", -4, N), ("c", -5, N), ("bc", -1, N), ("ab", -2, N), ("abc", -0.5, N))


def test_every_split_of_a_piece_is_a_merge_best_score_first() -> None:
    merges = convert(PLAIN, [])["model"]["merges"]
    assert merges == [["ab", "c"], ["a", "bc"], ["b", "c"], ["a", "b"]]


@pytest.mark.parametrize(
    ("broken", "added", "message"),
    [
        (replace(PLAIN, model_type=ModelType.WORD), [], "model_type WORD is not supported"),
        (replace(PLAIN, escape_whitespaces=False), [], "escape_whitespaces"),
        (replace(PLAIN, treat_whitespace_as_suffix=True), [], "treat_whitespace_as_suffix"),
        (replace(PLAIN, denormalizes=True), [], "denormalizer"),
        (replace(PLAIN, byte_fallback=True), [], "without all 256 byte pieces"),
        (replace(PLAIN, pieces=PLAIN.pieces[1:]), [], "not exactly one unknown piece"),
        (model(("a", -1, N), ("a", 0, PieceType.CONTROL)), [], "'a' is the name of two ids"),
        (model(("a", -1, N), ("b", -2, N), ("ab", -3, U)), [], "the unused piece 'ab' is what others merge into"),
        (PLAIN, [AddedToken(id=9, content="ab", special=True)], "'ab' is the name of two ids"),
        (PLAIN, [AddedToken(id=1, content="<x>", special=True)], "'<x>' has id 1, which is 'a'"),
    ],
)
def test_what_cannot_be_said_is_refused(broken: SentencePieceModel, added: Sequence[AddedToken], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(broken, added)


def test_unused_pieces_that_nothing_merges_into_are_only_names() -> None:
    document = convert(model(("a", -1, N), ("<unused1>", 0, U)), [])
    assert document["model"]["vocab"]["<unused1>"] == 2 and document["model"]["merges"] == []


def test_ids_that_no_file_names_are_filled_with_names_that_no_text_spells() -> None:
    vocab = convert(PLAIN, [AddedToken(id=10, content="<new>", special=True)])["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(11)) and vocab["<new>"] == 10
    assert [text.isprintable() for text, token in vocab.items() if 7 <= token < 10] == [False] * 3


CONTENT = train(**ERNIE_LIKE, vocab_size=900)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\xff\xff", CONTENT[:5000], CONTENT[:-1], b"\x0a\x03\x0a\x05abc", b"\x0a\x02\x18\x63"],
)
def test_what_is_no_model_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        read_model(content)


def test_a_model_file_is_read() -> None:
    found = read_model(CONTENT)
    assert len(found.pieces) == 900 and found.pieces[0] == UNKNOWN
    assert found.model_type is ModelType.BPE and found.byte_fallback and not found.precompiled_charsmap
    assert not found.add_dummy_prefix and not found.remove_extra_whitespaces and found.escape_whitespaces
