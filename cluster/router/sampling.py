"""What a request leaves open: sampling defaults of the checkpoint and the room left in the context. Pure."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.errors import ContextExceeded, InvalidRequest
from actors.types import SamplingParams
from cluster.generation import GenerateCall
from cluster.tools import answer_structure

log = logging.getLogger(__name__)

MAX_PROMPT_SCORES = 1 << 18
"""Log-probabilities of one prompt: each takes about 110 bytes here and 2 to 5 microseconds of the router's event loop,
which must not be silent for seconds."""

_NOT_APPLIED = {"no_repeat_ngram_size": 0}

Spellings = Callable[[str], tuple[tuple[int, ...], ...]]
"""Token ids of a text wherever it may stand in an output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """What a request that says nothing gets: the checkpoint's generation_config.json, else plain sampling."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_dir(cls, directory: Path) -> SamplingDefaults:
        """Reads generation_config.json when there is one; ``do_sample: false`` means greedy.

        Raises:
            ValueError: names the file and what is wrong in it.
        """
        path = directory / "generation_config.json"
        if not path.exists():
            return cls()
        try:
            return cls._read(json.loads(path.read_text(encoding="utf-8")), path)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _read(cls, values: dict[str, Any], path: Path) -> SamplingDefaults:
        for name, neutral in _NOT_APPLIED.items():
            if values.get(name, neutral) not in (None, neutral):
                log.warning("%s: %s=%s is not applied: not built yet", path.name, name, values[name])
        given = {name: values[name] for name in cls.__slots__ if values.get(name) is not None}
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if values.get("do_sample") is False:
            given["temperature"] = 0.0
        defaults = cls(**given)
        if not (
            0 <= defaults.temperature < math.inf
            and 0 < defaults.top_p <= 1
            and defaults.top_k >= 0
            and 0 <= defaults.min_p <= 1
            and 0 < defaults.repetition_penalty < math.inf
        ):
            raise ValueError(f"out of bounds: {given}")
        return defaults


def resolve_sampling(
    call: GenerateCall,
    defaults: SamplingDefaults,
    *,
    prompt_tokens: int,
    starts_thinking: bool,
    max_model_len: int,
    spellings: Spellings,
) -> SamplingParams:
    """Fills in what the caller left open. Without a bound the reply may take what the context leaves; a bound on
    thinking means nothing where the prompt ends outside a think block.

    Raises:
        ContextExceeded: the prompt leaves no room, or less than the caller asks for.
        InvalidRequest: a bad word has no text, or the prompt is too long for so many log-probabilities.
    """
    room = max_model_len - prompt_tokens
    if room < 1:
        raise ContextExceeded(
            f"the prompt has {prompt_tokens} tokens and leaves no room in a context of {max_model_len}",
            field="messages" if call.prompt is None else "prompt",
        )
    if call.max_tokens is not None and call.max_tokens > room:
        raise ContextExceeded(
            f"{call.max_tokens} tokens do not fit: the prompt has {prompt_tokens} and the context {max_model_len}",
            field="max_tokens",
        )
    _check_prompt_scores(call.prompt_logprobs, prompt_tokens)
    return SamplingParams(
        temperature=_given(call.temperature, defaults.temperature),
        top_p=_given(call.top_p, defaults.top_p),
        top_k=defaults.top_k if call.top_k is None else call.top_k,
        min_p=_given(call.min_p, defaults.min_p),
        repetition_penalty=_given(call.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=call.presence_penalty,
        frequency_penalty=call.frequency_penalty,
        logit_bias=call.logit_bias,
        allowed_token_ids=call.allowed_token_ids,
        bad_words_ids=_bad_words_ids(call.bad_words, spellings),
        min_tokens=call.min_tokens,
        max_tokens=room if call.max_tokens is None else call.max_tokens,
        stop_token_ids=call.stop_token_ids,
        ignore_eos=call.ignore_eos,
        logprobs=call.logprobs,
        prompt_logprobs=call.prompt_logprobs,
        structure=answer_structure(call),
        starts_thinking=starts_thinking,
        reasoning_max_tokens=call.reasoning_max_tokens if starts_thinking else None,
    )


def _check_prompt_scores(top: int | None, prompt_tokens: int) -> None:
    count = 0 if top is None else prompt_tokens * (1 + top)
    if count > MAX_PROMPT_SCORES:
        message = (
            f"{count} log-probabilities of {prompt_tokens} prompt tokens are over the limit of {MAX_PROMPT_SCORES}"
        )
        raise InvalidRequest(message, field="prompt_logprobs")


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _bad_words_ids(words: tuple[str, ...], spellings: Spellings) -> tuple[tuple[int, ...], ...]:
    """A word is bad however it begins: at the start, behind a space, inside another word. Spaces alone are no word."""
    found: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        text = word.lstrip(" ")
        if not text or not (ids := spellings(text)):
            raise InvalidRequest(f"{word!r} is no word", field=f"bad_words[{index}]")
        found.update(dict.fromkeys(ids))
    return tuple(found)
