"""Log-probabilities as clients see them: with the bytes of each token, and a prompt's in one piece. Pure."""

from __future__ import annotations

from collections.abc import Callable

from actors.errors import InternalError
from actors.types import PromptLogprobs, TokenLogprobs
from cluster.generation import PositionScores, PromptScored, TokenScore


class TokenScorer:
    """Adds the token's bytes to engine's numbers."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes

    def __call__(self, entry: TokenLogprobs) -> PositionScores:
        return PositionScores(
            chosen=self._score(entry.token_id, entry.logprob, entry.rank),
            top=tuple(self._score(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top, 1)),
        )

    def _score(self, token_id: int, logprob: float, rank: int) -> TokenScore:
        return TokenScore(token_id=token_id, token=self._token_bytes(token_id), logprob=logprob, rank=rank)


class PromptScores:
    """Collects a prompt's scores over pieces and attempts. Positions known already are not taken again."""

    def __init__(self, prompt_tokens: int, score: Callable[[TokenLogprobs], PositionScores]) -> None:
        self._prompt_tokens = prompt_tokens
        self._score = score
        self._entries: list[PositionScores | None] = []

    @property
    def complete(self) -> bool:
        return len(self._entries) == self._prompt_tokens

    def take(self, piece: PromptLogprobs) -> None:
        """Raises InternalError when positions before the piece are missing, or it goes beyond the prompt."""
        known = len(self._entries)
        if piece.first > known or piece.first + len(piece.entries) > self._prompt_tokens:
            end = piece.first + len(piece.entries)
            raise InternalError(
                f"scores of prompt tokens {piece.first}..{end} came after {known} of {self._prompt_tokens}"
            )
        for entry in piece.entries[known - piece.first :]:
            self._entries.append(None if entry is None else self._score(entry))

    def event(self) -> PromptScored:
        """Raises InternalError when positions are missing."""
        if not self.complete:
            raise InternalError(f"{len(self._entries)} of {self._prompt_tokens} prompt tokens have scores")
        return PromptScored(entries=tuple(self._entries))
