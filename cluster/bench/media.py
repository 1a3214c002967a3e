"""Pictures and videos made by code: every seed another one, of a size in bytes as photographs have."""

from __future__ import annotations

import io
import random

import av
from PIL import Image, ImageDraw

JPEG_QUALITY = 85
GRAIN = 32
"""Pixels per cell of the colour noise under the shapes."""


def jpeg(size: tuple[int, int], seed: str) -> bytes:
    """A picture of ``size`` (width, height)."""
    buffer = io.BytesIO()
    _draw(size, random.Random(seed)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def mp4(size: tuple[int, int], seconds: float, fps: int, seed: str) -> bytes:
    """A disc that crosses a still picture; mpeg4, even width and height (rounded down)."""
    width, height = (side // 2 * 2 for side in size)
    ground = _draw((width, height), random.Random(seed))
    frames = max(2, round(seconds * fps))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            image = ground.copy()
            left = (width * 3 // 4) * index // (frames - 1)
            ImageDraw.Draw(image).ellipse((left, height // 3, left + width // 4, height * 2 // 3), fill="#d02020")
            frame = av.VideoFrame.from_image(image)  # type: ignore[no-untyped-call]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _draw(size: tuple[int, int], random_: random.Random) -> Image.Image:
    cells = tuple(max(1, side // GRAIN) for side in size)
    noise = Image.frombytes("RGB", (cells[0], cells[1]), random_.randbytes(cells[0] * cells[1] * 3))
    image = noise.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = random_.randrange(size[0]), random_.randrange(size[1])
        reach = random_.randrange(4, max(5, min(size) // 3))
        shape = draw.ellipse if random_.random() < 0.5 else draw.rectangle
        shape((x - reach, y - reach, x + reach, y + reach), fill=tuple(random_.randbytes(3)))
    return image
