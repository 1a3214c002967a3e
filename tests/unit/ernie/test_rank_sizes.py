"""What a rank of a group holds and reads of the 28B model: meta tensors, and files of headers and holes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from actors.checkpoint.presets import build_documents
from actors.ernie.bank import vision_bank_bytes
from actors.ernie.config import ErnieConfig
from actors.ernie.text import LanguageModel
from actors.ernie.weights import Checkpoint
from actors.parallel.layout import ExpertShare, even_placement
from tests.hollow_checkpoint import hollow_checkpoint

README = Path(__file__).parents[3] / "README.md"
EXPERT_BYTES = (3 * 1536 * 2560 * 2, 3 * 512 * 2560 * 2)
"""Gate, up and down of a text and of a vision expert in bfloat16."""


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
    return hollow_checkpoint(tmp_path_factory.mktemp("hollow") / request.param, request.param)


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
