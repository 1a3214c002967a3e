from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from actors.errors import InvalidRequest, MediaTooLarge, MediaUnreadable
from actors.processing.config import ImageConfig, ProcessingLimits
from actors.processing.images import (
    PixelBounds,
    decode_image,
    image_unit,
    pixel_bounds,
    smart_resize,
    to_rgb,
    upright,
)
from actors.types import Grid
from tests.unit.processing.samples import encode, noise

LIMITS = ProcessingLimits()
BOUNDS = PixelBounds(low=3136, high=28 * 28 * 6177)
FIELD = "messages[1].content[0].image_url"


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((427, 640), (420, 644)),
        ((1080, 1920), (1092, 1932)),
        ((2160, 3840), (1624, 2912)),
        ((100, 75), (112, 84)),
        ((1, 1), (56, 56)),
        ((42, 70), (56, 56)),  # 1.5 -> 2 and 2.5 -> 2: half to even
        ((14, 2800), (28, 812)),  # 0.5 -> 0 rows, then grown to the minimum area
    ],
)
def test_smart_resize(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*size, BOUNDS) == expected


def test_smart_resize_refuses_long_strips() -> None:
    assert smart_resize(1, 200, BOUNDS)
    with pytest.raises(ValueError, match="200"):
        smart_resize(1, 201, BOUNDS)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_formats(form: str) -> None:
    image = decode_image(encode(noise(33, 21), form), LIMITS, FIELD)
    assert image.mode == "RGB"
    assert image.size == (33, 21)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(noise(30, 20), "PNG", exif=exif)
    with Image.open(io.BytesIO(content)) as raw:
        expected = np.asarray(ImageOps.exif_transpose(raw).convert("RGB"))
    decoded = decode_image(content, LIMITS, FIELD)
    assert np.array_equal(np.asarray(decoded), expected)
    assert decoded.size == ((30, 20) if orientation < 5 else (20, 30))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_ignored() -> None:
    content = encode(noise(30, 20), "PNG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert decode_image(content, LIMITS, FIELD).size == (30, 20)
    image = noise(4, 4)
    image.getexif()[0x0112] = 99
    assert upright(image) is image


def test_transparency_goes_over_white() -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    content = encode(palette, "PNG", transparency=1)
    assert decode_image(content, LIMITS, FIELD).getpixel((0, 0)) == (255, 255, 255)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (30, 30), color) for color in ("red", "blue")]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(content, LIMITS, FIELD).getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"",
        encode(noise(200, 200))[:2000],
        encode(noise(200, 200), "JPEG")[:500],
        encode(noise(20, 20), "GIF")[:30],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'/>",
        encode(noise(20, 20), "BMP")[:18] + b"\0" * 40,
    ],
)
def test_unreadable(content: bytes) -> None:
    with pytest.raises(MediaUnreadable) as caught:
        decode_image(content, LIMITS, FIELD)
    assert caught.value.field == FIELD
    assert "BytesIO" not in caught.value.message


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises far more pixels than it has."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82"


@pytest.mark.parametrize("side", [8_300, 12_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bomb_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(MediaTooLarge, match=str(LIMITS.max_image_pixels)) as caught:
        decode_image(png_header(side, side), LIMITS, FIELD)
    assert caught.value.field == FIELD


def test_byte_limit() -> None:
    content = encode(noise(50, 50))
    with pytest.raises(MediaTooLarge, match="1000 bytes"):
        decode_image(content, ProcessingLimits(max_image_bytes=1000), FIELD)


def test_aspect_limit() -> None:
    assert decode_image(encode(noise(200, 1)), LIMITS, FIELD).size == (200, 1)
    with pytest.raises(InvalidRequest, match="limit of 200") as caught:
        decode_image(encode(noise(201, 1)), LIMITS, FIELD)
    assert caught.value.field == FIELD


def test_unit_of_a_picture() -> None:
    unit = image_unit(encode(noise(75, 100)), BOUNDS, LIMITS, FIELD)
    assert unit.grid == Grid(1, 8, 6)
    assert unit.patches.shape == (48, 588)


def test_bounds_of_a_part() -> None:
    config = ImageConfig()
    assert pixel_bounds(config, LIMITS, None, None, FIELD) == PixelBounds(low=3136, high=4842768)
    assert pixel_bounds(config, LIMITS, 784, 10_000_000, FIELD) == PixelBounds(low=784, high=10_000_000)
    # One alone moves the other out of its way.
    assert pixel_bounds(config, LIMITS, None, 1000, FIELD) == PixelBounds(low=1000, high=1000)
    assert pixel_bounds(config, LIMITS, 5_000_000, None, FIELD) == PixelBounds(low=5_000_000, high=5_000_000)


@pytest.mark.parametrize(
    ("low", "high", "name"),
    [(0, None, "min_pixels"), (None, 783, "max_pixels"), (None, 10**9, "max_pixels"), (5000, 4000, "min_pixels")],
)
def test_bad_bounds(low: int | None, high: int | None, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        pixel_bounds(ImageConfig(), LIMITS, low, high, FIELD)
    assert caught.value.field == f"{FIELD}.{name}"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_in_bands_is_that_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    content = encode(noise(37, 29, mode), **options)
    whole = decode_image(content, ProcessingLimits(), FIELD)
    monkeypatch.setattr("actors.processing.images._BAND_PIXELS", 37 * 4)
    assert np.array_equal(np.asarray(decode_image(content, ProcessingLimits(), FIELD)), np.asarray(whole))


def test_forms_of_ppm_that_only_decode_slowly_are_refused() -> None:
    for content in (b"P3 2 2 255\n" + b"1 " * 12, b"P6 2 2 100\n" + bytes(12)):
        with pytest.raises(MediaUnreadable, match="PPM"):
            decode_image(content, ProcessingLimits(), FIELD)
    for content in (b"P6 2 2 255\n" + bytes(12), b"P5 2 2 65535\n" + bytes(8), b"P4 8 1\n" + bytes(1)):
        assert decode_image(content, ProcessingLimits(), FIELD).mode == "RGB"


@pytest.mark.parametrize("form", ["PCX", "TGA", "ICO", "SGI", "EPS"])
def test_formats_that_are_not_listed_are_not_opened(form: str) -> None:
    with pytest.raises(MediaUnreadable, match="unknown image format"):
        decode_image(encode(noise(32, 32), form), LIMITS, FIELD)
