from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actors.ernie.vision import patch_positions
from actors.types import Grid
from tests.small_models import vision_config, vision_model


def patches(grid: Grid, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (grid.patches, 588), dtype=torch.uint8, generator=generator)


def test_patches_come_in_squares_of_four() -> None:
    rows, columns = patch_positions(4, 6)
    assert rows.tolist() == [0, 0, 1, 1] * 3 + [2, 2, 3, 3] * 3
    assert columns.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5] * 2


def test_a_unit_alone_equals_itself_in_a_batch() -> None:
    model = vision_model(vision_config())
    grids = [Grid(1, 4, 6), Grid(2, 2, 4), Grid(1, 6, 4), Grid(2, 4, 6), Grid(1, 2, 2), Grid(1, 4, 6), Grid(2, 2, 4)]
    units = [patches(grid, i) for i, grid in enumerate(grids)]
    together = model.encode(torch.cat(units), grids)
    assert [e.shape for e in together] == [(grid.tokens, 48) for grid in grids]
    for unit, grid, batched in zip(units, grids, together, strict=True):
        (alone,) = model.encode(unit, [grid])
        torch.testing.assert_close(batched, alone, atol=1e-10, rtol=0)


def test_an_image_is_a_frame_paired_with_itself() -> None:
    model = vision_model(vision_config())
    image = patches(Grid(1, 4, 4), 0)
    (still,) = model.encode(image, [Grid(1, 4, 4)])
    (pair,) = model.encode(torch.cat([image, image]), [Grid(2, 4, 4)])
    torch.testing.assert_close(still, pair, atol=1e-12, rtol=0)


def test_frames_of_a_pair_keep_their_order_and_do_not_see_each_other() -> None:
    model = vision_model(vision_config())
    first, second = patches(Grid(1, 4, 4), 0), patches(Grid(1, 4, 4), 1)
    (pair,) = model.encode(torch.cat([first, second]), [Grid(2, 4, 4)])
    (swapped,) = model.encode(torch.cat([second, first]), [Grid(2, 4, 4)])
    assert (pair - swapped).abs().max() > 0.1


def test_pixels_are_normalised_per_channel() -> None:
    model = vision_model(vision_config(), torch.float32)
    row = torch.arange(588).remainder(256).to(torch.uint8).unsqueeze(0)
    expected = torch.empty(588, dtype=torch.float64)
    for channel, (mean, std) in enumerate(zip((0.5, 0.4, 0.3), (0.3, 0.2, 0.25), strict=True)):
        part = slice(196 * channel, 196 * (channel + 1))
        expected[part] = (row[0, part].double() / 255 - mean) / std
    torch.testing.assert_close(model.normalise(row)[0].double(), expected, atol=1e-6, rtol=0)


def test_pixels_are_normalised_in_float32_before_bfloat16() -> None:
    row = torch.arange(588).remainder(256).to(torch.uint8).unsqueeze(0)
    half = vision_model(vision_config(), torch.bfloat16).normalise(row)
    assert torch.equal(half, vision_model(vision_config(), torch.float32).normalise(row).bfloat16())


def test_dtypes_agree() -> None:
    grids = [Grid(1, 4, 4), Grid(2, 4, 2)]
    rows = torch.cat([patches(grid, i) for i, grid in enumerate(grids)])
    exact, single, half = (
        torch.cat(vision_model(vision_config(), dtype).encode(rows, grids))
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    assert (exact.dtype, single.dtype, half.dtype) == (torch.float64, torch.float32, torch.bfloat16)
    assert (single - exact).abs().max() < 1e-4
    assert (half - exact).abs().mean() < 0.05


def test_nothing_to_encode() -> None:
    assert vision_model(vision_config()).encode(torch.empty(0, 588, dtype=torch.uint8), []) == []


@pytest.mark.parametrize(
    ("rows", "grids", "message"),
    [
        (torch.zeros(8, 588), [Grid(1, 2, 4)], "uint8"),
        (torch.zeros(8, 587, dtype=torch.uint8), [Grid(1, 2, 4)], "588"),
        (torch.zeros(9, 588, dtype=torch.uint8), [Grid(1, 2, 4)], "9 rows"),
        (torch.zeros(32, 588, dtype=torch.uint8), [Grid(4, 2, 4)], "frame pair"),
        (torch.zeros(12, 588, dtype=torch.uint8), [Grid(1, 3, 4)], "2 x 2"),
        (torch.zeros(0, 588, dtype=torch.uint8), [Grid(1, 0, 4)], "empty"),
    ],
)
def test_grids_and_rows_are_checked(rows: Tensor, grids: list[Grid], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vision_model(vision_config()).encode(rows, grids)


def test_every_parameter_has_a_place_of_its_own() -> None:
    views = vision_model(vision_config()).parameters_by_name()
    for view in views.values():
        view.zero_()
    for view in views.values():
        assert not view.any()
        view.fill_(1)
