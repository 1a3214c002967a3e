"""Steps of the model on a group of ranks against the same steps on one rank that holds all experts.

Both sides load the same random checkpoint, each rank in a process of its own with its share of the threads; a side
sleeps while the other runs, and rounds alternate. First both generate greedily in float64 from prompts with and without
media, and must agree on every token; then steps are timed in the serving dtype. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.checkpoint import PRESETS, write_random_checkpoint
from actors.ernie.bank import empty_bank_buffer
from actors.ernie.text import LanguageModel
from actors.ernie.weights import Checkpoint, load_language
from actors.parallel.dispatch import Dispatched, Dispatcher
from actors.parallel.group import ExpertGroup, GroupStep
from actors.parallel.group_dispatch import AllToAllDispatcher, FixedShapeDispatcher
from actors.parallel.layout import ExpertShare, even_placement
from actors.parallel.world import MeetingPlace, World, WorldConfig, join_world

HOST = "127.0.0.1"
PARTS = ("dispatch", "experts", "combine", "rest")
"""Of a step. ``plan`` and ``gather`` are the engine group's, which does not run these steps yet; they belong here."""
KINDS = ("prefill", "decode")
EXACT_TOKENS = 8
"""Generated per sequence where both sides must agree."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A batch of prompts and how many tokens to generate for each. Sequence i lives on rank i modulo ranks."""

    sequences: int
    prompt: int
    tokens: int
    seed: int

    def has_media(self, sequence: int) -> bool:
        """Every other one; with two ranks one of them never has vision tokens."""
        return sequence % 2 == 1


class Stopwatch:
    """Passes dispatches on, and keeps the seconds of each part of the present step."""

    def __init__(self, inner: Dispatcher[Any]) -> None:
        self.inner = inner
        self.seconds = dict.fromkeys(PARTS, 0.0)
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


class SequenceCaches:
    """Keys and values of the sequences of one rank, whose next tokens lie end to end in a batch."""

    def __init__(self, sequences: int) -> None:
        self.kept: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(sequences)]
        self.tokens_each = 0

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        out_THd = torch.empty_like(q_THd)
        for number, kept in enumerate(self.kept):
            span = slice(number * self.tokens_each, (number + 1) * self.tokens_each)
            k, v = k_TKd[span], v_TKd[span]
            if layer in kept:
                k, v = torch.cat([kept[layer][0], k]), torch.cat([kept[layer][1], v])
            kept[layer] = k, v
            mask = torch.ones(self.tokens_each, k.shape[0], dtype=torch.bool).tril(k.shape[0] - self.tokens_each)
            parts = (x.transpose(0, 1).unsqueeze(0) for x in (q_THd[span], k, v))
            out = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)
            out_THd[span] = out.squeeze(0).transpose(0, 1)
        return out_THd


