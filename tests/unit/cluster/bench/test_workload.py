"""Conversations drawn from a seed."""

from __future__ import annotations

import io
from typing import Any

import av
import pytest
from PIL import Image

from cluster.bench.media import jpeg, mp4
from cluster.bench.settings import BenchSettings, Fixed, Uniform
from cluster.bench.workload import TokenScale, make_conversations, warmup_settings

SCALE = TokenScale(overhead=5, per_word=2)


def settings(**fields: Any) -> BenchSettings:
    return BenchSettings(url="http://h", concurrency=1, **{"num_requests": 12} | fields)


def test_the_same_seed_gives_the_same_conversations() -> None:
    wanted = settings(mix={"text": 1, "image": 1, "video": 1}, image_size=(32, 32), video_size=(32, 32), turns=2)
    first, again = make_conversations(wanted, SCALE), make_conversations(wanted, SCALE)
    assert first == again
    assert {conversation.kind for conversation in first} == {"text", "image", "video"}
    assert make_conversations(settings(seed=1), SCALE) != make_conversations(settings(), SCALE)


@pytest.mark.parametrize(("turns", "expected"), [(1, [1] * 12), (5, [5, 5, 2]), (20, [12])])
def test_requests_are_divided_into_turns(turns: int, expected: list[int]) -> None:
    found = make_conversations(settings(turns=turns), SCALE)
    assert [len(conversation.turns) for conversation in found] == expected
    assert [conversation.index for conversation in found] == list(range(len(expected)))


def test_lengths_follow_the_servers_count() -> None:
    (conversation,) = make_conversations(
        settings(num_requests=2, turns=2, input_tokens=Fixed(105), output_tokens=Uniform(3, 4)), SCALE
    )
    # The template's tokens belong to the first turn; (105 - 5) / 2 words there.
    assert [len(turn.text.split()) for turn in conversation.turns] == [50, 52]
    assert all(turn.output_tokens in (3, 4) for turn in conversation.turns)


@pytest.mark.parametrize(("tokens", "whole", "words"), [(3, True, 1), (5, True, 1), (15, True, 5), (15, False, 8)])
def test_scale(tokens: int, whole: bool, words: int) -> None:
    assert SCALE.words(tokens, whole_prompt=whole) == words


def test_shared_prefixes_are_used_in_turn() -> None:
    found = make_conversations(settings(shared_prefix_tokens=20, prefix_groups=3), SCALE)
    prefixes = [conversation.system for conversation in found]
    assert len(set(prefixes)) == 3 and prefixes[:3] == prefixes[3:6]
    assert all(prefix is not None and len(prefix.split()) == 10 for prefix in prefixes)
    assert make_conversations(settings(), SCALE)[0].system is None


@pytest.mark.parametrize(("distinct", "expected"), [(None, 24), (5, 5), (1, 1)])
def test_media_repeat_only_when_asked_to(distinct: int | None, expected: int) -> None:
    found = make_conversations(
        settings(mix={"image": 1}, images_per_request=2, image_size=(32, 32), distinct_media=distinct), SCALE
    )
    media = [medium for conversation in found for medium in conversation.turns[0].media]
    assert len(media) == 24 and len({medium.content for medium in media}) == expected


def test_media_are_in_the_first_turn_only() -> None:
    found = make_conversations(settings(mix={"video": 1}, video_size=(32, 32), turns=3), SCALE)
    for conversation in found:
        assert [len(turn.media) for turn in conversation.turns] == [1, 0, 0]
        assert conversation.turns[0].media[0].kind == "video"


def test_warm_up_shares_nothing_with_what_is_measured() -> None:
    wanted = settings(mix={"image": 1}, image_size=(32, 32), shared_prefix_tokens=20, warmup=3)
    measured, before = make_conversations(wanted, SCALE), make_conversations(warmup_settings(wanted), SCALE)
    assert len(before) == 3
    for name in ("system", "turns"):
        assert not {getattr(item, name) for item in measured} & {getattr(item, name) for item in before}


def test_pictures_are_pictures() -> None:
    with Image.open(io.BytesIO(jpeg((70, 50), "a"))) as image:
        assert (image.format, image.size) == ("JPEG", (70, 50))
    assert jpeg((70, 50), "a") == jpeg((70, 50), "a") != jpeg((70, 50), "b")


def test_videos_are_videos() -> None:
    with av.open(io.BytesIO(mp4((65, 48), 1.5, 4, "a"))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 6 and frames[0].shape == (48, 64, 3)
    assert (frames[0] != frames[-1]).any()
