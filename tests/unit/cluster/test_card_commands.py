"""The command lines of the model's cards and of FastDeploy's guides, with ``ernie serve`` in place of the program."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cluster.launch
from actors.types import MediaOptions
from cluster.cli import app
from cluster.config import ClusterConfig, resolve
from cluster.serve_options import ServeOptions
from tests.tiny_model import tiny_checkpoint

runner = CliRunner()
LONG = {"overrides": {"text_config.max_position_embeddings": 131072}}

VLLM = "vllm serve baidu/ERNIE-4.5-VL-28B-A3B-Thinking --trust-remote-code"
VLLM_PARSERS = r"""vllm serve baidu/ERNIE-4.5-VL-28B-A3B-Thinking --trust-remote-code \
 --reasoning-parser ernie45 \
 --tool-call-parser ernie45 \
 --enable-auto-tool-choice"""
FASTDEPLOY_THINKING = r"""fastdeploy serve --model baidu/ERNIE-4.5-VL-28B-A3B-Thinking \
 --max-model-len 131072 \
 --max-num-seqs 32 \
 --port 8180 \
 --quantization wint8 \
 --reasoning-parser ernie-45-vl-thinking \
 --tool-call-parser ernie-45-vl-thinking \
 --mm-processor-kwargs '{"image_max_pixels": 12845056 }'"""
FASTDEPLOY = r"""python -m fastdeploy.entrypoints.openai.api_server \
--model baidu/ERNIE-4.5-VL-28B-A3B-Paddle \
--port 8180 \
--metrics-port 8181 \
--engine-worker-queue-port 8182 \
--max-model-len 32768 \
--enable-mm \
--reasoning-parser ernie-45-vl \
--max-num-seqs 32"""
GUIDE = r"""python -m fastdeploy.entrypoints.openai.api_server \
  --model baidu/ERNIE-4.5-VL-28B-A3B-Paddle \
  --port 8180 \
  --metrics-port 8181 \
  --engine-worker-queue-port 8182 \
  --tensor-parallel-size 1 \
  --max-model-len 32768 \
  --max-num-seqs 256 \
  --limit-mm-per-prompt '{"image": 100, "video": 100}' \
  --reasoning-parser ernie-45-vl \
  --gpu-memory-utilization 0.9 \
  --max-num-batched-tokens 384"""

_PROGRAMS = ("vllm serve", "fastdeploy serve", "python -m fastdeploy.entrypoints.openai.api_server")


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ClusterConfig]:
    """What ``ernie serve`` would have started, from a folder that holds the cards' models by their names."""
    for name in ("Thinking", "Paddle"):
        directory = tmp_path / "baidu" / f"ERNIE-4.5-VL-28B-A3B-{name}"
        directory.mkdir(parents=True)
        for file in tiny_checkpoint(**LONG).iterdir():
            (directory / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    configs: list[ClusterConfig] = []

    @contextlib.contextmanager
    def running(config: ClusterConfig, *_: object, **__: object) -> Iterator[Any]:
        configs.append(config)
        yield type("Signals", (), {"wait": lambda self: None})()

    monkeypatch.setattr(cluster.launch, "running_cluster", running)
    return configs


def arguments(line: str) -> list[str]:
    (program,) = [program for program in _PROGRAMS if line.startswith(program)]
    return shlex.split(line.removeprefix(program).replace("\\\n", " "))


def serve(line: str, started: list[ClusterConfig], *more: str) -> tuple[ClusterConfig, str]:
    result = runner.invoke(app, ["serve", *arguments(line), *more])
    assert result.exit_code == 0, result.output
    return started.pop(), result.output


def test_vllm(started: list[ClusterConfig]) -> None:
    config, said = serve(VLLM, started)
    assert config.model_name == "ERNIE-4.5-VL-28B-A3B-Thinking" and config.http_port == 8000
    assert "--trust-remote-code: ignored" in said
    config, said = serve(VLLM, started, "--gpu-memory-utilization", "0.95", "--host", "0.0.0.0")
    (pool,) = resolve(config, gpus=1).pools
    assert (pool.gpu_memory_utilization, config.host) == (0.95, "0.0.0.0")


def test_vllm_with_parsers(started: list[ClusterConfig]) -> None:
    config, said = serve(VLLM_PARSERS, started)
    assert (config.reasoning_parser, config.tool_call_parser) == ("ernie45", "ernie45")
    assert "--enable-auto-tool-choice: ignored" in said


def test_fastdeploy(started: list[ClusterConfig]) -> None:
    config, said = serve(FASTDEPLOY, started)
    assert (config.model_name, config.http_port) == ("ERNIE-4.5-VL-28B-A3B-Paddle", 8180)
    assert (config.max_model_len, config.reasoning_parser) == (32768, "ernie-45-vl")
    assert {pool.max_num_seqs for pool in resolve(config, gpus=4).pools} == {32}
    assert config.metrics_port == 8181
    for option in ("--engine-worker-queue-port", "--enable-mm"):
        assert option in said


def test_fastdeploy_for_the_thinking_model(started: list[ClusterConfig]) -> None:
    result = runner.invoke(app, ["serve", *arguments(FASTDEPLOY_THINKING)])
    assert result.exit_code == 1 and "quantization: wint8 is not built yet" in result.output and not started
    config, _ = serve(FASTDEPLOY_THINKING.replace(" --quantization wint8", ""), started)
    assert (config.max_model_len, config.http_port) == (131072, 8180)
    assert (config.reasoning_parser, config.tool_call_parser) == ("ernie-45-vl-thinking",) * 2
    assert config.preprocessor.media == MediaOptions(image_max_pixels=12845056)


def test_fastdeploys_guide(started: list[ClusterConfig]) -> None:
    config, _ = serve(GUIDE, started)
    (pool,) = resolve(config, gpus=0).pools
    assert (pool.max_num_seqs, pool.max_batched_tokens) == (256, 384)
    assert (config.preprocessor.limits.max_images, config.preprocessor.limits.max_videos) == (100, 100)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--tensor-parallel-size", "2"], "tensor_parallel_size: 2 is not supported"),
        (["--tensor-parallel-size", "2"], "expert_parallel"),
        (["--reasoning-parser", "qwen3"], "reasoning_parser: Input should be 'ernie45'"),
        (["--tool-call-parser", "ernie-45-vl"], "tool_call_parser: Input should be 'ernie45'"),
        (["--max-num-seqs", "0"], "pool_defaults.max_num_seqs"),
        (["--max-num-seqs", "64", "--max-num-batched-tokens", "32"], "pool engine"),
        (["--gpu-memory-utilization", "1.5"], "pool_defaults.gpu_memory_utilization"),
        (["--mm-processor-kwargs", "{"], "mm_processor_kwargs: not JSON"),
        (["--mm-processor-kwargs", "[]"], "mm_processor_kwargs: must be a JSON object"),
        (["--mm-processor-kwargs", '{"do_resize": true}'], "mm_processor_kwargs.do_resize"),
        (["--mm-processor-kwargs", '{"fps": 0}'], "mm_processor_kwargs.fps must be"),
        (["--mm-processor-kwargs", '{"image_max_pixels": 5}'], "image_max_pixels must be at least 784"),
        (["--limit-mm-per-prompt", '{"audio": 1}'], "limit_mm_per_prompt.audio is not supported"),
        (["--limit-mm-per-prompt", '{"image": "1"}'], "limit_mm_per_prompt.image: must be a count"),
        (["--model", "nano"], "differ: give one"),
    ],
)
def test_what_is_wrong_is_named(given: list[str], complaint: str, started: list[ClusterConfig]) -> None:
    result = runner.invoke(app, ["serve", "baidu/ERNIE-4.5-VL-28B-A3B-Thinking", *given])
    assert result.exit_code == 1 and not started
    assert complaint in " ".join(result.output.split())


