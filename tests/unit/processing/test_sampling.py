"""Frame selection against tables worked out by hand from the original rule."""

from __future__ import annotations

import pytest

from actors.processing.sampling import Sampling, select_frames, timestamp_text, window

ORIGINAL = Sampling()


@pytest.mark.parametrize(
    ("total", "fps", "expected"),
    [
        # 2 s at 30: 4 wanted, fewer than 16: 16 runs of 3.75 frames.
        (60, 30.0, (0, 3, 7, 11, 15, 18, 22, 26, 30, 33, 37, 41, 45, 48, 52, 56)),
        # Fewer frames than the target: each once; an odd count repeats the last.
        (5, 25.0, (0, 1, 2, 3, 4, 4)),
        (1, 25.0, (0, 0)),
        (16, 30.0, tuple(range(16))),
        # 8 s at 4: exactly 16 wanted, every second frame.
        (32, 4.0, tuple(range(0, 32, 2))),
        # 8.5 s at 2: 17 wanted, every frame, odd: last repeated.
        (17, 2.0, (*range(17), 16)),
        # 1 frame per second: frames are asked for twice; half to even: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2; 8 is past the end.
        # 21 frames at 1.3: the last asked for, 20.8 -> 21, is past the end and falls away; 32 are left.
        (21, 1.3, tuple(round(i * 0.65) for i in range(32))),
        (8, 1.0, (0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7, 7)),
        (9, 1.0, (0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7, 8, 8, 8)),
    ],
)
def test_table(total: int, fps: float, expected: tuple[int, ...]) -> None:
    assert select_frames(total, fps, ORIGINAL) == expected


def test_rate_mode_rounds_half_to_even() -> None:
    chosen = select_frames(225, 25.0, ORIGINAL)  # 9 s: 18 frames, 12.5 apart
    assert chosen == (0, 12, 25, 38, 50, 62, 75, 88, 100, 112, 125, 138, 150, 162, 175, 188, 200, 212)


def test_fractional_duration_takes_one_more() -> None:
    # 462 frames at 25 fps = 18.48 s: int(36.96) = 36 wanted, but arange gives 37, plus one for evenness.
    chosen = select_frames(462, 25.0, ORIGINAL)
    assert len(chosen) == 38
    assert chosen[-2:] == (450, 450)


def test_long_video_is_cut_into_runs() -> None:
    chosen = select_frames(100 * 30, 30.0, ORIGINAL)
    assert len(chosen) == 180
    assert chosen[:4] == (0, 16, 33, 50)
    assert chosen[-1] == 2983


def test_around_the_upper_bound() -> None:
    assert len(select_frames(90 * 30, 30.0, ORIGINAL)) == 180
    assert select_frames(90 * 30, 30.0, ORIGINAL)[1] == 15
    assert select_frames(90 * 30 + 14, 30.0, ORIGINAL)[-1] == 2700  # 180 wanted, 181 in range, 182 after pairing
    assert len(select_frames(91 * 30, 30.0, ORIGINAL)) == 180


@pytest.mark.parametrize("total", [1, 2, 7, 15, 16, 17, 33, 100, 999, 5400])
@pytest.mark.parametrize("fps", [1.0, 7.5, 23.976, 30.0, 59.94])
def test_always_even_ascending_and_inside(total: int, fps: float) -> None:
    chosen = select_frames(total, fps, ORIGINAL)
    assert len(chosen) % 2 == 0
    assert list(chosen) == sorted(chosen)
    assert chosen[0] == 0
    assert chosen[-1] < total


def test_overrides() -> None:
    assert select_frames(100, 10.0, Sampling(frames_per_second=1.0, min_frames=2, max_frames=180)) == tuple(
        range(0, 100, 10)
    )
    assert select_frames(100, 10.0, Sampling(frames_per_second=2.0, min_frames=4, max_frames=4)) == (0, 25, 50, 75)
    assert select_frames(100, 10.0, Sampling(min_frames=1, max_frames=1)) == (0, 0)


@pytest.mark.parametrize(("total", "fps"), [(0, 30.0), (10, 0.0), (10, float("nan")), (10, -1.0)])
def test_refuses_nonsense(total: int, fps: float) -> None:
    with pytest.raises(ValueError):
        select_frames(total, fps, ORIGINAL)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, (0, 100)),
        (1.0, 2.0, (10, 20)),
        (0.05, None, (1, 100)),
        (9.0, 50.0, (90, 100)),
        (20.0, None, (200, 100)),
        (0.3, 0.4, (3, 4)),
    ],
)
def test_window(start: float | None, end: float | None, expected: tuple[int, int]) -> None:
    assert window(100, 10.0, start, end) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "time: 00:00:00.00"),
        (61.5, "time: 00:01:01.50"),
        (59.999, "time: 00:00:60.00"),
        (3 * 3600 + 25 * 60 + 45.678, "time: 03:25:45.68"),
    ],
)
def test_timestamp_text(seconds: float, text: str) -> None:
    assert timestamp_text(seconds) == text
