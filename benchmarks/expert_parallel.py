"""Steps of an engine group against the same steps of an engine of one rank that holds all experts.

Both sides load the same random checkpoint; a group's other ranks are processes of their own, and its ranks share the
threads. A side sleeps while the other runs, and rounds alternate. First both generate greedily in float64 from prompts
with and without pictures, and must agree on every token; then steps are timed in the serving dtype. See README.md
beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ours import StepLog
from torch import Tensor

from actors.checkpoint import PRESETS, write_random_checkpoint
from actors.config import EngineReplicaConfig
from actors.engine.config import EngineConfig
from actors.engine.engine import Engine
from actors.engine.group.group_runner import GroupRunner
from actors.engine.group.meeting import Invitation
from actors.engine.plan import StepPlan, StepResult
from actors.engine_group import EngineGroup
from actors.engine_rank import Rank, load_rank, rank_main
from actors.parallel.dispatch import Dispatched, Dispatcher
from actors.parallel.world import Seat
from actors.reports import KvIdentity
from actors.types import AttemptMode, EngineRequest, EngineRole, Grid, MediaKind, MediaSpan, SamplingParams, SequenceKey

HOST = "127.0.0.1"
OWN_PARTS = ("dispatch", "experts", "combine", "rest")
PARTS = ("plan", *OWN_PARTS, "gather")
"""Of a step, as the leader sees it: sending parts, computing its own, waiting for the others' results."""
KINDS = ("prefill", "decode")
EXACT_TOKENS = 8
"""Generated per sequence where both sides must agree."""
KV_CACHE_GIB = 0.5
LEAST_PROMPT = 16