@pytest.mark.parametrize("flag", ["--swap-space", "--splitwise-role", "--enable-chunked-prefill", "--no-enable-mm"])
def test_other_flags_are_refused(flag: str, started: list[ClusterConfig]) -> None:
    result = runner.invoke(app, ["serve", flag])
    assert result.exit_code == 2 and "No such option" in result.output and not started


def test_options_win_over_pools_and_media_of_a_file() -> None:
    values: dict[str, Any] = {
        "engines": [{"roles": {"colocated": 1}, "max_num_seqs": 8, "max_batched_tokens": 99}],
        "preprocessor": {"media": {"image_max_pixels": 999, "video_fps": 1.0}, "limits": {"max_videos": 1}},
    }
    ServeOptions(max_num_seqs=16, mm_processor_kwargs='{"max_pixels": 998}', limit_mm_per_prompt='{"image": 2}').apply(
        values
    )
    config = ClusterConfig.model_validate(values)
    (pool,) = resolve(config, gpus=0).pools
    assert (pool.max_num_seqs, pool.max_batched_tokens) == (16, 99)
    assert config.preprocessor.media == MediaOptions(image_max_pixels=998, video_fps=1.0)
    assert (config.preprocessor.limits.max_images, config.preprocessor.limits.max_videos) == (2, 1)
    with pytest.raises(ValueError, match=r"preprocessor\.limits: must be a mapping"):
        ServeOptions(limit_mm_per_prompt='{"image": 2}').apply({"preprocessor": {"limits": 3}})
