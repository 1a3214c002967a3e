"""A tokenizer, its vocabulary and a tiny model for tests of constraints, and a stand-in that draws whatever it may."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from actors.checkpoint.tokenizer import build_tokenizer
from actors.checkpoint.tokens import END_OF_SENTENCE, TokenLayout, token_layout
from actors.engine.constraints.compiler import ConstraintCompiler
from actors.engine.constraints.constraint import ConstraintFactory, TokenConstraint
from actors.engine.constraints.vocabulary import ConstraintVocabulary
from actors.ernie.config import ErnieConfig
from actors.ernie.text import LanguageModel
from actors.errors import ServingError
from actors.types import SamplingParams, Structure, StructureKind
from tests.small_models import language_model, text_config
from tests.unit.engine.harness import ernie_config

SIZE = 1024
LAYOUT: TokenLayout = token_layout(SIZE)
THINK, END_THINK = LAYOUT.special["<think>"], LAYOUT.special["</think>"]
EOS = 2
ENDS = (EOS, LAYOUT.special[END_OF_SENTENCE])


@functools.cache
def tokenizer_json() -> str:
    return json.dumps(build_tokenizer(LAYOUT))


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json())


@functools.cache
def vocabulary() -> ConstraintVocabulary:
    return ConstraintVocabulary(tokenizer_json(), limit=LAYOUT.im_patch_id, end_ids=ENDS)


def encode(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text, add_special_tokens=False).ids)


def decode(ids: Sequence[int]) -> str:
    """Text of an output without its end token. Raises UnicodeDecodeError if that is no text."""
    return vocabulary().text([token for token in ids if token not in ENDS]).decode()


def sampling(structure: Structure | None = None, **fields: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1000, "structure": structure} | fields))


def schema(value: Any) -> Structure:
    return Structure(kind=StructureKind.JSON_SCHEMA, text=json.dumps(value, ensure_ascii=False))


def regex(text: str) -> Structure:
    return Structure(kind=StructureKind.REGEX, text=text)


def lark(text: str) -> Structure:
    return Structure(kind=StructureKind.GRAMMAR, text=text)


def choice(*texts: str) -> Structure:
    return Structure(kind=StructureKind.CHOICE, text=json.dumps(texts))


def compiled(params: SamplingParams, using: ConstraintVocabulary | None = None) -> ConstraintFactory:
    """Raises what the compiler tells of a bad structure."""
    compiler = ConstraintCompiler(using or vocabulary())
    try:
        return compiler.compile(params).result(60)
    finally:
        compiler.close()


def raising(error: ServingError) -> None:
    raise error


def constraint(
    params: SamplingParams, prompt: Sequence[int] = (), fail: Callable[[ServingError], None] = raising
) -> TokenConstraint:
    return compiled(params)(tuple(prompt), fail)


def allowed(state: TokenConstraint, size: int = SIZE) -> set[int] | None:
    """Ids that may come next; None for all."""
    row = np.full((size + 31) // 32, 0x5A5A5A5A, dtype=np.int32)
    untouched = row.copy()
    if not state.fill(row):
        assert (row == untouched).all()
        return None
    ids = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
    return {int(token) for token in ids}


def advance(state: TokenConstraint, ids: Sequence[int]) -> None:
    for token in ids:
        state.accept(token)


def draw(state: TokenConstraint, seed: int, limit: int = 600, ends: Sequence[int] = ENDS) -> list[int] | None:
    """Uniformly random allowed tokens up to an end token, which is left out; None if it does not come in time."""
    rng = np.random.default_rng(seed)
    output: list[int] = []
    while len(output) < limit:
        ids = allowed(state)
        token = int(rng.choice(sorted(ids)) if ids is not None else rng.integers(3, LAYOUT.im_patch_id))
        if token in ends:
            return output
        output.append(token)
        state.accept(token)
    return None


def model_config() -> ErnieConfig:
    special = LAYOUT.special
    return ernie_config(
        text_config(vocab_size=SIZE, max_position_embeddings=4096),
        image_token_id=LAYOUT.im_patch_id,
        video_token_id=special["<|VIDEO_PLACEHOLDER|>"],
        image_start_token_id=special["<|IMAGE_START|>"],
        image_end_token_id=special["<|IMAGE_END|>"],
        video_start_token_id=special["<|VIDEO_START|>"],
        video_end_token_id=special["<|VIDEO_END|>"],
        eos_token_ids=ENDS,
    )


@functools.cache
def model() -> LanguageModel:
    return language_model(model_config().text, torch.float64, bank=False)
