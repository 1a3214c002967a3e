from __future__ import annotations

from collections import Counter

import pytest

from actors.reports import EncoderInfo, EngineInfo
from actors.types import EngineRole
from cluster.registry import LEASE_S, EncoderEntry, EngineEntry, LoadingEntry, Registry, next_role

P, D, C = EngineRole.PREFILL, EngineRole.DECODE, EngineRole.COLOCATED


def engine(incarnation: str, role: EngineRole = P, *, ready: bool = True) -> EngineEntry:
    info = EngineInfo(
        engine_id=f"engine-{incarnation}",
        incarnation=incarnation,
        address="127.0.0.1:1",
        role=role,
        epoch=1,
        fingerprint="f",
        dtype="float32",
        block_size=16,
        switches="s",
        max_model_len=128,
    )
    return EngineEntry(info=info, pool="pool", ready=ready, load=None)


@pytest.mark.parametrize(
    ("wanted", "present", "role"),
    [
        ({P: 1, D: 1}, {}, P),
        ({P: 1, D: 1}, {P: 1}, D),
        ({P: 1, D: 3}, {P: 1, D: 1}, D),
        ({P: 1, D: 1}, {P: 1, D: 1}, P),
        ({C: 1}, {C: 5}, C),
        ({P: 2, D: 1}, {D: 1}, P),
    ],
)
def test_next_role_is_the_one_furthest_below_its_count(
    wanted: dict[EngineRole, int], present: dict[EngineRole, int], role: EngineRole
) -> None:
    assert next_role(wanted, Counter(present)) is role


def test_a_pool_that_wants_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no role"):
        next_role({P: 0}, Counter())


def test_starting_engines_hold_their_role_before_they_are_ready() -> None:
    registry = Registry(term=1)
    wanted = {P: 1, D: 1}
    assert registry.assign("a", "pool", wanted, {}, now=0.0) is P
    assert registry.assign("b", "pool", wanted, {}, now=0.0) is D
    assert registry.assign("a", "pool", wanted, {}, now=1.0) is P
    registry.renew_engine(engine("a", P), now=1.0)
    assert registry.assign("c", "other", wanted, {}, now=1.0) is P


def test_a_registry_learns_of_engines_that_another_one_let_start() -> None:
    registry = Registry(term=2)
    registry.renew_loading("a", LoadingEntry(pool="pool", role=D), now=0.0)
    assert registry.assign("b", "pool", {P: 1, D: 1}, {}, now=0.0) is P
    registry.renew_engine(engine("a", D), now=1.0)
    registry.renew_loading("a", LoadingEntry(pool="pool", role=D), now=1.0)
    assert not registry.snapshot().loading[1:]


def test_a_vacancy_is_a_role_below_its_count_loading_engines_included() -> None:
    registry = Registry(term=1)
    wanted = {P: 1, D: 1}
    registry.assign("a", "pool", wanted, {}, now=0.0)
    assert registry.has_vacancy("pool", wanted, {})
    registry.renew_engine(engine("b", D), now=0.0)
    assert not registry.has_vacancy("pool", wanted, {})
    before = registry.version
    registry.renew_engine(engine("b", D), now=2.0)
    registry.expire(now=LEASE_S)
    assert registry.has_vacancy("pool", wanted, {}) and registry.version > before


def test_a_lost_engines_role_is_given_to_its_replacement() -> None:
    registry = Registry(term=1)
    wanted = {P: 1, D: 1}
    registry.renew_engine(engine("a", P), now=0.0)
    registry.renew_engine(engine("b", D), now=2.0)
    assert registry.expire(now=LEASE_S) == ["a"]
    assert registry.assign("c", "pool", wanted, {}, now=LEASE_S) is P


def test_a_starting_engine_that_goes_silent_gives_its_role_back() -> None:
    registry = Registry(term=1)
    wanted = {P: 1, D: 1}
    registry.assign("a", "pool", wanted, {}, now=0.0)
    registry.renew_loading("a", LoadingEntry(pool="pool", role=P, ranks=((3, 9),)), now=1.0)
    assert [(entry.role, entry.ranks) for entry in registry.snapshot().loading] == [(P, ((3, 9),))]
    assert registry.expire(now=LEASE_S) == []
    assert registry.expire(now=LEASE_S + 1.0) == ["a"]
    assert registry.assign("b", "pool", wanted, {}, now=LEASE_S + 1.0) is P


def test_the_version_follows_membership_and_readiness_but_not_renewals() -> None:
    registry = Registry(term=1)
    versions = [registry.version]
    for change in (
        lambda: registry.renew_engine(engine("a", ready=False), now=0.0),
        lambda: registry.renew_engine(engine("a", ready=True), now=1.0),
        lambda: registry.renew_encoder(
            EncoderEntry(
                info=EncoderInfo(encoder_id="e", incarnation="x", address="h:1", fingerprint="f", dtype="float32"),
                queued_patches=3,
            ),
            now=1.0,
        ),
        lambda: registry.leave("a"),
    ):
        change()
        versions.append(registry.version)
    assert versions == [0, 1, 2, 3, 4]
    registry.renew_engine(engine("b"), now=1.0)
    before = registry.version
    registry.renew_engine(engine("b"), now=2.0)
    registry.leave("unknown")
    assert registry.version == before
    snapshot = registry.snapshot()
    assert [entry.info.incarnation for entry in snapshot.engines] == ["b"]
    assert [entry.info.incarnation for entry in snapshot.encoders] == ["x"]
