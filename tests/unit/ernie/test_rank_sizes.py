"""What a rank of a group holds and reads of the 28B model: meta tensors, and files of headers and holes."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch

from actors.checkpoint.presets import build_documents
from actors.checkpoint.writer import write_json, write_neighbours, write_random_checkpoint
from actors.ernie.bank import vision_bank_bytes
from actors.ernie.config import ErnieConfig
from actors.ernie.text import LanguageModel
from actors.ernie.weights import Checkpoint
from actors.parallel.layout import ExpertShare, even_placement
from tests.tiny_model import tiny_checkpoint

README = Path(__file__).parents[3] / "README.md"
EXPERT_BYTES = (3 * 1536 * 2560 * 2, 3 * 512 * 2560 * 2)
"""Gate, up and down of a text and of a vision expert in bfloat16."""
SHARDS = 12


@pytest.fixture(scope="module")
def config() -> ErnieConfig:
    return build_documents("28b", None, dtype="bfloat16").model


def share(config: ErnieConfig, ranks: int, rank: int) -> ExpertShare:
    text = config.text
    return ExpertShare(even_placement(text.num_hidden_layers, text.sparse_layers, text.moe_num_experts, ranks), rank)


def held_bytes(config: ErnieConfig, ranks: int, rank: int) -> tuple[int, int]:
    """(with the vision experts, without)."""
    part = share(config, ranks, rank)
    model = LanguageModel(config.text, dtype=torch.bfloat16, device="meta", share=part)
    text = sum(view.nbytes for view in model.parameters_by_name().values())
    return text + vision_bank_bytes(config.text, torch.bfloat16, part), text


def test_every_rank_holds_an_equal_part_of_the_experts_and_all_of_the_rest(config: ErnieConfig) -> None:
    both, text = held_bytes(config, 1, 0)
    for ranks in (1, 2, 4, 8):
        saved = 27 * (64 - 64 // ranks)
        for rank in range(ranks):
            assert held_bytes(config, ranks, rank) == (
                both - saved * sum(EXPERT_BYTES),
                text - saved * EXPERT_BYTES[0],
            )


def test_the_readme_tells_these_sizes(config: ErnieConfig) -> None:
    rows = re.findall(r"^\| (\d) \| ([\d.]+) GB \| ([\d.]+) GB \|$", README.read_text(), re.MULTILINE)
    expected = [(n, *(f"{size / 1e9:.1f}" for size in held_bytes(config, n, n - 1))) for n in (1, 2, 4, 8)]
    assert rows == [(str(n), both, text) for n, both, text in expected]


@pytest.fixture(scope="module", params=["hf", "baidu"])
def hollow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 58.8 GB that takes no room: true headers, and nothing written behind them."""
    directory = tmp_path_factory.mktemp(f"hollow-{request.param}")
    summary = write_random_checkpoint(
        directory / "none", "28b", dtype="bfloat16", naming=request.param, overrides=None, write=False
    )
    documents = build_documents("28b", None, dtype="bfloat16")
    with (tiny_checkpoint() / "tokenizer.json").open() as file:
        write_neighbours(directory, documents, json.load(file), "pt")
    write_json(directory / "config.json", summary.config)
    weight_map: dict[str, str] = {}
    names = list(summary.tensors)
    for shard in range(SHARDS):
        header, end = {}, 0
        for name in names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]:
            tensor = summary.tensors[name]
            kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
            header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
            weight_map[name] = f"model-{shard:05}-of-{SHARDS:05}.safetensors"
            end += tensor.nbytes
        text = json.dumps(header).encode()
        with (directory / weight_map[name]).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    return directory


def test_a_rank_reads_what_it_holds(config: ErnieConfig, hollow: Path) -> None:
    with Checkpoint(hollow) as checkpoint:
        for ranks in (1, 2, 4, 8):
            for rank in {0, ranks - 1}:
                part = share(config, ranks, rank)
                model = LanguageModel(config.text, dtype=torch.bfloat16, device="meta", share=part)
                read = checkpoint.bytes_to_read(model.parameters_by_name(), model.expert_rows())
                both, text = held_bytes(config, ranks, rank)
                assert read == {"language": text, "vision_experts": 0, "vision": 0}
                vision = {name for name, spec in checkpoint.specs.items() if spec.group == "vision_experts"}
                rows = {name: part.vision(1) for name in vision if ".experts." in name}
                assert checkpoint.bytes_to_read(vision, rows)["vision_experts"] == both - text


def test_only_the_wanted_experts_are_read(config: ErnieConfig, hollow: Path) -> None:
    """Two experts of 64, from either end; the rest of the tensor's gigabyte is not touched."""
    name = "model.language_model.layers.5.mlp.text_moe.experts.gate_up_proj"
    with Checkpoint(hollow) as checkpoint:
        shape = checkpoint.specs[name].shape
        target = torch.ones(2, *shape[1:], dtype=torch.bfloat16)
        report = checkpoint.load_into({name: target}, rows={name: (63, 0)})
        assert not target.any(), "holes read as zeros"
        assert report.bytes_read == {"language": target.nbytes, "vision_experts": 0, "vision": 0}
