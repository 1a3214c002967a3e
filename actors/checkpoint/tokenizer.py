"""The tokenizer of random checkpoints: byte-level BPE trained on the built-in text, filled up to the vocabulary's size.

Every byte has a token, so any text survives encoding and decoding; digits are always tokens of their own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from actors.checkpoint.corpus import TEXT
from actors.checkpoint.tokens import (
    BEGIN_OF_SENTENCE,
    DELIMITERS,
    END_OF_SENTENCE,
    GENERATED,
    IMAGE_PLACEHOLDER,
    MASKS,
    VIDEO_PLACEHOLDER,
    TokenLayout,
)

SPACE = "\u0120"
"""How byte-level BPE writes a space."""


def build_tokenizer(layout: TokenLayout, lines: Sequence[str] | None = None) -> dict[str, Any]:
    """Contents of tokenizer.json, its words from ``lines`` or the built-in text. The same arguments give the same."""
    ids = [i for i in layout.text if i not in set(layout.special.values())]
    pieces, merges = _train(len(ids), TEXT.splitlines() if lines is None else lines)
    vocab = layout.special | dict(zip(pieces, ids, strict=True))
    tokenizer = _tokenizer(models.BPE(vocab={}, merges=[], unk_token="<unk>"))
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    document["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    document["model"]["merges"] = [list(pair) for pair in merges]
    document["added_tokens"] = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token not in GENERATED,
        }
        for token, token_id in sorted(layout.special.items(), key=lambda item: item[1])
    ]
    return document


def tokenizer_config(max_length: int) -> dict[str, Any]:
    """Contents of tokenizer_config.json as transformers reads it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "cls_token": BEGIN_OF_SENTENCE,
        "sep_token": END_OF_SENTENCE,
        "mask_token": MASKS[0],
        "extra_special_tokens": {
            "image_token": IMAGE_PLACEHOLDER,
            "image_start_token": DELIMITERS[0],
            "image_end_token": DELIMITERS[1],
            "video_token": VIDEO_PLACEHOLDER,
            "video_start_token": DELIMITERS[2],
            "video_end_token": DELIMITERS[3],
        },
    }


def _tokenizer(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train(count: int, lines: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Exactly ``count`` pieces in id order, all bytes among them, and the merges that make them."""
    tokenizer = _tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=count, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [(left, right) for left, right in model["merges"]]
    # The text gives some thousand merges; made-up words fill a larger vocabulary.
    for left, right in list(itertools.islice(_compounds(pieces), count - len(pieces))):
        pieces.append(left + right)
        merges.append((left, right))
    if len(pieces) != count:
        raise ValueError(f"no tokenizer of {count} text tokens can be made; at most {len(pieces)}")
    return pieces, merges


def _compounds(pieces: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of trained pieces whose joined text is new, long words first."""
    words = [piece for piece in pieces if piece.removeprefix(SPACE).isascii() and piece.removeprefix(SPACE).isalpha()]
    words.sort(key=len, reverse=True)
    tails = [word for word in words if not word.startswith(SPACE)]
    known = set(pieces)
    for left, right in itertools.product(words, tails):
        if left + right not in known:
            known.add(left + right)
            yield left, right
