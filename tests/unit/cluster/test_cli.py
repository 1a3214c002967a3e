"""What the command says to people who got something wrong; nothing is started."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from actors.checkpoint import nano_directory
from cluster.cli import _config, app
from tests.tiny_model import tiny_checkpoint

runner = CliRunner()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "/none"], "model: /none is not a checkpoint directory"),
        (["--dtype", "int8"], "options: dtype: Input should be 'auto'"),
        (["--compat", "vllm"], "options: compat: Input should be 'original' or 'transformers'"),
        (["--http-port", "0"], "options: http_port: Input should be greater"),
        (["--max-model-len", "0"], "options: max_model_len: Input should be greater"),
        (["--config", "/none.yaml"], "/none.yaml: No such file"),
    ],
)
def test_serve_names_what_is_wrong(arguments: list[str], complaint: str) -> None:
    result = runner.invoke(app, ["serve", *arguments])
    assert result.exit_code == 1
    assert complaint in result.output


def test_options_win_over_the_file(tmp_path: Path) -> None:
    model = tiny_checkpoint()
    file = tmp_path / "c.yaml"
    file.write_text(f"model: {model}\nhttp_port: 1234\ngrpc_port: 1235\npreprocessor: {{concurrency: 3}}\n")
    config = _config(file, {"http_port": 4321, "dtype": None}, ["a.example,b.example", "c.example"])
    assert (config.http_port, config.grpc_port, config.dtype) == (4321, 1235, "auto")
    assert config.preprocessor.concurrency == 3
    assert config.preprocessor.limits.allowed_media_domains == ("a.example", "b.example", "c.example")


def test_nano_is_served_unless_something_else_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "c.yaml"
    file.write_text("http_port: 1234\n")
    for given, options in ((None, {"model": None}), (file, {}), (None, {"model": "nano"})):
        config = _config(given, options, None)
        assert (Path(config.model), config.model_name) == (nano_directory(), "nano")
        assert "coloured shapes" in capsys.readouterr().out
    config = _config(None, {"model": "random", "served_model_name": "mine"}, None)
    assert Path(config.model).is_relative_to(tmp_path) and config.model_name == "mine"
    assert "nonsense" in capsys.readouterr().out


def test_a_directory_called_nano_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nano").symlink_to(tiny_checkpoint())
    monkeypatch.chdir(tmp_path)
    assert Path(_config(None, {"model": "./nano"}, None).model) == tiny_checkpoint().resolve()


def test_status_of_nothing() -> None:
    result = runner.invoke(app, ["status", "--url", "http://127.0.0.1:1"])
    assert result.exit_code == 1
    assert "no status from http://127.0.0.1:1" in result.output


@pytest.mark.parametrize("option", ["--seed=-1", "--seed=9223372036854775808", "--max-tokens=0", "--timeout=nan"])
def test_chat_refuses_numbers_that_cannot_be_sent(option: str) -> None:
    result = runner.invoke(app, ["chat", "hello", "--address", "127.0.0.1:1", option])
    assert result.exit_code == 2
    assert option.partition("=")[0] in result.output


def test_status_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = httpx.Response(200, json={"ready": True}, request=httpx.Request("GET", "http://elsewhere/status"))
    monkeypatch.setattr(httpx, "get", lambda *args, **kwargs: answer)
    result = runner.invoke(app, ["status"])
    assert result.exit_code == 1
    assert "is no ernie cluster" in result.output


def test_checkpoint_names_what_is_wrong(tmp_path: Path) -> None:
    for arguments, complaint in (
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--naming", "x"], "--naming: 'x' is not one of"),
        (["--set", "nothing"], "'nothing' is not of the form KEY=VALUE"),
        (["--set", "text_config.none=1"], "text_config.none"),
    ):
        result = runner.invoke(app, ["checkpoint", "random", str(tmp_path / "c"), *arguments])
        assert result.exit_code == 1, result.output
        assert complaint in result.output
    assert not (tmp_path / "c").exists()


def test_checkpoint_shapes_can_be_counted_without_writing(tmp_path: Path) -> None:
    result = runner.invoke(app, ["checkpoint", "random", str(tmp_path / "c"), "--no-write"])
    assert result.exit_code == 0
    assert "M parameters" in result.output and "nothing was written" in result.output
    assert not (tmp_path / "c").exists()
