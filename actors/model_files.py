"""The JSON files of a model directory that the model and the processing both read, in one reading for both.

Two dialects of config.json are known by ``model_type``: transformers' and Baidu's original.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

HF_MODEL_TYPE = "ernie4_5_vl_moe"
BAIDU_MODEL_TYPE = "ernie4_5_moe_vl"

PUBLISHED_TOKENS = {
    "image_token_id": 100295,
    "video_token_id": 103367,
    "image_start_token_id": 101304,
    "image_end_token_id": 101305,
    "video_start_token_id": 101306,
    "video_end_token_id": 101307,
}
"""Ids of the one published vocabulary; transformers leaves them out where they are these."""

MEDIA_TOKENS = {
    "image_start_token_id": "<|IMAGE_START|>",
    "image_end_token_id": "<|IMAGE_END|>",
    "video_start_token_id": "<|VIDEO_START|>",
    "video_end_token_id": "<|VIDEO_END|>",
}
"""What the tokenizer calls those that the original's config.json does not name."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def processor_section(model_dir: Path, kind: Literal["image", "video"]) -> tuple[str, dict[str, Any] | None]:
    """Settings of the image or video processor, None when there are none, and where they were looked for.

    ``processor_config.json`` (key image_processor or video_processor) wins over ``preprocessor_config.json`` or
    ``video_preprocessor_config.json``. Raises ValueError naming a malformed file.
    """
    combined = model_dir / "processor_config.json"
    if combined.is_file():
        section = read_json(combined).get(f"{kind}_processor")
        if isinstance(section, dict):
            return f"{combined}: {kind}_processor", section
    own = model_dir / ("preprocessor_config.json" if kind == "image" else "video_preprocessor_config.json")
    return str(own), read_json(own) if own.is_file() else None


def media_token_ids(config: Mapping[str, Any], spelled: Mapping[str, int] | None = None) -> dict[str, int]:
    """Ids of placeholders, START and END by the keys of transformers' config.json.

    The original's config names ``im_patch_id`` alone, the placeholder inside pictures and videos alike. START and END
    are then what the tokenizer has under their strings (``spelled``, see ``MEDIA_TOKENS``), else in their places of the
    published vocabulary; with any other vocabulary they must be named. Raises ValueError naming key and value.
    """
    tokens: dict[str, Any] = dict(PUBLISHED_TOKENS)
    if config.get("model_type") == BAIDU_MODEL_TYPE:
        patch = config.get("im_patch_id")
        if patch != PUBLISHED_TOKENS["image_token_id"]:
            tokens = dict.fromkeys(PUBLISHED_TOKENS)
        tokens |= {key: spelled[text] for key, text in MEDIA_TOKENS.items() if spelled and text in spelled}
        tokens |= {"image_token_id": patch, "video_token_id": patch}
    named = {key: config[key] for key in PUBLISHED_TOKENS if config.get(key) is not None}
    for key, value in (tokens | named).items():
        if value is None:
            raise ValueError(f"{key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{key} = {value!r} is not supported; need a token id")
        tokens[key] = value
    return tokens
