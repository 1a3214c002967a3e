from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.ernie.config import ErnieConfig, Rules, check_special_ids, pixel_normalisation

BAIDU: dict[str, Any] = {
    "model_type": "ernie4_5_moe_vl",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "vocab_size": 103424,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "rope_3d": True,
    "freq_allocation": 20,
    "rope_scaling": {"type": "default", "mrope_section": [22, 22, 20]},
    "max_position_embeddings": 131072,
    "moe_num_experts": [64, 64],
    "moe_intermediate_size": [1536, 512],
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28],
    "moe_layer_interval": 1,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "use_bias": False,
    "im_patch_id": 100295,
    "eos_token_id": 2,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1280,
        "hidden_act": "quick_gelu",
        "mlp_ratio": 4,
        "num_heads": 16,
        "patch_size": 14,
        "in_channels": 3,
        "spatial_merge_size": 2,
    },
}
HF: dict[str, Any] = {"model_type": "ernie4_5_vl_moe", "text_config": {}, "vision_config": {}}
"""transformers' defaults are the published model's."""


def changed(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    *path, last = key.split(".")
    target = raw
    for step in path:
        target = target.setdefault(step, {})
    target[last] = value
    return raw


def test_both_dialects_describe_the_same_published_model() -> None:
    baidu, hf = ErnieConfig.from_dict(BAIDU), ErnieConfig.from_dict(HF, {"eos_token_id": 2})
    assert baidu == replace(hf, video_token_id=hf.image_token_id)
    assert hf.text.mlp_layer_types == ("dense",) + ("sparse",) * 27
    assert hf.text.mrope_section == (22, 22, 20)
    assert (hf.text.q_size, hf.text.kv_size, hf.text.shared_intermediate_size) == (2560, 512, 3072)
    assert (hf.vision.head_dim, hf.vision.patch_values, hf.vision.spatial_size, hf.vision.temporal_size) == (
        80,
        588,
        5120,
        10240,
    )
    assert (hf.vision.layer_norm_eps, hf.vision.rms_norm_eps) == (1e-6, 1e-5)
    assert hf.im_patch_id == hf.image_token_id == 100295


@pytest.mark.parametrize(
    ("raw", "key", "value", "message"),
    [
        (HF, "model_type", "llama", "model_type = 'llama'"),
        (HF, "quantization_config", {"bits": 4}, "quantization_config"),
        (HF, "text_config", None, "text_config = None"),
        (HF, "text_config.hidden_act", "gelu", "text_config.hidden_act = 'gelu'"),
        (HF, "text_config.use_bias", "no", "text_config.use_bias = 'no'"),
        (HF, "text_config.num_hidden_layers", 0, "text_config.num_hidden_layers = 0"),
        (HF, "text_config.hidden_size", "big", "text_config.hidden_size = 'big'"),
        (HF, "text_config.num_attention_heads", 7, "text_config.num_attention_heads = 7"),
        (HF, "text_config.num_key_value_heads", 3, "num_key_value_heads = 3"),
        (HF, "text_config.mlp_layer_types", ["sparse"], "mlp_layer_types has 1 entries for num_hidden_layers = 28"),
        (HF, "text_config.mlp_layer_types", ["moe"] * 28, "text_config.mlp_layer_types"),
        (HF, "text_config.moe_intermediate_size", 512, "text_config.moe_intermediate_size = 512"),
        (HF, "text_config.moe_k", 65, "moe_k = 65"),
        (HF, "text_config.rope_parameters.rope_type", "yarn", "text_config.rope_parameters.rope_type = 'yarn'"),
        (HF, "text_config.rope_parameters.mrope_section", [20, 20, 20], r"mrope_section = \[20, 20, 20\]"),
        (HF, "text_config.rope_parameters.mrope_section", [23, 21, 20], "equal h and w"),
        (HF, "text_config.head_dim", 64, "head_dim / 2 = 32"),
        (HF, "vision_config.hidden_act", "gelu", "vision_config.hidden_act = 'gelu'"),
        (HF, "vision_config.patch_size", 16, "vision_config.patch_size = 16"),
        (HF, "vision_config.temporal_merge_size", 1, "vision_config.temporal_merge_size = 1"),
        (HF, "vision_config.num_heads", 3, "vision_config.num_heads = 3"),
        (HF, "image_start_token_id", 100294, "image_start_token_id = 100294"),
        (HF, "video_token_id", 103424, "video_token_id = 103424"),
        (HF, "eos_token_id", 100295, r"eos_token_id\[0\] = 100295"),
        (HF, "eos_token_id", "</s>", "eos_token_id = '</s>'"),
        (BAIDU, "moe_num_experts", [64, 32], r"moe_num_experts = \[64, 32\]"),
        (BAIDU, "moe_layer_start_index", [1, 2], r"moe_layer_start_index = \[1, 2\]"),
        (BAIDU, "moe_layer_end_index", [20, 27], r"moe_layer_end_index = \[20, 27\]"),
        (BAIDU, "moe_layer_interval", 2, "moe_layer_interval = 2"),
        (BAIDU, "rope_3d", False, "rope_3d = False"),
        (BAIDU, "freq_allocation", 16, "freq_allocation = 16"),
        (BAIDU, "im_patch_id", 90000, "image_start_token_id is missing"),
        (BAIDU, "hidden_size", 100, "head_dim = 5"),
    ],
)
def test_what_is_not_supported_is_refused_by_key_and_value(
    raw: dict[str, Any], key: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ErnieConfig.from_dict(changed(raw, key, value))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 999.0}, {"rope_parameters": {"rope_theta": 999.0}}),
        ({"rope_theta": 9.0, "rope_parameters": {"rope_theta": 999.0}}, {"rope_parameters": {"rope_theta": 999.0}}),
        (
            {"rope_theta": 999.0, "rope_scaling": {"type": "default", "mrope_section": [20, 20, 24]}},
            {"rope_parameters": {"rope_theta": 999.0, "mrope_section": [20, 20, 24]}},
        ),
        (
            {"rope_scaling": {"rope_theta": 999.0}, "rope_parameters": {"rope_theta": 9.0}},
            {"rope_parameters": {"rope_theta": 999.0}},
        ),
        ({"num_experts": 16, "num_experts_per_tok": 2}, {"moe_num_experts": 16, "moe_k": 2}),
    ],
)
def test_older_and_second_names_of_text_keys(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert ErnieConfig.from_dict(HF | {"text_config": old}) == ErnieConfig.from_dict(HF | {"text_config": new})
    assert ErnieConfig.from_dict(HF | {"text_config": new}) != ErnieConfig.from_dict(HF)


def test_older_and_second_names_of_vision_keys() -> None:
    old = {"rope_theta": 99.0, "num_hidden_layers": 3, "num_attention_heads": 8}
    vision = ErnieConfig.from_dict(HF | {"vision_config": old}).vision
    assert (vision.rope_theta, vision.depth, vision.num_heads) == (99.0, 3, 8)


def test_a_rope_type_is_refused_under_its_older_names_too() -> None:
    for key in ("rope_parameters", "rope_scaling"):
        with pytest.raises(ValueError, match=f"text_config.{key}.rope_type = 'linear'"):
            ErnieConfig.from_dict(HF | {"text_config": {key: {"type": "linear", "factor": 2.0}}})


def test_routing_weights_may_have_no_lower_bound() -> None:
    assert ErnieConfig.from_dict(changed(HF, "text_config.moe_norm_min", 0.0)).text.moe_norm_min == 0.0
    with pytest.raises(ValueError, match=r"text_config\.moe_norm_min = -0\.5"):
        ErnieConfig.from_dict(changed(HF, "text_config.moe_norm_min", -0.5))


def test_baidu_layer_range_becomes_layer_types() -> None:
    raw = changed(changed(BAIDU, "moe_layer_start_index", [2, 2]), "moe_layer_end_index", [25, 25])
    assert ErnieConfig.from_dict(raw).text.sparse_layers == tuple(range(2, 26))
    assert ErnieConfig.from_dict(changed(BAIDU, "moe_layer_end_index", -1)).text.sparse_layers == tuple(range(1, 28))


def test_eos_comes_from_generation_config_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed(HF, "text_config.eos_token_id", 7)))
    assert ErnieConfig.from_dir(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5, 2]}')
    assert ErnieConfig.from_dir(tmp_path).eos_token_ids == (2, 5)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be read as JSON"):
        ErnieConfig.from_dir(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        ErnieConfig.from_dir(tmp_path / "nowhere")


def test_special_ids_must_be_generatable() -> None:
    config = ErnieConfig.from_dict(HF)
    check_special_ids(config, {"eos": 2, "</think>": 100294})
    with pytest.raises(ValueError, match="<think> = 100295, sep = -1: not in") as error:
        check_special_ids(config, {"eos": 2, "<think>": 100295, "sep": -1})
    assert "eos = 2" not in str(error.value)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_routing_rules_differ_only_on_other_special_tokens(kind: str) -> None:
    config = ErnieConfig.from_dict(HF)
    ids: Any = np.array([5, 100294, 100295, 100296, 100500, 101304, 101305, 101306, 101307, 103367, 103400])
    ids = ids if kind == "numpy" else torch.from_numpy(ids)
    original = Rules.original().vision_tokens(ids, config).tolist()
    transformers = Rules.transformers().vision_tokens(ids, config).tolist()
    assert original == [False, False] + [True] * 9
    assert transformers == [False, False, True, False, False, True, True, True, True, True, False]
    assert Rules.original().switches == "routing=all_special,positions=original"
    assert Rules.transformers().switches == "routing=delimiters,positions=transformers"


def test_pixel_normalisation_is_one_for_pictures_and_videos(tmp_path: Path) -> None:
    mean, std = pixel_normalisation(tmp_path)
    assert mean[0] == 0.48145466 and std[2] == 0.27577711
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    assert pixel_normalisation(tmp_path)[0] == (0.5, 0.5, 0.5)
    (tmp_path / "video_preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="normalised differently"):
        pixel_normalisation(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    assert pixel_normalisation(tmp_path)[0] == (0.5, 0.5, 0.5)
    (tmp_path / "preprocessor_config.json").write_text('{"rescale_factor": 1.0}')
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: rescale_factor = 1\.0"):
        pixel_normalisation(tmp_path)


def test_pixel_normalisation_from_one_file_for_both_processors(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.1, 0.1]}')
    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": half, "video_processor": half}))
    assert pixel_normalisation(tmp_path) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"do_rescale": false}}')
    with pytest.raises(ValueError, match=r"processor_config\.json: image_processor: do_rescale = False"):
        pixel_normalisation(tmp_path)
