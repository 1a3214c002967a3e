"""One benchmark from its settings to its report."""

from __future__ import annotations

import asyncio
import random

from rich.console import Console
from rich.text import Text

from cluster.bench.load import Ask, Record, Sender, SendFailed, closed_loop, open_loop, poisson_times
from cluster.bench.metrics import summarise
from cluster.bench.report import as_json, print_tables
from cluster.bench.senders import Unreachable, make_sender
from cluster.bench.settings import BenchSettings
from cluster.bench.workload import TokenScale, Turn, make_conversations, text_of, warmup_settings
from cluster.json_output import STANDARD_OUTPUT, write_json

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130

SCALE_WORDS = (8, 264)
"""Two prompts that many words long show how a server counts tokens."""

START_HINT = (
    "start a server with `ernie serve` (its HTTP API is http://127.0.0.1:8000, its gRPC API grpc://127.0.0.1:9000)"
)


def run_bench(settings: BenchSettings, *, json_to: str | None, console: Console, errors: Console) -> int:
    """Runs it and returns the exit code.

    ``json_to`` is a file or "-" for standard output, where no tables are printed then.

    0: every request was answered. 1: some failed. 2: the file cannot be written. 3: nothing answers. 130: interrupted.
    """
    try:
        records = asyncio.run(_measure(settings, errors))
    except Unreachable as error:
        errors.print(Text(f"nothing answers at {settings.url} ({error}): {START_HINT}", style="red"), soft_wrap=True)
        return EXIT_UNREACHABLE
    except SendFailed as error:
        errors.print(Text(f"the first request failed: {error}", style="red"), soft_wrap=True)
        return EXIT_FAILED
    except KeyboardInterrupt:
        errors.print("interrupted", style="red")
        return EXIT_INTERRUPTED
    summary = summarise(records, settings.slo)
    if json_to != STANDARD_OUTPUT:
        print_tables(settings, summary, console)
    if json_to is not None:
        try:
            write_json(as_json(settings, summary), json_to, console)
        except OSError as error:
            errors.print(Text(f"cannot write {json_to}: {error.strerror}", style="red"), soft_wrap=True)
            return EXIT_USAGE
    return EXIT_OK if not summary.failed else EXIT_FAILED


async def _measure(settings: BenchSettings, errors: Console) -> list[Record]:
    sender = make_sender(settings)
    try:
        scale = await measure_scale(sender, settings)
        conversations = make_conversations(settings, scale)
        if settings.warmup:
            errors.print(f"warm-up: {settings.warmup} requests", style="dim")
            again = make_conversations(warmup_settings(settings), scale)
            await closed_loop(sender, again, settings.concurrency or settings.warmup)
        errors.print(f"sending {settings.num_requests} requests", style="dim")
        if settings.concurrency is not None:
            return await closed_loop(sender, conversations, settings.concurrency)
        assert settings.rate is not None
        due_s = poisson_times(len(conversations), settings.rate, settings.seed)
        return await open_loop(sender, conversations, due_s)
    finally:
        await sender.close()


async def measure_scale(sender: Sender, settings: BenchSettings) -> TokenScale:
    """Asks with two lengths and lets the server count, so that token counts need no tokenizer here.

    Raises:
        SendFailed: a request failed; Unreachable when nobody answers.
    """
    random_ = random.Random(f"{settings.seed}/scale")
    counts = []
    for words in SCALE_WORDS:
        turn = Turn(text=text_of(words, random_), output_tokens=1)
        reply = await sender.send(sender.prepare(Ask(system=None, history=(), turn=turn)))
        counts.append(reply.prompt_tokens)
    (few, many), (short, long) = SCALE_WORDS, counts
    per_word = max((long - short) / (many - few), 1e-3)
    return TokenScale(overhead=max(0.0, short - few * per_word), per_word=per_word)
