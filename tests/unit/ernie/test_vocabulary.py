from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from actors.ernie.vocabulary import GENERATED_TOKENS, generated_token_ids
from actors.ernie.weights import Checkpoint
from tests.tiny_model import tiny_checkpoint


def test_ids_are_found_in_added_tokens_and_in_both_kinds_of_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    assert generated_token_ids(tmp_path) == {}
    path.write_text(json.dumps({"model": {"vocab": {"a": 0, "</s>": 1}}, "added_tokens": None}))
    assert generated_token_ids(tmp_path) == {"</s>": 1}
    unigram = {"model": {"vocab": [["a", 0.0], ["<think>", -1.0]]}, "added_tokens": [{"content": "</think>", "id": 9}]}
    path.write_text(json.dumps(unigram))
    assert generated_token_ids(tmp_path) == {"<think>": 1, "</think>": 9}
    path.write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        generated_token_ids(tmp_path)


def test_a_random_checkpoint_has_them_all() -> None:
    assert set(generated_token_ids(tiny_checkpoint())) == set(GENERATED_TOKENS)


@pytest.mark.parametrize("token", GENERATED_TOKENS)
def test_a_checkpoint_whose_structure_tokens_lie_among_media_tokens_is_refused(tmp_path: Path, token: str) -> None:
    directory = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "copy"))
    document = json.loads((directory / "tokenizer.json").read_text())
    document["model"]["vocab"][token] = 1010
    for added in document["added_tokens"]:
        if added["content"] == token:
            added["id"] = 1010
    (directory / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{token.replace('|', '.')} = 1010: not in 0\.\.1006"):
        Checkpoint(directory)
