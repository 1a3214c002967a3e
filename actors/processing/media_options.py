"""How pictures and videos are prepared: what a deployment, a request and a part say, each over the one before it.

The checkpoint's processor files come first. A bound that is given alone wins over the other one from before.
"""

from __future__ import annotations

import math
from dataclasses import replace

from actors.errors import InvalidRequest
from actors.processing.config import ImageConfig, ProcessingLimits, VideoConfig
from actors.processing.images import pixel_bounds
from actors.types import MediaOptions, VideoPart


def with_options(
    images: ImageConfig, videos: VideoConfig, options: MediaOptions, limits: ProcessingLimits, field: str
) -> tuple[ImageConfig, VideoConfig]:
    """What holds for parts that say nothing. Raises InvalidRequest naming ``field`` and the option."""
    if options == MediaOptions():
        return images, videos
    bounds = pixel_bounds(images, limits, options.image_min_pixels, options.image_max_pixels, field, prefix="image_")
    images = replace(images, min_pixels=bounds.low, max_pixels=bounds.high)
    return images, _video_config(
        videos,
        limits,
        rate=options.video_fps,
        frames=(options.video_min_frames, options.video_max_frames),
        pixels=(options.video_min_pixels, options.video_max_pixels),
        field=field,
        prefix="video_",
        rate_name="video_fps",
    )


def with_part(videos: VideoConfig, part: VideoPart, limits: ProcessingLimits, field: str) -> VideoConfig:
    """What holds for one video. Raises InvalidRequest naming ``field``, the part, and the option."""
    return _video_config(
        videos,
        limits,
        rate=part.frames_per_second,
        frames=(part.min_frames, part.max_frames),
        pixels=(part.min_pixels, part.max_pixels),
        field=field,
        prefix="",
        rate_name="frames_per_second",
    )


def _video_config(
    videos: VideoConfig,
    limits: ProcessingLimits,
    *,
    rate: float | None,
    frames: tuple[int | None, int | None],
    pixels: tuple[int | None, int | None],
    field: str,
    prefix: str,
    rate_name: str,
) -> VideoConfig:
    most_rate = limits.max_frames_per_second
    if rate is not None and not (math.isfinite(rate) and 0 < rate <= most_rate):
        raise _wrong(f"{field}.{rate_name}", f"{rate_name} must be above 0 and at most {most_rate:g}, got {rate:g}")
    least, most = frames
    for name, value in (("min_frames", least), ("max_frames", most)):
        if value is not None and not 1 <= value <= videos.max_frames:
            raise _wrong(
                f"{field}.{prefix}{name}", f"{prefix}{name} must be from 1 to {videos.max_frames}, got {value}"
            )
    if least is not None and most is not None and least > most:
        raise _wrong(f"{field}.{prefix}min_frames", f"{prefix}min_frames {least} is above {prefix}max_frames {most}")
    max_frames = videos.max_frames if most is None else most
    min_frames = min(videos.min_frames, max_frames) if least is None else least
    bounds = pixel_bounds(videos, limits, *pixels, field, prefix=prefix)
    return replace(
        videos,
        frames_per_second=videos.frames_per_second if rate is None else rate,
        min_frames=min_frames,
        max_frames=max_frames,
        min_pixels=bounds.low,
        max_pixels=bounds.high,
    )


def _wrong(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, field=field)
