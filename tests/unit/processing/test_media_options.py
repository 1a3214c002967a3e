"""What a deployment, a request and a part say of pictures and videos, each over the one before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.errors import InvalidRequest
from actors.processing.config import ImageConfig, ProcessingLimits, VideoConfig
from actors.processing.media_options import with_options
from actors.processing.processor import Processor
from actors.types import Grid, ImagePart, MediaOptions, VideoPart
from tests.tiny_model import tiny_checkpoint
from tests.unit.processing.samples import encode, image_part, noise, request, user, video, video_part

LIMITS = ProcessingLimits(max_resized_pixels=28 * 28 * 100)
SIDE = 28 * 28
PICTURE = encode(noise(280, 280))
CLIP = video(20, fps=4)


def grid(part: ImagePart | VideoPart, of_request: MediaOptions | None = None, **deployment: Any) -> Grid:
    processor = Processor(tiny_checkpoint(), LIMITS, media=MediaOptions(**deployment))
    asked = replace(request(user(part)), media_options=of_request or MediaOptions())
    return processor.process(asked).media[0].grid


def picture(**options: Any) -> ImagePart:
    return replace(image_part(PICTURE), **options)


def clip(**options: Any) -> VideoPart:
    return replace(video_part(CLIP), **options)


def test_a_part_goes_over_the_request_and_that_over_the_deployment() -> None:
    assert grid(picture()) == Grid(1, 16, 16)
    assert grid(picture(), image_max_pixels=25 * SIDE) == Grid(1, 10, 10)
    assert grid(picture(), MediaOptions(image_max_pixels=9 * SIDE), image_max_pixels=25 * SIDE) == Grid(1, 6, 6)
    asked = MediaOptions(image_max_pixels=9 * SIDE)
    assert grid(picture(max_pixels=4 * SIDE), asked, image_max_pixels=25 * SIDE) == Grid(1, 4, 4)
    assert grid(picture(min_pixels=36 * SIDE), asked) == Grid(1, 12, 12)
    # What one says of videos is nothing to pictures.
    assert grid(picture(), MediaOptions(video_max_pixels=SIDE)) == Grid(1, 16, 16)


def test_little_detail_is_a_ceiling_that_never_lifts_another() -> None:
    large = image_part(encode(noise(1120, 1120)))
    limits = {"image_max_pixels": 100 * SIDE}
    assert grid(replace(large, low_detail=True), **limits) == Grid(1, 20, 20)
    processor = Processor(tiny_checkpoint(), ProcessingLimits(), media=MediaOptions(image_max_pixels=1600 * SIDE))
    low = processor.process(request(user(replace(large, low_detail=True)))).media[0].grid
    assert low == Grid(1, 36, 36)  # 18 * 18 units of 28 x 28 pixels: the most that fit in 512 x 512
    chosen = processor.process(request(user(replace(large, low_detail=True, max_pixels=400 * SIDE)))).media[0].grid
    assert chosen == Grid(1, 40, 40)


@pytest.mark.parametrize(
    ("part", "of_request", "deployment", "frames"),
    [
        ({}, {}, {}, 16),
        ({"max_frames": 4}, {}, {}, 4),
        ({}, {"video_max_frames": 6}, {}, 6),
        ({}, {}, {"video_max_frames": 8}, 8),
        ({"max_frames": 4}, {"video_max_frames": 6}, {"video_max_frames": 8}, 4),
        ({"min_frames": 2}, {}, {}, 10),  # five seconds at two frames a second
        ({"min_frames": 2, "frames_per_second": 0.8}, {}, {}, 4),
        ({}, {"video_min_frames": 2, "video_fps": 0.8}, {}, 4),
        ({}, {"video_min_frames": 12, "video_max_frames": 12}, {}, 12),
    ],
)
def test_frames_of_a_clip(
    part: dict[str, Any], of_request: dict[str, Any], deployment: dict[str, Any], frames: int
) -> None:
    assert grid(clip(**part), MediaOptions(**of_request), **deployment).frames == frames


def test_pixels_of_frames() -> None:
    smaller = grid(clip(), MediaOptions(video_min_pixels=SIDE, video_max_pixels=4 * SIDE))
    assert smaller.height * smaller.width <= 16
    own = grid(clip(min_pixels=SIDE, max_pixels=SIDE), MediaOptions(video_max_pixels=4 * SIDE))
    assert (own.height, own.width) == (2, 2)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"image_max_pixels": 783}, "image_max_pixels"),
        ({"image_max_pixels": 28 * 28 * 20_000}, "image_max_pixels"),
        ({"image_min_pixels": 999, "image_max_pixels": 998}, "image_min_pixels"),
        ({"video_min_pixels": 1}, "video_min_pixels"),
        ({"video_fps": 31.0}, "video_fps"),
        ({"video_max_frames": 181}, "video_max_frames"),
        ({"video_min_frames": 181}, "video_min_frames"),
        ({"video_min_frames": 9, "video_max_frames": 8}, "video_min_frames"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        with_options(ImageConfig(), VideoConfig(), MediaOptions(**options), LIMITS, "media_options")
    assert caught.value.field == f"media_options.{name}" and name in caught.value.message
    with pytest.raises(ValueError, match=name):
        Processor(tiny_checkpoint(), ProcessingLimits(), media=MediaOptions(**options))


def test_no_options_change_nothing(tmp_path: Path) -> None:
    images, videos = ImageConfig(), VideoConfig()
    assert with_options(images, videos, MediaOptions(), LIMITS, "x") == (images, videos)
