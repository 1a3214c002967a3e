"""The whole evaluation against clients that know the answers, or do not, and its exit codes."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import cast

import grpc
import pytest
from rich.console import Console
from typer.testing import CliRunner

from actors.errors import Overloaded
from cluster.cli import app
from cluster.client import AsyncClient, ClientError
from cluster.eval.run import (
    CONCURRENCY,
    EvalSettings,
    Score,
    as_json,
    evaluate,
    own_cluster,
    parse_address,
    parse_tasks,
    run_eval,
)
from cluster.eval.tasks import TASKS, samples
from cluster.eval.world import zoom
from cluster.ports import free_ports
from ernie_serving.v1 import content_pb2, inference_pb2
from tests.doubles import ScriptedService, grpc_serving_in_a_thread
from tests.tiny_model import tiny_checkpoint

SEED, COUNT = 3, 4


class Knowing:
    """Answers every sample of the seed rightly, those of ``wrong`` tasks never, small numbers only after zooming in."""

    def __init__(self, tasks: tuple[str, ...], wrong: tuple[str, ...] = ()) -> None:
        self.asked = 0
        self.at_a_time = self._now = 0
        self._answers: dict[frozenset[bytes], tuple[str, str]] = {
            frozenset(one.images + one.videos): (task, "?" if task in wrong else one.answer)
            for task in tasks
            for one in samples(task, SEED, COUNT)
        }

    async def generate(
        self, request: inference_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> inference_pb2.GenerateResponse:
        self.asked += 1
        self._now += 1
        self.at_a_time = max(self.at_a_time, self._now)
        await asyncio.sleep(0.001)
        self._now -= 1
        question = next(m for m in request.messages if m.role == content_pb2.ROLE_USER)
        media = [part.image.source.content or part.video.source.content for part in question.parts]
        task, answer = self._answers[frozenset(file for file in media if file)]
        calls: list[content_pb2.ToolCall] = []
        if task == "zoom":
            looked = request.messages[-1].role == content_pb2.ROLE_TOOL
            if request.tools and not looked:
                calls = [content_pb2.ToolCall(id="c", name=zoom.NAME, arguments_json='{"bbox_2d": [0, 0, 240, 240]}')]
            answer = answer if looked else "" if calls else "?"
        thinking = request.thinking_mode == inference_pb2.THINKING_MODE_ENABLED
        assert thinking == (task in ("position", "compare"))
        ending = inference_pb2.FINISH_REASON_TOOL_CALLS if calls else inference_pb2.FINISH_REASON_STOP
        choice = inference_pb2.Choice(text=answer, tool_calls=calls, finish_reason=ending)
        return inference_pb2.GenerateResponse(choices=[choice])


def scores_of(client: Knowing, tasks: tuple[str, ...]) -> dict[str, Score]:
    done: list[None] = []
    found = asyncio.run(evaluate(cast(AsyncClient, client), tasks, SEED, COUNT, on_sample=lambda: done.append(None)))
    assert len(done) == len(tasks) * COUNT
    return found


def test_right_answers_everywhere() -> None:
    client = Knowing(TASKS)
    found = scores_of(client, TASKS)
    assert list(found) == list(TASKS)
    assert found.pop("zoom") == Score(1.0, COUNT, without=0.0)
    assert set(found.values()) == {Score(1.0, COUNT)}
    assert client.asked == (len(TASKS) + 2) * COUNT and 1 < client.at_a_time <= CONCURRENCY


def test_wrong_answers_count_nothing() -> None:
    tasks = ("count", "grounding", "zoom", "colour")
    assert as_json(scores_of(Knowing(tasks, wrong=("count", "grounding", "zoom")), tasks)) == {
        "count": {"accuracy": 0.0, "n": COUNT},
        "grounding": {"iou": 0.0, "n": COUNT},
        "zoom": {"accuracy": 0.0, "without": 0.0, "n": COUNT},
        "colour": {"accuracy": 1.0, "n": COUNT},
    }


def test_a_failed_request_fails_the_evaluation() -> None:
    class Failing(Knowing):
        async def generate(
            self, request: inference_pb2.GenerateRequest, *, timeout_s: float | None = None
        ) -> inference_pb2.GenerateResponse:
            if self.asked == 5:
                raise ClientError(grpc.StatusCode.INTERNAL, "broken", reason="INTERNAL")
            return await super().generate(request, timeout_s=timeout_s)

    with pytest.raises(ClientError, match="broken"):
        scores_of(Failing(("colour", "shape", "count")), ("colour", "shape", "count"))


def run(settings: EvalSettings, json_to: str | None = None) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = run_eval(
        settings,
        json_to=json_to,
        console=Console(file=out, width=100, highlight=False),
        errors=Console(file=err, width=100, highlight=False),
    )
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("where", ["file", "-", None])
def test_a_running_server(tmp_path: Path, where: str | None) -> None:
    file = tmp_path / "result.json"
    with grpc_serving_in_a_thread(ScriptedService) as (address, service):
        settings = EvalSettings(tasks=("colour", "zoom"), seed=1, samples=3, address=address)
        code, out, _ = run(settings, str(file) if where == "file" else where)
    assert code == 0 and len(service.calls) == 3 + 2 * 3
    if where == "-":
        written = out
    else:
        assert "colour" in out and "without the tool" in out
        written = file.read_text() if where == "file" else None
    if written is not None:
        assert json.loads(written) == {
            "colour": {"accuracy": 0.0, "n": 3},
            "zoom": {"accuracy": 0.0, "without": 0.0, "n": 3},
        }


def test_an_error_of_the_server_is_no_wrong_answer() -> None:
    script = (Overloaded("no room", retry_after_s=0.1),)
    with grpc_serving_in_a_thread(lambda: ScriptedService(script=script)) as (address, _):
        code, out, err = run(EvalSettings(tasks=("colour",), samples=2, address=address), "-")
    assert code == 1 and out == "" and "a request failed: RESOURCE_EXHAUSTED: no room" in err


def test_nobody_answers() -> None:
    code, out, err = run(EvalSettings(tasks=("colour",), samples=1, address=f"127.0.0.1:{free_ports(1)[0]}"))
    assert code == 3 and out == "" and "nothing answers at 127.0.0.1:" in err


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with grpc_serving_in_a_thread(ScriptedService) as (address, _):
        code, _, err = run(EvalSettings(tasks=("colour",), samples=1, address=address), str(tmp_path))
    assert code == 2 and "cannot write" in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seed", "1048576"], "--seed: seed 1048576 is not from 0 to 1048575, which training leaves out"),
        (["--seed", "-1"], "--seed: seed -1 is not from 0 to 1048575"),
        (["--samples", "0"], "--samples: 0 is below 1"),
        (["--tasks", "colour,sound"], "--tasks: sound is not among colour, shape"),
        (["--tasks", ","], "--tasks: nothing is not among"),
        (["--tasks", "colour,colour"], "--tasks: names a task twice"),
        (["--url", "http://127.0.0.1:8000"], "--url: http://127.0.0.1:8000 is not grpc://HOST:PORT"),
        (["--url", "127.0.0.1:9000", "--model", "somewhere"], "--model: the server that --url names has its own"),
        (["--model", "/nowhere"], "--model: "),
    ],
)
def test_options_that_are_wrong_are_named(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["eval", "nano", *arguments], terminal_width=200)
    assert result.exit_code == 2
    assert complaint in result.output


def test_a_cluster_of_its_own_is_split_and_on_cpus() -> None:
    config = own_cluster(str(tiny_checkpoint()))
    (pool,) = config.pools
    assert (pool.roles.prefill, pool.roles.decode, pool.roles.colocated) == (1, 1, 0)
    assert pool.num_gpus == config.vision_encoder.num_gpus == 0
    assert config.model == str(tiny_checkpoint()) and config.http_port != config.grpc_port


def test_settings_name_the_seeds() -> None:
    with pytest.raises(ValueError, match="--seed: seed 1048576 is not from 0 to 1048575"):
        EvalSettings(seed=1 << 20)
    with pytest.raises(ValueError, match="--samples"):
        EvalSettings(samples=0)


def test_spellings() -> None:
    assert parse_tasks("colour, shape,") == ("colour", "shape")
    assert parse_address("grpc://127.0.0.1:9000") == parse_address("127.0.0.1:9000") == "127.0.0.1:9000"
    assert parse_address("[::1]:9000/") == "[::1]:9000"
