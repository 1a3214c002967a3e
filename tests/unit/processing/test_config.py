from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.processing.config import (
    ImageConfig,
    ModelTokens,
    ProcessingLimits,
    VideoConfig,
    load_image_config,
    load_video_config,
)


def write(directory: Path, name: str, value: Any) -> None:
    (directory / name).write_text(json.dumps(value))


def test_reads_what_transformers_writes(tmp_path: Path) -> None:
    pil = pytest.importorskip("transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe")
    pil.Ernie4_5_VLMoeImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 7840}).save_pretrained(tmp_path)
    config = load_image_config(tmp_path)
    assert (config.min_pixels, config.max_pixels) == (784, 7840)


def test_defaults_and_older_keys(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {})
    assert load_image_config(tmp_path) == ImageConfig()
    write(tmp_path, "preprocessor_config.json", {"min_pixels": 784, "max_pixels": 1000})
    assert load_image_config(tmp_path) == ImageConfig(min_pixels=784, max_pixels=1000)
    write(tmp_path, "preprocessor_config.json", {"size": {"min_pixels": 800, "max_pixels": 900}, "max_pixels": 1000})
    assert load_image_config(tmp_path) == ImageConfig(min_pixels=800, max_pixels=1000)


def test_nested_config_wins(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {"size": {"shortest_edge": 1, "longest_edge": 2}})
    nested = {
        "image_processor": {"size": {"shortest_edge": 3, "longest_edge": 4}},
        "video_processor": {"size": {"shortest_edge": 5, "longest_edge": 6}, "fps": 1, "max_frames": 20},
    }
    write(tmp_path, "processor_config.json", nested)
    assert load_image_config(tmp_path).max_pixels == 4
    video = load_video_config(tmp_path)
    assert (video.max_pixels, video.frames_per_second, video.max_frames, video.min_frames) == (6, 1.0, 20, 16)


def test_video_defaults(tmp_path: Path) -> None:
    assert load_video_config(tmp_path) == VideoConfig()
    write(tmp_path, "video_preprocessor_config.json", {"font": "/somewhere/Fancy.ttf", "draw_on_frames": False})
    config = load_video_config(tmp_path)
    assert (config.font, config.draw_timestamps, config.frames_per_second) == ("Fancy.ttf", False, 2.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patch_size": 16}, "patch_size"),
        ({"merge_size": 1}, "merge_size"),
        ({"resample": 2}, "resample"),
        ({"do_resize": False}, "do_resize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"size": {"shortest_edge": 10, "longest_edge": 5}}, "bounds"),
    ],
)
def test_unsupported_settings_are_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    write(tmp_path, "preprocessor_config.json", change)
    with pytest.raises(ValueError, match=named):
        load_image_config(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        load_image_config(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelTokens.from_dir(tmp_path)
    write(tmp_path, "config.json", {"image_token_id": 5, "video_token_id": "x"})
    with pytest.raises(ValueError, match="video_token_id"):
        ModelTokens.from_dir(tmp_path)


def test_media_tokens_left_out_are_the_published_ones(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"image_token_id": 5})
    tokens = ModelTokens.from_dir(tmp_path)
    assert (tokens.image, tokens.video, tokens.image_start, tokens.video_end) == (5, 103367, 101304, 101307)


def test_limits_refuse_negative() -> None:
    with pytest.raises(ValueError, match="max_images"):
        ProcessingLimits(max_images=-1)


@pytest.mark.parametrize("domain", ["", "https://example.com", "a.com,b.com", "user@a.com"])
def test_limits_refuse_what_is_no_host(domain: str) -> None:
    with pytest.raises(ValueError, match="allowed_media_domains"):
        ProcessingLimits(allowed_media_domains=(domain,))
