"""Other kinds of tokenizer.json than that of random checkpoints: pieces with byte fallback, as sentencepiece makes."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from actors.checkpoint.corpus import TEXT
from actors.engine.constraints.vocabulary import ConstraintVocabulary
from tests.unit.engine.constraints import structures as st

SPACE = "\u2581"
MARKERS = ("<think>", "</think>", "<|end_of_sentence|>")


def pieces(prefix_space: bool) -> dict[str, Any]:
    """Like the published conversion: BPE over characters, bytes for what has no piece, digits added and not special."""
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *MARKERS]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=base, show_progress=False)
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    if prefix_space:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix_space else []),
        ]
    )
    tokenizer.add_tokens([AddedToken(digit, normalized=False) for digit in "0123456789"])
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    special = {"<unk>", "<s>", "</s>"}
    document["added_tokens"] = [
        token for token in document["added_tokens"] if token["content"] in special or token["content"].isdigit()
    ]
    return document


@functools.cache
def vocabulary(prefix_space: bool) -> tuple[ConstraintVocabulary, Tokenizer]:
    text = json.dumps(pieces(prefix_space))
    tokenizer = Tokenizer.from_str(text)
    end = tokenizer.token_to_id("<|end_of_sentence|>")
    return ConstraintVocabulary(text, limit=880, end_ids=(2, end)), tokenizer


@pytest.mark.parametrize("prefix_space", [False, True])
def test_texts_of_pieces(prefix_space: bool) -> None:
    known, tokenizer = vocabulary(prefix_space)
    ids = tokenizer.encode("größe 漢 of the 42", add_special_tokens=False).ids
    assert known.text(ids).decode().lstrip() == "größe 漢 of the 42"
    assert known.text((tokenizer.token_to_id("<0x0A>"),)) == b"\n"
    assert known.text((2, 10_000, -1)) == b"</s>"


@pytest.mark.parametrize("prefix_space", [False, True])
def test_the_frame_of_thinking(prefix_space: bool) -> None:
    known, tokenizer = vocabulary(prefix_space)
    newline = tokenizer.token_to_id("<0x0A>")
    if tokenizer.token_to_id("\n") is not None:
        newline = tokenizer.token_to_id("\n")
    assert known.think is not None
    assert known.think.open_id == tokenizer.token_to_id("<think>")
    assert (known.think.newline, known.think.blank_line) == ((newline,), (newline, newline))
    params = st.sampling(st.choice("yes", "no"), starts_thinking=True, reasoning_max_tokens=0)
    state = st.compiled(params, known)((known.think.open_id,), st.raising)
    forced = []
    for _ in range(5):
        (token,) = st.allowed(state) or ()
        forced.append(token)
        state.accept(token)
    assert known.text(forced) == b"\n\n</think>\n\n"


@pytest.mark.parametrize("prefix_space", [False, True])
def test_structures_are_met(prefix_space: bool) -> None:
    known, _ = vocabulary(prefix_space)
    cases = [
        (st.schema({"enum": ["größer", "漢字", 42, "</s>", "<think>"]}), json.loads),
        (st.schema({"type": "object", "properties": {"a b": {"type": "integer"}}, "required": ["a b"]}), json.loads),
        (st.regex(r"x [0-9]{3} ü?</s>"), lambda text: re.fullmatch(r"x [0-9]{3} ü?</s>", text)),
    ]
    for structure, check in cases:
        make = st.compiled(st.sampling(structure), known)
        ended = 0
        for seed in range(12):
            output = st.draw(make((), st.raising), seed, 300, ends=known.end_ids)
            if output is not None:
                ended += 1
                assert known.end_ids[0] not in output
                assert check(known.text(output).decode()) is not None
        assert ended >= 3


def test_ids_may_have_gaps() -> None:
    document = json.loads(st.tokenizer_json())
    for token in document["added_tokens"]:
        if token["content"] == "<|VIDEO_PLACEHOLDER|>":
            document["model"]["vocab"][token["content"]] = token["id"] = 1500
    known = ConstraintVocabulary(json.dumps(document), limit=st.LAYOUT.im_patch_id, end_ids=st.ENDS)
    state = st.compiled(st.sampling(st.regex("(?s).*")), known)((), st.raising)
    assert st.allowed(state, 1600) == st.allowed(st.constraint(st.sampling(st.regex("(?s).*"))))
    assert known.text((1500, 1400)) == b"<|VIDEO_PLACEHOLDER|>"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Any) -> None:
    for text in ("", "{", "{}", '{"model": {}}', json.dumps(pieces(False) | {"decoder": None})):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            ConstraintVocabulary.from_model_dir(tmp_path, limit=800, end_ids=(2,))
