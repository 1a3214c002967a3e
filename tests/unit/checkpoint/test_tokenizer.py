from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from actors.checkpoint.tokenizer import build_tokenizer
from actors.checkpoint.tokens import (
    BEGIN_OF_SENTENCE,
    END_OF_SENTENCE,
    GENERATED,
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    token_layout,
)


def tokenizer(vocab_size: int) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(build_tokenizer(token_layout(vocab_size))))


@pytest.mark.parametrize("vocab_size", [600, 777, 1024, 16384])
def test_every_id_has_one_token_and_text_survives(vocab_size: int) -> None:
    tokens = tokenizer(vocab_size)
    assert sorted(tokens.get_vocab().values()) == list(range(vocab_size))
    text = "What is in Picture 12?\n\tGr\u00fc\u00dfe \u4f60\u597d \U0001f642 \x00\x7f\u00ad<b>x</b>  "
    ids = tokens.encode(text, add_special_tokens=False).ids
    assert tokens.decode(ids, skip_special_tokens=False) == text
    assert all(3 <= i < token_layout(vocab_size).im_patch_id for i in ids)


def test_special_tokens_are_single_and_in_the_published_order() -> None:
    layout, tokens = token_layout(1024), tokenizer(1024)
    assert [layout.special[t] for t in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    for token, token_id in layout.special.items():
        assert tokens.encode(f"a{token}b", add_special_tokens=False).ids[1:-1] == [token_id]
    low = [END_OF_SENTENCE, BEGIN_OF_SENTENCE, *GENERATED]
    assert all(layout.special[token] < layout.im_patch_id for token in low)
    ids = [layout.special[f"<|{name}|>"] for name in ("IMAGE_START", "IMAGE_END", "VIDEO_START", "VIDEO_END")]
    assert ids == list(range(ids[0], ids[0] + 4))
    assert layout.im_patch_id == layout.special[IMAGE_PLACEHOLDER] < ids[0]
    assert layout.special[VIDEO_PLACEHOLDER] == max(layout.special.values()) == 1023


def test_published_size_has_the_published_ids() -> None:
    layout = token_layout(103424)
    ids = {
        "<|IMAGE_PLACEHOLDER|>": 100295,
        "<|AUDIO_PLACEHOLDER|>": 100296,
        "<|LOC_0|>": 100297,
        "<|LOC_1000|>": 101297,
        "<|LOC_BEGIN|>": 101298,
        "<|IMAGE_START|>": 101304,
        "<|VIDEO_END|>": 101307,
        "<|VIDEO_PLACEHOLDER|>": 103367,
        "<|begin_of_sentence|>": 100273,
        "<|end_of_sentence|>": 100272,
    }
    assert {token: layout.special[token] for token in ids} == ids
    assert len(set(layout.special.values())) == len(layout.special)


def test_structure_tokens_show_when_special_ones_are_skipped() -> None:
    tokens = tokenizer(1024)
    ids = tokens.encode("<think>so</think>yes</s><|end_of_sentence|>", add_special_tokens=False).ids
    assert tokens.decode(ids, skip_special_tokens=True) == "<think>so</think>yes"


def test_digits_are_single_tokens() -> None:
    assert tokenizer(1024).encode("2024", add_special_tokens=False).tokens == ["2", "0", "2", "4"]


def test_the_same_size_gives_the_same_tokenizer() -> None:
    assert build_tokenizer(token_layout(1024)) == build_tokenizer(token_layout(1024))


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text_config\.vocab_size = 599 is too small"):
        token_layout(599)
