"""What a model directory holds, told from its JSON files and the headers of its weights.

Nothing is refused here: what cannot be read or served becomes a problem in the report, and the rest is told anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from actors.ernie.bank import vision_bank_bytes
from actors.ernie.config import ErnieConfig
from actors.ernie.files import StoredTensor, stored_tensors
from actors.ernie.names import EMBEDDING, LM_HEAD, RESAMPLER, TOWER
from actors.ernie.text import LanguageModel
from actors.ernie.vision import VisionModel
from actors.ernie.vocabulary import GENERATED_TOKENS
from actors.ernie.weights import Checkpoint
from actors.model_files import HF_MODEL_TYPE, read_json
from actors.parallel.layout import ExpertShare, even_placement
from actors.processing.config import RESIZE_FACTOR, load_image_config, load_video_config
from actors.processing.processor import Processor
from actors.processing.template import opens_thinking
from actors.tokenization.files import load_tokenizer
from actors.types import ThinkingMode

RANK_COUNTS = (1, 2, 4, 8)
SERVED_DTYPE = torch.bfloat16

_PARTS = (
    ("embedding", EMBEDDING),
    ("language head", LM_HEAD),
    ("vision tower", TOWER),
    ("resampler", RESAMPLER),
    ("attention", ".self_attn."),
    ("shared experts", ".shared_experts."),
    ("text experts", ".text_moe.experts."),
    ("vision experts", ".vision_moe.experts."),
    ("routers", "_moe.gate."),
    ("dense layers", ".mlp."),
)
"""Parts of a model by what the canonical names of their tensors contain, the first that fits; norms are the rest."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Tensors of one kind, as they lie in the files."""

    name: str
    parameters: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBytes:
    """What each rank of an engine group holds of the weights in bfloat16."""

    ranks: int
    prefill: int
    decode: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The tensors of a checkpoint that is whole."""

    names: str
    """``hf`` or ``baidu``: whose names the files use."""
    tensors: int
    files: int
    dtypes: dict[str, int]
    """Bytes by stored dtype."""
    parts: tuple[Part, ...]
    language_fingerprint: str
    vision_fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """The tokenizer, and the chat template that would be used."""

    tokenizer: str
    file: str
    tokens: int
    special_ids: dict[str, int]
    template: str
    style: str
    """``-Thinking`` if a conversation opens with thinking unless told otherwise, else ``-PT``."""
    template_takes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Media:
    """Bounds of the processors, in placeholder tokens of one picture, and of one frame pair."""

    image_tokens: tuple[int, int]
    video_tokens: tuple[int, int]
    frames: tuple[int, int]
    frames_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """Everything; what could not be found out is None, and among the problems."""

    directory: str
    config: str | None
    """Whose dialect config.json speaks: ``transformers`` or ``Baidu``."""
    layers: int | None
    context: int | None
    weights: Weights | None
    ranks: tuple[RankBytes, ...]
    encoder_bytes: int | None
    text: Text | None
    media: Media | None
    problems: tuple[str, ...]


def inspect(directory: Path) -> Inspection:
    """Reads no tensor but the few bytes that fingerprints are made of."""
    problems: list[str] = []

    def attempt(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except (ValueError, OSError) as error:
            text = str(error)
            if text not in problems:
                problems.append(text)
            return None

    config = attempt(lambda: ErnieConfig.from_dir(directory))
    dialect = attempt(lambda: _dialect(directory))
    return Inspection(
        directory=str(directory),
        config=dialect,
        layers=None if config is None else config.text.num_hidden_layers,
        context=None if config is None else config.text.max_position_embeddings,
        weights=attempt(lambda: _weights(directory)),
        ranks=() if config is None else _ranks(config),
        encoder_bytes=None if config is None else _encoder_bytes(config),
        text=attempt(lambda: _text(directory)),
        media=attempt(lambda: _media(directory)),
        problems=tuple(problems),
    )


def _dialect(directory: Path) -> str:
    return "transformers" if read_json(directory / "config.json").get("model_type") == HF_MODEL_TYPE else "Baidu"


def _weights(directory: Path) -> Weights:
    with Checkpoint(directory) as checkpoint:
        stored = list(stored_tensors(directory).values())
        return Weights(
            names=str(checkpoint.naming),
            tensors=len(stored),
            files=len({tensor.path for tensor in stored}),
            dtypes=_bytes_by_dtype(stored),
            parts=tuple(_parts(checkpoint)),
            language_fingerprint=checkpoint.fingerprint("language").hex(),
            vision_fingerprint=checkpoint.fingerprint("vision").hex(),
        )


def _bytes_by_dtype(stored: Iterable[StoredTensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor in stored:
        found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.nbytes
    return dict(sorted(found.items()))


def _parts(checkpoint: Checkpoint) -> Iterable[Part]:
    names: dict[str, list[str]] = {}
    for name in checkpoint.specs:
        part = next((part for part, sign in _PARTS if sign in name), "norms")
        names.setdefault(part, []).append(name)
    for part in (*(part for part, _ in _PARTS), "norms"):
        if part in names:
            yield Part(
                name=part,
                parameters=sum(checkpoint.specs[name].numel for name in names[part]),
                bytes=sum(checkpoint.bytes_to_read(names[part]).values()),
            )


def _ranks(config: ErnieConfig) -> tuple[RankBytes, ...]:
    text = config.text
    found = []
    for ranks in RANK_COUNTS:
        if ranks > text.moe_num_experts:
            break
        placement = even_placement(text.num_hidden_layers, text.sparse_layers, text.moe_num_experts, ranks)
        # The first ranks hold the most.
        share = ExpertShare(placement, 0)
        model = LanguageModel(text, dtype=SERVED_DTYPE, device="meta", share=share)
        decode = sum(view.nbytes for view in model.parameters_by_name().values())
        bank = vision_bank_bytes(text, SERVED_DTYPE, share)
        found.append(RankBytes(ranks=ranks, prefill=decode + bank, decode=decode))
    return tuple(found)


def _encoder_bytes(config: ErnieConfig) -> int:
    zeros, ones = (0.0,) * 3, (1.0,) * 3
    model = VisionModel(config.vision, dtype=SERVED_DTYPE, device="meta", image_mean=zeros, image_std=ones)
    return sum(view.nbytes for view in model.parameters_by_name().values())


def _text(directory: Path) -> Text:
    source = load_tokenizer(directory)
    processor = Processor(directory)
    try:
        tokens, template = processor.tokens, processor.template
        ids: dict[str, int] = {}
        for name in GENERATED_TOKENS:
            if (token_id := processor.tokenizer.token_id(name)) is not None:
                ids[name] = token_id
        delimiters = (tokens.image_start, tokens.image_end, tokens.video_start, tokens.video_end)
        media = (tokens.image, tokens.video, *delimiters)
        ids |= {processor.tokenizer.token_text(token_id) or "?": token_id for token_id in media}
        hello: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
        thinks = opens_thinking(template.render(hello, [], ThinkingMode.AUTO))
        support = template.support
        takes = {
            "pictures": "image" in {str(kind) for kind in support.media_types},
            "videos": "video" in {str(kind) for kind in support.media_types},
            "system": support.system,
            "tools": support.tools,
            "tool results": support.tool_messages,
            "thinking switch": bool(support.thinking_switches),
        }
        return Text(
            tokenizer=source.kind,
            file=source.path.name,
            tokens=processor.tokenizer.vocab_size,
            special_ids=ids,
            template=Path(template.origin).name,
            style="-Thinking" if thinks else "-PT",
            template_takes=tuple(name for name, taken in takes.items() if taken),
        )
    finally:
        processor.close()


def _media(directory: Path) -> Media:
    area = RESIZE_FACTOR**2
    image, video = load_image_config(directory), load_video_config(directory)
    return Media(
        image_tokens=(image.min_pixels // area, image.max_pixels // area),
        video_tokens=(video.min_pixels // area, video.max_pixels // area),
        frames=(video.min_frames, video.max_frames),
        frames_per_second=video.frames_per_second,
    )
