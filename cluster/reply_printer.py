"""Replies on a terminal: text as it comes, what it cost, and where the time went."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors.sizes import told_seconds
from cluster.client import Delta, Event, FinishReason, Reply, Timings, Usage

BAR_WIDTH = 30


class ReplyPrinter:
    """Prints deltas as they come: thinking dim under its own heading, the answer plain, each call on a line of its own,
    ``name(arguments)``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._section = ""
        self._thought = False
        self._in_call = False

    def show(self, event: Event) -> None:
        """Prints the text of one event, if it has any."""
        if not isinstance(event, Delta):
            return
        if event.reasoning:
            self._thought = True
            self._write(event.reasoning, "Thinking", "dim italic")
        if event.text:
            self._write(event.text, "Answer", "")
        for call in event.tool_calls:
            if call.name:
                self._write(f"{call.name}(", f"Call {call.index + 1}", "")
                self._in_call = True
            self._console.print(Text(call.arguments), end="", soft_wrap=True)

    def end(self) -> None:
        """Ends the last line. What comes next has its heading again."""
        if self._in_call:
            self._console.print(")", end="")
            self._in_call = False
        if self._section:
            self._console.print()
            self._section = ""

    def _write(self, text: str, section: str, style: str) -> None:
        if section != self._section:
            self.end()
            self._section = section
            if self._thought:
                self._console.print(Text(section, style="bold"))
        self._console.print(Text(text, style=style), end="", soft_wrap=True)


def print_cost(console: Console, reply: Reply) -> None:
    """Prints the counts of tokens and, where the request asked for them, the timings."""
    console.print(Text(usage_line(reply.usage, reply.finish_reason), style="dim"), soft_wrap=True)
    if reply.timings is not None:
        console.print(timings_table(reply.timings))


def usage_line(usage: Usage, finish_reason: FinishReason) -> str:
    """One line of token counts and, when known, the time to the first token."""
    prompt = [f"{usage.media_tokens} media"] if usage.media_tokens else []
    if usage.cached_tokens:
        prompt.append(f"{usage.cached_tokens} cached")
    line = f"{usage.prompt_tokens} prompt tokens"
    if prompt:
        line += f" ({', '.join(prompt)})"
    line += f", {usage.output_tokens} generated"
    if usage.reasoning_tokens:
        line += f" ({usage.reasoning_tokens} thinking)"
    line += f", ended by {finish_reason}"
    if usage.time_to_first_token_s is not None:
        line += f", first token after {told_seconds(usage.time_to_first_token_s)}"
    return line


def timings_table(timings: Timings) -> Table:
    """A row a stage: the time it held the request up, its share as a bar, and the time some place worked on it."""
    total = sum(timings.exposed.values())
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage")
    table.add_column("exposed", justify="right")
    table.add_column("", width=BAR_WIDTH, no_wrap=True)
    table.add_column("busy", justify="right")
    for stage, exposed in timings.exposed.items():
        table.add_row(
            stage,
            told_seconds(exposed),
            Text("#" * (round(BAR_WIDTH * exposed / total) if total > 0 else 0), style="cyan"),
            told_seconds(timings.busy[stage]) if stage in timings.busy else "",
        )
    table.add_row("total", told_seconds(total), "", "", style="bold")
    return table
