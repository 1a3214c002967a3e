"""``ernie demo``: a cluster on free ports, a question about a picture over gRPC and over HTTP, and where time went."""

from __future__ import annotations

import base64
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageDraw
from rich.console import Console
from rich.markup import escape

from cluster.cli_chat import EXIT_OK, run_chat, timings_table
from cluster.config import ClusterConfig
from cluster.launch import grpc_address, http_url, running_cluster
from ernie_serving.v1 import inference_pb2

QUESTION = "What is in this picture?"
MAX_TOKENS = 32
TIMEOUT_S = 120.0
WIDTH, HEIGHT = 336, 252


def run_demo(config: ClusterConfig, console: Console) -> int:
    """Runs the demo and returns the exit code; everything it started has ended by then.

    Raises:
        StartFailed: the cluster did not come up.
        StopRequested: a signal came.
    """
    with tempfile.TemporaryDirectory(prefix="ernie-demo-") as folder:
        picture = Path(folder) / "sample.png"
        draw_picture().save(picture)
        with running_cluster(config, lambda line: console.print(escape(line), style="dim", soft_wrap=True)):
            console.rule("gRPC StreamGenerate")
            console.print(f"Q: {QUESTION} (a picture of a house, {WIDTH} x {HEIGHT} pixels)\n")
            code = run_chat(
                QUESTION,
                images=[str(picture)],
                address=grpc_address(config),
                max_tokens=MAX_TOKENS,
                temperature=0.0,
                timeout_s=TIMEOUT_S,
                console=console,
            )
            if code != EXIT_OK:
                return code
            console.rule("HTTP POST /v1/chat/completions")
            console.print(f"Q: {QUESTION} (the same picture)\n")
            ask_over_http(http_url(config), picture, console)
            console.rule()
    return EXIT_OK


def draw_picture() -> Image.Image:
    """A house under a sun."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "#9fd3f5")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 180, WIDTH, HEIGHT), fill="#6fae5a")
    draw.ellipse((250, 24, 306, 80), fill="#ffd84a")
    for ray in range(12):
        angle = math.tau * ray / 12
        near, far = ((278 + reach * math.cos(angle), 52 + reach * math.sin(angle)) for reach in (34, 46))
        draw.line((near, far), fill="#ffd84a", width=4)
    draw.rectangle((80, 120, 200, 210), fill="#e0c9a6")
    draw.polygon(((68, 120), (140, 66), (212, 120)), fill="#b5483a")
    draw.rectangle((128, 160, 156, 210), fill="#6b4a32")
    return image


def ask_over_http(url: str, picture: Path, console: Console) -> None:
    """Streams one answer and prints it, its usage and its timings.

    Raises:
        httpx.HTTPError: the cluster refused or broke off.
    """
    data = base64.b64encode(picture.read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": QUESTION},
    ]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "stream": True,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream_options": {"include_usage": True},
        "return_timings": True,
    }
    last: dict[str, Any] = {}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT_S, trust_env=False) as response:
        if response.is_error:
            response.read()
            console.print(escape(response.text), style="red")
        response.raise_for_status()
        for chunk in sse_objects(response.iter_lines()):
            if "error" in chunk:
                raise httpx.HTTPError(str(chunk["error"]["message"]))
            for choice in chunk["choices"]:
                text = choice["delta"].get("reasoning", "") + choice["delta"].get("content", "")
                console.print(escape(text), end="", soft_wrap=True)
            last = chunk
    usage = last["usage"]
    console.print(f"\n{usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} generated", style="dim")
    console.print(timings_table(timings_message(last["timings"])))


def sse_objects(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, up to [DONE]."""
    for line in lines:
        data = line.removeprefix("data: ")
        if data == line:
            continue
        if data == "[DONE]":
            return
        yield json.loads(data)


def timings_message(timings: dict[str, Any]) -> inference_pb2.Timings:
    """The HTTP form of timings as the gRPC message."""
    message = inference_pb2.Timings()
    for name, seconds in timings["exposed"].items():
        stage = message.stages.add(stage=inference_pb2.Stage.Value(f"STAGE_{name.upper()}"))
        stage.exposed_duration.FromNanoseconds(round(seconds * 1e9))
        if name in timings["busy"]:
            stage.busy_duration.FromNanoseconds(round(timings["busy"][name] * 1e9))
    return message
