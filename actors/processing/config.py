"""What processing reads from a model directory, and the limits a deployment sets."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.model_files import media_token_ids, processor_section, read_json
from actors.tokenization.files import spelled_media_tokens

PATCH_SIZE = 14
MERGE_SIZE = 2
RESIZE_FACTOR = PATCH_SIZE * MERGE_SIZE
MAX_ASPECT_RATIO = 200

_BICUBIC = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessingLimits:
    """Bounds on what one request may bring. Going over one is the caller's error and names the limit."""

    max_images: int = 64
    max_videos: int = 4
    max_image_bytes: int = 32 << 20
    max_video_bytes: int = 512 << 20
    max_image_pixels: int = 64 << 20
    """Decoded pixels of one picture, checked in its header before decoding."""
    max_resized_pixels: int = 28 * 28 * 16384
    """Highest ``max_pixels`` a picture part may ask for."""
    max_video_pixels: int = 16 << 20
    """Pixels of one video frame."""
    max_video_seconds: float = 1800.0
    max_video_frames: int = 108_000
    """Frames in the file, before sampling."""
    max_frames_per_second: float = 30.0
    """Highest sampling rate a video part may ask for."""
    allowed_media_domains: tuple[str, ...] = ()
    """Hosts media may be fetched from: exact names, ``*.example.com`` or ``*``. Empty: no fetching."""
    allowed_media_networks: tuple[str, ...] = ()
    """Private networks that allowed hosts may lie in (``10.1.0.0/16``). Empty: public addresses only."""
    media_timeout_s: float = 30.0
    """For one fetch, redirects included."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, tuple) and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        for domain in self.allowed_media_domains:
            if not domain or any(c in domain for c in "/@, \t\n"):
                raise ValueError(f"allowed_media_domains takes host names, *.domain or *, got {domain!r}")
        for network in self.allowed_media_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"allowed_media_networks takes networks such as 10.1.0.0/16: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """Pixel bounds of a checkpoint's image processor. Normalisation is the encoder's."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 6177


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoConfig:
    """Sampling, overlay and pixel bounds (of one frame) of a checkpoint's video processor."""

    min_pixels: int = 28 * 28 * 299
    max_pixels: int = 28 * 28 * 1196
    frames_per_second: float = 2.0
    min_frames: int = 16
    max_frames: int = 180
    draw_timestamps: bool = True
    font: str = "Roboto-Regular.ttf"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTokens:
    """Ids of the media tokens in ``config.json``. Image and video placeholders may be one id (original checkpoints)."""

    image: int
    video: int
    image_start: int
    image_end: int
    video_start: int
    video_end: int

    @classmethod
    def from_dir(cls, model_dir: Path) -> ModelTokens:
        """Raises ValueError naming the file and the key."""
        path = model_dir / "config.json"
        config = read_json(path)
        spelled = spelled_media_tokens(model_dir, config)
        try:
            ids = media_token_ids(config, spelled)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return cls(**{key.removesuffix("_token_id"): value for key, value in ids.items()})

    @property
    def placeholders(self) -> frozenset[int]:
        return frozenset((self.image, self.video))


def load_image_config(model_dir: Path) -> ImageConfig:
    """From ``processor_config.json`` (key image_processor) or ``preprocessor_config.json``.

    Raises ValueError when neither is there or a key asks for something this processor does not do.
    """
    origin, raw = processor_section(model_dir, "image")
    if raw is None:
        raise ValueError(f"{model_dir}: no preprocessor_config.json")
    _check_supported(origin, raw)
    default = ImageConfig()
    low, high = _pixel_bounds(origin, raw, default.min_pixels, default.max_pixels)
    return ImageConfig(min_pixels=low, max_pixels=high)


def load_video_config(model_dir: Path) -> VideoConfig:
    """From ``processor_config.json`` (key video_processor) or ``video_preprocessor_config.json``; defaults when absent.

    A file without ``fps`` gets 2 frames per second, the rate of the original processor.
    """
    origin, raw = processor_section(model_dir, "video")
    if raw is None:
        return VideoConfig()
    _check_supported(origin, raw)
    default = VideoConfig()
    low, high = _pixel_bounds(origin, raw, default.min_pixels, default.max_pixels)
    rate = raw.get("fps") or default.frames_per_second
    if not isinstance(rate, int | float) or not math.isfinite(rate) or rate <= 0:
        raise ValueError(f"{origin}: fps must be positive, got {rate!r}")
    min_frames = _count(origin, raw, "min_frames", default.min_frames)
    max_frames = _count(origin, raw, "max_frames", default.max_frames)
    if min_frames > max_frames:
        raise ValueError(f"{origin}: min_frames {min_frames} is above max_frames {max_frames}")
    font = raw.get("font") or default.font
    if not isinstance(font, str):
        raise ValueError(f"{origin}: font must be a file name, got {font!r}")
    draw = raw.get("draw_on_frames", True)
    return VideoConfig(
        min_pixels=low,
        max_pixels=high,
        frames_per_second=float(rate),
        min_frames=min_frames,
        max_frames=max_frames,
        draw_timestamps=bool(draw),
        # Only a name: a path in the file belongs to the machine that wrote it.
        font=Path(font).name,
    )


def _check_supported(origin: str, raw: Mapping[str, Any]) -> None:
    for key, only in (
        ("do_resize", True),
        ("do_rescale", True),
        ("do_normalize", True),
        ("do_convert_rgb", True),
        ("patch_size", PATCH_SIZE),
        ("merge_size", MERGE_SIZE),
        ("resample", _BICUBIC),
    ):
        value = raw.get(key, only)
        if value is not None and value != only:
            raise ValueError(f"{origin}: {key} {value!r} is not supported, only {only!r}")
    factor = raw.get("rescale_factor")
    if factor is not None and not math.isclose(factor, 1 / 255, rel_tol=1e-9):
        raise ValueError(f"{origin}: rescale_factor {factor!r} is not supported, only 1/255")


def _pixel_bounds(origin: str, raw: Mapping[str, Any], low: int, high: int) -> tuple[int, int]:
    size = raw.get("size")
    if isinstance(size, dict) and "shortest_edge" in size and "longest_edge" in size:
        # The keys say edge, the values are areas: so transformers writes them for this model.
        low, high = size["shortest_edge"], size["longest_edge"]
    else:
        # The original's keys, beside ``size`` or inside.
        named = {**size, **raw} if isinstance(size, dict) else raw
        low, high = named.get("min_pixels") or low, named.get("max_pixels") or high
    if not (isinstance(low, int) and isinstance(high, int) and 0 < low <= high):
        raise ValueError(f"{origin}: pixel bounds must be positive and ordered, got {low!r} and {high!r}")
    return low, high


def _count(origin: str, raw: Mapping[str, Any], key: str, default: int) -> int:
    value = raw.get(key) or default
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{origin}: {key} must be a positive count, got {value!r}")
    return value
