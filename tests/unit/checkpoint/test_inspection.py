from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors.checkpoint.inspection import inspect
from cluster.cli import app
from tests.hollow_checkpoint import hollow_checkpoint
from tests.sentencepiece_made import original_checkpoint
from tests.tiny_model import tiny_checkpoint

PUBLISHED = {
    "embedding": 264_765_440,
    "attention": 440_401_920,
    "dense layers": 94_371_840,
    "text experts": 20_384_317_440,
    "vision experts": 6_794_772_480,
    "shared experts": 637_009_920,
    "routers": 8_850_816,
    "norms": 145_920,
    "vision tower": 630_433_280,
    "resampler": 144_225_280,
}
"""Parameters of the published model by part, counted by hand."""


@pytest.mark.parametrize("naming", ["hf", "baidu"])
def test_the_published_sizes(naming: str, tmp_path: Path) -> None:
    found = inspect(hollow_checkpoint(tmp_path / "hollow", naming))  # type: ignore[arg-type]
    assert found.weights is not None and found.weights.names == naming
    assert found.weights.tensors == (872 if naming == "hf" else 11_105)
    parts = {part.name: part for part in found.weights.parts}
    assert {name: part.parameters for name, part in parts.items()} == PUBLISHED
    assert all(part.bytes == (4 if name == "routers" else 2) * part.parameters for name, part in parts.items())
    assert found.weights.dtypes == {
        "BF16": 2 * (sum(PUBLISHED.values()) - PUBLISHED["routers"]),
        "F32": 4 * PUBLISHED["routers"],
    }
    sizes = [(size.ranks, f"{size.prefill / 1e9:.1f}", f"{size.decode / 1e9:.1f}") for size in found.ranks]
    assert sizes == [(1, "57.3", "43.7"), (2, "30.1", "23.3"), (4, "16.5", "13.1"), (8, "9.7", "8.0")]
    assert found.encoder_bytes == 2 * (PUBLISHED["vision tower"] + PUBLISHED["resampler"])
    # The tokenizer is not of that size: told, and the rest all the same.
    assert len(found.problems) == 1 and "is not a token of its own" in found.problems[0]
    assert found.text is None and found.media is not None and found.media.image_tokens == (4, 6177)


def test_a_repository_of_the_original(tmp_path: Path) -> None:
    found = inspect(original_checkpoint(tmp_path / "original", style="thinking"))
    assert not found.problems and found.config == "Baidu"
    assert found.weights is not None and found.weights.names == "baidu"
    assert found.text is not None
    assert (found.text.tokenizer, found.text.file, found.text.style) == (
        "SentencePiece BPE",
        "tokenizer.model",
        "-Thinking",
    )
    assert found.text.special_ids["<|IMAGE_PLACEHOLDER|>"] == 1007 and found.text.special_ids["</s>"] == 2
    assert "tools" in found.text.template_takes


def test_without_a_template_the_name_of_the_directory_decides(tmp_path: Path) -> None:
    for name, style in (("ERNIE-4.5-VL-28B-A3B-Thinking", "-Thinking"), ("ERNIE-4.5-VL-28B-A3B-PT", "-PT")):
        plain = Path(shutil.copytree(tiny_checkpoint(), tmp_path / name))
        cached = tmp_path / f"models--baidu--{name}" / "snapshots" / ("1" * 40)
        shutil.copytree(tiny_checkpoint(), cached)
        for directory in (plain, cached):
            (directory / "chat_template.jinja").unlink()
            found = inspect(directory)
            assert found.text is not None and found.text.style == style, directory


def test_problems_are_told_and_the_rest_as_well(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "broken"))
    (directory / "model.safetensors").write_bytes(b"short")
    (directory / "preprocessor_config.json").write_text('{"patch_size": 16}')
    result = CliRunner().invoke(app, ["checkpoint", "inspect", str(directory)])
    assert result.exit_code == 1
    problems = [line for line in result.output.splitlines() if line.startswith("problem ")]
    assert len(problems) == 2 and "model.safetensors" in problems[0] and "patch_size" in problems[1]
    assert "config      of transformers, 4 layers" in result.output and "each rank holds" in result.output
    (directory / "config.json").unlink()
    assert inspect(directory).problems


def test_as_text_and_as_json() -> None:
    directory = str(tiny_checkpoint())
    result = CliRunner().invoke(app, ["checkpoint", "inspect", directory])
    assert result.exit_code == 0 and result.output.endswith("nothing is wrong with it\n")
    result = CliRunner().invoke(app, ["checkpoint", "inspect", directory, "--json"])
    found = json.loads(result.output)
    assert result.exit_code == 0 and found["problems"] == [] and found["weights"]["names"] == "hf"
    assert len(found["weights"]["language_fingerprint"]) == 64
    assert CliRunner().invoke(app, ["checkpoint", "inspect", "/nowhere"]).exit_code == 1
