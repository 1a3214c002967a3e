"""The documents of a random checkpoint: config.json and its neighbours, by preset and overrides.

Overrides are dotted keys into these documents: ``text_config.hidden_size``, ``vision_config.depth``,
``generation_config.eos_token_id``, ``preprocessor_config.size.longest_edge``,
``video_preprocessor_config.max_frames``. What follows from other keys (token ids from the vocabulary, the dense first
layer from the layer count, the rotary sections from the head width) is filled in unless it is overridden.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from actors.checkpoint.tokens import END_OF_SENTENCE, TokenLayout, token_layout
from actors.ernie.config import ErnieConfig
from actors.ernie.config_keys import DEFAULT_MEAN, DEFAULT_STD

TEXT_BASE: dict[str, Any] = {
    "model_type": "ernie4_5_vl_moe_text",
    "vocab_size": 1024,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": None},
    "mlp_layer_types": None,
    "moe_intermediate_size": [48, 24],
    "moe_k": 3,
    "moe_num_experts": 8,
    "moe_num_shared_experts": 2,
    "moe_norm_min": 1e-12,
    "tie_word_embeddings": True,
    "use_bias": False,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION_BASE: dict[str, Any] = {
    "model_type": "ernie4_5_vl_moe_vision",
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 128,
    "hidden_act": "quick_gelu",
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_merge_size": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
}
PIXEL = 28 * 28
"""Pixels of one token: 2 x 2 patches of 14 x 14."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """What a preset changes in the base documents; pixel bounds in tokens (per picture; per frame of a video)."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    image_tokens: tuple[int, int]
    video_tokens: tuple[int, int]


