"""Prompts go where their beginning is cached, as far as load allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from actors.reports import EngineInfo, KvIdentity, LoadReport
from actors.types import EngineRole
from cluster.policy.choose import choose
from cluster.policy.views import Demand, EngineView, PrefixHashes, Route, cached_tokens

P, D, C = EngineRole.PREFILL, EngineRole.DECODE, EngineRole.COLOCATED
BLOCK = 16


def hashes(identity: KvIdentity) -> Sequence[bytes]:
    """Of a prompt of ten whole blocks."""
    return [f"{identity.fingerprint} {number}".encode() for number in range(10)]


def pick_route(engines: list[EngineView], tokens: int, hashes: PrefixHashes) -> Route | None:
    return choose(Demand(token_count=tokens, prefix_hashes=hashes), engines).route


def view(name: str, role: EngineRole, *, cached: int = 0, used: int = 0, queued: int = 0) -> EngineView:
    info = EngineInfo(
        engine_id=name,
        incarnation=name,
        address=name,
        role=role,
        epoch=1,
        fingerprint="f",
        dtype="bfloat16",
        block_size=BLOCK,
        switches="s",
        max_model_len=4096,
    )
    load = LoadReport(
        step=0, running=0, waiting=0, free_blocks=100 - used, total_blocks=100, block_size=BLOCK, queued_tokens=queued
    )
    return EngineView(info=info, load=load, cached_blocks=frozenset(hashes(info.kv_identity)[:cached]))


@pytest.mark.parametrize(
    ("engines", "expected"),
    [
        # Equal load: the longest prefix.
        ([view("a", C), view("b", C, cached=3), view("c", C, cached=2)], "b"),
        # What is cached is worth as many queued tokens.
        ([view("a", C), view("b", C, cached=3, queued=47)], "b"),
        ([view("a", C), view("b", C, cached=3, queued=49)], "a"),
        # And less than room.
        ([view("a", C), view("b", C, cached=10, used=95)], "a"),
        # Blocks in use only decide between equals.
        ([view("a", C), view("b", C, cached=1, used=60)], "b"),
        ([view("a", C, cached=2, used=50), view("b", C, cached=2)], "b"),
    ],
)
def test_the_engine_with_the_least_to_compute_is_taken(engines: list[EngineView], expected: str) -> None:
    for order in (engines, engines[::-1]):
        route = pick_route(order, 165, hashes)
        assert route is not None and route.prefill.engine_id == expected


@pytest.mark.parametrize(
    ("engines", "expected"),
    [
        # Each half by its own cache.
        ([view("p1", P), view("p2", P, cached=4), view("d1", D, cached=9), view("d2", D)], ("p2", "d1")),
        # A decode engine's cache saves no computing.
        ([view("p1", P, queued=10), view("p2", P), view("d1", D, cached=9)], ("p2", "d1")),
        # It decides among those about equally full,
        ([view("p1", P), view("d1", D), view("d2", D, cached=1, used=9)], ("p1", "d2")),
        # not against an emptier one.
        ([view("p1", P), view("d1", D), view("d2", D, cached=9, used=30)], ("p1", "d1")),
        # A colocated engine competes by what it has to compute.
        ([view("p1", P, cached=5), view("d1", D), view("c", C)], ("p1", "d1")),
        ([view("p1", P, cached=5), view("d1", D), view("c", C, cached=5)], ("c", None)),
    ],
)
def test_pairs_are_weighed_by_both_caches(engines: list[EngineView], expected: tuple[str, str | None]) -> None:
    for order in (engines, engines[::-1]):
        route = pick_route(order, 165, hashes)
        assert route is not None
        assert (route.prefill.engine_id, route.decode.engine_id if route.decode else None) == expected


@pytest.mark.parametrize(("tokens", "cached", "expected"), [(165, 10, 160), (161, 10, 160), (160, 10, 144), (1, 10, 0)])
def test_the_last_token_is_never_cached(tokens: int, cached: int, expected: int) -> None:
    assert cached_tokens(view("a", C, cached=cached), tokens, hashes) == expected


def test_a_gap_ends_the_prefix() -> None:
    whole = view("a", C, cached=10)
    gap = replace(whole, cached_blocks=whole.cached_blocks - {hashes(whole.info.kv_identity)[4]})
    assert cached_tokens(gap, 165, hashes) == 4 * BLOCK


def test_every_engine_is_asked_about_hashes_of_its_own_kind() -> None:
    other = view("b", C, cached=9)
    other = replace(other, info=replace(other.info, fingerprint="g"))
    assert cached_tokens(other, 165, hashes) == 0


def test_without_anything_cached_no_hash_is_computed() -> None:
    def never(identity: KvIdentity) -> Sequence[bytes]:
        raise AssertionError("nobody needs hashes")

    assert pick_route([view("a", C), view("p", P), view("d", D)], 165, never) is not None
