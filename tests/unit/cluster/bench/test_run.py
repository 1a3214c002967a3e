"""The whole command against the gRPC facade, its output captured."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from actors.errors import Overloaded
from cluster.bench.load import Ask, Reply
from cluster.bench.run import measure_scale, run_bench
from cluster.bench.settings import BenchSettings, Fixed
from cluster.cli import app
from tests.doubles import ScriptedService, grpc_serving_in_a_thread


def bench(settings: BenchSettings, json_to: str | None = None) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = run_bench(
        settings,
        json_to=json_to,
        console=Console(file=out, width=100, highlight=False),
        errors=Console(file=err, width=100, highlight=False),
    )
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("load", [{"concurrency": 3}, {"rate": 1000.0}])
def test_a_benchmark(load: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    with grpc_serving_in_a_thread(ScriptedService) as (address, service):
        settings = BenchSettings(
            url=f"grpc://{address}",
            num_requests=7,
            warmup=2,
            mix={"text": 1, "image": 1},
            image_size=(32, 32),
            output_tokens=Fixed(9),
            slo={"e2e": 60.0},
            **load,
        )
        code, out, _ = bench(settings, str(file))
    assert code == 0
    assert "7 completed, 0 failed" in out and "100.0% within E2E <= 60000 ms" in out
    assert {"TTFT", "TPOT", "ITL", "E2E"} <= set(out.split())
    assert ("send lag" in out) == ("rate" in load)
    # Two requests to see how tokens are counted, the warm-up, then what is measured.
    assert [call.max_tokens for call in service.calls] == [1, 1] + [9] * 9
    found = json.loads(file.read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (7, 0, 35)
    assert found["ttft_ms"]["count"] == 7 and found["itl_ms"]["count"] == 21
    assert found["goodput_fraction"] == 1 and set(found["by_kind"]) <= {"text", "image"}
    assert found["settings"]["output_tokens"] == "9" and found["settings"]["slo"] == {"e2e": 60.0}


def test_json_on_standard_output_stands_alone() -> None:
    with grpc_serving_in_a_thread(ScriptedService) as (address, _):
        settings = BenchSettings(url=f"grpc://{address}", num_requests=2, rate=float("inf"), warmup=0)
        code, out, _ = bench(settings, "-")
    found = json.loads(out)
    assert code == 0 and found["completed"] == 2
    assert found["settings"]["rate"] == "inf" and "request_goodput" not in found


def test_failures_are_counted_and_listed() -> None:
    class Failing(ScriptedService):
        async def generate(self, call: Any) -> Any:
            if len(self.calls) >= 3:
                self.script = (Overloaded("queue full", retry_after_s=1),)
            async for event in super().generate(call):
                yield event

    with grpc_serving_in_a_thread(Failing) as (address, _):
        settings = BenchSettings(url=f"grpc://{address}", num_requests=5, concurrency=1, warmup=0)
        code, out, _ = bench(settings)
    assert code == 1
    assert "1 completed, 4 failed" in out
    assert "4 x RESOURCE_EXHAUSTED: queue full" in out


def test_a_server_that_refuses_the_first_request() -> None:
    with grpc_serving_in_a_thread(lambda: ScriptedService(script=(Overloaded("queue full"),))) as (address, _):
        code, _, err = bench(BenchSettings(url=f"grpc://{address}", concurrency=1))
    assert code == 1 and "the first request failed: RESOURCE_EXHAUSTED: queue full" in err


def test_nobody_listens() -> None:
    code, _, err = bench(BenchSettings(url="grpc://127.0.0.1:1", concurrency=1))
    assert code == 3 and "nothing answers at grpc://127.0.0.1:1" in err and "ernie serve" in err


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with grpc_serving_in_a_thread(ScriptedService) as (address, _):
        settings = BenchSettings(url=f"grpc://{address}", num_requests=1, concurrency=1, warmup=0)
        code, out, err = bench(settings, str(tmp_path / "none" / "x.json"))
    assert code == 2 and "cannot write" in err and "1 completed" in out


async def test_the_server_says_how_it_counts() -> None:
    class Counting:
        def prepare(self, ask: Ask) -> Ask:
            return ask

        async def send(self, prepared: Ask) -> Reply:
            tokens = 11 + round(1.5 * len(prepared.turn.text.split()))
            return Reply(text="", chunk_s=(), end_s=0, prompt_tokens=tokens, cached_tokens=0, output_tokens=1)

    scale = await measure_scale(Counting(), BenchSettings(url="http://h", concurrency=1))
    assert (scale.overhead, scale.per_word) == (pytest.approx(11), pytest.approx(1.5))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "ernie serve"),
        (["--url", "ftp://h"], "--url"),
        (["--url", "http://h", "--rate", "1", "--concurrency", "1"], "--rate (open loop) or --concurrency"),
        (["--url", "http://h", "--mix", "audio"], "--mix"),
        (["--url", "http://h", "--input-tokens", "0"], "--input-tokens"),
        (["--url", "http://h", "--slo", "x"], "--slo"),
        (["--url", "http://h", "--image-size", "x"], "--image-size"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert complaint in result.output


def test_the_command_line_reaches_the_server(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with grpc_serving_in_a_thread(ScriptedService) as (address, service):
        arguments = ["bench", "--url", f"grpc://{address}", "--num-requests", "2", "--json", str(file), "--ignore-eos"]
        result = CliRunner().invoke(app, [*arguments, "--output-tokens", "7", "--warmup", "0"])
    assert result.exit_code == 0, result.output
    assert [(call.max_tokens, call.ignore_eos) for call in service.calls[2:]] == [(7, True)] * 2
    assert json.loads(file.read_text())["settings"]["rate"] == "inf"
