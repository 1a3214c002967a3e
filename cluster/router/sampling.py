"""What a request leaves open: sampling defaults of the checkpoint and the room left in the context. Pure."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.errors import ContextExceeded
from actors.types import SamplingParams
from cluster.generation import GenerateCall

log = logging.getLogger(__name__)

_NOT_APPLIED = {"repetition_penalty": 1.0, "min_p": 0.0, "no_repeat_ngram_size": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """What a request that says nothing gets: the checkpoint's generation_config.json, else plain sampling."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

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
        given = {name: values[name] for name in ("temperature", "top_p", "top_k") if values.get(name) is not None}
        if values.get("do_sample") is False:
            given["temperature"] = 0.0
        defaults = cls(**given)
        if not (0 <= defaults.temperature < math.inf and 0 < defaults.top_p <= 1 and defaults.top_k >= 0):
            raise ValueError(f"out of bounds: {given}")
        return defaults


def resolve_sampling(
    call: GenerateCall, defaults: SamplingDefaults, *, prompt_tokens: int, max_model_len: int
) -> SamplingParams:
    """Fills in what the caller left open. Without a bound the reply may take what the context leaves.

    Raises:
        ContextExceeded: the prompt leaves no room, or less than the caller asks for.
    """
    room = max_model_len - prompt_tokens
    if room < 1:
        raise ContextExceeded(
            f"the prompt has {prompt_tokens} tokens and leaves no room in a context of {max_model_len}",
            field="messages",
        )
    if call.max_tokens is not None and call.max_tokens > room:
        raise ContextExceeded(
            f"{call.max_tokens} tokens do not fit: the prompt has {prompt_tokens} and the context {max_model_len}",
            field="max_tokens",
        )
    return SamplingParams(
        temperature=defaults.temperature if call.temperature is None else call.temperature,
        top_p=defaults.top_p if call.top_p is None else call.top_p,
        top_k=defaults.top_k if call.top_k is None else call.top_k,
        max_tokens=room if call.max_tokens is None else call.max_tokens,
        stop_token_ids=call.stop_token_ids,
        ignore_eos=call.ignore_eos,
    )
