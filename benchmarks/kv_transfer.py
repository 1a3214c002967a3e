"""How much of a transfer of KV is hidden behind the prefill it belongs to, between two engine processes.

A prompt is computed by one engine and decoded by another. A chunk of it is *on its way* from the moment its keys and
values are in the cache until the decode engine has verified it and written it to its own. The transfer time of a prompt
is the time during which any of its chunks is on its way; the part of it after the prompt's first token was drawn is
*exposed*, and ``hidden`` is the share that is not. ``alone_ms`` is the transfer time where the prompt was computed
before: it has the machine to itself. Cold prompts, and prompts computed before, take turns.

The bytes that both engines count must be those of the model's arithmetic, layers x 2 x KV heads x head width x itemsize
for each token the decode engine lacked; the exit status is 1 if they are not. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from actors.checkpoint import PRESETS, write_random_checkpoint
from actors.config import EngineReplicaConfig
from actors.engine.events import ComputedChunk
from actors.engine_replica import EngineReplica
from actors.ernie.weights import Checkpoint
from actors.reports import EngineInfo
from actors.types import AttemptMode, EngineRequest, EngineRole, SamplingParams, SequenceKey, TokenEvent
from actors.wire.kv_receiving_pair import ReceivingPair
from cluster.router.link import AttemptError, AttemptEvent, EngineLink

HOST = "127.0.0.1"
BLOCK = 16
KV_CACHE_GIB = 0.5
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Noted:
    """One end of a chunk, on the clock that all processes of a machine share."""

    request_id: str
    index: int
    at_s: float


@dataclass(frozen=True)
class Report:
    """What an engine process has to tell of the transfers since the last report."""

    computed: list[Noted]
    verified: list[Noted]
    sent_bytes: int
    received_bytes: int


class NoPlanner:
    """A handle of a planner that gives a role, orders nothing and keeps nobody."""

    def __init__(self, role: EngineRole) -> None:
        self.assign_role = _Answer(role)
        self.may_leave = _Answer(True)

    def __getattr__(self, name: str) -> _Answer:
        return _Answer(None)


class _Answer:
    def __init__(self, value: Any) -> None:
        self._value = value

    async def remote(self, *_: object) -> Any:
        return self._value


class Notes:
    """Stands between an engine and its transfers, on whichever side."""

    def __init__(self, replica: EngineReplica) -> None:
        self.computed: list[Noted] = []
        self.verified: list[Noted] = []
        self._replica = replica
        self._counted = (0, 0)
        push, place = replica.push, ReceivingPair._place

        def noting_push(chunk: ComputedChunk) -> None:
            self.computed.append(Noted(chunk.key.request_id, chunk.index, time.monotonic()))
            push(chunk)

        def noting_place(pair: ReceivingPair, entry: Any, chunk: Any, sent: Any) -> None:
            self.verified.append(Noted(entry.key.request_id, sent.chunk, time.monotonic()))
            place(pair, entry, chunk, sent)

        replica.push = noting_push  # type: ignore[method-assign]
        ReceivingPair._place = noting_place  # type: ignore[method-assign]

    def report(self) -> Report:
        counters = (self._replica._sender.counters.sent_bytes, self._replica._receiver.counters.received_bytes)
        sent, received = (now - before for now, before in zip(counters, self._counted, strict=True))
        self._counted = counters
        made = Report(self.computed, self.verified, sent, received)
        self.computed, self.verified = [], []
        return made


def serve(config: EngineReplicaConfig, role: EngineRole, threads: int, pipe: Connection) -> None:
    """An engine process: tells where it is, then a report for each message that comes."""
    torch.set_num_threads(threads)
    asyncio.run(_serve(config, role, pipe))


async def _serve(config: EngineReplicaConfig, role: EngineRole, pipe: Connection) -> None:
    replica = EngineReplica.__new__(EngineReplica)
    await replica.__init__(config, NoPlanner(role), None, HOST)  # type: ignore[func-returns-value,misc]
    notes = Notes(replica)
    pipe.send(replica._info)
    with contextlib.suppress(EOFError):
        while True:
            await asyncio.to_thread(pipe.recv)
            pipe.send(notes.report())
    await replica.close()


class EngineProcess:
    """An engine in a process of its own, and a link to it."""

    def __init__(self, config: EngineReplicaConfig, role: EngineRole, threads: int) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=serve, args=(config, role, threads, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.link: EngineLink

    async def __aenter__(self) -> EngineProcess:
        info: EngineInfo = await asyncio.to_thread(self._pipe.recv)
        ready = asyncio.Event()
        self.link = EngineLink(
            info, "benchmark", lost_after_s=60.0, on_load=lambda _: ready.set(), on_lost=lambda _: None
        )
        self.link.start()
        await asyncio.wait_for(ready.wait(), PATIENCE_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.link.close()
        self._pipe.close()
        await asyncio.to_thread(self._process.join, 30.0)
        self._process.kill()

    async def report(self) -> Report:
        self._pipe.send(None)
        report: Report = await asyncio.to_thread(self._pipe.recv)
        return report


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """One prompt from one engine to the other."""

    chunks: int
    on_way_ms: float
    exposed_ms: float
    sent_bytes: int
    received_bytes: int

    @property
    def hidden(self) -> float:
        return 1.0 - self.exposed_ms / self.on_way_ms


class Bench:
    """Two engines: one that computes prompts, and whole replies too, and one that decodes."""

    def __init__(self, prefill: EngineProcess, decode: EngineProcess, token_bytes: int, vocabulary: int) -> None:
        self._prefill = prefill
        self._decode = decode
        self._token_bytes = token_bytes
        self._vocabulary = vocabulary
        self._random = random.Random(0)
        self._count = 0
        self.wrong_bytes: list[str] = []

    def prompt(self, tokens: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(10, self._vocabulary) for _ in range(tokens))

    async def compute(self, prompt: tuple[int, ...]) -> None:
        """Where prompts are computed, which remembers it."""
        key, request, events = self._request(prompt, 1)
        self._prefill.link.submit(key, request, AttemptMode.COLOCATED, None, events)
        await _last_token(events, 1)
        self._prefill.link.forget(key, cancel=False)

    async def transfer(self, prompt: tuple[int, ...], lacking: int) -> Transferred:
        """Decodes where ``lacking`` tokens of the prompt are not held."""
        prefill, decode = self._prefill, self._decode
        key, request, events = self._request(prompt, 2)
        decode.link.submit(key, request, AttemptMode.DECODE, prefill.link.info, events)
        prefill.link.submit(key, request, AttemptMode.PREFILL, decode.link.info, events)
        await _last_token(events, 2)
        for process in (prefill, decode):
            process.link.forget(key, cancel=False)
        sender, receiver = await prefill.report(), await decode.report()
        made = _measured(key.request_id, sender, receiver)
        expected = lacking * self._token_bytes
        if not made.sent_bytes == made.received_bytes == expected:
            self.wrong_bytes.append(
                f"{made.sent_bytes} bytes sent and {made.received_bytes} received of a prompt of {len(prompt)} tokens, "
                f"{lacking} of which the decode engine lacked: {expected} expected"
            )
        return made

    def _request(
        self, prompt: tuple[int, ...], max_tokens: int
    ) -> tuple[SequenceKey, EngineRequest, asyncio.Queue[AttemptEvent]]:
        self._count += 1
        request = EngineRequest(
            prompt_ids=prompt,
            media=(),
            output_ids=(),
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
            seed=0,
            salt=b"",
            arrival_s=time.time(),
            deadline_s=time.time() + PATIENCE_S,
            priority=0,
        )
        return SequenceKey(f"prompt-{self._count}", 0, 0), request, asyncio.Queue()


async def _last_token(events: asyncio.Queue[AttemptEvent], count: int) -> None:
    tokens = set()
    async with asyncio.timeout(PATIENCE_S):
        while len(tokens) < count:
            event = await events.get()
            if isinstance(event, AttemptError):
                raise event.error
            if isinstance(event, TokenEvent):
                tokens.add(event.index)


def _measured(request_id: str, sender: Report, receiver: Report) -> Transferred:
    computed = {note.index: note.at_s for note in sender.computed if note.request_id == request_id}
    verified = {note.index: note.at_s for note in receiver.verified if note.request_id == request_id}
    if computed.keys() != verified.keys():
        raise RuntimeError(f"chunks {sorted(computed)} were computed and {sorted(verified)} verified")
    on_way_s, until = 0.0, 0.0
    for index in sorted(computed):
        on_way_s += max(0.0, verified[index] - max(computed[index], until))
        until = max(until, verified[index])
    return Transferred(
        chunks=len(computed),
        on_way_ms=1e3 * on_way_s,
        exposed_ms=1e3 * (until - max(computed.values())),
        sent_bytes=sender.sent_bytes,
        received_bytes=receiver.received_bytes,
    )


async def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    with Checkpoint(directory) as checkpoint:
        text = checkpoint.config.text
    itemsize = getattr(torch, options.dtype).itemsize
    token_bytes = text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim * itemsize
    config = EngineReplicaConfig(
        model_dir=str(directory),
        pool="benchmark",
        dtype=options.dtype,
        kv_cache_gib=KV_CACHE_GIB,
        **({} if options.max_batched_tokens is None else {"max_batched_tokens": options.max_batched_tokens}),
    )
    found: dict[str, Any] = {"token_bytes": token_bytes, "prompts": {}}
    # What computes prompts also computes whole replies here, so that a prompt can be in its cache and in no other.
    sides = (EngineProcess(config, role, options.threads) for role in (EngineRole.COLOCATED, EngineRole.DECODE))
    async with contextlib.AsyncExitStack() as stack:
        prefill, decode = [await stack.enter_async_context(side) for side in list(sides)]
        bench = Bench(prefill, decode, token_bytes, text.vocab_size // 2)
        await bench.transfer(bench.prompt(BLOCK), BLOCK)  # The pair is built.
        for tokens in options.prompts:
            rounds: list[dict[str, Transferred]] = []
            for number in range(options.rounds):
                rounds.append(await _round(bench, tokens, cold_first=number % 2 == 0))
            found["prompts"][tokens] = _summary(rounds)
    found["wrong_bytes"] = bench.wrong_bytes
    return found


async def _round(bench: Bench, tokens: int, *, cold_first: bool) -> dict[str, Transferred]:
    known, cold = bench.prompt(tokens), bench.prompt(tokens)
    await bench.compute(known)
    made: dict[str, Transferred] = {}
    for kind in ("cold", "alone") if cold_first else ("alone", "cold"):
        made[kind] = await bench.transfer(cold if kind == "cold" else known, tokens)
    # The decode engine holds whole blocks of what it was sent: only what follows them travels.
    held = tokens // BLOCK * BLOCK
    made["again"] = await bench.transfer(cold + bench.prompt(2 * BLOCK), tokens - held + 2 * BLOCK)
    return made


def _summary(rounds: Sequence[dict[str, Transferred]]) -> dict[str, Any]:
    cold = [made["cold"] for made in rounds]
    return {
        "hidden": statistics.median(one.hidden for one in cold),
        "on_way_ms": statistics.median(one.on_way_ms for one in cold),
        "exposed_ms": statistics.median(one.exposed_ms for one in cold),
        "alone_ms": statistics.median(made["alone"].on_way_ms for made in rounds),
        "rounds": [{kind: asdict(one) for kind, one in made.items()} for made in rounds],
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(set(PRESETS) - {"28b"}), default="mid")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--model", type=Path, help="directory of the checkpoint, written if it is empty")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048, 4096], help="tokens")
    parser.add_argument("--max-batched-tokens", type=int, help="of a step; the engine's default if not given")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1 or min(options.prompts) < BLOCK:
        parser.error(f"one round and one thread are the least, and a prompt has {BLOCK} tokens or more")
    return options


def print_report(found: dict[str, Any]) -> None:
    print(f"{'tokens':>8}{'hidden':>9}{'on its way ms':>15}{'exposed ms':>12}{'alone ms':>10}{'chunks':>8}")
    for tokens, row in found["prompts"].items():
        chunks = row["rounds"][-1]["cold"]["chunks"]
        times = f"{row['on_way_ms']:15.1f}{row['exposed_ms']:12.1f}{row['alone_ms']:10.1f}"
        print(f"{tokens:>8}{row['hidden']:9.1%}{times}{chunks:8}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="ernie-bench-") as folder:
        directory = options.model or Path(folder)
        if not any(directory.glob("*")):
            write_random_checkpoint(directory, options.preset, dtype=options.dtype)
        settings = {name: getattr(options, name) for name in ("preset", "dtype", "threads", "max_batched_tokens")}
        found = settings | asyncio.run(measure(directory, options))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_report(found)
    for line in found["wrong_bytes"]:
        print(line, file=sys.stderr)
    return 1 if found["wrong_bytes"] else 0


if __name__ == "__main__":
    sys.exit(main())
