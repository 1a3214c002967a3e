"""A checkpoint of the real size that takes no room: true headers, and nothing written behind them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Literal

import torch

from actors.checkpoint.presets import build_documents
from actors.checkpoint.writer import write_json, write_neighbours, write_random_checkpoint
from tests.tiny_model import tiny_checkpoint

SHARDS = 12


def hollow_checkpoint(directory: Path, naming: Literal["hf", "baidu"]) -> Path:
    """58.8 GB in bfloat16 that read as zeros; the tokenizer is that of a tiny checkpoint."""
    directory.mkdir(parents=True)
    summary = write_random_checkpoint(directory / "none", "28b", dtype="bfloat16", naming=naming, write=False)
    documents = build_documents("28b", None, dtype="bfloat16")
    with (tiny_checkpoint() / "tokenizer.json").open() as file:
        write_neighbours(directory, documents, json.load(file), "pt")
    write_json(directory / "config.json", summary.config)
    weight_map: dict[str, str] = {}
    names = list(summary.tensors)
    for shard in range(SHARDS):
        path = directory / f"model-{shard:05}-of-{SHARDS:05}.safetensors"
        header, end = {}, 0
        for name in names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]:
            tensor = summary.tensors[name]
            kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
            header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
            weight_map[name] = path.name
            end += tensor.nbytes
        text = json.dumps(header).encode()
        with path.open("wb") as written:
            written.write(struct.pack("<Q", len(text)) + text)
            written.truncate(8 + len(text) + end)
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    return directory
