from __future__ import annotations

import hashlib

import numpy as np
import pytest

from actors.processing.patches import content_key, make_unit, patchify
from actors.types import Grid, MediaKind

RNG = np.random.default_rng(0)


def pixels(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_rows_follow_merge_blocks_channel_first() -> None:
    picture = pixels(56, 84)
    rows = patchify(picture)
    assert rows.shape == (4 * 6, 588)
    assert rows.dtype == np.uint8
    row = 0
    for block_y in range(2):
        for block_x in range(3):
            for y in range(2):
                for x in range(2):
                    top, left = 28 * block_y + 14 * y, 28 * block_x + 14 * x
                    patch = picture[top : top + 14, left : left + 14]
                    assert np.array_equal(rows[row], patch.transpose(2, 0, 1).ravel())
                    row += 1


def test_refuses_sides_off_the_grid() -> None:
    with pytest.raises(ValueError, match="28"):
        patchify(pixels(56, 42))


def test_pair_is_first_frame_then_second() -> None:
    first, second = pixels(28, 56), pixels(28, 56)
    unit = make_unit(MediaKind.VIDEO, (first, second))
    assert unit.grid == Grid(2, 2, 4)
    assert np.array_equal(unit.patches, np.concatenate([patchify(first), patchify(second)]))
    assert not unit.patches.flags.writeable


def test_key_covers_kind_grid_and_patches() -> None:
    picture = pixels(28, 56)
    base = make_unit(MediaKind.IMAGE, (picture,))
    assert base.key == make_unit(MediaKind.IMAGE, (picture.copy(),)).key
    assert len(base.key) == 32
    changed = picture.copy()
    changed[0, 0, 0] ^= 1
    others = {
        make_unit(MediaKind.VIDEO, (picture,)).key,
        make_unit(MediaKind.IMAGE, (changed,)).key,
        content_key(MediaKind.IMAGE, Grid(1, 4, 2), base.patches),
    }
    assert base.key not in others
    assert len(others) == 3


def test_key_is_blake2b_of_header_and_bytes() -> None:
    unit = make_unit(MediaKind.IMAGE, (pixels(28, 28),))
    expected = hashlib.blake2b(b"image 1 2 2\n" + unit.patches.tobytes(), digest_size=32).digest()
    assert unit.key == expected
