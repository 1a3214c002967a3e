"""Stage one: the tower and the resampler learn to say what lies on every patch, through a head that is thrown away.

python -m nano.train_vision --minutes 25 --out build/nano/vision.pt
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nano.files import documents
from nano.model import Nano
from nano.train import Clock, Muon, average, launch, save, step
from nano.vision_data import OUTPUTS, VisionBatch, vision_batch
from nano.vision_loss import losses

PICTURES, CLIPS = 12, 4


def train(rank: int, options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    nano = Nano(documents().model)
    head = nn.Linear(documents().model.text.hidden_size, 8 * OUTPUTS)
    if options.resume:
        state = torch.load(options.resume)
        nano.load_state_dict(state["nano"])
        head.load_state_dict(state["head"])
    vision = [*nano.vision_tower.parameters(), *nano.resampler_model.parameters(), *head.parameters()]
    matrices = [p for p in nano.vision_tower.blocks.parameters() if p.ndim == 2]
    held = {id(p) for p in matrices}
    others = [p for p in vision if id(p) not in held]
    optimisers = [
        Muon(matrices, lr=options.matrix_lr),
        torch.optim.AdamW(others, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    bases = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]

    def forward(batch: VisionBatch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return head(nano.see(*map(torch.from_numpy, batch.frames.arrays)))

    rng = random.Random(f"vision/{options.seed}/{rank}")
    clock, steps, seen = Clock(options.minutes), 0, np.zeros((4, 2))
    while (share := clock.share) < 1:
        warm = min(1.0, (steps + 1) / 150)
        scale = warm * (1 if share < 0.5 else max(0.02, 2 * (1 - share)))
        batch = vision_batch(rng, PICTURES, CLIPS)
        classes, box, right = losses(forward(batch), batch)
        (classes + options.box_weight * box).backward()
        average(p.grad for p in vision if p.grad is not None)
        nn.utils.clip_grad_norm_(vision, 1.0)
        step(optimisers, bases, scale)
        steps += 1
        seen = 0.97 * seen + np.array(list(right.values()))
        if rank == 0 and steps % 100 == 0:
            rates = " ".join(f"{name} {100 * a / max(b, 1):.1f}" for name, (a, b) in zip(right, seen, strict=True))
            print(
                f"{clock.minutes:6.1f} min  step {steps}  loss {classes.item():.3f}  box {box.item():.4f}  {rates}",
                flush=True,
            )
        if rank == 0 and steps % 1000 == 0:
            save(options.out, {"nano": nano.state_dict(), "head": head.state_dict()})
    if rank == 0:
        save(options.out, {"nano": nano.state_dict(), "head": head.state_dict()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--matrix-lr", type=float, default=0.02, help="of the blocks' matrices, by Muon")
    parser.add_argument("--box-weight", type=float, default=2.0)
    launch(train, parser)


if __name__ == "__main__":
    main()
