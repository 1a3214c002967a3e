"""The converted tokenizer against the sentencepiece library, on models trained here."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from actors.processing.detokenize import IncrementalDetokenizer
from actors.processing.tokenizer import TextTokenizer
from actors.tokenization.sentencepiece_model import read_model
from actors.tokenization.sentencepiece_normalizer import SentencePieceNormalizer
from tests.sentencepiece_made import ERNIE_LIKE, LINES, train

MODELS: dict[str, dict[str, Any]] = {
    "as published": {
        **ERNIE_LIKE,
        "vocab_size": 900,
        "user_defined_symbols": [*"0123456789", "<mask:1>", "abc"],
        "control_symbols": ["<ctrl>"],
    },
    "runs of spaces by name": {
        **ERNIE_LIKE,
        "vocab_size": 900,
        "user_defined_symbols": ["\u2581\u2581", "\u2581\u2581\u2581\u2581", "\n", "\n\n"],
    },
    "runs of spaces merged": {**ERNIE_LIKE, "vocab_size": 1200, "split_by_whitespace": False},
    "as Llama": {**ERNIE_LIKE, "vocab_size": 900, "add_dummy_prefix": True, "split_digits": True},
    "BPE by default": {"model_type": "bpe", "vocab_size": 700, "user_defined_symbols": ["<mask:1>", "①", "1"]},
    "BPE that rewrites, with bytes": {
        **ERNIE_LIKE,
        "vocab_size": 900,
        "normalization_rule_name": "nfkc",
        "add_dummy_prefix": True,
        "character_coverage": 0.99,
    },
    "unigram by default": {"model_type": "unigram", "vocab_size": 500},
    "unigram as published": {
        **ERNIE_LIKE,
        "model_type": "unigram",
        "vocab_size": 800,
        "user_defined_symbols": ["<mask:1>", "12"],
        "control_symbols": ["<ctrl>"],
        "character_coverage": 1.0,
    },
    "unigram that folds case, with bytes": {
        "model_type": "unigram",
        "vocab_size": 600,
        "normalization_rule_name": "nmt_nfkc_cf",
        "byte_fallback": True,
    },
}

FRAGMENTS = (
    *LINES,
    *(chr(code) for code in range(300)),
    *"１２３①㌔ｶﾞﬁ▁今天狗😀\u3000\u00a0\u200b\ufeff각",
    *("e\u0301", "가", "  ", "   ", "    ", "\n", "\n\n", "\t", "12", "345", "\u2581\u2581", "abc"),
    *("<mask:1>", "<0x41>", "<unk>", "<s>", "</s>", "<ctrl>"),
)


def texts(count: int) -> Iterator[str]:
    rng = random.Random(0)
    yield ""
    yield "".join(chr(code) for code in range(1, 256))
    for _ in range(count):
        picked = (rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 10)))
        yield "".join(text if rng.random() < 0.7 else text[: rng.randint(0, 9)] for text in picked)


@pytest.fixture(scope="module", params=list(MODELS))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TextTokenizer, sentencepiece.SentencePieceProcessor]:
    content = train(**MODELS[request.param])
    path: Path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(content)
    return TextTokenizer(path), sentencepiece.SentencePieceProcessor(model_proto=content)


def test_the_same_ids_and_the_same_text(
    pair: tuple[TextTokenizer, sentencepiece.SentencePieceProcessor],
) -> None:
    ours, theirs = pair
    unknown = theirs.unk_id()
    for text in texts(500):
        ids = theirs.encode(text)
        # As text of a client: there no special token can be spelled, as to the library none can at all.
        assert ours.encode(ours.protect(text)) == ids or len(text) == 0, text
        if unknown not in ids:
            assert ours.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize("around", [True, False])
def test_a_raw_prompt_has_the_ids_of_the_library(
    pair: tuple[TextTokenizer, sentencepiece.SentencePieceProcessor], around: bool
) -> None:
    ours, theirs = pair
    for text in ("hello world", *texts(50)):
        if ours.protect(text) == text:
            assert ours.encode_raw(text, add_special_tokens=around) == theirs.encode(text), text
    assert ours.encode_raw("a</s>", add_special_tokens=around) == [*theirs.encode("a"), theirs.eos_id()]


def test_text_comes_token_by_token(pair: tuple[TextTokenizer, sentencepiece.SentencePieceProcessor]) -> None:
    ours, theirs = pair
    for text in texts(150):
        ids = theirs.encode(text)
        if theirs.unk_id() in ids:
            continue
        stream = IncrementalDetokenizer(ours)
        deltas = [stream.push([token_id]) for token_id in ids]
        assert "".join([*deltas, stream.flush()]) == theirs.decode(ids)


def test_every_piece_has_its_id_and_its_bytes(
    pair: tuple[TextTokenizer, sentencepiece.SentencePieceProcessor],
) -> None:
    ours, theirs = pair
    assert ours.vocab_size == theirs.get_piece_size()
    for token_id in range(theirs.get_piece_size()):
        piece = theirs.id_to_piece(token_id)
        assert (ours.token_text(token_id), ours.token_id(piece)) == (piece, token_id)
        if theirs.is_byte(token_id):
            assert ours.token_bytes(token_id) == bytes([int(piece[3:5], 16)])
        elif not theirs.is_control(token_id):
            assert ours.token_bytes(token_id).decode() == piece.replace("\u2581", " ")
        assert ours.is_hidden(token_id) == (theirs.is_control(token_id) or theirs.is_unknown(token_id))


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity"])
@pytest.mark.parametrize("trims", [False, True])
def test_text_is_rewritten_as_by_the_library(rule: str, trims: bool) -> None:
    content = train(
        model_type="bpe",
        vocab_size=700,
        normalization_rule_name=rule,
        remove_extra_whitespaces=trims,
        user_defined_symbols=["①", "ab"],
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    normalize = SentencePieceNormalizer(read_model(content))
    samples = [
        *texts(300),
        *(f"a{chr(code)} {chr(code)}b" for code in range(0x20, 0x3200, 7)),
        "  ",
        " ② ",
        "\u1112\u1161\u11ab",
    ]
    for text in samples:
        assert normalize(text) == theirs.normalize(text), text
