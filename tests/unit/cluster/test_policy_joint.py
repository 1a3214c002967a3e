"""Encoder, prefill and decode engine are picked together, and so is whether there are two engines at all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from actors.reports import EncoderInfo, EngineInfo, KvIdentity, LoadReport
from actors.types import EngineRole
from cluster.policy.candidates import MOST_TOLD
from cluster.policy.choose import (
    BESIDE_DECODING,
    HANDOVER_TOKENS,
    PULL_FAR,
    SEND,
    SEND_FAR,
    USED_STEP,
    USED_TOKENS,
    choose,
)
from cluster.policy.encoders import AWAY_TOKENS, PATCH_TOKENS, QUEUE_STEP, encoder_terms
from cluster.policy.views import Demand, EncoderView, EngineView, cached_tokens, has_room, node_of, used_share

P, D, C = EngineRole.PREFILL, EngineRole.DECODE, EngineRole.COLOCATED
BLOCK = 16
PICTURE = b"p" * 32


def hashes(identity: KvIdentity) -> Sequence[bytes]:
    return [f"{identity.fingerprint} {number}".encode() for number in range(100)]


def view(
    name: str,
    role: EngineRole,
    node: str = "a",
    *,
    cached: int = 0,
    used: int = 0,
    queued: int = 0,
    longest: int = 4096,
    fingerprint: str = "f",
) -> EngineView:
    """``cached``, ``used``: blocks, of 1000 in all."""
    info = EngineInfo(
        engine_id=name,
        incarnation=name,
        address=f"{node}:1",
        role=role,
        epoch=1,
        fingerprint=fingerprint,
        dtype="bfloat16",
        block_size=BLOCK,
        switches="s",
        max_model_len=longest,
    )
    load = LoadReport(
        step=0, running=0, waiting=0, free_blocks=1000 - used, total_blocks=1000, block_size=BLOCK, queued_tokens=queued
    )
    return EngineView(info=info, load=load, cached_blocks=frozenset(hashes(info.kv_identity)[:cached]))


def encoder(name: str, node: str = "a", *, queued: int = 0, knows: Sequence[bytes] = ()) -> EncoderView:
    info = EncoderInfo(encoder_id=name, incarnation=name, address=f"{node}:2", fingerprint="f", dtype="float32")
    return EncoderView(info=info, queued_patches=queued, known_units=frozenset(knows))


def taken(engines: list[EngineView], demand: Demand) -> str:
    return choose(demand, engines).routes[0].name


@pytest.mark.parametrize(
    ("tokens", "alone_tokens", "engines", "expected"),
    [
        # A short text is not worth a transfer, a long one is.
        (100, 512, [view("p", P), view("d", D)], "d alone"),
        (400, 512, [view("p", P), view("d", D)], "p -> d"),
        # Nor is a long one that was cached before where it is decoded.
        (1600, 512, [view("p", P), view("d", D, cached=98)], "d alone"),
        (1600, 512, [view("p", P, cached=98), view("d", D)], "p -> d"),
        # The setting may forbid it.
        (100, 0, [view("p", P), view("d", D)], "p -> d"),
        # Where prefill engines have much to do, up to the bound.
        (500, 512, [view("p", P, queued=3000), view("d", D)], "d alone"),
        (600, 512, [view("p", P, queued=3000), view("d", D)], "p -> d"),
        (500, 512, [view("p", P, queued=300), view("d", D, queued=3000)], "p -> d"),
        # Without any prefill engine texts that are short enough are still answered.
        (500, 512, [view("d", D)], "d alone"),
        # A colocated engine computes beside its decoding, which long prompts feel.
        (100, 0, [view("p", P), view("d", D), view("c", C)], "c alone"),
        (2000, 0, [view("p", P), view("d", D), view("c", C)], "p -> d"),
    ],
)
def test_whether_to_disaggregate(tokens: int, alone_tokens: int, engines: list[EngineView], expected: str) -> None:
    for order in (engines, engines[::-1]):
        assert taken(order, Demand(token_count=tokens, prefix_hashes=hashes, alone_tokens=alone_tokens)) == expected


@pytest.mark.parametrize(
    ("engines", "expected"),
    [
        # A partner on the same node saves bandwidth,
        ([view("p", P, "a"), view("d1", D, "b"), view("d2", D, "a")], "p -> d2"),
        ([view("p1", P, "b"), view("p2", P, "a"), view("d", D, "a")], "p2 -> d"),
        # but not so much as queues, caches and room.
        ([view("p1", P, "b"), view("p2", P, "a", queued=500), view("d", D, "a")], "p1 -> d"),
        ([view("p", P, "a"), view("d1", D, "b", cached=90), view("d2", D, "a", used=700)], "p -> d1"),
        ([view("p", P, "a"), view("d1", D, "b"), view("d2", D, "a", used=990)], "p -> d1"),
    ],
)
def test_pairs_are_near_each_other(engines: list[EngineView], expected: str) -> None:
    for order in (engines, engines[::-1]):
        assert taken(order, Demand(token_count=1600, prefix_hashes=hashes)) == expected


@pytest.mark.parametrize(("cached", "expected"), [(60, "p -> d"), (61, "d alone"), (98, "d alone")])
def test_a_decode_engine_goes_on_behind_pictures_it_has(cached: int, expected: str) -> None:
    """They end in block 61."""
    engines = [view("p", P, cached=cached), view("d", D, cached=cached)]
    demand = Demand(token_count=1100, prefix_hashes=hashes, alone_tokens=512, vision_end=961)
    found = choose(demand, engines)
    assert found.routes[0].name == expected
    if expected == "p -> d":
        assert found.routes[-1].excluded == "has no vision experts, and 960 tokens of 961 with media"


MEDIA = Demand(token_count=1100, prefix_hashes=hashes, units=((PICTURE, 4000),), media_tokens=1000)


@pytest.mark.parametrize(
    ("engines", "encoders", "expected"),
    [
        # Whoever has the embeddings, also if its queue is longer and no engine is near.
        ([view("c", C, "a")], [encoder("v1", "a"), encoder("v2", "b", queued=8000, knows=[PICTURE])], ("v2", "c")),
        # Not if it would wait longer than encoding takes.
        ([view("c", C, "a")], [encoder("v1", "a"), encoder("v2", "b", queued=9000, knows=[PICTURE])], ("v1", "c")),
        # The engine that has the prefix draws the encoder near to it when both know nothing,
        (
            [view("c1", C, "a"), view("c2", C, "b", cached=60)],
            [encoder("v1", "a", queued=QUEUE_STEP), encoder("v2", "b")],
            ("v2", "c2"),
        ),
        # and the encoder an engine when they are equal.
        ([view("c1", C, "a"), view("c2", C, "b")], [encoder("v", "b")], ("v", "c2")),
        ([], [encoder("v", "b")], ("v", None)),
    ],
)
def test_encoder_and_engines_are_picked_together(
    engines: list[EngineView], encoders: list[EncoderView], expected: tuple[str, str | None]
) -> None:
    for order in (1, -1):
        found = choose(MEDIA, engines[::order], encoders[::order])
        assert found.encoder is not None
        assert (found.encoder.encoder_id, found.route and found.route.prefill.engine_id) == expected


def test_once_media_are_encoded_their_place_draws_engines() -> None:
    engines = [view("c1", C, "a"), view("c2", C, "b")]
    for place, expected in (("a:7", "c1"), ("b:7", "c2")):
        demand = Demand(token_count=1100, media_tokens=1000, encoder_address=place)
        found = choose(demand, engines)
        assert found.route is not None and found.route.prefill.engine_id == expected
        assert found.encoder is None and not found.encoders


def test_why_the_others_were_not_taken() -> None:
    engines = [
        view("p1", P, cached=50),
        view("p2", P, queued=700),
        view("p3", P, used=990),
        view("p4", P, fingerprint="other"),
        view("d1", D, longest=1000),
        view("d2", D),
    ]
    told = [one.told() for one in choose(Demand(token_count=1600, prefix_hashes=hashes), engines).routes]
    assert told[0] == {
        "name": "p1 -> d2",
        "cost": 914.0,
        "terms": {"computes": 800.0, "handover": 64.0, "sends": 50.0},
    }
    assert told[1]["name"] == "p2 -> d2" and told[1]["terms"]["queued"] == 700
    assert [one.get("last_for") for one in told[2:4]] == ["no room now", "too short for the prompt"]
    excluded = {one["name"]: one["excluded"] for one in told if "excluded" in one}
    assert excluded == {
        "p4": "no engine that decodes takes its KV",
        "d1 alone": "would compute 1600 tokens, and may 0",
        "d2 alone": "would compute 1600 tokens, and may 0",
    }


def test_of_many_a_few_are_told() -> None:
    engines = [view(f"p{number}", P) for number in range(20)] + [view(f"d{number}", D) for number in range(20)]
    found = choose(MEDIA, engines, [encoder(f"v{number}") for number in range(20)])
    assert len(found.routes) == 2 * MOST_TOLD and len(found.encoders) == MOST_TOLD
    assert found.encoder is not None and found.encoders[0].name == found.encoder.encoder_id


def plain_cost(demand: Demand, first: EngineView, second: EngineView | None, place: int, encoders: list[EncoderView]):  # type: ignore[no-untyped-def]
    """(engines too short, engines without room, cost) of one way, term by term."""
    both = [first] if second is None else [first, second]
    node = node_of(first.info.address)
    lacking = demand.token_count - cached_tokens(first, demand.token_count, hashes)
    cost = first.load.queued_tokens + lacking
    if first.info.role.decodes:
        cost += BESIDE_DECODING * (first.load.queued_tokens + lacking)
    if second is not None:
        far = node_of(second.info.address) != node
        sent = demand.token_count - cached_tokens(second, demand.token_count, hashes)
        cost += HANDOVER_TOKENS + second.load.queued_tokens + (SEND_FAR if far else SEND) * sent
    cost += sum(int(used_share(one) / USED_STEP) * USED_TOKENS for one in both)
    cost += sum(encoder_terms(demand, encoders)[place].values())
    cost += PULL_FAR * demand.media_tokens * (node_of(encoders[place].info.address) != node)
    too_long = sum(demand.token_count >= one.info.max_model_len for one in both)
    return too_long, sum(not has_room(one, demand.token_count) for one in both), pytest.approx(cost)


def test_nothing_is_better_than_what_is_picked() -> None:
    """Against every encoder with every engine and every pair."""
    draw = random.Random(1)
    for _ in range(150):
        engines = [
            view(
                f"e{number}",
                draw.choice([P, D, D, C] if draw.random() < 0.3 else [P, D]),
                draw.choice("abc"),
                cached=draw.choice([0, 0, 20, 60]),
                used=draw.choice([0, 150, 500, 950]),
                queued=draw.choice([0, 100, 1000]),
                longest=draw.choice([4096, 4096, 1000]),
                fingerprint=draw.choice("fffg"),
            )
            for number in range(draw.randint(1, 7))
        ]
        encoders = [
            encoder(name, draw.choice("abc"), queued=draw.choice([0, 9000]), knows=draw.choice([[], [PICTURE]]))
            for name in ("v1", "v2", "v3")
        ]
        demand = Demand(
            token_count=1100,
            prefix_hashes=hashes,
            units=((PICTURE, 4000),),
            media_tokens=1000,
            alone_tokens=draw.choice([0, 900]),
        )
        alone = [one for one in engines if one.info.role is C]
        alone += [
            one
            for one in engines
            if one.info.role is D and 1100 - cached_tokens(one, 1100, hashes) <= demand.alone_tokens
        ]
        pairs = [
            (one, two)
            for one, two in itertools.product(engines, engines)
            if one.info.role is P and two.info.role is D and one.info.kv_identity == two.info.kv_identity
        ]
        ways = [*((one, None) for one in alone), *pairs]
        found = choose(demand, engines, encoders)
        if not ways:
            assert found.route is None
            continue
        assert found.route is not None and found.encoder is not None
        by_name = {one.info.engine_id: one for one in engines}
        first = by_name[found.route.prefill.engine_id]
        second = None if found.route.decode is None else by_name[found.route.decode.engine_id]
        place = [one.info.encoder_id for one in encoders].index(found.encoder.encoder_id)
        picked = plain_cost(demand, first, second, place, encoders)
        every = [plain_cost(demand, *way, place, encoders) for way in ways for place in range(3)]
        assert picked == min((long, full, cost.expected) for long, full, cost in every)


def test_a_known_picture_is_cheaper_than_its_home() -> None:
    assert PATCH_TOKENS * 4000 > AWAY_TOKENS
    home = choose(MEDIA, [], [encoder(name) for name in "abc"]).encoder
    assert home is not None
    other = next(name for name in "abc" if name != home.encoder_id)
    places = [encoder(name, knows=[PICTURE] if name == other else []) for name in "abc"]
    found = choose(MEDIA, [], places).encoder
    assert found is not None and found.encoder_id == other
