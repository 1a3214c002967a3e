from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.processing.detokenize import IncrementalDetokenizer
from actors.processing.tokenizer import TextTokenizer
from tests.unit.processing.tokenizers_made import byte_fallback, byte_level

MAKERS = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "byte-fallback-strip": lambda path: byte_fallback(path, strip=True),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return TextTokenizer(MAKERS[request.param](path))


def stream(tokenizer: TextTokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    deltas = []
    position = 0
    for size in [*sizes, len(ids)]:
        deltas.append(detokenizer.push(ids[position : position + size]))
        position += size
    return [*deltas, detokenizer.flush()]


TEXTS = st.text(st.sampled_from("the a\n\u00e9\u4e2d\U0001f600\u2581\u0939\u0940 x7"), max_size=30)


@settings(deadline=None, max_examples=150)
@given(text=TEXTS, sizes=st.lists(st.integers(0, 5), max_size=10))
def test_pieces_join_to_the_whole(tokenizer: TextTokenizer, text: str, sizes: list[int]) -> None:
    ids = tokenizer.encode(text)
    deltas = stream(tokenizer, ids, sizes)
    assert "".join(deltas) == tokenizer.decode(ids)
    assert not any("\ufffd" in delta for delta in deltas)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_ids_in_any_cut_give_one_text(tokenizer: TextTokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=25))
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=10))
    joined = "".join(stream(tokenizer, ids, sizes))
    assert joined == "".join(stream(tokenizer, ids, [1] * len(ids)))
    whole = tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert joined == whole


def test_a_character_is_never_cut(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a\U0001f600b")
    assert len(ids) > 4
    deltas = stream(tokenizer, ids, [1] * len(ids))
    assert "\U0001f600" in deltas
    assert all("\ufffd" not in delta for delta in deltas)


def test_unfinished_character_shows_at_the_end(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a\U0001f600")[:-1]
    deltas = stream(tokenizer, ids, [1] * len(ids))
    assert set(deltas[-1]) == {"\ufffd"}
    assert "".join(deltas).startswith("a")


def test_spaces_between_words_survive(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("the a  the")
    assert "".join(stream(tokenizer, ids, [1] * len(ids))) == "the a  the"


def test_special_tokens_are_hidden_but_markers_stay(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a<think>b</think>c</s><|end_of_sentence|>")
    assert "".join(stream(tokenizer, ids, [2, 3])).replace(" ", "") == "a<think>b</think>c"


def test_endless_stray_bytes_are_let_go(tokenizer: TextTokenizer) -> None:
    stray = tokenizer.encode("\U0001f600")[-1]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert any(detokenizer.push([stray]) for _ in range(40))


def test_real_replacement_characters_pass(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a\ufffdb\ufffd")
    assert "".join(stream(tokenizer, ids, [1] * len(ids))) == "a\ufffdb\ufffd"
