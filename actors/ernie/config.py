"""Model configuration: what config.json says, checked, in one shape for both of its dialects.

Two dialects are read: the one transformers writes (``text_config`` and ``vision_config``) and Baidu's flat original.
Keys that change the mathematics in a way not built here are refused by name and value; keys that do not (initialiser
ranges, auxiliary losses, ...) are ignored. The naming of the weights is independent of the dialect of config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from actors.ernie import config_keys as keys
from actors.model_files import processor_section, read_json
from actors.tokenization.files import spelled_media_tokens

DENSE: Literal["dense"] = "dense"
SPARSE: Literal["sparse"] = "sparse"
LayerType = Literal["dense", "sparse"]

ArrayT = TypeVar("ArrayT")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The language model. Every field has the meaning of the key of that name in transformers' text_config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Of dense layers."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    """Rotary frequencies per axis in the order (h, w, t): h and w alternate first, t has the lowest ones."""
    max_position_embeddings: int
    mlp_layer_types: tuple[LayerType, ...]
    moe_intermediate_size: tuple[int, int]
    """Width of one expert: (text, vision)."""
    moe_k: int
    moe_num_experts: int
    """In each of the two banks."""
    moe_num_shared_experts: int
    """Fused into one MLP of this many text expert widths; 0 is none."""
    moe_norm_min: float
    use_bias: bool
    """Of attention, dense and shared MLPs; published models have none."""
    tie_word_embeddings: bool

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def shared_intermediate_size(self) -> int:
        return self.moe_intermediate_size[0] * self.moe_num_shared_experts

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.mlp_layer_types) if kind == SPARSE)

    def __post_init__(self) -> None:
        if len(self.mlp_layer_types) != self.num_hidden_layers:
            count = len(self.mlp_layer_types)
            raise ValueError(f"mlp_layer_types has {count} entries for num_hidden_layers = {self.num_hidden_layers}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads} does not divide "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd; rotary embedding needs pairs")
        h, w, t = self.mrope_section
        if h != w or h < 0 or t < 0 or h + w + t != self.head_dim // 2:
            raise ValueError(
                f"mrope_section = {list(self.mrope_section)}: need equal h and w and a sum of "
                f"head_dim / 2 = {self.head_dim // 2}"
            )
        if self.sparse_layers and not 1 <= self.moe_k <= self.moe_num_experts:
            raise ValueError(f"moe_k = {self.moe_k} is not in 1..moe_num_experts = {self.moe_num_experts}")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The vision tower and the resampler, complete: an encoder builds from this alone."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    output_size: int
    """The language model's hidden size."""
    patch_size: int = 14
    in_channels: int = 3
    spatial_merge_size: int = 2
    temporal_merge_size: int = 2
    layer_norm_eps: float = 1e-6
    """Of every LayerNorm in tower and resampler."""
    rms_norm_eps: float = 1e-5
    """Of the resampler's last norm: the language model's."""
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Values in one flattened patch."""
        return self.in_channels * self.patch_size**2

    @property
    def spatial_size(self) -> int:
        """Features of one merged 2 x 2 square of patches."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def temporal_size(self) -> int:
        """Features of one frame pair."""
        return self.spatial_size * self.temporal_merge_size

    def __post_init__(self) -> None:
        expected = {"patch_size": 14, "in_channels": 3, "spatial_merge_size": 2, "temporal_merge_size": 2}
        for key, value in expected.items():
            if getattr(self, key) != value:
                raise ValueError(f"vision_config.{key} = {getattr(self, key)} is not supported; only {value}")
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"vision_config.num_heads = {self.num_heads} must split hidden_size = {self.hidden_size} "
                "into heads of a multiple of 4"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ErnieConfig:
    """A whole model. All media tokens have ids from ``im_patch_id`` up; ids that may be generated lie below it."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    image_start_token_id: int
    image_end_token_id: int
    video_start_token_id: int
    video_end_token_id: int
    eos_token_ids: tuple[int, ...]
    """From generation_config.json, else config.json; empty when neither names one (then only bounds end a text)."""

    @property
    def im_patch_id(self) -> int:
        return self.image_token_id

    @property
    def delimiter_ids(self) -> tuple[int, int, int, int]:
        return (
            self.image_start_token_id,
            self.image_end_token_id,
            self.video_start_token_id,
            self.video_end_token_id,
        )

    def __post_init__(self) -> None:
        for key in (
            "image_token_id",
            "video_token_id",
            "image_start_token_id",
            "image_end_token_id",
            "video_start_token_id",
            "video_end_token_id",
        ):
            value = getattr(self, key)
            if not self.im_patch_id <= value < self.text.vocab_size:
                raise ValueError(
                    f"{key} = {value} must lie between image_token_id = {self.im_patch_id} "
                    f"and vocab_size = {self.text.vocab_size}"
                )
        check_special_ids(self, {f"eos_token_id[{i}]": token for i, token in enumerate(self.eos_token_ids)})

    @classmethod
    def from_dir(cls, path: str | Path) -> ErnieConfig:
        """Read config.json (and generation_config.json for the end tokens) of a model directory.

        Raises ValueError naming file, key and value for anything missing, malformed or not supported.
        """
        directory = Path(path)
        raw = read_json(directory / "config.json")
        generation_path = directory / "generation_config.json"
        generation = read_json(generation_path) if generation_path.is_file() else {}
        try:
            return cls.from_dict(raw, generation, spelled_media_tokens(directory, raw))
        except ValueError as error:
            raise ValueError(f"{directory / 'config.json'}: {error}") from None

    @classmethod
    def from_dict(
        cls,
        raw: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        spelled: Mapping[str, int] | None = None,
    ) -> ErnieConfig:
        """Build from parsed config.json and generation_config.json, and the tokenizer's ids of media tokens.

        Raises ValueError as ``from_dir``.
        """
        fields = keys.read_config(raw, spelled)
        text = TextConfig(**fields.text)
        vision = VisionConfig(**fields.vision, output_size=text.hidden_size, rms_norm_eps=text.rms_norm_eps)
        eos = keys.eos_token_ids(raw, generation or {})
        return cls(text=text, vision=vision, eos_token_ids=eos, **fields.tokens)


def check_special_ids(config: ErnieConfig, ids: Mapping[str, int]) -> None:
    """Refuse tokens that a model must be able to generate but that lie among the media ids, which are masked out.

    ``ids`` maps a name for messages (``"eos"``, ``"</think>"``) to the id. Raises ValueError naming all offenders.
    """
    limit = min(config.im_patch_id, config.text.vocab_size)
    wrong = [f"{name} = {token}" for name, token in ids.items() if not 0 <= token < limit]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: not in 0..{limit - 1}; ids from im_patch_id = {config.im_patch_id} up "
            "are media tokens and can never be generated"
        )


def pixel_normalisation(path: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel of pixels in 0..1, from the processor configs of a model directory.

    Absent keys mean the values of transformers' processor classes; without a video processor (the original has one for
    both) pictures decide. Raises ValueError if both are normalised differently, or not from 8-bit values.
    """
    directory = Path(path)
    found: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
    for kind in ("image", "video"):
        origin, raw = processor_section(directory, kind)
        if raw is None and found:
            continue
        try:
            found.append(keys.normalisation(raw or {}))
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
    image, video = found[0], found[-1]
    if image != video:
        raise ValueError(f"{path}: pictures and videos are normalised differently: {image} and {video}")
    return image


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """Where the trained model and transformers' port differ. Defaults follow the original.

    ``routing``: which prompt tokens go to the vision experts. "all_special" = every id >= im_patch_id (the trainer's
    rule), "delimiters" = placeholders and image / video START and END. Generated tokens are text under both.
    ``positions``: how far a medium advances the position counter. "original" = max(frames, height, width) of its token
    grid, "transformers" = max(height, width).
    """

    routing: Literal["all_special", "delimiters"] = "all_special"
    positions: Literal["original", "transformers"] = "original"

    @classmethod
    def original(cls) -> Rules:
        return cls()

    @classmethod
    def transformers(cls) -> Rules:
        return cls(routing="delimiters", positions="transformers")

    @property
    def switches(self) -> str:
        """One string for block hashes and for pairing engines."""
        return f"routing={self.routing},positions={self.positions}"

    def vision_tokens(self, ids: ArrayT, config: ErnieConfig) -> ArrayT:
        """Boolean mask, of the kind and shape of ``ids`` (numpy or torch integers): True routes to vision experts."""
        array: Any = ids
        if self.routing == "all_special":
            return array >= config.im_patch_id  # type: ignore[no-any-return]
        mask = (array == config.image_token_id) | (array == config.video_token_id)
        for token in config.delimiter_ids:
            mask = mask | (array == token)
        return mask  # type: ignore[no-any-return]
