"""Random ERNIE-4.5-VL models of the transformers library, and prompts for them: the peer of the conformance tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeTopKRouter

from actors.ernie.config import ErnieConfig
from actors.types import Grid, MediaKind

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

TEXT_IDS = 300
"""Ids below are ordinary text; IMAGE is im_patch_id."""
IMAGE, IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END, LOC, VIDEO = 300, 304, 305, 306, 307, 308, 310
VOCABULARY = 320


def small_config(
    *,
    hidden: int = 64,
    layers: int = 3,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    sections: tuple[int, int, int] = (3, 3, 2),
    experts: int = 8,
    k: int = 3,
    bank_widths: tuple[int, int] = (48, 16),
    shared: int = 2,
    sparse: Sequence[int] | None = None,
    tied: bool = True,
    use_bias: bool = False,
    vision: tuple[int, int, int] = (2, 32, 4),
    eps: tuple[float, float] = (1e-5, 1e-6),
    theta: float = 500000.0,
    norm_min: float = 1e-12,
) -> Ernie4_5_VLMoeConfig:
    """``vision``: depth, hidden size, heads. ``eps``: text, vision. ``sparse``: MoE layers (all but the first)."""
    sparse = range(1, layers) if sparse is None else sparse
    return Ernie4_5_VLMoeConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden // 2,
            "num_hidden_layers": layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": head_dim,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)},
            "mlp_layer_types": ["sparse" if i in sparse else "dense" for i in range(layers)],
            "moe_intermediate_size": list(bank_widths),
            "moe_k": k,
            "moe_num_experts": experts,
            "moe_num_shared_experts": shared,
            "moe_norm_min": norm_min,
            "rms_norm_eps": eps[0],
            "use_bias": use_bias,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 4096,
        },
        vision_config={
            "depth": vision[0],
            "hidden_size": vision[1],
            "num_heads": vision[2],
            "intermediate_size": 3 * vision[1],
            "rms_norm_eps": eps[1],
        },
        image_token_id=IMAGE,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
        video_token_id=VIDEO,
        tie_word_embeddings=tied,
    )


def random_model(config: Ernie4_5_VLMoeConfig, seed: int) -> Ernie4_5_VLMoeForConditionalGeneration:
    """float32, every tensor non-trivial: norm weights around 1, biases and correction biases not zero."""
    model = Ernie4_5_VLMoeForConditionalGeneration(config)
    model.train(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "correction_bias" in name:
                parameter.copy_(0.05 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids, media in order as (kind, first placeholder, grid), and uint8 patches of each."""

    ids: npt.NDArray[np.int64]
    media: tuple[tuple[MediaKind, int, Grid], ...]
    patches: tuple[npt.NDArray[np.uint8], ...]

    @property
    def spans(self) -> list[tuple[int, Grid]]:
        return [(offset, grid) for _, offset, grid in self.media]


def prompt(seed: int, *parts: int | tuple[MediaKind, Grid]) -> Prompt:
    """``parts``: a number of text tokens, or a medium, which gets its START and END tokens."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    media: list[tuple[MediaKind, int, Grid]] = []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(3, TEXT_IDS, part).tolist()
            continue
        kind, grid = part
        image = kind is MediaKind.IMAGE
        ids.append(IMAGE_START if image else VIDEO_START)
        media.append((kind, len(ids), grid))
        ids += [IMAGE if image else VIDEO] * grid.tokens + [IMAGE_END if image else VIDEO_END]
    patches = [rng.integers(0, 256, (grid.patches, 588), dtype=np.uint8) for *_, grid in media]
    return Prompt(ids=np.array(ids), media=tuple(media), patches=tuple(patches))


def reference_inputs(case: Prompt, config: Ernie4_5_VLMoeConfig | ErnieConfig) -> dict[str, Any]:
    """Keyword arguments of the reference's forward, as its processor makes them."""
    kinds = np.where(case.ids == config.image_token_id, 1, np.where(case.ids == config.video_token_id, 2, 0))
    routed = kinds.copy()
    routed[np.isin(case.ids, (config.image_start_token_id, config.image_end_token_id))] = 1
    routed[np.isin(case.ids, (config.video_start_token_id, config.video_end_token_id))] = 2
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(case.ids)[None]}
    if case.media:
        inputs["mm_token_type_ids"] = torch.from_numpy(kinds)[None]
        inputs["moe_mm_token_type_ids"] = torch.from_numpy(routed)[None]
    mean, std = (np.repeat(np.array(x, dtype=np.float32), 196) for x in (MEAN, STD))
    for kind, pixels, grids in (
        (MediaKind.IMAGE, "pixel_values", "image_grid_thw"),
        (MediaKind.VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = [i for i, (k, *_) in enumerate(case.media) if k is kind]
        if chosen:
            rows = np.concatenate([case.patches[i] for i in chosen]).astype(np.float32) * np.float32(1 / 255)
            inputs[pixels] = torch.from_numpy((rows - mean) / std)
            inputs[grids] = torch.tensor([tuple(case.media[i][2]) for i in chosen])
    return inputs


def reference_logits(model: Ernie4_5_VLMoeForConditionalGeneration, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits [T, V], and for each token the smallest gap between the last chosen and the first left-out expert [T].

    The gap is over all MoE layers and over this and all earlier tokens: what could have tipped a token's logits.
    """
    tokens = inputs["input_ids"].shape[1]
    routed = inputs.get("moe_mm_token_type_ids", torch.zeros(1, tokens))[0].bool()
    gaps = torch.full((tokens,), torch.inf)

    def watch(name: str, router: Ernie4_5_VLMoeMoeTopKRouter) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            scores = output[0].softmax(-1) + router.moe_statics.e_score_correction_bias
            if router.top_k < router.num_experts:
                best = scores.topk(router.top_k + 1).values
                mask = routed if "vision_moe" in name else ~routed
                gaps[mask] = torch.minimum(gaps[mask], best[:, -2] - best[:, -1])

        return router.register_forward_hook(hook)

    hooks = [watch(n, m) for n, m in model.named_modules() if isinstance(m, Ernie4_5_VLMoeMoeTopKRouter)]
    model.model.rope_deltas = None
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits[0]
    for handle in hooks:
        handle.remove()
    return logits, gaps.cummin(0).values
