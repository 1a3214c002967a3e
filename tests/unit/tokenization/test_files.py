"""Model directories with a SentencePiece model and the JSON files beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.engine.constraints.vocabulary import ConstraintVocabulary
from actors.ernie.config import ErnieConfig
from actors.ernie.vocabulary import GENERATED_TOKENS, generated_token_ids
from actors.ernie.weights import Checkpoint
from actors.processing.config import ModelTokens
from actors.processing.processor import Processor
from actors.processing.tokenizer import TextTokenizer
from actors.tokenization.files import load_tokenizer, token_ids
from actors.types import Message, MessageRole, PreprocessRequest, TextPart
from cluster.config import ClusterConfig
from cluster.model_check import check_model
from tests.media import image_part, video_part
from tests.sentencepiece_made import ERNIE_LIKE, original_checkpoint, train


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return original_checkpoint(tmp_path_factory.mktemp("original") / "ERNIE-4.5-VL-tiny")


def test_an_original_repository_is_served_as_it_is(original: Path) -> None:
    check_model(ClusterConfig(model=str(original)))
    source = load_tokenizer(original)
    assert (source.path.name, source.kind, source.runs) == ("tokenizer.model", "SentencePiece BPE", None)
    assert set(generated_token_ids(original)) == set(GENERATED_TOKENS)
    with Checkpoint(original) as checkpoint:
        assert checkpoint.config.image_token_id == checkpoint.config.video_token_id == 1007


def test_media_ids_are_those_the_tokenizer_has_under_their_strings(original: Path) -> None:
    names = ["<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>"]
    ids = list(token_ids(original, names).values())
    config, tokens = ErnieConfig.from_dir(original), ModelTokens.from_dir(original)
    assert list(config.delimiter_ids) == ids
    assert [tokens.image_start, tokens.image_end, tokens.video_start, tokens.video_end] == ids


def test_a_prompt_with_media_reads_back(original: Path) -> None:
    parts = (TextPart(text="Is that </s> one? 42 猫"), image_part(100, 80), video_part(64, 64, 8, 4))
    processor = Processor(original)
    reply = processor.process(
        PreprocessRequest(
            messages=(Message(role=MessageRole.USER, parts=parts),),
            lease="a",
            max_prompt_tokens=4096,
            keep_patches=False,
        )
    )
    processor.close()
    tokenizer = processor.tokenizer
    ids = [token for token in reply.prompt_ids if token != processor.tokens.image]
    named = b"".join(tokenizer.token_bytes(token) for token in ids).decode()
    assert named == (
        "<|begin_of_sentence|>User: Is that </s> one? 42 猫Picture 1:<|IMAGE_START|><|IMAGE_END|>"
        "Video 1:<|VIDEO_START|><|VIDEO_END|>\nAssistant: <think>\n\n</think>\n\n"
    )
    assert tokenizer.token_id("</s>") not in ids
    assert len(reply.prompt_ids) - len(ids) == sum(media.grid.tokens for media in reply.media)


def test_structured_output_knows_the_tokens(original: Path) -> None:
    config = ErnieConfig.from_dir(original)
    known = ConstraintVocabulary.from_model_dir(original, limit=config.im_patch_id, end_ids=config.eos_token_ids)
    tokenizer = TextTokenizer.from_dir(original)
    text = '{"a": [1, 2.5, "größe 漢 😀"]}\n'
    ids = tokenizer.encode(text)
    assert known.text(ids).decode() == text
    assert known.think is not None and known.text(known.think.blank_line) == b"\n\n"
    assert known.special_id("<tool_call>") == tokenizer.token_id("<tool_call>")
    assert known.end_ids == (tokenizer.token_id("</s>"),)


def test_tokens_are_added_as_transformers_adds_them(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(**ERNIE_LIKE, vocab_size=900))
    (tmp_path / "added_tokens.json").write_text('{"<|A|>": 900, "plain": 903}')
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "additional_special_tokens": ["<|A|>", {"content": "<|new|>"}]})
    )
    tokenizer = TextTokenizer.from_dir(tmp_path)
    assert tokenizer.encode("<|A|>plain<|new|></s>") == [900, 903, 904, 2]
    assert [tokenizer.is_hidden(token) for token in (900, 903, 904, 2)] == [True, False, True, True]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"901": {"content": "<|B|>", "special": True}}, "pad_token": "<unk>"})
    )
    tokenizer = TextTokenizer.from_dir(tmp_path)
    assert tokenizer.token_id("<|A|>") == 902, "what only the map names comes next"
    assert tokenizer.encode("<|B|>") == [901]


def test_tokenizer_json_wins(original: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a SentencePiece model"):
        TextTokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text(load_tokenizer(original).document)
    assert TextTokenizer.from_dir(tmp_path).encode("the house") == TextTokenizer.from_dir(original).encode("the house")
