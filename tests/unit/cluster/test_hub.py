"""Checkpoints by name, from a hub on loopback."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session
from typer.testing import CliRunner

from actors.config import PreprocessorConfig
from cluster.app import _deployed
from cluster.cli import _config, app
from cluster.config import ClusterConfig
from cluster.hub import download, local_directory, locate_checkpoint, repository_name
from cluster.workers.common import with_files
from tests.hub_server import Hub, Repository, hub_server, use_hub
from tests.tiny_model import tiny_checkpoint

NAME = "baidu/ERNIE-4.5-VL-28B-A3B-PT"
said: list[str] = []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    said.clear()
    published = tmp_path / "published"
    shutil.copytree(tiny_checkpoint(shard_bytes=1_000_000), published)
    for extra in ("README.md", "modeling_ernie4_5_vl.py", "pytorch_model.bin", "consolidated.safetensors"):
        (published / extra).write_text("not needed")
    with hub_server(tmp_path / "cache", monkeypatch) as server:
        server.repositories[NAME] = Repository(published)
        yield server


def test_a_name_is_what_is_no_path_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert repository_name(NAME) == NAME
    for path in ("./baidu/X", "/baidu/X", "~/X", "~", "X", "a/b/c", "models/", "../X", "baidu/.X", "baidu/X@main", ""):
        assert repository_name(path) is None, path
    (tmp_path / NAME).mkdir(parents=True)
    assert repository_name(NAME) is None, "the hub's own tool puts it there with --local-dir"


def test_only_what_serving_reads_is_fetched_and_only_once(hub: Hub) -> None:
    found = download(NAME, None, say=said.append)
    assert found.commit == "1" * 40 and found.reference == f"hub:{NAME}@{'1' * 40}"
    files = {file.name for file in tiny_checkpoint(shard_bytes=1_000_000).iterdir()}
    assert sorted(hub.served) == sorted(files), "each once"
    assert len([line for line in said if "files of weights" in line]) == 1
    hub.served.clear()
    assert download(NAME, "1" * 40, say=said.append) == found
    assert not hub.served


def test_a_served_name_is_the_whole_name(hub: Hub) -> None:
    config = _config(None, {"model": NAME}, None)
    assert Path(config.model).is_dir() and config.model_name == NAME
    assert _config(None, {"model": NAME, "served_model_name": "ernie"}, None).model_name == "ernie"


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[NAME].commits["refs/pr/10"] = "2" * 40
    config, found = locate_checkpoint(ClusterConfig(model=NAME, revision="refs/pr/10"), said.append)
    assert found is not None and found.commit == "2" * 40 and config.model.endswith("2" * 40)
    with pytest.raises(ValueError, match=r"^model: .* has no revision 'nope'$"):
        locate_checkpoint(ClusterConfig(model=NAME, revision="nope"), said.append)
    with pytest.raises(ValueError, match=r"^revision: .* is a directory"):
        locate_checkpoint(ClusterConfig(model=str(tmp_path), revision="main"), said.append)


def test_the_paddle_form_of_the_cards_means_the_model_in_pytorchs(hub: Hub) -> None:
    config = _config(None, {"model": NAME.replace("-PT", "-Paddle")}, None)
    assert "1" * 40 in config.model
    download(NAME.replace("-PT", "-Paddle"), None, say=said.append)
    assert "Paddle's format" in said[0] and said[0].endswith(NAME)


def test_other_models_are_refused_before_their_weights_come(hub: Hub) -> None:
    (hub.repositories[NAME].directory / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"cannot be served: .*model_type = 'llama' is not supported"):
        download(NAME, None, say=said.append)
    assert not any(file.endswith(".safetensors") for file in hub.served)


def test_what_a_hub_refuses_is_one_line(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^baidu/Unknown is no directory here, and {hub.url} has no such model"):
        download("baidu/Unknown", None, say=said.append)
    hub.repositories[NAME].gated = True
    with pytest.raises(
        ValueError, match=r"it is gated: accept its terms at .*/baidu/ERNIE.* and set HF_TOKEN"
    ) as caught:
        download(NAME, None, say=said.append)
    assert "\n" not in str(caught.value)


def test_a_proxy_that_refuses_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub("https://hub.invalid", tmp_path / "empty", monkeypatch)
    for name in ("https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    # It tunnels nothing.
    monkeypatch.setenv("HTTPS_PROXY", hub.url)
    # The client of huggingface_hub, one for all calls, asks for proxies when it is made.
    close_session()
    try:
        with pytest.raises(ValueError, match=r"^model: .* could not be fetched from https://hub\.invalid: 501 [^\n]*$"):
            locate_checkpoint(ClusterConfig(model=NAME), said.append)
    finally:
        close_session()


def test_without_a_hub_the_cache_serves(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    found = download(NAME, None, say=said.append)
    use_hub("http://127.0.0.1:1", tmp_path / "cache", monkeypatch)
    assert download(NAME, None, say=said.append) == found
    assert local_directory(found.reference) == str(found.directory)
    use_hub("http://127.0.0.1:1", tmp_path / "empty", monkeypatch)
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:1 cannot be reached; its files are not all in .*empty"):
        download(NAME, None, say=said.append)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE forbids"):
        download(NAME, None, say=said.append)


def test_every_node_fetches_the_commit_that_was_checked(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _deployed({"model": NAME})
    assert config.model == f"hub:{NAME}@{'1' * 40}" and config.model_name == NAME
    hub.repositories[NAME].commits = {"main": "3" * 40, "before": "1" * 40}
    use_hub(hub.url, tmp_path / "other node", monkeypatch)
    assert local_directory(config.model).endswith("1" * 40)
    assert local_directory("/models/x") == "/models/x"
    settings = asyncio.run(with_files(PreprocessorConfig(model_dir=config.model)))
    assert settings.model_dir == local_directory(config.model)


def test_the_download_command(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / "here"
    result = CliRunner().invoke(app, ["checkpoint", "download", NAME, "--to", str(target)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().splitlines()[-1] == str(target)
    assert (target / "config.json").is_file() and not (target / "README.md").exists()
    result = CliRunner().invoke(app, ["checkpoint", "download", "baidu/Unknown"])
    assert result.exit_code == 1 and "has no such model" in result.output
