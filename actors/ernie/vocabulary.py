"""Ids of the tokens a model must be able to write, looked up in the tokenizer by their strings.

A place which loads weights and never handles text can refuse a checkpoint for them.
"""

from __future__ import annotations

from pathlib import Path

from actors.tokenization.files import token_ids

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
    """Ids of those of ``GENERATED_TOKENS`` that the tokenizer has as single tokens; empty without a tokenizer.

    Raises ValueError naming a malformed file.
    """
    return token_ids(directory, GENERATED_TOKENS)
