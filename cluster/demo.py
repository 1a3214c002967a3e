"""``ernie demo``: a cluster on free ports, questions about a few pictures and a clip, and where the time went."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from cluster.client import AsyncClient, FinishReason, Timings
from cluster.config import ClusterConfig
from cluster.eval.asking import ask, ask_with_zoom
from cluster.eval.world import clips, scenes
from cluster.eval.world.draw import draw_scene
from cluster.eval.world.questions import BUILDERS, Question, digits, listing
from cluster.eval.world.things import Scene
from cluster.launch import grpc_address, http_url, running_cluster
from cluster.pictures import open_upright
from cluster.reply_printer import ReplyPrinter, print_cost, timings_table

SEEDS = {"picture": 4, "clip": 99, "thought": 26, "number": 26, "http": 29}
"""Which pictures and which clip are shown, by the name they are saved under. Training has seen none of these seeds."""
TASKS = {"picture": "colour", "clip": "event_time", "thought": "position", "http": "count"}
"""What is asked about them; about ``number``, what it is."""

MAX_TOKENS = 64
TIMEOUT_S = 120.0
THUMBNAIL_COLUMNS, GAP = 36, 2
UPPER_HALF = "\u2580"
"""A character whose upper half has the text's colour and whose lower half the background's."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A question with its true answer, the encoded picture or clip it is about, and how to show that to people."""

    question: Question
    content: bytes
    caption: str
    shown: tuple[Image.Image, ...]
    """The picture, or the frames of the clip that the model sees."""


def run_demo(config: ClusterConfig, console: Console, *, command: str, save: Path | None = None) -> None:
    """Asks everything; all it started has ended by then. A wrong answer is shown like any other.

    ``command`` is how ``ernie`` can be called; in ``save`` the pictures and the clip are kept.

    Raises:
        StartFailed: the cluster did not come up.
        StopRequested: a signal came.
        ClientError, httpx.HTTPError: the cluster refused or failed.
        OSError: a reply broke off, or ``save`` cannot be written.
    """
    samples = made_samples()
    if save is not None:
        keep(samples, save)
    with running_cluster(config, lambda line: console.print(escape(line), style="dim", soft_wrap=True)):
        asyncio.run(ask_over_grpc(grpc_address(config), samples, console))
        console.rule("Over HTTP: POST /v1/chat/completions")
        show_question(samples["http"], console)
        ask_over_http(http_url(config), samples["http"], console)
        console.rule()
    for line in (
        f"Ask about your own pictures: start {command} serve and, in another terminal, for example",
        f'  {command} chat "What colour is the star?" --image picture.png',
        "with --video clip.mp4 for a clip and --think for thinking. To see more:",
        f"  {command} demo --save DIR      keeps the pictures and the clip of this demo",
        f"  {command} eval nano            asks about many more and counts the right answers",
    ):
        console.print(Text(line), soft_wrap=True)


def made_samples() -> dict[str, Sample]:
    """All that is asked, by the names of SEEDS. The same each time."""
    samples = {name: picture(TASKS[name], SEEDS[name]) for name in ("picture", "thought", "http")}
    return samples | {"clip": clip(TASKS["clip"], SEEDS["clip"]), "number": small_number(SEEDS["number"])}


def picture(task: str, seed: int) -> Sample:
    """A picture and a question of ``task`` about it."""
    rng = random.Random(seed)
    while True:
        scene = scenes.scene(rng, task)
        for question in BUILDERS[task](scene, rng):
            return _picture_sample(scene, question)


def small_number(seed: int) -> Sample:
    """A picture with a number too small to read at first sight."""
    rng = random.Random(seed)
    scene = scenes.small_number(rng)
    return _picture_sample(scene, next(digits(scene, rng)))


def _picture_sample(scene: Scene, question: Question) -> Sample:
    image = draw_scene(scene)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    caption = f"A picture, {scene.width} x {scene.height} pixels: {listing(scene.things)}."
    return Sample(question, buffer.getvalue(), caption, (image,))


def clip(task: str, seed: int) -> Sample:
    """A clip and a question of ``task`` about it."""
    rng = random.Random(seed)
    made = clips.clip(rng, task)
    frames = made.sampled()
    caption = f"A clip, {made.seconds:g} s, of which the model sees {len(frames)} frames: {listing(made.things)}."
    return Sample(next(made.questions(rng)), clips.encode(made), caption, tuple(made.draw(frames)))