PRESETS: dict[str, Preset] = {
    "tiny": Preset(text={}, vision={}, image_tokens=(4, 64), video_tokens=(4, 16)),
    "mid": Preset(
        text={
            "vocab_size": 16384,
            "hidden_size": 1280,
            "intermediate_size": 6144,
            "num_hidden_layers": 6,
            "num_attention_heads": 10,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "moe_intermediate_size": [768, 256],
            "moe_k": 6,
            "moe_num_experts": 64,
        },
        vision={"depth": 8, "hidden_size": 640, "num_heads": 8, "intermediate_size": 2560},
        image_tokens=(4, 100),
        video_tokens=(4, 36),
    ),
    "28b": Preset(
        text={
            "vocab_size": 103424,
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "num_hidden_layers": 28,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "moe_intermediate_size": [1536, 512],
            "moe_k": 6,
            "moe_num_experts": 64,
        },
        vision={"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 5120},
        image_tokens=(4, 6177),
        video_tokens=(299, 1196),
    ),
}

DERIVED = (
    "image_token_id",
    "video_token_id",
    "image_start_token_id",
    "image_end_token_id",
    "video_start_token_id",
    "video_end_token_id",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """The JSON files of a checkpoint by what they hold, and the checked forms of the first."""

    config: dict[str, Any]
    generation_config: dict[str, Any]
    preprocessor_config: dict[str, Any]
    video_preprocessor_config: dict[str, Any]
    model: ErnieConfig
    layout: TokenLayout


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """``["text_config.hidden_size=192", ...]`` to a mapping; values are JSON, or else plain strings.

    Raises ValueError for an item without ``=`` and for a key given twice.
    """
    overrides: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"{item!r} is not of the form KEY=VALUE")
        if key in overrides:
            raise ValueError(f"{key} is given twice")
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = value.strip()
    return overrides


def build_documents(preset: str, overrides: Mapping[str, Any] | None = None, *, dtype: str = "float32") -> Documents:
    """All documents of a preset. Raises ValueError naming an unknown preset or key, a wrong kind of value, or a value
    the model does not support."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    raw: dict[str, Any] = copy.deepcopy(
        {
            "text_config": TEXT_BASE | dict(chosen.text),
            "vision_config": VISION_BASE | dict(chosen.vision),
            "tie_word_embeddings": True,
            "generation_config": {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
            "preprocessor_config": _image_processor(chosen),
            "video_preprocessor_config": _video_processor(chosen),
        }
    )
    for key, value in (overrides or {}).items():
        _override(raw, key, value)
    layout = _fill_derived(raw, overrides or {})
    config = {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_vl_moe",
        "dtype": dtype,
        **layout.config_ids(),
        **{key: raw[key] for key in ("text_config", "vision_config", "tie_word_embeddings")},
    }
    return Documents(
        config=config,
        generation_config=raw["generation_config"],
        preprocessor_config=raw["preprocessor_config"],
        video_preprocessor_config=raw["video_preprocessor_config"],
        model=ErnieConfig.from_dict(config, raw["generation_config"]),
        layout=layout,
    )


def _override(raw: dict[str, Any], key: str, value: Any) -> None:
    if key in DERIVED:
        raise ValueError(f"{key} cannot be set: token ids follow from text_config.vocab_size")
    *path, last = key.split(".")
    target: Any = raw
    for step in path:
        target = target.get(step) if isinstance(target, dict) else None
    if not isinstance(target, dict) or last not in target or isinstance(target[last], dict) or last == "model_type":
        raise ValueError(f"unknown override {key!r}; known: {', '.join(_leaves(raw))}")
    old = target[last]
    number = isinstance(old, int | float) and not isinstance(old, bool)
    new_number = isinstance(value, int | float) and not isinstance(value, bool)
    kinds_differ = old is not None and value is not None and type(old) is not type(value)
    if kinds_differ and not (number and new_number):
        raise ValueError(f"{key} = {value!r} is not a {type(old).__name__}")
    target[last] = value


def _fill_derived(raw: dict[str, Any], overrides: Mapping[str, Any]) -> TokenLayout:
    text = raw["text_config"]
    if "tie_word_embeddings" in overrides and "text_config.tie_word_embeddings" not in overrides:
        text["tie_word_embeddings"] = raw["tie_word_embeddings"]
    elif "text_config.tie_word_embeddings" in overrides and "tie_word_embeddings" not in overrides:
        raw["tie_word_embeddings"] = text["tie_word_embeddings"]
    if not isinstance(text["vocab_size"], int):
        raise ValueError(f"text_config.vocab_size = {text['vocab_size']!r} is not an integer")
    layout = token_layout(text["vocab_size"])
    if text["head_dim"] is None:
        del text["head_dim"]
    if text["mlp_layer_types"] is None:
        text["mlp_layer_types"] = ["dense"] + ["sparse"] * (int(text["num_hidden_layers"]) - 1)
    if text["rope_parameters"]["mrope_section"] is None:
        heads = max(1, int(text["num_attention_heads"]))
        head_dim = text.get("head_dim") or int(text["hidden_size"]) // heads
        text["rope_parameters"]["mrope_section"] = mrope_section(head_dim)
    generation = raw["generation_config"]
    if generation["eos_token_id"] is None:
        generation["eos_token_id"] = [text["eos_token_id"], layout.special[END_OF_SENTENCE]]
    return layout


def mrope_section(head_dim: int) -> list[int]:
    """[h, w, t] in the published proportion 22 : 22 : 20 of head_dim / 2 frequencies, h and w equal."""
    half = head_dim // 2
    spatial = round(half * 22 / 64)
    return [spatial, spatial, half - 2 * spatial]


def _leaves(raw: Mapping[str, Any], prefix: str = "") -> list[str]:
    leaves = []
    for key, value in raw.items():
        if isinstance(value, dict):
            leaves += _leaves(value, f"{prefix}{key}.")
        elif key != "model_type":
            leaves.append(prefix + key)
    return leaves


def _processor(kind: str, tokens: tuple[int, int]) -> dict[str, Any]:
    return {
        "processor_class": "Ernie4_5_VLMoeProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(DEFAULT_MEAN),
        "image_std": list(DEFAULT_STD),
        "merge_size": 2,
        "patch_size": 14,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": tokens[0] * PIXEL, "longest_edge": tokens[1] * PIXEL},
        "temporal_patch_size": 1 if kind == "image" else 2,
    }


def _image_processor(preset: Preset) -> dict[str, Any]:
    return {"image_processor_type": "Ernie4_5_VLMoeImageProcessor", **_processor("image", preset.image_tokens)}


def _video_processor(preset: Preset) -> dict[str, Any]:
    return {
        "video_processor_type": "Ernie4_5_VLMoeVideoProcessor",
        **_processor("video", preset.video_tokens),
        "do_sample_frames": True,
        "fps": 2,
        "min_frames": 16,
        "max_frames": 180,
        "draw_on_frames": True,
        "font": "Roboto-Regular.ttf",
    }
