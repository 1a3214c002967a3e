"""Tokens as bytes, against the tokenizer's own decoding."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.processing.token_bytes import piece_reader
from actors.processing.tokenizer import TextTokenizer
from tests.tiny_model import tiny_checkpoint
from tests.unit.processing.tokenizers_made import byte_fallback, byte_level

MAKERS = [byte_level, byte_fallback, lambda path: byte_fallback(path, strip=True)]


@pytest.fixture(scope="module", params=range(len(MAKERS)))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(MAKERS[request.param](tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


@settings(deadline=None, max_examples=100)
@given(text=st.text(alphabet="the quick dog é 12\n\U0001f600\u4e2d<>", max_size=20))
def test_bytes_of_the_tokens_are_the_text(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    spelled = b"".join(tokenizer.token_bytes(token) for token in ids).decode()
    assert spelled.lstrip(" ") == tokenizer.decode(ids).lstrip(" ")  # one tokenizer takes a space off


def test_every_whole_token_reads_as_it_decodes(tokenizer: TextTokenizer) -> None:
    (before,) = tokenizer.encode("a")[-1:]
    start = tokenizer.decode([before])
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([before, token])
        if not tokenizer.is_hidden(token) and "\ufffd" not in text:
            assert tokenizer.token_bytes(token).decode() == text[len(start) :], tokenizer.token_text(token)


def test_special_tokens_spell_themselves_and_unused_ids_nothing(tokenizer: TextTokenizer) -> None:
    token = tokenizer.token_id("</s>")
    assert token is not None and tokenizer.token_bytes(token) == b"</s>"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""


def test_every_byte_has_a_token(tokenizer: TextTokenizer) -> None:
    assert {bytes([i]) for i in range(256)} <= {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}


def test_decoders_told_apart() -> None:
    assert piece_reader(None)("\u2581a") == "\u2581a".encode()
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    assert piece_reader(metaspace)("\u2581a") == b" a"
    assert piece_reader(metaspace)("<0x41>") == b"<0x41>"


def test_spellings_cover_start_middle_and_after_a_space(tokenizer: TextTokenizer) -> None:
    forms = tokenizer.spellings("the")
    assert len(set(forms)) == len(forms) and set(forms) <= {tuple(f) for f in forms}
    outputs = ["the", "a the", "xthe", "\nthe"]
    for output in outputs:
        ids = tuple(tokenizer.encode(output))
        assert any(ids[i : i + len(form)] == form for form in forms for i in range(len(ids))), output
    assert tokenizer.token_id("</s>") not in {token for form in tokenizer.spellings("</s>") for token in form}


def test_spellings_of_a_random_checkpoint() -> None:
    tokenizer = TextTokenizer.from_dir(tiny_checkpoint())
    assert {tokenizer.decode(form) for form in tokenizer.spellings("picture")} == {"picture", " picture"}