class Rank:
    """One rank of a side: a model, its group if there is one, and the steps."""

    def __init__(self, directory: str, dtype: torch.dtype, world: World | None) -> None:
        with Checkpoint(directory) as checkpoint:
            text = checkpoint.config.text
            share = None
            if world is not None:
                sparse, experts = text.sparse_layers, text.moe_num_experts
                placement = even_placement(text.num_hidden_layers, sparse, experts, world.size)
                share = ExpertShare(placement, world.rank)
            storage = empty_bank_buffer(text, dtype, share=share)
            quiet = {"progress": lambda _done, _total: None}
            self.model: LanguageModel = load_language(
                checkpoint, checkpoint.config, dtype=dtype, bank_storage=storage, share=share, **quiet
            )
            self.loaded = {"bytes": checkpoint.report.total_bytes, "seconds": checkpoint.report.seconds}
            self.limit = checkpoint.config.im_patch_id
        self.group: ExpertGroup | None = None
        self.rank, self.ranks = (0, 1) if world is None else (world.rank, world.size)
        forms: dict[str, Dispatcher[Any]]
        if world is None or share is None:
            assert self.model.dispatcher is not None
            forms = dict.fromkeys(KINDS, self.model.dispatcher)
        else:
            self.group = ExpertGroup(world, share.placement)
            forms = {"prefill": AllToAllDispatcher(self.group), "decode": FixedShapeDispatcher(self.group)}
        self.forms = {kind: Stopwatch(form) for kind, form in forms.items()}
        self.steps = 0

    def run(self, work: Work) -> dict[str, Any]:
        """Greedy tokens by sequence, and the seconds of every step by kind and part."""
        mine = list(range(self.rank, work.sequences, self.ranks))
        most = -(-work.sequences // self.ranks)
        caches = SequenceCaches(len(mine))
        media_T = torch.arange(work.prompt) // 4 % 2 == 0
        vision_T = torch.cat([media_T & work.has_media(s) for s in mine] or [media_T[:0]])
        x_TD = torch.cat([self._prompt(work, s, media_T) for s in mine] or [self._nothing()])
        tokens: list[list[int]] = [[] for _ in mine]
        seconds: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for step in range(work.tokens):
            kind, length, first = ("prefill", work.prompt, 0) if step == 0 else ("decode", 1, work.prompt + step - 1)
            has_vision = step == 0 and work.sequences > 1
            positions_3T = torch.arange(first, first + length).repeat(len(mine)).expand(3, -1)
            caches.tokens_each = length
            stopwatch = self.forms[kind]
            stopwatch.seconds = dict.fromkeys(PARTS, 0.0)
            self.model.dispatcher = stopwatch
            if self.group is not None:
                self.group.begin_step(GroupStep(number=self.steps, most_tokens=most * length, vision=has_vision))
            self.steps += 1
            started = time.perf_counter()
            h_TD = self.model.forward(x_TD, positions_3T, vision_T if has_vision else None, caches)
            logits = self.model.logits(h_TD[length - 1 :: length])[:, : self.limit]
            taken = time.perf_counter() - started
            stopwatch.seconds["rest"] = taken - sum(stopwatch.seconds.values())
            seconds[kind].append(dict(stopwatch.seconds))
            chosen = logits.argmax(-1)
            for sequence, token in zip(tokens, chosen.tolist(), strict=True):
                sequence.append(token)
            x_TD = self.model.embed(chosen)
        return {"tokens": dict(zip(mine, tokens, strict=True)), "seconds": seconds}

    def _prompt(self, work: Work, sequence: int, media_T: Tensor) -> Tensor:
        """Random text, and random embeddings of about their size where media are."""
        generator = torch.Generator().manual_seed(work.seed * 1000 + sequence)
        x_TD = self.model.embed(torch.randint(self.limit, (work.prompt,), generator=generator))
        media_TD = torch.randn(x_TD.shape, generator=generator, dtype=torch.float64).to(x_TD.dtype) * x_TD.std()
        return torch.where((media_T & work.has_media(sequence)).unsqueeze(1), media_TD, x_TD)

    def _nothing(self) -> Tensor:
        return self.model.embed(torch.empty(0, dtype=torch.int64))


def serve_rank(
    end: Connection, directory: str, dtype: torch.dtype, threads: int, rank: int, ranks: int, meeting: tuple[str, str]
) -> None:
    """A rank's process: answers with what loading took, then with the result of each ``Work``, until None comes."""
    torch.set_num_threads(threads)
    world: World | None = None
    try:
        if ranks > 1:
            address, name = meeting
            config = WorldConfig(join_timeout_s=300, collective_timeout_s=300)
            device = torch.device("cpu")
            world = join_world(address, name=name, rank=rank, size=ranks, host=HOST, device=device, config=config)
        with torch.inference_mode():
            served = Rank(directory, dtype, world)
            end.send(served.loaded)
            while (work := end.recv()) is not None:
                end.send(served.run(work))
    except Exception:
        end.send(traceback.format_exc())
    finally:
        if world is not None:
            world.close()


class Side:
    """The processes of one side."""

    def __init__(self, directory: Path, dtype: torch.dtype, threads: int, ranks: int) -> None:
        self.place = MeetingPlace(HOST)
        context = multiprocessing.get_context("spawn")
        self.processes, self.ends = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            share = max(1, threads // ranks)
            meeting = (self.place.address, uuid.uuid5(uuid.NAMESPACE_OID, self.place.address).hex)
            arguments = (theirs, str(directory), dtype, share, rank, ranks, meeting)
            process = context.Process(target=serve_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.ends.append(ours)
        self.loaded: list[dict[str, float]] = self._answers()

    def run(self, work: Work) -> tuple[dict[int, list[int]], dict[str, list[dict[str, float]]]]:
        """Tokens by sequence; by kind and step the mean seconds of the ranks, which wait for each other, by part."""
        for end in self.ends:
            end.send(work)
        answers = self._answers()
        tokens = {sequence: found for answer in answers for sequence, found in answer["tokens"].items()}
        seconds = {
            kind: [
                {part: statistics.mean(step[part] for step in steps) for part in PARTS}
                for steps in zip(*(answer["seconds"][kind] for answer in answers), strict=True)
            ]
            for kind in KINDS
        }
        return tokens, seconds

    def close(self) -> None:
        for end, process in zip(self.ends, self.processes, strict=True):
            end.send(None)
            process.join()
        self.place.close()

    def _answers(self) -> list[Any]:
        answers = [end.recv() for end in self.ends]
        for answer in answers:
            if isinstance(answer, str):
                raise RuntimeError(f"a rank failed:\n{answer}")
        return answers


def compare_tokens(directory: Path, threads: int, ranks: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Greedy generation in float64 on both sides, from even and uneven numbers of sequences."""
    compared, equal = 0, True
    sides = [Side(directory, torch.float64, threads, size) for size in (1, ranks)]
    for seed in seeds:
        for sequences in (1, 2 * ranks + 1):
            work = Work(sequences=sequences, prompt=24, tokens=EXACT_TOKENS, seed=seed)
            alone, grouped = (side.run(work)[0] for side in sides)
            compared += sum(map(len, alone.values()))
            equal = equal and alone == grouped
    for side in sides:
        side.close()
    return {"equal": equal and compared > 0, "tokens_compared": compared}


def time_steps(directory: Path, dtype: torch.dtype, threads: int, ranks: int, works: Sequence[Work]) -> dict[str, Any]:
    """One round per work after one that is not counted; the side that runs first changes from round to round."""
    names = ("ep1", f"ep{ranks}")
    sides = {name: Side(directory, dtype, threads, size) for name, size in zip(names, (1, ranks), strict=True)}
    medians: dict[str, dict[str, list[dict[str, float]]]] = {kind: {name: [] for name in names} for kind in KINDS}
    for number, work in enumerate((works[0], *works)):
        for name in names if number % 2 else reversed(names):
            _, seconds = sides[name].run(work)
            if number:
                for kind in KINDS:
                    steps = seconds[kind]
                    parts = {part: 1e3 * statistics.median(step[part] for step in steps) for part in PARTS}
                    parts["step"] = 1e3 * statistics.median(sum(step.values()) for step in steps)
                    medians[kind][name].append(parts)
    found: dict[str, Any] = {"load": {name: side.loaded for name, side in sides.items()}}
    for kind in KINDS:
        rows = medians[kind]
        found[kind] = {
            name: {f"{part}_ms": statistics.median(row[part] for row in rows[name]) for part in ("step", *PARTS)}
            for name in names
        }
        pairs = zip(rows[names[1]], rows[names[0]], strict=True)
        found[kind]["ratio"] = statistics.median(group["step"] / alone["step"] for group, alone in pairs)
    for side in sides.values():
        side.close()
    return found


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
    if options.ranks < 2 or options.rounds < 1 or options.tokens < 2 or options.prompt < 1 or options.sequences < 1:
        parser.error("a group has two ranks or more; one round, one sequence and two tokens are the least to measure")
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
