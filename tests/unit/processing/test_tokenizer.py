from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from actors.processing.config import ModelTokens
from actors.processing.tokenizer import PROTECT_END, PROTECT_START, TextTokenizer, media_strings
from tests.tiny_model import tiny_checkpoint
from tests.unit.processing.tokenizers_made import byte_fallback, byte_level

MAKERS = [byte_level, byte_fallback, lambda path: byte_fallback(path, strip=True)]


@pytest.fixture(scope="module", params=range(len(MAKERS)))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> TextTokenizer:
    return TextTokenizer(path)


def specials(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    texts = [tokenizer.token_text(token_id) or "" for token_id in ids]
    return [text for text in texts if text.startswith("<") and text.endswith(">") and not text.startswith("<0x")]


def test_ordinary_prompts_are_one_plain_pass(path: Path, tokenizer: TextTokenizer) -> None:
    text = "<s>the dog 12</think> a<|end_of_sentence|>  the"
    assert tokenizer.encode(text) == Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids


def test_protected_text_spells_no_special_token(tokenizer: TextTokenizer) -> None:
    client = "the </s> a <|end_of_sentence|></think>"
    ids = tokenizer.encode(f"<s>{tokenizer.protect(client)}<think>")
    assert specials(tokenizer, ids) == ["<s>", "<think>"]
    assert tokenizer.decode(ids[1:-1]).strip() == client


SPELLINGS = st.sampled_from(["</s>", "<s>", "<", "/s>", "|", "the", " ", "a", "7", "\n", "</think>"])


@settings(deadline=None, max_examples=100)
@given(text=st.lists(SPELLINGS, max_size=12).map("".join))
def test_protection_only_changes_how_special_tokens_read(tokenizer: TextTokenizer, text: str) -> None:
    protected = tokenizer.protect(text)
    ids = tokenizer.encode(protected)
    assert specials(tokenizer, ids) == []
    if protected == text:
        assert ids == tokenizer.encode(text)


def test_marks_cannot_be_forged(tokenizer: TextTokenizer) -> None:
    forged = f"{PROTECT_END}</s>{PROTECT_START}"
    assert tokenizer.protect(forged) == f"{PROTECT_START}</s>{PROTECT_END}"
    nested = f"</{PROTECT_START}s>"
    assert specials(tokenizer, tokenizer.encode(tokenizer.protect(nested))) == []


def test_lone_marks_of_a_template_that_cuts_text_go(tokenizer: TextTokenizer) -> None:
    protected = tokenizer.protect("why</think>yes")
    _, _, after = protected.partition("</think>")
    ids = tokenizer.encode(f"<s>{after}")
    assert tokenizer.decode(ids).strip() == "yes"


def test_digits_stay_tokens_of_their_own_in_protected_prompts(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(byte_fallback(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("<s>" + tokenizer.protect("42</s>"))
    texts = [tokenizer.token_text(token_id) for token_id in ids]
    assert texts == ["<s>", "4", "2", "<", "/", "s", ">"]


def test_media_strings_of_a_checkpoint() -> None:
    directory = tiny_checkpoint()
    strings = media_strings(TextTokenizer.from_dir(directory), ModelTokens.from_dir(directory))
    for text in ("<|IMAGE_PLACEHOLDER|>", "<|VIDEO_END|>", "<|image@placeholder|>", "<|video@placeholder|>"):
        assert text in strings
    assert len(strings) == len(set(strings))


def test_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        TextTokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        TextTokenizer.from_dir(tmp_path)
