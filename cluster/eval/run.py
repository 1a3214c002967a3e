"""One evaluation from its settings to its report."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from cluster.builtin import locate
from cluster.client import AsyncClient, ClientError
from cluster.config import NANO, ClusterConfig, parse, resolve
from cluster.eval.asking import ask, ask_with_zoom
from cluster.eval.scoring import metric, score
from cluster.eval.tasks import TASKS, Sample, check_seed, sample
from cluster.json_output import STANDARD_OUTPUT, write_json
from cluster.launch import StopRequested, grpc_address, running_cluster
from cluster.model_check import check_model
from cluster.ports import free_ports

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130

CONCURRENCY = 8
"""Samples asked about at a time."""
KV_CACHE_GIB = 0.25
"""For each engine of a cluster of one's own: thousands of tokens more than so many samples have together."""
ZOOM = "zoom"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """What to ask, and of whom: the cluster at ``address`` (host:port), or one of its own for ``model`` (a directory or
    a built-in name).

    Raises:
        ValueError: naming the option that is wrong.
    """

    tasks: tuple[str, ...] = TASKS
    seed: int = 0
    samples: int = 100
    address: str | None = None
    model: str = NANO

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"--tasks: {', '.join(unknown) or 'nothing'} is not among {', '.join(TASKS)}")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError("--tasks: names a task twice")
        if self.samples < 1:
            raise ValueError(f"--samples: {self.samples} is below 1")
        try:
            check_seed(self.seed)
        except ValueError as error:
            raise ValueError(f"--seed: {error}, which training leaves out") from None


@dataclass(frozen=True, slots=True)
class Score:
    """Mean over ``n`` samples; ``without`` is that of the same questions asked without the tool."""

    value: float
    n: int
    without: float | None = None


def parse_tasks(text: str) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_address(url: str) -> str:
    """host:port of a gRPC API.

    Raises:
        ValueError: it is neither grpc://HOST:PORT nor HOST:PORT.
    """
    address = url.removeprefix("grpc://").rstrip("/")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise ValueError(f"--url: {url} is not grpc://HOST:PORT")
    return address


def run_eval(settings: EvalSettings, *, json_to: str | None, console: Console, errors: Console) -> int:
    """Runs it and returns the exit code.

    ``json_to`` is a file or "-" for standard output, where no table is printed then.

    0: every sample was answered. 1: a request failed. 2: the model cannot be served or the file cannot be written.
    3: nothing answers. 130: interrupted.

    Raises:
        StartFailed: a cluster of its own did not come up.
        StopRequested: a signal came while there was one.
    """
    try:
        own = own_cluster(settings.model) if settings.address is None else None
    except (ValueError, OSError) as error:
        errors.print(Text(f"--model: {error}", style="red"), soft_wrap=True)
        return EXIT_USAGE
    try:
        with contextlib.nullcontext(settings.address) if own is None else _cluster(own, errors) as address:
            assert address is not None
            scores = asyncio.run(_evaluate_at(address, settings, errors))
    except ClientError as error:
        if error.unreachable:
            errors.print(Text(f"nothing answers at {settings.address}: {error}", style="red"), soft_wrap=True)
            return EXIT_UNREACHABLE
        errors.print(Text(f"no evaluation, a request failed: {error}", style="red"), soft_wrap=True)
        return EXIT_FAILED
    except StopRequested:
        raise
    except KeyboardInterrupt:
        errors.print("interrupted", style="red")
        return EXIT_INTERRUPTED
    if json_to != STANDARD_OUTPUT:
        console.print(table(scores))
    if json_to is not None:
        try:
            write_json(as_json(scores), json_to, console)
        except OSError as error:
            errors.print(Text(f"cannot write {json_to}: {error.strerror}", style="red"), soft_wrap=True)
            return EXIT_USAGE
    return EXIT_OK


