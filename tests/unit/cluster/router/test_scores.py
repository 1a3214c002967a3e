from __future__ import annotations

import pytest

from actors.errors import InternalError
from actors.types import PromptLogprobs, SequenceKey, TokenLogprobs
from cluster.generation import TokenScore
from cluster.router.scores import PromptScores, TokenScorer

KEY = SequenceKey("r", 0, 0)


def entry(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id=token_id, logprob=-3.0, rank=9, top=((5, -0.5), (token_id, -1.0)))


SCORE = TokenScorer(lambda token: bytes([token]))


def test_every_token_comes_with_its_bytes_and_the_most_likely_with_their_ranks() -> None:
    scores = SCORE(entry(200))
    assert scores.chosen == TokenScore(token_id=200, token=b"\xc8", logprob=-3.0, rank=9)
    assert [(top.token_id, top.token, top.logprob, top.rank) for top in scores.top] == [
        (5, b"\x05", -0.5, 1),
        (200, b"\xc8", -1.0, 2),
    ]


def piece(first: int, *tokens: int | None) -> PromptLogprobs:
    return PromptLogprobs(key=KEY, first=first, entries=tuple(None if t is None else entry(t) for t in tokens))


def test_pieces_make_a_prompt_whatever_an_earlier_attempt_told() -> None:
    scores = PromptScores(4, SCORE)
    for part in (piece(0, None, 1), piece(0, None), piece(1, 1, None), piece(3, 3)):
        assert not scores.complete
        scores.take(part)
    assert [found and found.chosen.token_id for found in scores.event().entries] == [None, 1, None, 3]


@pytest.mark.parametrize("part", [piece(1, 1), piece(0, *range(5))])
def test_a_gap_or_too_much_is_our_defect(part: PromptLogprobs) -> None:
    with pytest.raises(InternalError):
        PromptScores(4, SCORE).take(part)


def test_half_a_prompt_is_not_told() -> None:
    scores = PromptScores(2, SCORE)
    scores.take(piece(0, None))
    with pytest.raises(InternalError, match="1 of 2"):
        scores.event()
