from __future__ import annotations

from dataclasses import replace

import pytest

from actors.engine.scheduling.block_hash import hash_blocks
from actors.reports import KvIdentity
from actors.types import EngineRequest, Grid, MediaKind, MediaSpan, SamplingParams
from cluster.router import prefix
from cluster.router.prefix import request_hashes

IDENTITY = KvIdentity(fingerprint="ab", dtype="float64", block_size=4, switches="s")
PICTURE = MediaSpan(
    kind=MediaKind.IMAGE, offset=2, grid=Grid(1, 4, 6), embedding_keys=(b"k" * 32,), encoder_address="encoder:1"
)
REQUEST = EngineRequest(
    prompt_ids=(3, 4, *[100] * 6, 5),
    media=(PICTURE,),
    output_ids=(6, 7, 8, 9),
    sampling=SamplingParams(max_tokens=9),
    seed=1,
    salt=b"tenant",
    arrival_s=0.0,
    deadline_s=9.0,
)


def test_they_are_the_hashes_an_engine_computes() -> None:
    expected = hash_blocks(IDENTITY, (*REQUEST.prompt_ids, *REQUEST.output_ids), (PICTURE,), b"tenant")
    assert len(expected) == 3
    assert request_hashes(REQUEST)(IDENTITY) == expected
    elsewhere = replace(REQUEST, media=(replace(PICTURE, encoder_address="encoder:2"),), seed=2, priority=5)
    assert request_hashes(elsewhere)(IDENTITY) == expected


def test_each_identity_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[KvIdentity] = []
    monkeypatch.setattr(prefix, "hash_blocks", lambda identity, *rest: asked.append(identity) or (b"",))
    hashes = request_hashes(REQUEST)
    other = replace(IDENTITY, block_size=8)
    for identity in (IDENTITY, other, IDENTITY, other):
        hashes(identity)
    assert asked == [IDENTITY, other]


def test_a_prompt_that_is_scored_is_found_nowhere() -> None:
    scored = replace(REQUEST, sampling=replace(REQUEST.sampling, prompt_logprobs=0))
    assert request_hashes(scored)(IDENTITY) == ()
