"""Our picture path against transformers' PIL image processor for this model, value by value."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
    smart_resize,
)

from actors.processing.config import ImageConfig, ProcessingLimits, load_image_config
from actors.processing.images import PixelBounds, image_unit
from actors.processing.images import smart_resize as our_smart_resize
from actors.types import Grid

LIMITS = ProcessingLimits()
REFERENCE = Ernie4_5_VLMoeImageProcessorPil()
CONFIG = ImageConfig()
BOUNDS = PixelBounds(low=CONFIG.min_pixels, high=CONFIG.max_pixels)
SIZES = [(1, 1), (1, 200), (13, 17), (28, 28), (29, 55), (42, 70), (100, 75), (333, 41), (427, 640), (641, 479)]


def noise(mode: str, width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    if mode in ("I;16", "I"):
        values = rng.integers(0, 65536 if mode == "I;16" else 300, (height, width))
        return Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    if mode == "F":
        return Image.fromarray(rng.random((height, width), dtype=np.float32) * 255)
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, (height, width)).astype(bool))
    bands = len(Image.new(mode, (1, 1)).getbands())
    image = Image.frombytes(mode, (width, height), rng.integers(0, 256, height * width * bands, np.uint8).tobytes())
    if mode == "P":
        image.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
    return image


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def assert_same(content: bytes, processor: Ernie4_5_VLMoeImageProcessorPil = REFERENCE, exif: bool = False) -> None:
    bounds = PixelBounds(low=processor.size["shortest_edge"], high=processor.size["longest_edge"])
    picture = Image.open(io.BytesIO(content))
    expected = processor(ImageOps.exif_transpose(picture) if exif else picture, return_tensors="np")
    unit = image_unit(content, bounds, LIMITS, "field")
    assert unit.grid == Grid(*expected["image_grid_thw"][0].tolist())
    values = unit.patches.reshape(-1, 3, 196).astype(np.float64) / 255
    normalised = (values - np.array(processor.image_mean)[:, None]) / np.array(processor.image_std)[:, None]
    assert np.abs(normalised.reshape(-1, 588) - expected["pixel_values"]).max() <= 1e-6


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, int]) -> None:
    width, height = size
    assert_same(encode(noise("RGB", width, height), "PNG"))
    assert_same(encode(noise("RGB", height, width), "PNG"))


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("CMYK", "JPEG"),
        ("L", "JPEG"),
        ("RGB", "JPEG"),
        ("YCbCr", "TIFF"),
        ("LAB", "TIFF"),
        ("CMYK", "TIFF"),
        ("RGBA", "WEBP"),
        ("P", "GIF"),
        ("P", "BMP"),
        ("RGB", "BMP"),
        ("1", "PPM"),
        ("RGB", "JPEG2000"),
    ],
)
def test_modes(mode: str, form: str) -> None:
    """All but grey of more than 8 bits, which transformers cuts off at 255: it is scaled, or refused, here."""
    image = noise(mode, 61, 45)
    content = encode(image, form)
    assert Image.open(io.BytesIO(content)).format == form
    assert_same(content)


def test_transparency_of_palettes_and_keys() -> None:
    assert_same(encode(noise("P", 50, 40), "PNG", transparency=bytes(range(256))))
    assert_same(encode(noise("P", 50, 40), "GIF", transparency=3))
    assert_same(encode(noise("L", 50, 40), "PNG", transparency=7))
    assert_same(encode(Image.new("RGB", (40, 40), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))


def test_sixteen_bit_colour() -> None:
    """Pillow reads 48-bit PNG as 24-bit; both sides see the same."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    assert_same(content)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("JPEG", "PNG", "TIFF"):
        assert_same(encode(noise("RGB", 61, 33), form, exif=exif), exif=True)


def test_animated_first_frame() -> None:
    frames = [noise("RGB", 40, 30), noise("RGB", 30, 40).resize((40, 30))]
    for form in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if form == "WEBP" else {}
        assert_same(encode(frames[0], form, save_all=True, append_images=frames[1:], **options))


@pytest.mark.parametrize("bounds", [(784, 784), (784, 7840), (3136, 50176), (200_000, 400_000)], ids=str)
def test_pixel_bounds(bounds: tuple[int, int], tmp_path: Path) -> None:
    processor = Ernie4_5_VLMoeImageProcessorPil(size={"shortest_edge": bounds[0], "longest_edge": bounds[1]})
    processor.save_pretrained(tmp_path)
    config = load_image_config(tmp_path)
    assert (config.min_pixels, config.max_pixels) == bounds
    for size in ((61, 45), (300, 200), (10, 190)):
        assert_same(encode(noise("RGB", *size), "PNG"), processor)


def test_smart_resize_agrees_on_many_sizes() -> None:
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(0, np.log(9000), (2000, 2))).astype(int)
    compared = 0
    for height, width in sides.tolist():
        for low, high in ((56 * 56, 28 * 28 * 6177), (28 * 28 * 299, 28 * 28 * 1196)):
            if max(height, width) / min(height, width) > 200:
                with pytest.raises(ValueError):
                    our_smart_resize(height, width, PixelBounds(low=low, high=high))
                continue
            compared += 1
            assert our_smart_resize(height, width, PixelBounds(low=low, high=high)) == smart_resize(
                height, width, 28, low, high
            )
    assert compared > 2000
