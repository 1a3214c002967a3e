"""Parts cut out of pictures, and boxes drawn onto them."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from cluster.boxes import LabelledBox
from cluster.pictures import MAX_ENLARGED, MIN_CROP_PIXELS, crop, draw_boxes, enlarged, open_upright, png


def test_crops() -> None:
    image = Image.new("RGB", (200, 100))
    assert crop(image, [0, 0, 1000, 1000]).size == (200, 100)
    assert crop(image, [-50, 500, 250.0, 2000]).size == (50, 50)
    with pytest.raises(ValueError, match="holds no pixel of a 200 x 100 picture"):
        crop(image, [600, 0, 400, 1000])


@pytest.mark.parametrize("size", [(1000, 500), (448, 448), (200, 100), (3, 2), (1, 400)])
def test_small_parts_are_enlarged(size: tuple[int, int]) -> None:
    grown = enlarged(Image.new("RGB", size))
    factor = grown.width / size[0]
    assert 1 <= factor <= MAX_ENLARGED + 0.01
    assert grown.height / size[1] == pytest.approx(factor, rel=0.02)
    pixels = grown.width * grown.height
    assert pixels >= 0.98 * MIN_CROP_PIXELS or factor == MAX_ENLARGED


def test_pictures_are_turned_upright() -> None:
    upright = Image.new("RGB", (60, 100), "white")
    upright.paste("black", (0, 0, 60, 50))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    found = open_upright(buffer.getvalue())
    assert found.size == (60, 100) and crop(found, [0, 0, 1000, 500]).getextrema() == ((0, 0),) * 3


def test_boxes_are_drawn_where_they_lie() -> None:
    image = Image.new("RGB", (400, 200), "white")
    drawn = draw_boxes(
        image,
        [
            LabelledBox((250, 500, 500, 900)),
            LabelledBox((0, 0, 1000, 1000), "all of it"),
            LabelledBox((995, 0, 1000, 9), "é"),
        ],
    )
    assert image.getextrema() == ((255, 255),) * 3 and drawn.size == image.size
    for inside, outside in (((100, 140), (90, 140)), ((150, 100), (150, 90)), ((199, 140), (205, 140))):
        assert drawn.getpixel(inside) != (255, 255, 255)
        assert drawn.getpixel(outside) == (255, 255, 255)
    assert drawn.getpixel((150, 140)) == (255, 255, 255)
    assert open_upright(png(drawn)).tobytes() == drawn.tobytes()
