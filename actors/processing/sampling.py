"""Which frames of a video the model sees: the rule of the original processor, as pure functions.

``int(duration * rate)`` frames are wanted. Between the checkpoint's least and most, frames are taken every ``1 / rate``
seconds (rounded to the nearest frame, half to even). Outside, the bound is the target: the video is cut into that many
nearly equal runs and the first frame of each is taken; a video with fewer frames than the target gives each frame once.
Frames come in pairs, so the last of an odd count is repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Rate and bounds of frame selection."""

    frames_per_second: float = 2.0
    min_frames: int = 16
    max_frames: int = 180


def select_frames(total: int, video_fps: float, sampling: Sampling) -> tuple[int, ...]:
    """Indices into a video of ``total`` frames at ``video_fps``, ascending, an even count (the last may repeat).

    Raises ValueError for no frames or a rate that is not positive.
    """
    if total < 1:
        raise ValueError("a video needs at least one frame")
    if not (math.isfinite(video_fps) and video_fps > 0):
        raise ValueError(f"video frame rate must be positive, got {video_fps}")
    duration = total / video_fps
    wanted = int(duration * sampling.frames_per_second)
    if wanted < sampling.min_frames:
        chosen = _first_of_runs(total, sampling.min_frames)
    elif wanted > sampling.max_frames:
        chosen = _first_of_runs(total, sampling.max_frames)
    else:
        seconds = np.arange(0, duration, 1 / sampling.frames_per_second)
        indices = np.around(seconds * video_fps).astype(int)
        chosen = tuple(int(index) for index in indices if index < total)
    return chosen + chosen[-1:] if len(chosen) % 2 else chosen


def _first_of_runs(total: int, target: int) -> tuple[int, ...]:
    count = min(total, target)
    starts = np.linspace(0, total, count + 1).astype(int)[:-1]
    return tuple(int(start) for start in starts)


def window(total: int, video_fps: float, start_s: float | None, end_s: float | None) -> tuple[int, int]:
    """First and one-past-last frame shown in [start_s, end_s) seconds; empty when first >= last."""
    first = 0 if start_s is None else math.ceil(start_s * video_fps - 1e-9)
    last = total if end_s is None else min(total, math.ceil(end_s * video_fps - 1e-9))
    return first, last


def timestamp_text(seconds: float) -> str:
    """The overlay of a frame, ``time: HH:MM:SS.ss``; 59.999 gives ``00:00:60.00``, as in training."""
    hours = int(seconds // 3600)
    minutes = int(seconds % 3600 // 60)
    return f"time: {hours:02d}:{minutes:02d}:{seconds % 3600 % 60:05.02f}"
