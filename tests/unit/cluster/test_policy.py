from __future__ import annotations

import dataclasses

from actors.reports import EncoderInfo, EngineInfo, LoadReport
from actors.types import EngineRole
from cluster.policy.choose import choose
from cluster.policy.encoders import QUEUE_STEP
from cluster.policy.views import Demand, EncoderView, EngineView, Route, admissible, blocks_needed, has_room_on


def view(name: str, role: EngineRole, *, free: int = 100, queued: int = 0, fingerprint: str = "f") -> EngineView:
    return EngineView(
        info=EngineInfo(
            engine_id=name,
            incarnation=name,
            address=name,
            role=role,
            epoch=1,
            fingerprint=fingerprint,
            dtype="bfloat16",
            block_size=16,
            switches="s",
            max_model_len=4096,
        ),
        load=LoadReport(
            step=0, running=0, waiting=0, free_blocks=free, total_blocks=100, block_size=16, queued_tokens=queued
        ),
    )


def pick_route(engines: list[EngineView], tokens: int) -> Route | None:
    return choose(Demand(token_count=tokens), engines).route


def names(engines: list[EngineView], tokens: int = 64) -> tuple[str, str | None] | None:
    route = pick_route(engines, tokens)
    return None if route is None else (route.prefill.engine_id, route.decode.engine_id if route.decode else None)


P, D, C = EngineRole.PREFILL, EngineRole.DECODE, EngineRole.COLOCATED


def test_a_path_needs_both_halves() -> None:
    assert names([]) is None
    assert names([view("p", P)]) is None
    assert names([view("d", D)]) is None
    assert names([view("p", P), view("d", D)]) == ("p", "d")
    assert names([view("c", C)]) == ("c", None)


def test_the_least_loaded_engines_are_paired() -> None:
    engines = [view("p1", P, queued=500), view("p2", P), view("d1", D, free=20), view("d2", D, free=80)]
    assert names(engines) == ("p2", "d2")


def test_engines_with_room_come_before_idle_ones_without() -> None:
    engines = [view("p", P), view("d1", D, free=2), view("d2", D, free=10, queued=900)]
    assert names(engines, tokens=64) == ("p", "d2")


def test_a_full_path_is_still_a_path() -> None:
    assert names([view("p", P, free=0), view("d", D, free=0)]) == ("p", "d")


def test_only_engines_of_equal_weights_dtype_blocks_and_rules_are_paired() -> None:
    prefill = view("p", P)
    assert names([prefill, view("d", D, fingerprint="other")]) is None
    for field, value in [("dtype", "float32"), ("block_size", 32), ("switches", "t")]:
        decode = view("d", D)
        decode = dataclasses.replace(decode, info=dataclasses.replace(decode.info, **{field: value}))
        assert names([prefill, decode]) is None


def test_those_who_wait_are_taken_up_in_order_while_whole_blocks_last() -> None:
    assert blocks_needed(17, 16) == 2
    decode = view("d", D, free=4)
    assert admissible(decode, [32, 17, 1]) == [0, 1]
    assert admissible(decode, [32, 32]) == [0, 1]
    assert admissible(decode, [65, 1]) == []
    assert admissible(decode, []) == []
    assert admissible(view("p", P), [1]) == []
    assert admissible(view("c", C), [1]) == [0]


def test_one_that_an_engine_could_never_hold_keeps_nobody_waiting_there() -> None:
    decode = view("d", D, free=4)
    assert admissible(decode, [16 * 101, 32, 32, 1]) == [1, 2]
    assert admissible(decode, [16 * 100, 32]) == [], "it could, once all others have gone"


def test_a_route_has_room_where_all_of_its_engines_do() -> None:
    engines = [view("p", P, free=2), view("d", D, free=3), view("c", C, free=4)]
    split, alone = pick_route(engines[:2], 1), pick_route(engines[2:], 1)
    assert split is not None and alone is not None
    assert has_room_on(engines, split, 32) and not has_room_on(engines, split, 33)
    assert has_room_on(engines, alone, 64) and not has_room_on(engines, alone, 65)
    assert not has_room_on(engines[1:], split, 1)


def test_engines_that_may_not_take_so_long_a_prompt_come_last() -> None:
    short, long = view("short", EngineRole.COLOCATED), view("long", EngineRole.COLOCATED, queued=500)
    engines = [dataclasses.replace(short, info=dataclasses.replace(short.info, max_model_len=32)), long]
    routes = [pick_route(engines, count) for count in (31, 32)]
    assert [route.prefill.engine_id for route in routes if route is not None] == ["short", "long"]
    assert pick_route(engines[:1], 32) is not None, "the engine says what is wrong"


def encoder(name: str, queued: int = 0) -> EncoderView:
    info = EncoderInfo(encoder_id=name, incarnation=name, address=name, fingerprint="f", dtype="float32")
    return EncoderView(info=info, queued_patches=queued)


def home(key: int, encoders: list[EncoderView]) -> str:
    picked = choose(Demand(token_count=64, units=((bytes([key]) * 32, 1000),)), [], encoders).encoder
    assert picked is not None
    return picked.encoder_id


def test_the_encoder_with_the_shorter_queue_is_picked() -> None:
    assert choose(Demand(token_count=64), []).encoder is None
    for key in range(20):
        assert home(key, [encoder("a", QUEUE_STEP + 5), encoder("b", 5)]) == "b"


def test_a_picture_goes_where_it_went_before_and_others_elsewhere() -> None:
    three = [encoder("a", 5), encoder("b", QUEUE_STEP - 1), encoder("c")]
    homes = [home(key, three) for key in range(200)]
    assert homes == [home(key, three[::-1]) for key in range(200)]
    assert min(homes.count(name) for name in "abc") > 30
    left = [home(key, three[:2]) for key in range(200)]
    assert all(now == before for now, before in zip(left, homes, strict=True) if before != "c"), "only c's move"
