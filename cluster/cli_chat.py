"""What ``ernie chat`` does: asks one question, streams the reply, shows its cost and where the time went."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.client import DEFAULT_ADDRESS, AsyncClient, ClientError, generate_request, user_message
from ernie_serving.v1 import inference_pb2

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130

BAR_WIDTH = 30


def run_chat(
    prompt: str,
    *,
    images: Sequence[str] = (),
    videos: Sequence[str] = (),
    think: bool | None = None,
    address: str = DEFAULT_ADDRESS,
    model: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    tools: str | None = None,
    timeout_s: float | None = None,
    show_timings: bool = True,
    console: Console | None = None,
    errors: Console | None = None,
) -> int:
    """Runs one exchange and returns the exit code. ``tools`` is a JSON file of functions as OpenAI has them.

    0: answered. 1: the cluster refused or failed, or the reply was cancelled elsewhere. 2: a file could not be read.
    3: nothing answers at the address. 130: interrupted.
    """
    console = console or Console(highlight=False)
    errors = errors or Console(stderr=True, highlight=False)
    try:
        message = user_message(prompt, images=images, videos=videos)
        offered = [] if tools is None else json.loads(Path(tools).read_bytes())
    except OSError as error:
        errors.print(Text(f"cannot read {error.filename}: {error.strerror}", style="red"), soft_wrap=True)
        return EXIT_USAGE
    except UnicodeEncodeError:
        errors.print("the prompt is not UTF-8", style="red")
        return EXIT_USAGE
    except ValueError as error:
        errors.print(Text(f"{tools}: {error}", style="red"), soft_wrap=True)
        return EXIT_USAGE
    try:
        request = generate_request(
            message,
            model=model,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            tools=offered,
            enable_thinking=think,
            return_timings=show_timings,
        )
    except (ValueError, TypeError) as error:
        errors.print(Text(f"{tools}: {error}", style="red"), soft_wrap=True)
        return EXIT_USAGE
    try:
        return asyncio.run(_chat(request, address, timeout_s, console))
    except ClientError as error:
        _print_error(error, address, errors)
        return EXIT_UNREACHABLE if error.unreachable else EXIT_FAILED
    except KeyboardInterrupt:
        errors.print("interrupted", style="red")
        return EXIT_INTERRUPTED


async def _chat(request: inference_pb2.GenerateRequest, address: str, timeout_s: float | None, console: Console) -> int:
    reply = ReplyPrinter(console)
    async with AsyncClient(address) as client:
        ending, finished = await stream_reply(client, request, reply, timeout_s=timeout_s)
    reply.end()
    if finished is None:
        console.print("the reply ended early", style="red")
        return EXIT_FAILED
    print_cost(console, ending, finished)
    return EXIT_FAILED if ending.finish_reason == inference_pb2.FINISH_REASON_CANCELLED else EXIT_OK


async def stream_reply(
    client: AsyncClient, request: inference_pb2.GenerateRequest, reply: ReplyPrinter, *, timeout_s: float | None
) -> tuple[inference_pb2.ChoiceFinished, inference_pb2.GenerationFinished | None]:
    """Shows a reply as it comes, and returns how it ended: None as the second when it broke off.

    Raises:
        ClientError: the cluster refused or failed.
    """
    ending = inference_pb2.ChoiceFinished()
    finished: inference_pb2.GenerationFinished | None = None
    async with contextlib.aclosing(client.stream_generate(request, timeout_s=timeout_s)) as responses:
        async for response in responses:
            reply.show(response)
            if response.HasField("choice_finished"):
                ending = response.choice_finished
            if response.HasField("finished"):
                finished = response.finished
    return ending, finished


def print_cost(
    console: Console, ending: inference_pb2.ChoiceFinished, finished: inference_pb2.GenerationFinished
) -> None:
    """Prints the counts of tokens and, where the request asked for them, the timings."""
    console.print(Text(usage_line(finished.usage, ending.finish_reason), style="dim"), soft_wrap=True)
    if finished.HasField("timings"):
        console.print(timings_table(finished.timings))


class ReplyPrinter:
    """Prints deltas as they come: thinking dim under its own heading, the answer plain, each call on a line of its own,
    ``name(arguments)``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._section = ""
        self._thought = False
        self._in_call = False

    def show(self, response: inference_pb2.StreamGenerateResponse) -> None:
        """Prints the text of one response, if it has any."""
        if response.delta.reasoning_text:
            self._thought = True
            self._write(response.delta.reasoning_text, "Thinking", "dim italic")
        if response.delta.text:
            self._write(response.delta.text, "Answer", "")
        for call in response.delta.tool_calls:
            if call.name:
                self._write(f"{call.name}(", f"Call {call.index + 1}", "")
                self._in_call = True
            self._console.print(Text(call.arguments_json), end="", soft_wrap=True)

    def end(self) -> None:
        """Ends the last line."""
        if self._in_call:
            self._console.print(")", end="")
            self._in_call = False
        if self._section:
            self._console.print()

    def _write(self, text: str, section: str, style: str) -> None:
        if section != self._section:
            self.end()
            self._section = section
            if self._thought:
                self._console.print(Text(section, style="bold"))
        self._console.print(Text(text, style=style), end="", soft_wrap=True)


def usage_line(usage: inference_pb2.Usage, finish_reason: inference_pb2.FinishReason.ValueType) -> str:
    """One line of token counts and, when known, the time to the first token."""
    prompt = [f"{usage.media_token_count} media"] if usage.media_token_count else []
    if usage.cached_token_count:
        prompt.append(f"{usage.cached_token_count} cached")
    line = f"{usage.prompt_token_count} prompt tokens"
    if prompt:
        line += f" ({', '.join(prompt)})"
    line += f", {usage.output_token_count} generated"
    if usage.reasoning_token_count:
        line += f" ({usage.reasoning_token_count} thinking)"
    reason = inference_pb2.FinishReason.Name(finish_reason).removeprefix("FINISH_REASON_").lower()
    line += f", ended by {reason}"
    if usage.HasField("time_to_first_token"):
        line += f", first token after {_seconds(usage.time_to_first_token.ToTimedelta().total_seconds())}"
    return line


def timings_table(timings: inference_pb2.Timings) -> Table:
    """A row a stage: the time it held the request up, its share as a bar, and the time some place worked on it."""
    total = sum(stage.exposed_duration.ToTimedelta().total_seconds() for stage in timings.stages)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage")
    table.add_column("exposed", justify="right")
    table.add_column("", width=BAR_WIDTH, no_wrap=True)
    table.add_column("busy", justify="right")
    for stage in timings.stages:
        exposed = stage.exposed_duration.ToTimedelta().total_seconds()
        table.add_row(
            inference_pb2.Stage.Name(stage.stage).removeprefix("STAGE_").lower(),
            _seconds(exposed),
            Text("#" * (round(BAR_WIDTH * exposed / total) if total > 0 else 0), style="cyan"),
            _seconds(stage.busy_duration.ToTimedelta().total_seconds()) if stage.HasField("busy_duration") else "",
        )
    table.add_row("total", _seconds(total), "", "", style="bold")
    return table


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def _print_error(error: ClientError, address: str, errors: Console) -> None:
    if error.unreachable:
        line = f"nothing answers at {address}: start a cluster with `ernie serve`, or give another --address"
    else:
        line = f"{error.code.name}: {error.message}"
        if error.retry_after_s is not None:
            line += f" - try again in {error.retry_after_s:g} s"
    errors.print(Text(line, style="red"), soft_wrap=True)
