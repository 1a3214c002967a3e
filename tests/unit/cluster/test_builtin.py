"""Models asked for by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import actors.checkpoint
from actors.checkpoint import nano_directory
from actors.ernie.weights import Checkpoint
from cluster.builtin import locate, random_directory
from cluster.config import ClusterConfig


def test_a_name_becomes_a_directory_that_clients_know_by_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, directory in (("nano", nano_directory()), ("random", random_directory())):
        located = locate(ClusterConfig(model=name))
        assert (located.model, located.model_name) == (str(directory), name)
        assert locate(ClusterConfig(model=name, served_model_name="mine")).model_name == "mine"


def test_a_directory_stays_as_it_is() -> None:
    config = ClusterConfig(model="/models/nano")
    assert locate(config) == config


def test_nano_is_a_whole_checkpoint_of_under_ten_megabytes() -> None:
    directory = nano_directory()
    assert sum(path.stat().st_size for path in directory.iterdir()) < 10_000_000
    with Checkpoint(directory) as checkpoint:
        assert checkpoint.config.text.max_position_embeddings == 8192


def test_an_installation_without_the_weights_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nano").mkdir()
    for file in nano_directory().iterdir():
        if file.name != "model.safetensors":
            (tmp_path / "nano" / file.name).symlink_to(file)
    monkeypatch.setattr(actors.checkpoint, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ValueError, match=r"^model: nano is not installed whole: .* lacks model\.safetensors$"):
        locate(ClusterConfig())


def test_the_random_checkpoint_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = random_directory()
    written = (directory / "config.json").stat().st_mtime_ns
    assert random_directory() == directory
    assert (directory / "config.json").stat().st_mtime_ns == written


def test_built_in_models_have_no_revisions() -> None:
    with pytest.raises(ValueError, match=r"^revision: nano is built in"):
        locate(ClusterConfig(revision="main"))