def keep(samples: dict[str, Sample], directory: Path) -> None:
    """Writes every picture and clip as ``<name>.png`` or ``<name>.mp4``."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, sample in samples.items():
        (directory / name).with_suffix(".mp4" if name == "clip" else ".png").write_bytes(sample.content)


async def ask_over_grpc(address: str, samples: dict[str, Sample], console: Console) -> None:
    """A streamed answer with its cost, one about a clip, one after thinking, and one after a closer look."""
    async with AsyncClient(address) as client:
        console.rule("A picture, over gRPC: StreamGenerate")
        sample = samples["picture"]
        show_question(sample, console)
        await stream_answer(client, sample, console)

        console.rule("A clip")
        sample = samples["clip"]
        show_question(sample, console)
        reply = await ask(client, sample.question.text, videos=[sample.content], timeout_s=TIMEOUT_S)
        show_answer(reply.text, sample.question, console)

        console.rule("Thinking before the answer")
        sample = samples["thought"]
        show_question(sample, console)
        reply = await ask(client, sample.question.text, images=[sample.content], thinking=True, timeout_s=TIMEOUT_S)
        console.print(Text(reply.reasoning.strip(), style="dim italic"), soft_wrap=True)
        show_answer(reply.text, sample.question, console)

        console.rule("A closer look: a tool call")
        sample = samples["number"]
        show_question(sample, console)
        reply, looks = await ask_with_zoom(client, sample.question.text, sample.content, timeout_s=TIMEOUT_S)
        for look in looks:
            console.print(Text(f"{look.call.name}({look.call.arguments})", style="dim italic"), soft_wrap=True)
            if look.error is not None:
                console.print(Text(f"That call is wrong, and the model is told: {look.error}"), soft_wrap=True)
            for part in map(open_upright, look.shown):
                console.print(f"That part is cut out, enlarged to {part.width} x {part.height} pixels and shown to it:")
                show_images([part], console)
        show_answer(reply.text, sample.question, console)


async def stream_answer(client: AsyncClient, sample: Sample, console: Console) -> None:
    """Prints one answer as it comes, then its usage and its timings.

    Raises:
        ClientError: the cluster refused or failed.
        ConnectionError: it was cancelled.
    """
    console.print("A: ", end="")
    printer = ReplyPrinter(console)
    async with client.stream(
        sample.question.text,
        images=[sample.content],
        temperature=0,
        max_tokens=MAX_TOKENS,
        return_timings=True,
        timeout_s=TIMEOUT_S,
    ) as events:
        async for event in events:
            printer.show(event)
        reply = await events.rest()
    console.print(truth(sample.question), soft_wrap=True)
    if reply.finish_reason is FinishReason.CANCELLED:
        raise ConnectionError("the reply was cancelled")
    print_cost(console, reply)


def ask_over_http(url: str, sample: Sample, console: Console) -> None:
    """Streams one answer and prints it, its usage and its timings.

    Raises:
        httpx.HTTPError: the cluster refused or broke off.
    """
    data = base64.b64encode(sample.content).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": sample.question.text},
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
    console.print("A: ", end="")
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
                console.print(Text(text), end="", soft_wrap=True)
            last = chunk
    console.print(truth(sample.question), soft_wrap=True)
    usage = last["usage"]
    console.print(f"{usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} generated", style="dim")
    timings = last["timings"]
    console.print(timings_table(Timings(exposed=timings["exposed"], busy=timings["busy"])))


def sse_objects(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, up to [DONE]."""
    for line in lines:
        data = line.removeprefix("data: ")
        if data == line:
            continue
        if data == "[DONE]":
            return
        yield json.loads(data)


def show_question(sample: Sample, console: Console) -> None:
    console.print(Text(sample.caption, style="dim"), soft_wrap=True)
    show_images(sample.shown, console)
    console.print(Text(f"Q: {sample.question.text}"), soft_wrap=True)


def show_answer(answer: str, question: Question, console: Console) -> None:
    console.print(Text(f"A: {answer.strip()}") + truth(question), soft_wrap=True)


def truth(question: Question) -> Text:
    return Text(f"   (truth: {question.answer})", style="dim")


def show_images(images: Sequence[Image.Image], console: Console) -> None:
    """Draws them side by side where the terminal has colours for it."""
    if console.is_terminal and console.color_system in ("256", "truecolor") and not console.options.ascii_only:
        widest = THUMBNAIL_COLUMNS if len(images) == 1 else THUMBNAIL_COLUMNS // 2
        console.print(thumbnails(images, max(1, min(widest, (console.width + GAP) // len(images) - GAP))))


def thumbnails(images: Sequence[Image.Image], columns: int) -> Text:
    """Pictures of one size side by side, each so many columns wide; a character is two pixels high."""
    width, height = images[0].size
    rows = max(1, round(columns * height / width / 2))
    small = [image.convert("RGB").resize((columns, 2 * rows), Image.Resampling.BOX) for image in images]
    text = Text(no_wrap=True)
    for row in range(rows):
        for index, image in enumerate(small):
            text.append(" " * GAP if index else "")
            for column in range(columns):
                upper, lower = (image.getpixel((column, 2 * row + half)) for half in (0, 1))
                text.append(UPPER_HALF, f"rgb{_rgb(upper)} on rgb{_rgb(lower)}")
        text.append("\n" if row < rows - 1 else "")
    return text


def _rgb(pixel: Any) -> str:
    red, green, blue = pixel
    return f"({red},{green},{blue})"
