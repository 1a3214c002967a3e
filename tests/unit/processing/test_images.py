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
    FORMATS,
    PixelBounds,
    decode_image,
    image_unit,
    pixel_bounds,
    smart_resize,
    to_rgb,
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
    exif = Image.Exif()
    exif[0x0112] = 99
    plain = np.asarray(decode_image(encode(noise(30, 20)), LIMITS, FIELD))
    assert np.array_equal(plain, np.asarray(decode_image(encode(noise(30, 20), exif=exif), LIMITS, FIELD)))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int = 8, colour_type: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)


def png_of_depth_16(values: np.ndarray, colour_type: int, transparent: int | None = None) -> bytes:
    """Pillow writes no deep colours itself. ``values`` [height, width, channels]."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    key = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    head = png_header(width, height, 16, colour_type)
    return head + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_of_depth_12(value: int) -> bytes:
    """8 x 8 pixels of one grey level, two in three bytes."""
    data = (value << 12 | value).to_bytes(3, "big") * 32
    entries = [(256, 3, 8), (257, 3, 8), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 8)]
    entries.append((279, 4, len(data)))
    table = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in entries
    )
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + table + struct.pack("<I", 0)


RAMP = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)


def portable_grey(values: np.ndarray) -> bytes:
    height, width = values.shape
    return f"P5\n{width} {height}\n65535\n".encode() + values.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "content",
    [*(encode(Image.fromarray(RAMP), form) for form in ("PNG", "TIFF", "JPEG2000")), portable_grey(RAMP)],
    ids=["PNG", "TIFF", "JPEG2000", "PPM"],
)
def test_deep_grey_keeps_its_high_byte(content: bytes) -> None:
    decoded = np.asarray(decode_image(content, LIMITS, FIELD))
    assert np.array_equal(decoded, np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_deep_colour_keeps_its_high_byte() -> None:
    deep = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)
    decoded = np.asarray(decode_image(png_of_depth_16(deep, colour_type=2), LIMITS, FIELD))
    assert np.array_equal(decoded, (deep >> 8).astype(np.uint8))


def test_deep_pictures_are_turned_and_laid_over_white() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.asarray(decode_image(encode(Image.fromarray(RAMP), exif=exif), LIMITS, FIELD))
    assert np.array_equal(turned[..., 0], np.rot90(RAMP >> 8, -1))
    inside = np.full((20, 20), 0x1200, np.uint16)
    inside[:, :10] = 0x1234
    shown = np.asarray(decode_image(png_of_depth_16(inside[..., None], 0, transparent=0x1234), LIMITS, FIELD))
    assert shown[0, 0].tolist() == [255, 255, 255] and shown[0, 15].tolist() == [0x12, 0x12, 0x12]
    half = np.dstack([np.full((20, 20), 0, np.uint16), np.full((20, 20), 0x8000, np.uint16)])
    assert np.allclose(np.asarray(decode_image(png_of_depth_16(half, 4), LIMITS, FIELD)), 127, atol=1)


def test_tiff_with_white_at_zero_and_with_twelve_bits() -> None:
    inverted = encode(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(np.asarray(decode_image(inverted, LIMITS, FIELD))[..., 0], 255 - (RAMP >> 8))
    assert decode_image(tiff_of_depth_12(0xABC), LIMITS, FIELD).getpixel((3, 3)) == (0xAB, 0xAB, 0xAB)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_known_range_are_refused(mode: str) -> None:
    with pytest.raises(MediaUnreadable, match="need 8 or 16 bits a channel") as caught:
        decode_image(encode(Image.new(mode, (8, 8), 3), "TIFF"), LIMITS, FIELD)
    assert caught.value.field == FIELD


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk(form: str) -> None:
    ink = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (0, 0, 16, 32))
    content = encode(ink, form)
    if form == "JPEG":
        assert b"Adobe" in content[:40], "values in the file are inverted"
    decoded = decode_image(content, LIMITS, FIELD)
    assert np.allclose(decoded.getpixel((28, 28)), (0, 255, 255), atol=4)
    assert np.allclose(decoded.getpixel((3, 3)), (0, 0, 0), atol=4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"])
def test_every_mode_that_tiff_or_png_can_hold_becomes_rgb(mode: str) -> None:
    image = noise(40, 30).convert("LAB") if mode == "LAB" else noise(40, 30).convert(mode)
    form = "PNG" if mode in ("1", "L", "LA", "P", "RGB", "RGBA") else "TIFF"
    if mode == "HSV":
        image, form = noise(40, 30), "WEBP"
    decoded = decode_image(encode(image, form), LIMITS, FIELD)
    assert (decoded.mode, decoded.size) == ("RGB", (40, 30))


def test_transparency_goes_over_white() -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    content = encode(palette, "PNG", transparency=1)
    assert decode_image(content, LIMITS, FIELD).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("form", [form for form in ("GIF", "PNG", "WEBP", "TIFF", "AVIF") if form in FORMATS])
def test_animation_gives_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (30, 30), color) for color in ("red", "blue")]
    content = encode(frames[0], form, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(content)) as opened:
        assert getattr(opened, "n_frames", 1) == 2
    assert np.allclose(decode_image(content, LIMITS, FIELD).getpixel((5, 5)), (255, 0, 0), atol=3)


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


@pytest.mark.parametrize("side", [8_300, 12_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bomb_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(MediaTooLarge, match=str(LIMITS.max_image_pixels)) as caught:
        decode_image(png_header(side, side) + chunk(b"IEND", b""), LIMITS, FIELD)
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
