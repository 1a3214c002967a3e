"""Log-probabilities as OpenAI (of the reply) and vLLM (of the prompt) write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.generation import PositionScores, TokenScore

LOWEST = -9999.0
"""What stands for minus infinity, which JSON lacks; OpenAI's and vLLM's number."""


def logprobs_body(positions: Iterable[PositionScores]) -> dict[str, Any]:
    """``choices[].logprobs``, one entry per generated token, thinking included."""
    content = [
        _token(position.chosen) | {"top_logprobs": [_token(score) for score in position.top]} for position in positions
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs_body(entries: Iterable[PositionScores | None]) -> list[dict[str, Any] | None]:
    """``prompt_logprobs``: per prompt token an object by token id, the token itself first; null where there is none."""
    return [None if entry is None else _by_id(entry) for entry in entries]


def _by_id(position: PositionScores) -> dict[str, Any]:
    return {
        str(score.token_id): {"logprob": _finite(score.logprob), "rank": score.rank, "decoded_token": _text(score)}
        for score in (position.chosen, *position.top)
    }


def _token(score: TokenScore) -> dict[str, Any]:
    return {"token": _text(score), "logprob": _finite(score.logprob), "bytes": list(score.token)}


def _text(score: TokenScore) -> str:
    """Bytes that are only part of a character show as U+FFFD; ``bytes`` has them as they are."""
    return score.token.decode(errors="replace")


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