@dataclass(frozen=True, kw_only=True)
class Work:
    """A batch of prompts and how many tokens to generate for each; every other one has a picture in its middle."""

    sequences: int
    prompt: int
    tokens: int
    seed: int

    def has_media(self, sequence: int) -> bool:
        return sequence % 2 == 1

    @property
    def grid(self) -> Grid:
        """Half of the prompt, more or less."""
        return Grid(1, 4, 2 * (self.prompt // 4))


class Stopwatch:
    """Passes dispatches on, and keeps the seconds of each part of the present step."""

    def __init__(self, inner: Dispatcher[Any]) -> None:
        self.inner = inner
        self.seconds = dict.fromkeys(OWN_PARTS, 0.0)
        self._handed_out = 0.0

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Dispatched[Any]:
        started = time.perf_counter()
        sent = self.inner.dispatch(layer, x_TD, expert_ids_TK, weights_TK)
        self._handed_out = time.perf_counter()
        self.seconds["dispatch"] += self._handed_out - started
        return sent

    def combine(self, rows_ND: Tensor, metadata: Any) -> Tensor:
        started = time.perf_counter()
        self.seconds["experts"] += started - self._handed_out
        out_TD = self.inner.combine(rows_ND, metadata)
        self.seconds["combine"] += time.perf_counter() - started
        return out_TD


class TimedRunner:
    """A ``StepRunner`` that keeps the seconds of every step with tokens, by kind and part."""

    def __init__(self, group: GroupRunner, stopwatches: Sequence[Stopwatch]) -> None:
        self.group = group
        self.stopwatches = stopwatches
        self.seconds: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def run(self, plan: StepPlan) -> StepResult:
        for stopwatch in self.stopwatches:
            stopwatch.seconds = dict.fromkeys(OWN_PARTS, 0.0)
        counters = self.group.counters
        before = counters.plan_s, counters.own_s, counters.gather_s
        result = self.group.run(plan)
        if plan.shape.max_tokens:
            after = counters.plan_s, counters.own_s, counters.gather_s
            plan_s, own_s, gather_s = (new - old for new, old in zip(after, before, strict=True))
            parts = {part: sum(watch.seconds[part] for watch in self.stopwatches) for part in OWN_PARTS}
            parts["rest"] = own_s - sum(parts.values())
            self.seconds["decode" if plan.shape.decodes else "prefill"].append(
                {"plan": plan_s, **parts, "gather": gather_s}
            )
        return result


def serve_rank(threads: int, config: EngineReplicaConfig, invitation: Invitation, seat: Seat) -> None:
    """All that the process of another rank does."""
    torch.set_num_threads(threads)
    rank_main(invitation, seat, config, EngineRole.COLOCATED)


def start_rank(
    threads: int, config: EngineReplicaConfig, invitation: Invitation, seat: Seat
) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve_rank, args=(threads, config, invitation, seat), daemon=True)
    process.start()
    return process


class Side:
    """An engine of so many ranks."""

    def __init__(self, directory: Path, dtype: torch.dtype, threads: int, ranks: int) -> None:
        self.threads = max(1, threads // ranks)
        self.group: EngineGroup | None = None
        name = str(dtype).removeprefix("torch.")
        config = EngineReplicaConfig(
            model_dir=str(directory), pool="benchmark", dtype=name, kv_cache_gib=KV_CACHE_GIB, prefix_caching=False
        )
        self.config, role = config, EngineRole.COLOCATED
        torch.set_num_threads(self.threads)
        if ranks == 1:
            self.rank: Rank = load_rank(config, role)
            model = self.rank.runner.model
            assert model.dispatcher is not None
            watch = Stopwatch(model.dispatcher)
            model.dispatcher, watches = watch, [watch]
            group = GroupRunner(self.rank.runner)
        else:
            self.group = EngineGroup([HOST] * ranks, partial(start_rank, self.threads, config))
            self.rank, group = self.group.load(config, role)
            experts: Any = self.rank.runner.need_experts()
            experts.fixed, experts.variable = watches = [Stopwatch(experts.fixed), Stopwatch(experts.variable)]
        self.runner = TimedRunner(group, watches)
        self.loaded = {"bytes": self.rank.loaded.total_bytes, "seconds": self.rank.loaded.seconds}
        """Of the leader."""

    def run(self, work: Work) -> tuple[dict[int, list[int]], dict[str, list[dict[str, float]]]]:
        """Tokens by sequence; by kind and step the seconds by part."""
        torch.set_num_threads(self.threads)
        self.runner.seconds = {kind: [] for kind in KINDS}
        sink = StepLog()
        engine = sink.engine = self._engine(work, sink)
        for sequence in range(work.sequences):
            key = SequenceKey(str(sequence), 0, 0)
            request, embeddings = self._request(work, sequence)
            sink.embeddings[key] = embeddings
            engine.submit(key, request, AttemptMode.COLOCATED)
        # All are here before the first step, so that both sides batch alike.
        engine.start()
        try:
            sink.wait(work.sequences)
        finally:
            engine.stop()
        tokens: dict[int, list[int]] = {sequence: [] for sequence in range(work.sequences)}
        for _, events in sink.steps:
            for event in events:
                tokens[int(event.key.request_id)].append(event.token_id)
        return tokens, self.runner.seconds

    def close(self) -> None:
        if self.group is not None:
            self.group.close()

    def _engine(self, work: Work, sink: StepLog) -> Engine:
        settings = EngineConfig(
            role=EngineRole.COLOCATED,
            max_model_len=work.prompt + work.tokens,
            block_size=self.config.block_size,
            max_num_seqs=work.sequences,
            max_batched_tokens=work.sequences * work.prompt,
            prefix_caching=False,
        )
        rank = self.rank
        identity = KvIdentity(
            fingerprint="", dtype=self.config.dtype, block_size=settings.block_size, switches=rank.rules.switches
        )
        return Engine(settings, rank.config, rank.rules, self.runner, sink, identity=identity)

    def _request(self, work: Work, sequence: int) -> tuple[EngineRequest, list[Tensor]]:
        """Random text, and of a picture random embeddings of about the size of those of text."""
        generator = torch.Generator().manual_seed(work.seed * 1000 + sequence)
        prompt = torch.randint(self.rank.config.im_patch_id, (work.prompt,), generator=generator).tolist()
        media: tuple[MediaSpan, ...] = ()
        embeddings: list[Tensor] = []
        if work.has_media(sequence):
            model, grid, at = self.rank.runner.model, work.grid, work.prompt // 4
            prompt[at : at + grid.tokens] = [self.rank.config.image_token_id] * grid.tokens
            noise_TD = torch.randn(grid.tokens, model.config.hidden_size, generator=generator, dtype=torch.float64)
            embeddings = [(noise_TD * model.embed_VD[:1000].double().std()).to(model.dtype)]
            keys = (sequence.to_bytes(32, "big"),)
            media = (MediaSpan(kind=MediaKind.IMAGE, offset=at, grid=grid, embedding_keys=keys, encoder_address=""),)
        request = EngineRequest(
            prompt_ids=tuple(prompt),
            media=media,
            output_ids=(),
            sampling=SamplingParams(temperature=0.0, max_tokens=work.tokens, ignore_eos=True),
            seed=0,
            salt=b"",
            arrival_s=float(sequence),
            deadline_s=time.time() + 1e6,
            priority=0,
        )
        return request, embeddings


def compare_tokens(directory: Path, threads: int, ranks: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Greedy generation in float64 on both sides, from even and uneven numbers of sequences."""
    compared, equal = 0, True
    with contextlib.ExitStack() as stack:
        sides = [_open(stack, directory, torch.float64, threads, size) for size in (1, ranks)]
        for seed in seeds:
            for sequences in (1, 2 * ranks + 1):
                work = Work(sequences=sequences, prompt=24, tokens=EXACT_TOKENS, seed=seed)
                alone, grouped = (side.run(work)[0] for side in sides)
                compared += sum(map(len, alone.values()))
                equal = equal and alone == grouped
    return {"equal": equal and compared > 0, "tokens_compared": compared}


def time_steps(directory: Path, dtype: torch.dtype, threads: int, ranks: int, works: Sequence[Work]) -> dict[str, Any]:
    """One round per work after one that is not counted; the side that runs first changes from round to round."""
    names = ("ep1", f"ep{ranks}")
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {kind: {name: [] for name in names} for kind in KINDS}
    with contextlib.ExitStack() as stack:
        sides = {
            name: _open(stack, directory, dtype, threads, size) for name, size in zip(names, (1, ranks), strict=True)
        }
        for number, work in enumerate((works[0], *works)):
            for name in names if number % 2 else reversed(names):
                _, seconds = sides[name].run(work)
                if number:
                    rounds["prefill"][name].append(_of_round(seconds["prefill"], sum))
                    rounds["decode"][name].append(_of_round(seconds["decode"], statistics.median))
        found: dict[str, Any] = {"load": {name: side.loaded for name, side in sides.items()}}
    for kind in KINDS:
        rows = rounds[kind]
        found[kind] = {
            name: {f"{part}_ms": statistics.median(row[part] for row in rows[name]) for part in ("step", *PARTS)}
            for name in names
        }
        pairs = zip(rows[names[1]], rows[names[0]], strict=True)
        found[kind]["ratio"] = statistics.median(group["step"] / alone["step"] for group, alone in pairs)
    return found


def _open(stack: contextlib.ExitStack, directory: Path, dtype: torch.dtype, threads: int, ranks: int) -> Side:
    return stack.enter_context(contextlib.closing(Side(directory, dtype, threads, ranks)))


def _of_round(steps: Sequence[dict[str, float]], join: Callable[[Iterable[float]], float]) -> dict[str, float]:
    """Milliseconds by part, and of the whole step."""
    parts = {part: 1e3 * join([step[part] for step in steps]) for part in PARTS}
    return parts | {"step": 1e3 * join([sum(step.values()) for step in steps])}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(set(PRESETS) - {"28b"}), default="tiny", help="of the timed steps")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the timed steps")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of a side; its ranks share them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each sequence")
    parser.add_argument("--tokens", type=int, default=16, help="generated for each sequence")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.ranks < 2 or options.rounds < 1 or options.tokens < 2 or options.sequences < 1:
        parser.error("a group has two ranks or more; one round, one sequence and two tokens are the least to measure")
    if options.prompt < LEAST_PROMPT:
        parser.error(f"a prompt has {LEAST_PROMPT} tokens or more")
    return options


def print_report(found: dict[str, Any]) -> None:
    names = ("ep1", f"ep{found['ranks']}")
    print(f"{found['tokens_compared']} tokens in float64 {'agree' if found['equal'] else 'DIFFER'}")
    print(f"{'ms':>14}" + "".join(f"{part:>10}" for part in ("step", *PARTS)))
    for kind in KINDS:
        for name in names:
            values = "".join(f"{found[kind][name][f'{part}_ms']:10.2f}" for part in ("step", *PARTS))
            print(f"{kind:>8} {name:>5}{values}")
        print(f"{kind:>8} takes {found[kind]['ratio']:.2f} times as long on {found['ranks']} ranks")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    found: dict[str, Any] = {
        name: getattr(options, name) for name in ("preset", "dtype", "ranks", "threads", "rounds", "sequences")
    }
    with tempfile.TemporaryDirectory(prefix="ernie-bench-") as folder:
        exact, timed = Path(folder) / "exact", Path(folder) / "timed"
        write_random_checkpoint(exact, "tiny")
        found |= compare_tokens(exact, options.threads, options.ranks, seeds=range(2))
        write_random_checkpoint(timed, options.preset, dtype=options.dtype)
        works = [
            Work(sequences=options.sequences, prompt=options.prompt, tokens=options.tokens, seed=100 + number)
            for number in range(options.rounds)
        ]
        found["work"] = asdict(works[0])
        found |= time_steps(timed, getattr(torch, options.dtype), options.threads, options.ranks, works)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_report(found)
    return 0 if found["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
