"""Encoded pictures to units: decode, orient, convert to RGB, resize, cut into patches.

Where references differ or say nothing: 16-bit grey keeps its high byte, as in the original; transparency is laid over
white, as in both; the EXIF orientation is applied, as transformers' loader does and the original does not; CMYK is
converted as Pillow does, which takes JPEGs of four channels for inverted, as Adobe writes them; an animation shows its
first frame.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from actors.errors import InvalidRequest, MediaTooLarge, MediaUnreadable
from actors.processing.config import MAX_ASPECT_RATIO, RESIZE_FACTOR, ImageConfig, ProcessingLimits, VideoConfig
from actors.processing.patches import Pixels, Unit, make_unit
from actors.types import MediaKind

# Only formats that Pillow decodes by itself: no EPS (it starts Ghostscript), no plugin that follows references.
_WANTED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
Image.init()
FORMATS = [name for name in _WANTED if name in Image.OPEN]
_SLOW_DECODERS = frozenset(("ppm", "ppm_plain"))
"""Written in Python, a value at a time: half a minute for a file at the byte limit, holding the interpreter."""
_BAND_PIXELS = 1 << 22

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelBounds:
    """Area a resized picture may have."""

    low: int
    high: int


def pixel_bounds(
    config: ImageConfig | VideoConfig,
    limits: ProcessingLimits,
    minimum: int | None,
    maximum: int | None,
    field: str,
    *,
    prefix: str = "",
) -> PixelBounds:
    """The bounds of ``config`` or a part's own. Raises InvalidRequest naming the bound, with ``prefix`` before it."""
    ceiling = max(limits.max_resized_pixels, config.max_pixels)
    for name, value in (("min_pixels", minimum), ("max_pixels", maximum)):
        if value is None:
            continue
        if value < RESIZE_FACTOR**2:
            message = f"{prefix}{name} must be at least {RESIZE_FACTOR**2}, got {value}"
            raise InvalidRequest(message, field=f"{field}.{prefix}{name}")
        if value > ceiling:
            message = f"{prefix}{name} must be at most {ceiling}, got {value}"
            raise InvalidRequest(message, field=f"{field}.{prefix}{name}")
    low = config.min_pixels if minimum is None else minimum
    high = config.max_pixels if maximum is None else maximum
    # A bound given alone wins over the checkpoint's other one.
    if minimum is None:
        low = min(low, high)
    elif maximum is None:
        high = max(low, high)
    if low > high:
        message = f"{prefix}min_pixels {low} is above {prefix}max_pixels {high}"
        raise InvalidRequest(message, field=f"{field}.{prefix}min_pixels")
    return PixelBounds(low=low, high=high)


def smart_resize(height: int, width: int, bounds: PixelBounds) -> tuple[int, int]:
    """Sides that are multiples of 28, an area within bounds, and nearly the same aspect ratio.

    The rule of the model's processors (Python's rounding, half to even). Raises ValueError over an aspect ratio of 200.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"aspect ratio of {width} x {height} is over {MAX_ASPECT_RATIO}")
    factor = RESIZE_FACTOR
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > bounds.high:
        shrink = math.sqrt((height * width) / bounds.high)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < bounds.low:
        grow = math.sqrt(bounds.low / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def to_bytes(image: Image.Image) -> Image.Image:
    """A loaded picture with 8 bits a channel: of deep grey ones the high byte. Others pass as they are.

    Raises ValueError for values whose range no file tells: 32-bit integers and floats.
    """
    portable = image.format == "PPM" and image.mode == "I"
    if not (portable or image.mode.startswith("I;16")):
        if image.mode in ("I", "F"):
            raise ValueError("values of 32 bits have no known range; need 8 or 16 bits a channel")
        return image
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    values = np.asarray(image)
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB with transparency laid over white, as transformers' image processor does.

    In bands: three more copies of a whole picture would be a gigabyte at the limit of pixels.
    """
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    flat = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        flat.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return flat


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of a loaded picture; damaged EXIF counts as none."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        # Tag parsing fails in as many ways as there are writers; the pixels are fine without it.
        return 1
    return found if isinstance(found, int) else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def decode_image(content: bytes, limits: ProcessingLimits, field: str) -> Image.Image:
    """First frame of a picture, upright, RGB. Raises MediaTooLarge or MediaUnreadable naming ``field``."""
    check_bytes(len(content), limits.max_image_bytes, "image", field)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > limits.max_image_pixels:
                raise MediaTooLarge(
                    f"image of {width} x {height} pixels is over the limit of {limits.max_image_pixels} pixels",
                    field=field,
                )
            check_aspect(height, width, field)
            if image.tile and image.tile[0][0] in _SLOW_DECODERS:
                raise MediaUnreadable(
                    "PPM pictures are read in binary form only, with 8 bits, or 16 of grey", field=field
                )
            image.load()
            orientation = _orientation(image)
            return to_rgb(_turned(to_bytes(image), orientation))
    except InvalidRequest:
        raise
    except Image.DecompressionBombError as error:
        raise MediaTooLarge(f"image is over the limit of {limits.max_image_pixels} pixels", field=field) from error
    except Exception as error:
        # Pillow's decoders raise whatever the damage leads to: OSError, SyntaxError, struct.error, ValueError ...
        raise MediaUnreadable(f"not a readable image: {_short(error)}", field=field) from error


def resize(image: Image.Image, height: int, width: int) -> Pixels:
    """Bicubic on bytes, uint8 [height, width, 3]."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def image_unit(content: bytes, bounds: PixelBounds, limits: ProcessingLimits, field: str) -> Unit:
    """Everything above for one picture."""
    image = decode_image(content, limits, field)
    height, width = smart_resize(image.height, image.width, bounds)
    return make_unit(MediaKind.IMAGE, (resize(image, height, width),))


def check_bytes(size: int, limit: int, what: str, field: str) -> None:
    """Raises MediaTooLarge over the limit, MediaUnreadable for nothing at all."""
    if size > limit:
        raise MediaTooLarge(f"{what} of {size} bytes is over the limit of {limit} bytes", field=field)
    if size == 0:
        raise MediaUnreadable(f"{what} is empty", field=field)


def check_aspect(height: int, width: int, field: str) -> None:
    """Raises InvalidRequest for sides that differ more than 200 times, MediaUnreadable for an empty side."""
    if height < 1 or width < 1:
        raise MediaUnreadable(f"picture of {width} x {height} pixels", field=field)
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InvalidRequest(
            f"aspect ratio of {width} x {height} pixels is over the limit of {MAX_ASPECT_RATIO}", field=field
        )


def _short(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    # Pillow names the in-memory file object; that is no help to a caller.
    return "unknown image format" if "cannot identify image file" in text else text[:200]