@contextlib.contextmanager
def _cluster(config: ClusterConfig, errors: Console) -> Iterator[str]:
    """Its gRPC address, for as long as the block runs."""
    with running_cluster(config, lambda line: errors.print(Text(line, style="dim"), soft_wrap=True)):
        yield grpc_address(config)


def own_cluster(model: str) -> ClusterConfig:
    """One preprocessor, encoder, prefill and decode engine on this machine's CPUs, also where there is a GPU: the model
    is small, and one GPU does not hold two engines.

    Raises:
        ValueError: the model cannot be served.
        OSError: its files cannot be read.
    """
    http_port, grpc_port = free_ports(2)
    description = {
        "model": model if model == NANO else str(Path(model).expanduser().resolve()),
        "http_port": http_port,
        "grpc_port": grpc_port,
        "engines": [{"roles": {"prefill": 1, "decode": 1}, "kv_cache_gib": KV_CACHE_GIB}],
    }
    config = locate(parse(description, "evaluation"))
    check_model(config)
    return resolve(config, gpus=0)


async def _evaluate_at(address: str, settings: EvalSettings, errors: Console) -> dict[str, Score]:
    with Progress(console=errors, transient=True) as progress:
        line = progress.add_task("asking", total=len(settings.tasks) * settings.samples)
        async with AsyncClient(address) as client:
            return await evaluate(
                client, settings.tasks, settings.seed, settings.samples, on_sample=lambda: progress.advance(line)
            )


async def evaluate(
    client: AsyncClient, tasks: Sequence[str], seed: int, count: int, *, on_sample: Callable[[], None] = lambda: None
) -> dict[str, Score]:
    """Scores of ``count`` samples of each task, in the order of ``tasks``; ``on_sample`` is called after each.

    Raises:
        ClientError: a request failed. The others are cancelled: a score over part of the samples would mean nothing.
    """
    results: dict[str, list[tuple[float, float]]] = {task: [] for task in tasks}
    jobs = iter([(task, index) for task in tasks for index in range(count)])

    async def work() -> None:
        for task, index in jobs:
            # Drawing and encoding take long enough to hold up the answers of others.
            made = await asyncio.to_thread(sample, task, seed, index)
            results[task].append(await score_sample(client, task, made))
            on_sample()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(work())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return {task: _mean(task, found) for task, found in results.items()}


async def score_sample(client: AsyncClient, task: str, made: Sample) -> tuple[float, float]:
    """Score of one sample, and that of asking plainly; only for zoom do the two differ. Raises ClientError."""
    plain = await ask(
        client,
        made.text,
        images=made.images,
        videos=made.videos,
        thinking=made.thinking,
        question_first=made.question_first,
    )
    without = score(task, plain.text, made.answer)
    if task != ZOOM:
        return without, without
    reply, _ = await ask_with_zoom(client, made.text, made.images[0])
    return score(task, reply.text, made.answer), without


def _mean(task: str, found: Sequence[tuple[float, float]]) -> Score:
    value, without = (sum(column) / len(found) for column in zip(*found, strict=True))
    return Score(value, len(found), without if task == ZOOM else None)


def as_json(scores: Mapping[str, Score]) -> dict[str, Any]:
    """By task: ``accuracy`` or ``iou``, for zoom also ``without`` the tool, and ``n``."""
    return {
        task: {metric(task): found.value}
        | ({"without": found.without} if found.without is not None else {})
        | {"n": found.n}
        for task, found in scores.items()
    }


def table(scores: Mapping[str, Score]) -> Table:
    """For people."""
    made = Table("task", box=None, pad_edge=False, header_style="dim")
    made.add_column("score", justify="right")
    made.add_column("")
    made.add_column("n", justify="right")
    for task, found in scores.items():
        what = "mean IoU" if metric(task) == "iou" else "right"
        if found.without is not None:
            what = f"right; {found.without:.1%} without the tool"
        shown = f"{found.value:.3f}" if metric(task) == "iou" else f"{found.value:.1%}"
        made.add_row(task, shown, what, str(found.n))
    return made
