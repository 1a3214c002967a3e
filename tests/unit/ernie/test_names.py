from __future__ import annotations

import numpy as np
import pytest

from actors.ernie.config import ErnieConfig
from actors.ernie.names import LM_HEAD, Naming, detect_naming, normalise, sources, tensor_shapes

PUBLISHED = ErnieConfig.from_dict({"model_type": "ernie4_5_vl_moe", "text_config": {}, "vision_config": {}})


def test_inventory_of_the_published_model() -> None:
    specs = tensor_shapes(PUBLISHED)
    assert len(specs) == 872
    assert sum(spec.numel for spec in specs.values()) == 29_399_294_336
    by_group = {
        group: sum(s.numel for s in specs.values() if s.group == group) for group in ("vision", "vision_experts")
    }
    assert by_group["vision"] == 630_433_280 + 144_225_280
    assert by_group["vision_experts"] == 6_794_772_480 + 8_850_816 // 2
    kept = [name for name, spec in specs.items() if spec.keep_fp32]
    assert len(kept) == 27 * 4
    assert sum(specs[name].numel for name in kept) == 8_850_816


def test_original_naming_has_11105_tensors() -> None:
    stored = {
        s.name for name, spec in tensor_shapes(PUBLISHED).items() for s in sources(name, spec, PUBLISHED, Naming.BAIDU)
    }
    assert len(stored) == 11_105
    layer = "model.layers.3.mlp."
    assert {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        layer + "gate.weight",
        layer + "gate.weight_1",
        layer + "moe_statics.e_score_correction_bias",
        layer + "experts.127.up_proj.weight",
        layer + "shared_experts.down_proj.weight",
        "vision_model.blocks.31.attn.qkv.bias",
        "vision_model.ln.weight",
        "model.resampler_model.spatial_linear.0.weight",
        "model.resampler_model.temporal_linear.3.bias",
        "model.resampler_model.after_norm.weight",
    } <= stored


@pytest.mark.parametrize("naming", list(Naming))
def test_sources_cover_each_tensor_exactly_once(naming: Naming) -> None:
    raw = {
        "model_type": "ernie4_5_vl_moe",
        "text_config": {
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": [24, 8],
            "rope_parameters": {"mrope_section": [3, 3, 2]},
        },
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48},
    }
    config = ErnieConfig.from_dict(raw)
    for name, spec in tensor_shapes(config).items():
        covered = np.zeros(spec.shape, dtype=int)
        for source in sources(name, spec, config, naming):
            view = covered[source.target] if source.target else covered
            shape = source.shape[::-1] if source.transpose else source.shape
            shape = shape if source.row is None else (1, *shape[1:])
            assert view.shape == shape, name
            view += 1
        assert (covered == 1).all(), name


def test_untied_head_and_absent_shared_experts() -> None:
    raw = {
        "model_type": "ernie4_5_vl_moe",
        "text_config": {"moe_num_shared_experts": 0},
        "vision_config": {},
        "tie_word_embeddings": False,
    }
    specs = tensor_shapes(ErnieConfig.from_dict(raw))
    assert specs[LM_HEAD].shape == (103424, 2560)
    assert not [name for name in specs if "shared_experts" in name]


def test_naming_is_told_from_names() -> None:
    assert detect_naming(["lm_head.weight", "model.language_model.norm.weight"]) is Naming.HF
    assert detect_naming(["model.layers.0.mlp.gate.weight"]) is Naming.BAIDU
    assert detect_naming(["vision_model.ln.weight"]) is Naming.BAIDU
    stray = "model.layers.0.mlp.gate.weight"
    assert detect_naming([stray, "model.vision_tower.ln.weight", "model.language_model.norm.weight"]) is Naming.HF
    assert detect_naming([stray, "model.norm.weight", "model.language_model.norm.weight"]) is Naming.BAIDU
    with pytest.raises(ValueError, match=r"'ernie\.layers\.0'"):
        detect_naming(["ernie.layers.0"])


def test_spellings_of_stored_names() -> None:
    assert normalise("model.vision_model.ln.weight") == normalise("vision_model.ln.weight") == "vision_model.ln.weight"
    assert normalise("model.mtp_block.0.norm.weight") is None
    assert normalise("mtp.layers.0.weight") is None
    assert normalise("model.layers.0.mlp.gate_proj.weight") == "model.layers.0.mlp.gate_proj.weight"
