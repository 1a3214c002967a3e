"""Ids of the tokens a model must be able to write, looked up in tokenizer.json by their strings.

Read as plain JSON, so that a place which loads weights and never handles text can refuse a checkpoint for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GENERATED_TOKENS = (
    "</s>",
    "<|end_of_sentence|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<response>",
    "</response>",
)
"""Ends of a text and the structure of an answer."""


def generated_token_ids(directory: str | Path) -> dict[str, int]:
    """Ids of those of ``GENERATED_TOKENS`` that tokenizer.json has as single tokens; empty without that file.

    Raises ValueError if the file is malformed.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        ids = _vocabulary(document["model"]["vocab"])
        ids |= {token["content"]: int(token["id"]) for token in document.get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot be read: {error!r}") from None
    return {token: ids[token] for token in GENERATED_TOKENS if token in ids}


def _vocabulary(vocab: Any) -> dict[str, int]:
    """A mapping from token to id, or (unigram models) a list of [token, score] in id order."""
    if isinstance(vocab, dict):
        return dict(vocab)
    return {entry[0]: token_id for token_id, entry in enumerate(vocab)}
