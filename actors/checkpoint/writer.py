"""Writes a random checkpoint: a complete model directory of the real format, loadable here and by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from actors.checkpoint.presets import Documents, build_documents
from actors.checkpoint.random_weights import pieces
from actors.checkpoint.safetensors_writer import DTYPES, PlannedTensor, write_sharded
from actors.checkpoint.tokenizer import build_tokenizer, tokenizer_config
from actors.ernie.names import Naming, Source, TensorSpec, sources, tensor_shapes

FONT = "Roboto-Regular.ttf"
CONFIG = "config.json"
STORED_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
SHARD_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSummary:
    """What was (or would be) written. ``tensors`` are on the meta device, by stored name, in the stored dtype."""

    directory: Path | None
    """None when nothing was written."""
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    parameters: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def write_random_checkpoint(
    directory: str | Path,
    preset: str = "tiny",
    *,
    seed: int = 0,
    dtype: str = "float32",
    naming: Literal["hf", "baidu"] = "hf",
    overrides: Mapping[str, Any] | None = None,
    style: Literal["pt", "thinking"] = "pt",
    write: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> CheckpointSummary:
    """Write weights, config, tokenizer, chat template, processor configs and font into a new or empty directory.

    ``preset``: tiny, mid or 28b; ``overrides``: dotted keys (see ``presets``). The same seed gives the same values
    under both namings and, up to rounding, in both dtypes; routers and correction biases are always stored in float32.
    ``style`` is the chat template of -PT or of -Thinking. ``write`` None writes every preset except 28b (58.8 GB in
    bfloat16), of which only the summary is made; config.json comes last, so an interrupted write leaves no model.
    Raises ValueError for a wrong argument or override, FileExistsError for a directory that holds anything.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype = {dtype!r} is not supported; known: {', '.join(STORED_DTYPES)}")
    if style not in ("pt", "thinking"):
        raise ValueError(f"style = {style!r} is not supported; known: pt, thinking")
    if naming not in tuple(Naming):
        raise ValueError(f"naming = {naming!r} is not supported; known: {', '.join(Naming)}")
    documents = build_documents(preset, overrides, dtype=dtype)
    plan = list(_plan(documents, Naming(naming), STORED_DTYPES[dtype], seed))
    if write is None:
        write = preset != "28b"
    root = Path(directory)
    if write:
        _create(root)
        write_neighbours(root, documents, build_tokenizer(documents.layout), style)
        write_sharded(root, plan, shard_bytes)
        write_json(root / CONFIG, documents.config)
    return CheckpointSummary(
        directory=root if write else None,
        config=documents.config,
        tensors={t.name: torch.empty(t.shape, dtype=DTYPES[t.dtype], device="meta") for t in plan},
        parameters=sum(spec.numel for spec in tensor_shapes(documents.model).values()),
    )


def _plan(documents: Documents, naming: Naming, dtype: str, seed: int) -> Iterator[PlannedTensor]:
    """Stored tensors in the order of the model; one stored tensor may hold rows of several canonical ones."""
    stored: dict[str, list[tuple[str, TensorSpec, Source]]] = {}
    for name, spec in tensor_shapes(documents.model).items():
        for source in sources(name, spec, documents.model, naming):
            stored.setdefault(source.name, []).append((name, spec, source))
    for stored_name, parts in stored.items():
        _, spec, source = parts[0]
        yield PlannedTensor(
            name=stored_name,
            dtype="F32" if spec.keep_fp32 else dtype,
            shape=source.shape,
            values=partial(_values, parts, seed),
        )


def _values(parts: list[tuple[str, TensorSpec, Source]], seed: int) -> Iterator[Tensor]:
    for name, spec, source in sorted(parts, key=lambda part: part[2].row or 0):
        yield from pieces(name, spec, source, seed)


def _create(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty")


def write_neighbours(root: Path, documents: Documents, tokenizer: Mapping[str, Any], style: str) -> None:
    """Writes all files of a checkpoint but the weights and config.json."""
    (root / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1), encoding="utf-8")
    max_length = documents.model.text.max_position_embeddings
    write_json(root / "tokenizer_config.json", tokenizer_config(max_length))
    write_json(root / "generation_config.json", documents.generation_config)
    write_json(root / "preprocessor_config.json", documents.preprocessor_config)
    write_json(root / "video_preprocessor_config.json", documents.video_preprocessor_config)
    template = resources.files("actors.processing") / "templates" / f"{style}.jinja"
    (root / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    with resources.as_file(resources.files("actors.processing") / "assets" / FONT) as font:
        shutil.copyfile(font, root / FONT)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
