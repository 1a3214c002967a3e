"""Broken model directories are told before anything starts, by the CLI and by ``serve deploy`` alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.app import build
from cluster.config import ClusterConfig
from cluster.model_check import check_model
from tests.tiny_model import tiny_checkpoint

NORM = "model.language_model.layers.0.post_attention_layernorm.weight"


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[NORM]
    save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


BREAKS: list[tuple[Callable[[Path], object], str]] = [
    (drop_tensor, f"missing (1): {NORM}"),
    (truncate, "is not a whole safetensors file"),
    (lambda folder: (folder / "config.json").unlink(), "is not a checkpoint directory"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "holds neither tokenizer.json nor tokenizer.model"),
    (lambda folder: (folder / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
    (lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"), "chat_template.jinja"),
    (lambda folder: (folder / "generation_config.json").write_text('{"top_p": 3}'), "generation_config.json"),
]


@pytest.mark.parametrize(("damage", "told"), BREAKS)
def test_what_is_broken_is_named(tmp_path: Path, damage: Callable[[Path], object], told: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(), folder)
    damage(folder)
    with pytest.raises(ValueError) as caught:
        check_model(ClusterConfig(model=str(folder)))
    message = str(caught.value)
    assert message.startswith("model: ") and told in message and "\n" not in message


def test_a_whole_checkpoint_passes_and_bounds_the_context() -> None:
    model = str(tiny_checkpoint())
    check_model(ClusterConfig(model=model, max_model_len=64))
    with pytest.raises(ValueError, match=r"^max_model_len: 1000000 is over the \d+ of "):
        check_model(ClusterConfig(model=model, max_model_len=10**6))


def test_serve_deploy_is_told_all_of_it() -> None:
    with pytest.raises(ValueError, match=r"^args: router\.replicas: more than one.*\nargs: modle: "):
        build({"model": "m", "modle": 1, "router": {"replicas": 2}})
    with pytest.raises(ValueError) as caught:
        build({"model": "m", "http_port": 8000, "log_level": "INFO"})
    assert str(caught.value).splitlines() == [
        "args: http_port: set http_options.port instead",
        "args: log_level: set logging_config.log_level instead",
    ]
    with pytest.raises(ValueError, match=r"^model: m is not a checkpoint directory"):
        build({"model": "m"})
