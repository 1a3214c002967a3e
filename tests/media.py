"""Encoded pictures and videos for tests, deterministic by seed."""

from __future__ import annotations

import io

import av
import numpy as np
from PIL import Image

from actors.types import ImagePart, MediaSource, VideoPart


def png(width: int, height: int, seed: int = 0) -> bytes:
    """Smooth colour noise, so that resizing keeps something to see."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BILINEAR).save(buffer, "PNG")
    return buffer.getvalue()


def mp4(width: int, height: int, frame_count: int, fps: int, seed: int = 0) -> bytes:
    """A square that moves over colour noise; mpeg4."""
    ground = np.array(Image.open(io.BytesIO(png(width, height, seed))))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frame_count):
            frame = ground.copy()
            left = index * max(1, width // (2 * frame_count))
            frame[height // 3 : height // 2, left : left + width // 4] = (255, 40, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def image_part(width: int, height: int, seed: int = 0) -> ImagePart:
    return ImagePart(source=MediaSource(content=png(width, height, seed)))


def video_part(width: int, height: int, frame_count: int, fps: int, seed: int = 0) -> VideoPart:
    return VideoPart(source=MediaSource(content=mp4(width, height, frame_count, fps, seed)))
