"""Our engine against transformers ``generate`` on the same weights: decode, prefill and image prompts.

Runs are interleaved (ours, theirs; theirs, ours; ...), each side in a process of its own that sleeps meanwhile. Ours
goes through the real engine: submit, scheduler, paged cache, sampler, sink; an image prompt also through the vision
tower. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ours import Ours
from peer import Peer
from scenarios import Outcome, Scenario, make_prompts
from torch import Tensor

from actors.checkpoint import PRESETS, write_random_checkpoint
from actors.parallel.dispatch import Dispatched, Dispatcher
from actors.types import Grid

SCENARIOS = {
    "decode_b1": Scenario(batch=1, prompt=64, decode=True),
    "decode_b8": Scenario(batch=8, prompt=64, decode=True),
    "decode_b32": Scenario(batch=32, prompt=64, decode=True),
    "prefill_512": Scenario(prompt=512),
    "image_prompt": Scenario(prompt=64, grid=Grid(1, 32, 32)),
}
BANDWIDTH_BYTES = 1 << 30
NEAR_TIE = 0.5
"""First tokens that differ are a near-tie if transformers' logits of both are within this many of their standard
deviations. Measured on the mid preset, bfloat16 moves each logit by 0.09 of that from float32's, on either side alike,
so the gap between two logits differs by 0.17 between the sides; this is three times as much. A wrong token is off by
4."""


@dataclass(kw_only=True)
class Measured:
    """Rounds of one scenario so far."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    same: int = 0
    near_ties: int = 0
    different: int = 0

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios: what the machine did to both sides of a round cancels."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    def add(self, ours: Outcome, theirs: Outcome) -> None:
        self.ours.append(ours.tokens_per_s)
        self.theirs.append(theirs.tokens_per_s)
        assert theirs.logits_BV is not None
        for token, logits_V, other in zip(ours.first, theirs.logits_BV, theirs.first, strict=True):
            if token == other:
                self.same += 1
            elif logits_V[other] - logits_V[token] <= NEAR_TIE * logits_V.std():
                self.near_ties += 1
            else:
                self.different += 1


class CountingDispatcher:
    """Counts how many experts had rows in each call it passes on."""

    def __init__(self, inner: Dispatcher[Any]) -> None:
        self.inner = inner
        self.hit: list[tuple[int, int]] = []
        """(tokens, experts with rows)."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Dispatched[Any]:
        sent = self.inner.dispatch(layer, x_TD, expert_ids_TK, weights_TK)
        self.hit.append((x_TD.shape[0], int((sent.rows_per_expert_X > 0).sum())))
        return sent

    def combine(self, rows_ND: Tensor, metadata: Any) -> Tensor:
        return self.inner.combine(rows_ND, metadata)


def decode_step_bytes(ours: Ours, scenario: Scenario, tokens: int) -> tuple[float, float]:
    """Bytes a decode step must read at least, and the experts per layer it touches, counted in a run of its own.

    Every weight that is no expert once (the embedding only as the head), the experts that have rows, and the context's
    keys and values.
    """
    model = ours.model
    assert model.dispatcher is not None
    counting = CountingDispatcher(model.dispatcher)
    model.dispatcher = counting
    try:
        ours.run(scenario, make_prompts(scenario, ours.config, seed=1), tokens)
    finally:
        model.dispatcher = counting.inner
    hits = [experts for count, experts in counting.hit if count == scenario.batch]
    parameters = model.parameters_by_name()
    dense = sum(p.nbytes for name, p in parameters.items() if ".experts." not in name and ".embed_tokens." not in name)
    dense += 0 if "lm_head.weight" in parameters else model.head_VD.nbytes
    expert = sum(p[0].nbytes for name, p in parameters.items() if ".experts." in name)  # of all layers
    context = scenario.batch * (scenario.prompt + tokens / 2) * ours.token_bytes
    per_layer = statistics.mean(hits) if hits else 0.0
    return dense + per_layer * expert + context, per_layer


def read_bandwidth(data: Tensor) -> float:
    """Bytes per second of summing ``data``, the best of three."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - started)
    return data.nbytes / min(seconds)


