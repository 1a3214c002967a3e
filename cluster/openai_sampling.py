"""What every generation request over HTTP may say of how tokens are drawn and how the request is served."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, FiniteFloat

from actors.errors import InvalidRequest
from cluster.openai_neutral import NamingFields

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class SamplingBody(NamingFields):
    """Fields of ``GenerateCall`` under OpenAI's names, then vLLM's."""

    model: str | None = None
    stream: bool | None = None
    request_id: str | None = None
    temperature: FiniteFloat | None = None
    top_p: FiniteFloat | None = None
    top_k: int | None = None
    min_p: FiniteFloat | None = None
    repetition_penalty: FiniteFloat | None = None
    presence_penalty: FiniteFloat | None = None
    frequency_penalty: FiniteFloat | None = None
    logit_bias: dict[str, FiniteFloat] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    timeout: FiniteFloat | None = None
    return_timings: bool | None = None


def sampling_fields(body: SamplingBody) -> Mapping[str, Any]:
    """The same as fields of ``GenerateCall``."""
    return {
        "model": body.model,
        "request_id": body.request_id,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": 0 if body.top_k == -1 else body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "logit_bias": _logit_bias(body.logit_bias or {}),
        "allowed_token_ids": None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        "bad_words": tuple(body.bad_words or ()),
        "seed": body.seed,
        "min_tokens": body.min_tokens or 0,
        "stop": tuple(body.stop or ()),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_eos": bool(body.ignore_eos),
        "priority": body.priority or 0,
        "cache_salt": body.cache_salt,
        "timeout_s": body.timeout,
        "return_timings": bool(body.return_timings),
    }


def _logit_bias(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """Token ids are keys of a JSON object, so they come as text."""
    for key in biases:
        if _TOKEN_ID.fullmatch(key) is None:
            raise InvalidRequest(f"logit_bias has the key {key!r}, which is no token id", field="logit_bias")
    return tuple(sorted((int(key), bias) for key, bias in biases.items()))
