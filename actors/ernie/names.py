"""The inventory of tensors and the two ways checkpoints name them.

The canonical names are those of transformers' ``Ernie4_5_VLMoeForConditionalGeneration`` (stacked experts, [out, in]
matrices). Baidu's original names differ: experts one by one, routers transposed, the correction biases of both
banks in one tensor, the vision tower under ``vision_model``. ``sources`` says, for each canonical tensor, which
tensors of the files fill which part of it; nothing else in the code base knows the original names.

Legend: E experts of one bank, D hidden size, F width of one expert, V vocabulary.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from actors.ernie.config import SPARSE, ErnieConfig, TextConfig, VisionConfig

Group = Literal["language", "vision_experts", "vision"]
GROUPS: tuple[Group, ...] = ("language", "vision_experts", "vision")

LANGUAGE = "model.language_model."
TOWER = "model.vision_tower."
RESAMPLER = "model.resampler_model."
EMBEDDING = "model.language_model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
CORRECTION_BIAS = "gate.moe_statics.e_score_correction_bias"
BAIDU_NAMES = re.compile(r"(model\.(embed_tokens|layers|norm)\.|(model\.)?vision_model\.)")


class Naming(enum.StrEnum):
    """How the files name tensors. Told from the names, never from config.json."""

    HF = "hf"
    BAIDU = "baidu"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Shape of one canonical tensor and who needs it.

    ``keep_fp32``: held in float32 (float64 in a float64 model) whatever the model's dtype: routers, correction biases.
    ``group``: "vision" = tower and resampler, "vision_experts" = vision bank and its routers, "language" = the rest.
    """

    shape: tuple[int, ...]
    keep_fp32: bool = False
    group: Group = "language"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One tensor in the files and the part of a canonical tensor it fills.

    ``target`` indexes the canonical tensor; ``row``, if set, keeps one row of the stored tensor (as a [1, n] matrix);
    ``transpose`` swaps the two axes of the stored tensor. ``shape`` is the shape as stored.
    """

    name: str
    shape: tuple[int, ...]
    target: tuple[int | slice, ...] = ()
    row: int | None = None
    transpose: bool = False


def tensor_shapes(config: ErnieConfig) -> dict[str, TensorSpec]:
    """All tensors of a model by canonical name, in layer order. Tied embeddings have no ``lm_head.weight``."""
    return dict(language_tensors(config.text)) | dict(vision_tensors(config.vision))


def language_tensors(text: TextConfig) -> Iterator[tuple[str, TensorSpec]]:
    """Groups "language" and "vision_experts" in layer order."""
    D = text.hidden_size
    yield EMBEDDING, TensorSpec(shape=(text.vocab_size, D))
    for i, kind in enumerate(text.mlp_layer_types):
        layer = f"{LANGUAGE}layers.{i}."
        yield layer + "input_layernorm.weight", TensorSpec(shape=(D,))
        yield from _projection(layer + "self_attn.q_proj", text.q_size, D, text.use_bias)
        yield from _projection(layer + "self_attn.k_proj", text.kv_size, D, text.use_bias)
        yield from _projection(layer + "self_attn.v_proj", text.kv_size, D, text.use_bias)
        yield from _projection(layer + "self_attn.o_proj", D, text.q_size, text.use_bias)
        yield layer + "post_attention_layernorm.weight", TensorSpec(shape=(D,))
        if kind != SPARSE:
            yield from _gated_mlp(layer + "mlp.", D, text.intermediate_size, text.use_bias)
            continue
        yield from _bank(layer + "mlp.text_moe.", text, text.moe_intermediate_size[0], "language")
        yield from _bank(layer + "mlp.vision_moe.", text, text.moe_intermediate_size[1], "vision_experts")
        if text.moe_num_shared_experts:
            yield from _gated_mlp(layer + "mlp.shared_experts.", D, text.shared_intermediate_size, text.use_bias)
    yield LANGUAGE + "norm.weight", TensorSpec(shape=(D,))
    if not text.tie_word_embeddings:
        yield LM_HEAD, TensorSpec(shape=(text.vocab_size, D))


def vision_tensors(vision: VisionConfig) -> Iterator[tuple[str, TensorSpec]]:
    """Group "vision": tower, then resampler."""
    H, S, D = vision.hidden_size, vision.spatial_size, vision.output_size
    shapes: dict[str, tuple[int, ...]] = {TOWER + "patch_embed.proj.weight": (H, vision.patch_values)}
    for i in range(vision.depth):
        block = f"{TOWER}blocks.{i}."
        shapes |= _affine(block + "norm1", H) | _affine(block + "norm2", H)
        shapes |= _linear(block + "attn.qkv", 3 * H, H) | _linear(block + "attn.proj", H, H)
        shapes |= _linear(block + "mlp.fc1", vision.intermediate_size, H)
        shapes |= _linear(block + "mlp.fc2", H, vision.intermediate_size)
    shapes |= _affine(TOWER + "ln", H)
    for part, width in (("spatial_linear", S), ("temporal_linear", vision.temporal_size)):
        shapes |= _linear(f"{RESAMPLER}{part}.fc1", S, width) | _linear(f"{RESAMPLER}{part}.fc2", S, S)
        shapes |= _affine(f"{RESAMPLER}{part}.ln", S)
    shapes |= _linear(RESAMPLER + "mlp", D, S)
    shapes[RESAMPLER + "after_norm.weight"] = (D,)
    for name, shape in shapes.items():
        yield name, TensorSpec(shape=shape, group="vision")


def detect_naming(names: Iterable[str]) -> Naming:
    """Tell the naming from tensor names: that of most of them, so that strays are reported as unexpected later.

    Raises ValueError if no name belongs to either, quoting one.
    """
    listed = list(names)
    hf = sum(name.startswith((LANGUAGE, TOWER)) for name in listed)
    baidu = sum(bool(BAIDU_NAMES.match(name)) for name in listed)
    if not hf and not baidu:
        raise ValueError(f"no tensor is named as in an ERNIE-4.5-VL checkpoint; found {min(listed, default=None)!r}")
    return Naming.HF if hf >= baidu else Naming.BAIDU


def normalise(name: str) -> str | None:
    """The spelling of a stored name that ``sources`` uses; None for tensors of no use here (multi-token prediction)."""
    if re.search(r"(^|[._])mtp", name):
        return None
    return name.removeprefix("model.") if name.startswith("model.vision_model.") else name


def sources(name: str, spec: TensorSpec, config: ErnieConfig, naming: Naming) -> tuple[Source, ...]:
    """The stored tensors (normalised names) that make up canonical tensor ``name``; together they cover it once."""
    if naming is Naming.HF:
        return (Source(name=name, shape=spec.shape),)
    if name.startswith(TOWER):
        return (Source(name="vision_model." + name.removeprefix(TOWER), shape=spec.shape),)
    if name.startswith(RESAMPLER):
        return (Source(name=_baidu_resampler(name), shape=spec.shape),)
    found = re.fullmatch(r"model\.language_model\.(layers\.\d+\.mlp\.)(text|vision)_moe\.(.+)", name)
    if found is None:
        stored = "model." + name.removeprefix(LANGUAGE) if name.startswith(LANGUAGE) else name
        return (Source(name=stored, shape=spec.shape),)
    prefix, bank, rest = "model." + found[1], 0 if found[2] == "text" else 1, found[3]
    if rest == "gate.weight":
        suffix = "gate.weight" if bank == 0 else "gate.weight_1"
        return (Source(name=prefix + suffix, shape=spec.shape[::-1], transpose=True),)
    experts = config.text.moe_num_experts
    if rest == CORRECTION_BIAS:
        return (Source(name=prefix + "moe_statics.e_score_correction_bias", shape=(2, experts), row=bank),)
    return tuple(_baidu_experts(prefix, rest, spec.shape, first=bank * experts))


def _baidu_experts(prefix: str, rest: str, shape: tuple[int, ...], *, first: int) -> Iterator[Source]:
    """Expert ids count text experts first, then vision experts."""
    for e in range(shape[0]):
        expert = f"{prefix}experts.{first + e}."
        if rest == "experts.down_proj":
            yield Source(name=expert + "down_proj.weight", shape=shape[1:], target=(e,))
        else:
            F = shape[1] // 2
            yield Source(name=expert + "gate_proj.weight", shape=(F, shape[2]), target=(e, slice(0, F)))
            yield Source(name=expert + "up_proj.weight", shape=(F, shape[2]), target=(e, slice(F, 2 * F)))


def _baidu_resampler(name: str) -> str:
    for canonical, original in (("fc1", "0"), ("fc2", "2"), ("ln", "3")):
        name = name.replace(f"_linear.{canonical}.", f"_linear.{original}.")
    return name


def _bank(prefix: str, text: TextConfig, width: int, group: Group) -> Iterator[tuple[str, TensorSpec]]:
    E, D = text.moe_num_experts, text.hidden_size
    yield prefix + "gate.weight", TensorSpec(shape=(E, D), keep_fp32=True, group=group)
    yield prefix + CORRECTION_BIAS, TensorSpec(shape=(1, E), keep_fp32=True, group=group)
    yield prefix + "experts.gate_up_proj", TensorSpec(shape=(E, 2 * width, D), group=group)
    yield prefix + "experts.down_proj", TensorSpec(shape=(E, D, width), group=group)


def _gated_mlp(prefix: str, hidden: int, width: int, bias: bool) -> Iterator[tuple[str, TensorSpec]]:
    yield from _projection(prefix + "gate_proj", width, hidden, bias)
    yield from _projection(prefix + "up_proj", width, hidden, bias)
    yield from _projection(prefix + "down_proj", hidden, width, bias)


def _projection(prefix: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, TensorSpec]]:
    for name, shape in _linear(prefix, rows, columns).items():
        if bias or not name.endswith(".bias"):
            yield name, TensorSpec(shape=shape)


def _linear(prefix: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {prefix + ".weight": (rows, columns), prefix + ".bias": (rows,)}


def _affine(prefix: str, size: int) -> dict[str, tuple[int, ...]]:
    return {prefix + ".weight": (size,), prefix + ".bias": (size,)}