def compare(
    ours: Ours, theirs: Peer, names: Sequence[str], *, rounds: int, tokens: int
) -> tuple[dict[str, Measured], float]:
    """Interleaved rounds after one of warm-up, and the best memory bandwidth of all rounds, bytes per second."""
    results = {name: Measured() for name in names}
    bandwidth = 0.0
    data = torch.ones(BANDWIDTH_BYTES // 4)
    for number in range(rounds + 1):
        for name in names:
            scenario = SCENARIOS[name]
            prompts = make_prompts(scenario, ours.config, seed=1000 * number + len(name))
            count = tokens + 1 if scenario.decode else 1
            sides = (ours, theirs) if number % 2 else (theirs, ours)
            outcomes = {side: side.run(scenario, prompts, count) for side in sides}
            if number:
                results[name].add(outcomes[ours], outcomes[theirs])
        bandwidth = max(bandwidth, read_bandwidth(data))
        _say(f"round {number} of {rounds} done" if number else "warmed up")
    return results, bandwidth


def report(
    ours: Ours, results: dict[str, Measured], bandwidth: float, *, tokens: int, options: dict[str, Any]
) -> dict[str, Any]:
    """The object that ``--json`` prints."""
    out: dict[str, Any] = {
        name: {
            "ours": statistics.median(found.ours),
            "transformers": statistics.median(found.theirs),
            "ratio": found.ratio,
        }
        for name, found in results.items()
    }
    roofline = {}
    for name in results:
        scenario = SCENARIOS[name]
        if scenario.decode:
            size, experts = decode_step_bytes(ours, scenario, tokens)
            seconds = scenario.batch / out[name]["ours"]
            roofline[name] = {
                "fraction": size / seconds / bandwidth,
                "bytes_per_step": round(size),
                "experts_per_layer": experts,
            }
    return out | {
        "ratio_is": "median of the rounds' ratios",
        "first_tokens_agree": not any(found.different for found in results.values()),
        "first_tokens": {
            name: {"same": found.same, "near_ties": found.near_ties, "different": found.different}
            for name, found in results.items()
        },
        "read_bandwidth_gb_s": bandwidth / 1e9,
        "roofline": roofline,
        "forms": ours.forms,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        **options,
    }


def print_report(found: dict[str, Any]) -> None:
    print(f"{'':14} {'ours':>9} {'transf.':>9}  ratio   memory roofline")
    for name in SCENARIOS:
        if name in found:
            row, roof = found[name], found["roofline"].get(name)
            memory = f"{roof['fraction']:.0%} ({roof['experts_per_layer']:.1f} experts a layer)" if roof else ""
            print(f"{name:14} {row['ours']:9.1f} {row['transformers']:9.1f}  {row['ratio']:5.2f}   {memory}")
    print(f"tokens/s, medians of {found['rounds']} rounds; ratio: {found['ratio_is']}; {found['threads']} threads")
    counts = [sum(row[kind] for row in found["first_tokens"].values()) for kind in ("same", "near_ties", "different")]
    print("first tokens: {} the same, {} near-ties, {} different".format(*counts))
    print(f"memory read at {found['read_bandwidth_gb_s']:.1f} GB/s; forms: {found['forms']}; {found['versions']}")


@contextmanager
def checkpoint(path: Path | None, preset: str, dtype: str) -> Iterator[Path]:
    """A random checkpoint at ``path``, written if there is none yet, or a temporary one."""
    if path is None:
        with tempfile.TemporaryDirectory(prefix="ernie-bench-") as directory:
            write_random_checkpoint(directory, preset=preset, dtype=dtype)
            yield Path(directory)
        return
    if not (path / "config.json").exists():
        _say(f"writing a random {preset} checkpoint to {path}")
        write_random_checkpoint(path, preset=preset, dtype=dtype)
    yield path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint directory, written if empty (default: a temporary one)")
    parser.add_argument("--preset", default="mid", choices=sorted(PRESETS), help="of a checkpoint to write")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="decode steps of a run")
    parser.add_argument("--only", action="append", choices=list(SCENARIOS), help="may be given several times")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--profile", action="store_true", help="print where the time of our steps goes, nothing else")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    names = options.only or list(SCENARIOS)
    dtype: torch.dtype = getattr(torch, options.dtype)
    with checkpoint(options.model, options.preset, options.dtype) as directory:
        ours = Ours(directory, dtype)
        try:
            if options.profile:
                from profiling import print_profile

                for name in names:
                    print_profile(ours, name, SCENARIOS[name], options.tokens)
                return 0
            theirs = Peer(directory, dtype, options.threads)
            results, bandwidth = compare(ours, theirs, names, rounds=options.rounds, tokens=options.tokens)
            theirs.close()
            shared = {name: getattr(options, name) for name in ("preset", "dtype", "threads", "rounds", "tokens")}
            found = report(ours, results, bandwidth, tokens=options.tokens, options=shared)
        finally:
            ours.close()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_report(found)
    return 0 if found["first_tokens_agree"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
