"""Who is tried alone after an engine died, who is cleared and who is refused."""

from __future__ import annotations

import asyncio

import pytest

from cluster.router.suspects import TOKENS_BEYOND, ChoiceKey, Suspects
from tests.waiting import LIMIT_S

A, B, C = (ChoiceKey(name, 0) for name in "abc")
P, D, E = "prefill", "decode", "other decode"


def accused(*choices: ChoiceKey, engine: str = D, tokens: int = 5) -> Suspects:
    suspects = Suspects()
    for choice in choices:
        assert not suspects.accuse(choice, engine, tokens, computed=True)
    return suspects


def test_an_engine_tries_one_suspect_beside_any_number_of_others() -> None:
    suspects = accused(A, B)
    assert all(suspects.may_try(choice, engine) for choice in (A, B, C) for engine in (P, D, E))
    suspects.begin(A, frozenset({P, E}))
    assert [suspects.may_try(B, engine) for engine in (P, D, E)] == [False, True, False]
    assert suspects.may_try(A, P) and suspects.may_try(C, P) and suspects.may_try(C, E)
    suspects.rest(A)
    assert suspects.may_try(B, P) and A in suspects


@pytest.mark.parametrize(("got", "cleared"), [(0, False), (1, False), (TOKENS_BEYOND, True), (9, True)])
def test_a_suspect_is_cleared_beyond_the_token_where_the_death_fell(got: int, cleared: bool) -> None:
    suspects = accused(A, tokens=5)
    suspects.begin(A, frozenset({P, E}))
    suspects.advance(A, 5 + got)
    assert (A not in suspects) is cleared
    assert suspects.may_try(B, E)  # no suspect
    assert suspects.accuse(A, E, 5 + got, computed=True) is not cleared


@pytest.mark.parametrize("engine", [P, E])
def test_a_second_death_under_a_suspect_refuses_it(engine: str) -> None:
    suspects = accused(A, B)
    suspects.begin(A, frozenset({P, E}))
    assert not suspects.accuse(C, engine, 3, computed=True)  # beside it, and never accused before
    assert suspects.accuse(A, engine, 5, computed=True)
    assert A not in suspects and B in suspects and C in suspects


@pytest.mark.parametrize("first", [True, False])
def test_a_second_engine_that_had_not_begun_spares_it_once(first: bool) -> None:
    """Whatever was known of the first death."""
    suspects = Suspects()
    suspects.accuse(A, D, 5, computed=first)
    assert not suspects.is_spared(A)
    suspects.begin(A, frozenset({P, E}))
    assert not suspects.accuse(A, E, 5, computed=False)
    assert suspects.is_spared(A) and A in suspects
    suspects.begin(A, frozenset({P, "third"}))
    assert suspects.accuse(A, "third", 5, computed=False)


def test_what_says_nothing_of_a_suspect_leaves_it_one() -> None:
    """Its engine fell silent, moved it or had no blocks, or another one died."""
    suspects = accused(A)
    suspects.begin(A, frozenset({P, E}))
    suspects.rest(A)
    assert A in suspects
    assert not suspects.accuse(A, E, 6, computed=True)
    suspects.drop(A)
    suspects.drop(A)
    assert suspects.count == 0


def test_only_suspects_are_noted() -> None:
    suspects = accused(A)
    suspects.begin(B, frozenset({P, E}))
    suspects.advance(B, 100)
    suspects.rest(B)
    assert suspects.may_try(A, P) and suspects.may_try(A, E) and suspects.count == 1


@pytest.mark.parametrize("how", ["rest", "drop", "advance"])
async def test_whoever_waits_hears_that_an_engine_is_free(how: str) -> None:
    suspects = accused(A, B)
    suspects.begin(A, frozenset({P, E}))
    waiting = asyncio.create_task(suspects.changed())
    await asyncio.sleep(0)
    assert not waiting.done()
    {"rest": suspects.rest, "drop": suspects.drop, "advance": lambda choice: suspects.advance(choice, 7)}[how](A)
    await asyncio.wait_for(waiting, LIMIT_S)
    assert suspects.may_try(B, E)
