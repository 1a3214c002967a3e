"""The two dialects of config.json, read into keyword arguments of the dataclasses in ``config``.

transformers': ``model_type`` "ernie4_5_vl_moe", ``text_config`` and ``vision_config``, token ids at the top.
Baidu's: ``model_type`` "ernie4_5_moe_vl", text keys at the top, pairs [text, vision] for expert settings.
Defaults are those of the class that wrote the file, because both writers may leave defaults out. Older and second names
that transformers still reads (``rope_theta`` beside ``rope_scaling``, ``num_experts_per_tok``) mean here what they mean
there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.model_files import BAIDU_MODEL_TYPE, HF_MODEL_TYPE, media_token_ids

DEFAULT_MROPE = (22, 22, 20)
DEFAULT_MEAN = (0.48145466, 0.4578275, 0.40821073)
DEFAULT_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """Checked keyword arguments for TextConfig, VisionConfig (without the text's share) and ErnieConfig's ids."""

    text: dict[str, Any]
    vision: dict[str, Any]
    tokens: dict[str, int]


def read_config(raw: Mapping[str, Any], spelled: Mapping[str, int] | None = None) -> Fields:
    """Tell the dialect by ``model_type`` and read it; ``spelled`` as in ``media_token_ids``.

    Raises ValueError naming key and value.
    """
    if raw.get("quantization_config") is not None:
        raise ValueError(f"quantization_config = {raw['quantization_config']!r} is not supported")
    model_type = raw.get("model_type")
    if model_type == HF_MODEL_TYPE:
        return _read_hf(raw)
    if model_type == BAIDU_MODEL_TYPE:
        return _read_baidu(raw, spelled)
    raise ValueError(f"model_type = {model_type!r} is not supported; known: {HF_MODEL_TYPE}, {BAIDU_MODEL_TYPE}")


def eos_token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """End tokens: generation_config.json wins, then config.json, then its text_config."""
    text = raw.get("text_config")
    for source in (generation, raw, text if isinstance(text, Mapping) else {}):
        value = source.get("eos_token_id")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not all(_is_int(v) for v in values):
            raise ValueError(f"eos_token_id = {value!r} is not an integer or a list of integers")
        return tuple(dict.fromkeys(values))
    return ()


def normalisation(raw: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of a processor config. Raises ValueError naming key and value."""
    section = _Section(raw)
    section.only("do_rescale", True)
    section.only("do_normalize", True)
    factor = section.number("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise section.wrong("rescale_factor", factor, "1/255")
    return section.channels("image_mean", DEFAULT_MEAN), section.channels("image_std", DEFAULT_STD)


class _Section:
    """Typed access to one JSON object; ``prefix`` makes the key in messages what the file says."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        self.raw = raw
        self.prefix = prefix

    def value(self, key: str, default: Any) -> Any:
        found = self.raw.get(key)
        found = default if found is None else found
        if found is None:
            raise ValueError(f"{self.prefix}{key} is missing")
        return found

    def wrong(self, key: str, value: object, need: str) -> ValueError:
        return ValueError(f"{self.prefix}{key} = {value!r} is not supported; need {need}")

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.value(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not _is_int(value) or value < least:
            raise self.wrong(key, value, f"an integer of at least {least}")
        return int(value)

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 or (zero and value == 0)):
            raise self.wrong(key, value, f"a positive number{' or 0' if zero else ''}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def pair(self, key: str, default: tuple[int, int] | None = None) -> tuple[int, int]:
        value = self.value(key, default)
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(_is_int(v) and v > 0 for v in value):
            raise self.wrong(key, value, "two positive integers [text, vision]")
        return int(value[0]), int(value[1])

    def channels(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        value = self.value(key, list(default))
        if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, int | float) for v in value):
            raise self.wrong(key, value, "three numbers")
        return tuple(float(v) for v in value)

    def section(self, key: str) -> _Section:
        value = self.raw.get(key)
        if not isinstance(value, Mapping):
            raise self.wrong(key, value, "an object")
        return _Section(value, f"{self.prefix}{key}.")

    def optional(self, key: str) -> _Section:
        return _Section({}, f"{self.prefix}{key}.") if self.raw.get(key) is None else self.section(key)

    def only(self, key: str, *allowed: Any) -> None:
        """A key that may be absent, but if given must be one of ``allowed``."""
        value = self.raw.get(key)
        if value is not None and value not in allowed:
            raise self.wrong(key, value, " or ".join(repr(a) for a in allowed))

    def mrope(self, key: str = "mrope_section") -> tuple[int, int, int]:
        value = self.value(key, DEFAULT_MROPE)
        if not isinstance(value, list | tuple) or len(value) != 3 or not all(_is_int(v) for v in value):
            raise self.wrong(key, value, "three integers [h, w, t]")
        return int(value[0]), int(value[1]), int(value[2])


def _read_hf(raw: Mapping[str, Any]) -> Fields:
    top = _Section(raw)
    text = _with_second_names(top.section("text_config"), _SECOND_NAMES_TEXT)
    vision = _with_second_names(top.section("vision_config"), _SECOND_NAMES_VISION)
    text.only("model_type", "ernie4_5_vl_moe_text")
    vision.only("model_type", "ernie4_5_vl_moe_vision")
    text.only("hidden_act", "silu")
    vision.only("hidden_act", "quick_gelu")
    for section in (text, vision):
        section.only("quantization_config")
    rope = _rope(text)
    rope.only("rope_type", "default")
    vision_rope = _rope(vision)
    vision_rope.only("rope_type", "axial", "default")
    layers = text.integer("num_hidden_layers", 28)
    fields = _text_sizes(text, layers)
    fields |= {
        "rope_theta": rope.number("rope_theta", 500000.0),
        "mrope_section": rope.mrope(),
        "mlp_layer_types": _layer_types(text, layers),
        "moe_num_experts": text.integer("moe_num_experts", 64),
        "moe_intermediate_size": text.pair("moe_intermediate_size", (1536, 512)),
        # transformers ties by the outer key and writes it always; the inner one only matters to the bare text model
        "tie_word_embeddings": top.flag("tie_word_embeddings", True),
    }
    hidden = vision.integer("hidden_size", 1280)
    tower = _tower(vision, hidden) | {
        "intermediate_size": vision.integer("intermediate_size", 5120),
        "temporal_merge_size": vision.integer("temporal_merge_size", 2),
        "layer_norm_eps": vision.number("rms_norm_eps", 1e-6),
        "rope_theta": vision_rope.number("rope_theta", 10000.0),
    }
    return Fields(text=fields, vision=tower, tokens=media_token_ids(raw))


_SECOND_NAMES_TEXT = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
_SECOND_NAMES_VISION = {"num_hidden_layers": "depth", "num_attention_heads": "num_heads"}


def _with_second_names(section: _Section, names: Mapping[str, str]) -> _Section:
    """``names`` (second name -> key) as transformers' attribute_map has them; a second name wins over the key."""
    given = {key: section.raw[second] for second, key in names.items() if section.raw.get(second) is not None}
    return _Section({**section.raw, **given}, section.prefix)


def _rope(section: _Section) -> _Section:
    """Rotary settings of either age: ``rope_scaling`` wins over ``rope_parameters``, and what neither says may stand
    beside it (``rope_theta``) or under its older name (``type``)."""
    key = "rope_scaling" if section.raw.get("rope_scaling") else "rope_parameters"
    rope = section.optional(key)
    older = {"rope_theta": section.raw.get("rope_theta"), "rope_type": rope.raw.get("type")}
    return _Section({**older, **rope.raw}, rope.prefix)


def _read_baidu(raw: Mapping[str, Any], spelled: Mapping[str, int] | None) -> Fields:
    top = _Section(raw)
    vision = top.section("vision_config")
    top.only("hidden_act", "silu")
    vision.only("hidden_act", "quick_gelu")
    for key, allowed in _BAIDU_ONLY.items():
        top.only(key, *allowed)
    scaling = top.optional("rope_scaling")
    scaling.only("type", "default")
    scaling.only("rope_type", "default")
    section = scaling.mrope()
    if (frequencies := raw.get("freq_allocation")) is not None and frequencies != section[2]:
        raise top.wrong("freq_allocation", frequencies, f"the t share of mrope_section, {section[2]}")
    layers = top.integer("num_hidden_layers")
    experts = top.pair("moe_num_experts")
    if experts[0] != experts[1]:
        raise top.wrong("moe_num_experts", list(experts), "two equal counts")
    fields = _text_sizes(top, layers)
    fields |= {
        "rope_theta": top.number("rope_theta"),
        "mrope_section": section,
        "mlp_layer_types": _baidu_layer_types(top, layers),
        "moe_num_experts": experts[0],
        "moe_intermediate_size": top.pair("moe_intermediate_size"),
        "moe_num_shared_experts": top.integer("moe_num_shared_experts", 0, least=0),
        "tie_word_embeddings": top.flag("tie_word_embeddings", True),
    }
    hidden = vision.integer("hidden_size")
    ratio = vision.number("mlp_ratio", 4.0)
    tower = _tower(vision, hidden) | {
        "intermediate_size": int(hidden * ratio),
        "temporal_merge_size": top.integer("temporal_conv_size", 2),
    }
    return Fields(text=fields, vision=tower, tokens=media_token_ids(raw, spelled))


_BAIDU_ONLY: dict[str, tuple[Any, ...]] = {
    "use_rmsnorm": (True,),
    "rope_3d": (True,),
    "compression_ratio": (1, 1.0),
    "moe_layer_interval": (1,),
    "moe_gate_act": ("softmax",),
    "moe_use_aux_free": (True,),
    "spatial_conv_size": (2,),
}


def _text_sizes(section: _Section, layers: int) -> dict[str, Any]:
    """Keys that both dialects share; the defaults are transformers'."""
    hidden = section.integer("hidden_size", 2560)
    heads = section.integer("num_attention_heads", 20)
    if section.raw.get("head_dim") is None and hidden % heads:
        raise section.wrong("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}")
    return {
        "vocab_size": section.integer("vocab_size", 103424),
        "hidden_size": hidden,
        "intermediate_size": section.integer("intermediate_size", 12288),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": section.integer("num_key_value_heads", 4),
        "head_dim": section.integer("head_dim", hidden // heads),
        "rms_norm_eps": section.number("rms_norm_eps", 1e-5),
        "max_position_embeddings": section.integer("max_position_embeddings", 131072),
        "moe_k": section.integer("moe_k", 6),
        "moe_num_shared_experts": section.integer("moe_num_shared_experts", 2, least=0),
        "moe_norm_min": section.number("moe_norm_min", 1e-12, zero=True),
        "use_bias": section.flag("use_bias", False),
    }


def _tower(section: _Section, hidden: int) -> dict[str, Any]:
    patch = section.value("patch_size", 14)
    if isinstance(patch, list) and len(set(patch)) == 1:
        patch = patch[0]
    return {
        "depth": section.integer("depth", 32),
        "hidden_size": hidden,
        "num_heads": section.integer("num_heads", 16),
        "patch_size": _Section({"patch_size": patch}, section.prefix).integer("patch_size"),
        "in_channels": section.integer("in_channels", 3),
        "spatial_merge_size": section.integer("spatial_merge_size", 2),
    }


def _layer_types(text: _Section, layers: int) -> tuple[str, ...]:
    value = text.value("mlp_layer_types", ["dense"] + ["sparse"] * (layers - 1))
    if not isinstance(value, list) or any(kind not in ("dense", "sparse") for kind in value):
        raise text.wrong("mlp_layer_types", value, 'a list of "dense" and "sparse"')
    return tuple(value)


def _baidu_layer_types(top: _Section, layers: int) -> tuple[str, ...]:
    """Layers start..end (inclusive) are sparse; the end may lie past the last layer."""
    start = _index_pair(top, "moe_layer_start_index", 0)
    end = [min(e, layers - 1) if e >= 0 else layers - 1 for e in _index_pair(top, "moe_layer_end_index", -1)]
    if start[0] != start[1]:
        raise top.wrong("moe_layer_start_index", start, "the same first layer for text and vision experts")
    if end[0] != end[1]:
        raise top.wrong("moe_layer_end_index", end, "the same last layer for text and vision experts")
    return tuple("sparse" if start[0] <= i <= end[0] else "dense" for i in range(layers))


def _index_pair(top: _Section, key: str, default: int) -> list[int]:
    value = top.value(key, default)
    values = [value, value] if _is_int(value) else value
    if not isinstance(values, list) or len(values) != 2 or not all(_is_int(v) for v in values):
        raise top.wrong(key, value, "an integer or a pair of integers")
    return values


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
