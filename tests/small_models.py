"""Small models with random, non-trivial weights, built without files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from actors.ernie.bank import VisionBank, empty_bank_buffer
from actors.ernie.config import TextConfig, VisionConfig
from actors.ernie.text import LanguageModel
from actors.ernie.vision import VisionModel


def text_config(**changes: Any) -> TextConfig:
    fields: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "mrope_section": (3, 3, 2),
        "max_position_embeddings": 1024,
        "mlp_layer_types": ("dense", "sparse", "sparse"),
        "moe_intermediate_size": (32, 16),
        "moe_k": 3,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 2,
        "moe_norm_min": 1e-12,
        "use_bias": False,
        "tie_word_embeddings": True,
    }
    return TextConfig(**(fields | changes))


def vision_config(**changes: Any) -> VisionConfig:
    fields: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 64,
        "output_size": 48,
    }
    return VisionConfig(**(fields | changes))


def fill(destinations: Mapping[str, Tensor], seed: int) -> None:
    """Norm weights around 1, biases not zero; the same numbers for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    for name, view in destinations.items():
        noise = torch.randn(view.shape, generator=generator, dtype=torch.float64)
        if name.endswith("bias"):
            view.copy_(0.1 * noise)
        elif view.dim() == 1:
            view.copy_(1 + 0.2 * noise)
        else:
            view.copy_(noise * view.shape[-1] ** -0.5)


def language_model(
    config: TextConfig, dtype: torch.dtype = torch.float64, *, seed: int = 0, bank: bool = True, **options: Any
) -> LanguageModel:
    model = LanguageModel(config, dtype=dtype, **options)
    fill(model.parameters_by_name(), seed)
    if bank:
        vision = VisionBank(config, dtype, empty_bank_buffer(config, dtype))
        fill(vision.parameters_by_name(), seed + 1)
        model.attach_vision_bank(vision)
    return model


def vision_model(config: VisionConfig, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> VisionModel:
    model = VisionModel(config, dtype=dtype, image_mean=(0.5, 0.4, 0.3), image_std=(0.3, 0.2, 0.25))
    fill(model.parameters_by_name(), seed)
    return model
