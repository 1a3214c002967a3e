"""Parts of pictures cut out, and boxes drawn onto pictures. Needs pillow only."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from cluster.boxes import SCALE, LabelledBox

MIN_CROP_PIXELS = 448 * 448
"""A part with fewer is enlarged to about so many: 256 tokens of the 28B model, which sees only what has pixels."""
MAX_ENLARGED = 8.0
COLOURS = ("#e6194b", "#0072d6", "#2c9e4b", "#b24bd6", "#e07b00", "#00939c", "#c2185b", "#5f6b00")


def open_upright(content: bytes) -> Image.Image:
    """A picture as people see it, and as the server does. Raises OSError when it is none."""
    with Image.open(io.BytesIO(content)) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def crop(image: Image.Image, corners: Sequence[float]) -> Image.Image:
    """That part of a picture, corners in thousandths of the sides, in its own pixels.

    Raises ValueError for a box without area inside.
    """
    x1, y1, x2, y2 = (min(SCALE, max(0, c)) / SCALE for c in corners)
    width, height = image.size
    box = (round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"{list(corners)} holds no pixel of a {width} x {height} picture")
    return image.crop(box)


def enlarged(image: Image.Image) -> Image.Image:
    """With MIN_CROP_PIXELS or about so many; the picture itself where it has them."""
    factor = min(MAX_ENLARGED, math.sqrt(MIN_CROP_PIXELS / (image.width * image.height)))
    if factor <= 1:
        return image
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def draw_boxes(image: Image.Image, boxes: Iterable[LabelledBox]) -> Image.Image:
    """A copy with boxes and their labels drawn on; boxes of one label have one colour, between thin white lines."""
    drawn = image.copy()
    pen = ImageDraw.Draw(drawn)
    line = max(2, round(min(image.size) / 150))
    font = ImageFont.load_default(size=max(12, round(min(image.size) / 28)))
    colours: dict[str, str] = {}
    for box in boxes:
        colour = colours.setdefault(box.label, COLOURS[len(colours) % len(COLOURS)])
        x1, y1, x2, y2 = (
            round(corner * side / SCALE) for corner, side in zip(box.corners, (*image.size, *image.size), strict=True)
        )
        pen.rectangle((x1 - 1, y1 - 1, max(x1, x2), max(y1, y2)), outline="white", width=line + 2)
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=line)
        if box.label:
            _write(pen, font, box.label, (x1, y1), colour, image.size)
    return drawn


def _write(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text: str,
    corner: tuple[int, int],
    colour: str,
    size: tuple[int, int],
) -> None:
    """A label above its box, inside where there is no room above, on a ground of the box's colour."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = max(0, min(corner[0], size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + 3 - left, y + 3 - top), text, fill="white", font=font)


def png(image: Image.Image) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
