"""What both stages of training share: processes, averaged gradients, optimisers, schedules, saved state."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from cluster.eval.world.seeds import EVALUATION_SEEDS


def check_seed(seed: int) -> None:
    if seed in EVALUATION_SEEDS:
        raise SystemExit(f"seed {seed} is of the evaluation's range; take one from {EVALUATION_SEEDS.stop} on")


Stage = Callable[[int, argparse.Namespace], None]


def launch(run: Stage, parser: argparse.ArgumentParser) -> None:
    """Calls ``run(rank, options)`` in ``--ranks`` processes of one thread each, joined by gloo.

    ``parser`` has the stage's own options; those that all stages have are added.
    """
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=EVALUATION_SEEDS.stop)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    check_seed(options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    port = 20000 + os.getpid() % 20000
    torch.multiprocessing.start_processes(  # type: ignore[attr-defined]
        _start, args=(run, port, options), nprocs=options.ranks, start_method="spawn"
    )


def _start(rank: int, run: Stage, port: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.nice(5)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=options.ranks)
    try:
        run(rank, options)
        # The first process saves a little longer; leaving it behind would end this one by an abort.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def average(tensors: Iterable[Tensor]) -> None:
    """Averages tensors over all processes, in place."""
    held = list(tensors)
    flat = torch.cat([t.reshape(-1) for t in held])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = 0
    for t in held:
        t.copy_(flat[offset : offset + t.numel()].view_as(t))
        offset += t.numel()


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices (Jordan et al., 2024), same shapes together."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01):
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for held in shapes.values():
                updates = []
                for p in held:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    gradient = p.grad if p.grad is not None else torch.zeros_like(p)
                    state["momentum"].lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(state["momentum"], group["momentum"]))
                whole = orthogonalise(torch.stack(updates))
                rows, columns = held[0].shape[-2:]
                scale = max(1.0, rows / columns) ** 0.5
                for p, update in zip(held, whole, strict=True):
                    p.mul_(1 - group["lr"] * group["decay"])
                    p.add_(update.to(p.dtype), alpha=-group["lr"] * scale)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest orthogonal matrices by a quintic Newton-Schulz iteration, g [..., rows, columns]."""
    x = g.bfloat16()
    flip = x.shape[-2] > x.shape[-1]
    if flip:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).bfloat16() + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if flip else x


def step(optimisers: Sequence[torch.optim.Optimizer], bases: Sequence[float], scale: float) -> None:
    """One step of all at ``scale`` times the base rates of their groups; gradients are gone afterwards."""
    for group, base in zip((g for o in optimisers for g in o.param_groups), bases, strict=True):
        group["lr"] = base * scale
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


class Clock:
    """Share of the given minutes that has passed; the schedules hang on it, so that a slow machine still ends well."""

    def __init__(self, minutes: float) -> None:
        self._start, self._length = time.monotonic(), minutes * 60

    @property
    def share(self) -> float:
        shared = torch.tensor([(time.monotonic() - self._start) / self._length])
        dist.broadcast(shared, 0)
        return min(1.0, float(shared))

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self._start) / 60


def save(path: Path, value: object) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".part")
    torch.save(value, partial)
    partial.replace(path)
