"""``mm_processor_kwargs``: how pictures and videos are prepared, under the names of FastDeploy, vLLM and the
checkpoint's own processors. For one request, and with ``ernie serve --mm-processor-kwargs`` for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import FiniteFloat

from actors.errors import InvalidRequest
from actors.types import MediaOptions
from cluster.openai_structure import Strict
from cluster.request_checks import check_media_options

FIELD = "mm_processor_kwargs"
_UNSET = -1
"""FastDeploy's word for an option that is not set."""

_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "image_min_pixels": ("image_min_pixels", "min_pixels", "size.shortest_edge"),
    "image_max_pixels": ("image_max_pixels", "max_pixels", "size.longest_edge"),
    "video_min_pixels": ("video_min_pixels",),
    "video_max_pixels": ("video_max_pixels",),
    "video_fps": ("video_fps", "fps"),
    "video_min_frames": ("video_min_frames", "min_frames"),
    "video_max_frames": ("video_max_frames", "max_frames"),
    "target": ("video_target_frames", "num_frames"),
}


class ProcessorSize(Strict):
    """Areas, though the keys say edge: so transformers writes them for this model."""

    shortest_edge: int | None = None
    longest_edge: int | None = None


class ProcessorKwargs(Strict):
    """FastDeploy's names first. What would change the model's shape may only say what it is."""

    image_min_pixels: int | None = None
    image_max_pixels: int | None = None
    video_min_pixels: int | None = None
    video_max_pixels: int | None = None
    video_fps: FiniteFloat | None = None
    video_min_frames: int | None = None
    video_max_frames: int | None = None
    video_target_frames: int | None = None
    video_frames_sample: Literal["leading"] | None = None
    spatial_conv_size: Literal[2] | None = None
    temporal_conv_size: Literal[2] | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    size: ProcessorSize | None = None
    fps: FiniteFloat | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    num_frames: int | None = None


def to_media_options(kwargs: ProcessorKwargs | None) -> tuple[MediaOptions, dict[str, str]]:
    """The options, and the client's name of each that it gave, by ``media_options.<option>``.

    Raises:
        InvalidRequest: two names of one option differ, or a value is out of bounds.
    """
    if kwargs is None:
        return MediaOptions(), {}
    values: dict[str, float] = {}
    names: dict[str, str] = {}
    for option, spellings in _SPELLINGS.items():
        for name in spellings:
            value = _value(kwargs, name)
            if value is None:
                continue
            if values.setdefault(option, value) != value:
                raise InvalidRequest(
                    f"{FIELD}.{names[option]} and {FIELD}.{name} differ: give one", field=f"{FIELD}.{name}"
                )
            names.setdefault(option, name)
    spelt = {option: names.get(option, option) for option in _SPELLINGS}
    target = values.pop("target", None)
    least, most = one_target(
        None if target is None else int(target),
        values.get("video_fps"),
        _whole(values.get("video_min_frames")),
        _whole(values.get("video_max_frames")),
        FIELD,
        (spelt["target"], spelt["video_fps"], spelt["video_min_frames"], spelt["video_max_frames"]),
    )
    options = MediaOptions(
        image_min_pixels=_whole(values.get("image_min_pixels")),
        image_max_pixels=_whole(values.get("image_max_pixels")),
        video_min_pixels=_whole(values.get("video_min_pixels")),
        video_max_pixels=_whole(values.get("video_max_pixels")),
        video_fps=values.get("video_fps"),
        video_min_frames=least,
        video_max_frames=most,
    )
    if target is not None:
        spelt |= dict.fromkeys(("video_min_frames", "video_max_frames"), spelt["target"])
    check_media_options(options, FIELD, spelt)
    return options, {f"media_options.{option}": f"{FIELD}.{name}" for option, name in spelt.items()}


def one_target(
    target: int | None,
    rate: float | None,
    least: int | None,
    most: int | None,
    field: str,
    names: tuple[str, str, str, str] = ("target_frames", "fps", "min_frames", "max_frames"),
) -> tuple[int | None, int | None]:
    """Least and most frames, which a target makes equal. ``names`` are those of the four values before.

    Raises:
        InvalidRequest: a target stands beside what else says how many frames there are.
    """
    if target is None:
        return least, most
    for name, value in zip(names[1:], (rate, least, most), strict=True):
        if value is not None:
            raise InvalidRequest(
                f"{field}.{names[0]} and {field}.{name} both say how many frames: give one", field=f"{field}.{name}"
            )
    if target < 1:
        raise InvalidRequest(f"{field}.{names[0]} must be 1 or more, not {target}", field=f"{field}.{names[0]}")
    return target, target


def _value(kwargs: ProcessorKwargs, name: str) -> float | None:
    outer, _, inner = name.partition(".")
    value = getattr(kwargs, outer)
    if inner and value is not None:
        value = getattr(value, inner)
    if value == _UNSET and outer in ("video_fps", "video_target_frames"):
        return None
    number: float | None = value
    return number


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
