"""Encoded pictures and videos made on the spot, and a model directory to process them with."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from actors.types import ImagePart, MediaSource, Message, MessageRole, PreprocessRequest, TextPart, VideoPart
from tests.tiny_model import tiny_checkpoint


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    data = rng.integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), data.tobytes())


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def video(
    frames: int = 40,
    *,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    form: str = "mp4",
    gop: int = 12,
    times: Sequence[float] | None = None,
) -> bytes:
    """Frame i is grey of level 4 + 6 * i (modulo 40 frames), and comes at ``times[i]`` seconds if given."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        stream.bit_rate = 5_000_000
        stream.codec_context.thread_count = 1
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), 4 + 6 * (i % 40), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.time_base = Fraction(1, 1000)
                frame.pts = round(1000 * times[i])
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def model_dir(tmp_path: Path, **changes: str | None) -> Path:
    """A copy of the tiny checkpoint without weights; ``changes`` replace (or with None remove) files by stem."""
    target = tmp_path / "model"
    target.mkdir()
    for file in tiny_checkpoint().iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target / file.name)
    for name, text in changes.items():
        matches = [file for file in target.iterdir() if file.stem == name]
        for file in matches:
            file.unlink()
        if text is not None:
            (matches[0] if matches else target / f"{name}.json").write_text(text)
    return target


def image_part(content: bytes | None = None, **options: Any) -> ImagePart:
    return ImagePart(source=MediaSource(content=content or encode(noise(60, 40))), **options)


def video_part(content: bytes | None = None, **options: Any) -> VideoPart:
    return VideoPart(source=MediaSource(content=content or video()), **options)


def user(*parts: str | ImagePart | VideoPart, **options: Any) -> Message:
    return message(MessageRole.USER, *parts, **options)


def message(role: MessageRole, *parts: str | ImagePart | VideoPart, **options: Any) -> Message:
    return Message(role=role, parts=tuple(TextPart(text=p) if isinstance(p, str) else p for p in parts), **options)


def request(*messages: Message, **options: Any) -> PreprocessRequest:
    return PreprocessRequest(
        **{"lease": "lease", "messages": messages, "max_prompt_tokens": 100_000, **options},
    )
