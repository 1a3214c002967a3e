"""Stage two: the language model learns to answer, first with the tower as it is, then with the tower learning too.

    python -m nano.train_language --minutes 90 --vision build/nano/vision.pt --out build/nano/nano.pt

A run ended at any time leaves its last state in ``--out``; ``--resume`` goes on from there with all that was learned.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano.export import load_checkpoint
from nano.files import documents
from nano.language_data import MIXES, Batch, language_batch
from nano.model import Bank, Nano, Passed
from nano.packing import RowBatch
from nano.train import Clock, Muon, average, launch, save, step
from nano.vision_data import COLOUR_INDEX, CORNER_BINS, DIGITS, ORDINALS, OUTPUTS, THING_INDEX, digits_of_tokens
from nano.vision_loss import losses

BALANCE = 0.01
SEEN_SCALE = 0.2
BIAS_STEP = 1e-3
SLOTS = (512, 768, 1 << 10, 1 << 12)
"""Sizes that vision places are padded to: few, as each is compiled for."""
KNOWN = 0.2
"""Weight of what tokens of pictures and clips are to know before the last layers: where they lie, which the tower
cannot know, which digits they hold, and whether something changes there."""
PLACE_CLASSES, DIGIT_CLASSES, EVENT_CLASSES = 24, 11, 3
THING_CLASSES = (len(THING_INDEX) + 1, len(COLOUR_INDEX) + 1)
BEFORE, WRITTEN, LOOKS = 3.0, 0.8, 2.0
"""Weights of the states of pictures before the vision experts, of what others than they add to them, and of words that
look at them too early: with all three small the experts carry what is seen, as in a model whose banks had to learn
different things."""
PATCHES = 0.2
"""Weight of the first stage's loss while the tower learns on."""
SMOOTH = 0.99


class Scores:
    """Running share of answers with every token right, by task."""

    def __init__(self) -> None:
        self._right: dict[str, float] = {}
        self._all: dict[str, float] = {}

    def add(self, rows: RowBatch, hits: np.ndarray) -> None:
        for table in (self._right, self._all):
            for task in table:
                table[task] *= SMOOTH
        for row, first, last, task in rows.answers:
            self._right[task] = self._right.get(task, 0) + bool(hits[row, first:last].all())
            self._all[task] = self._all.get(task, 0) + 1

    def __str__(self) -> str:
        return " ".join(f"{task} {100 * self._right[task] / self._all[task]:.1f}" for task in sorted(self._all))


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes it; routers it does not, whose scale means something."""
    return parameter.requires_grad and parameter.ndim >= 2 and "gate.weight" not in name


def per_find(guesses: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy [N, C] against [N] (-1 for unknown), summed and divided by how many are not 0: most tokens hold
    nothing."""
    lost = F.cross_entropy(guesses, wanted, reduction="sum", ignore_index=-1)
    return lost / (wanted > 0).sum().clamp_min(1)


class Learner:
    """The model, what is trained of it, and a step."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.nano = Nano(documents().model)
        self.step_count = 0
        self.notes = ""
        """Of the last batch, for the log."""
        state = None
        if options.vision:
            seen = {k: v for k, v in torch.load(options.vision)["nano"].items() if not k.startswith("language_model")}
            self.nano.load_state_dict(seen, strict=False)
        self.head = nn.Linear(documents().model.text.hidden_size, 8 * OUTPUTS)
        if options.vision:
            self.head.load_state_dict(torch.load(options.vision)["head"])
            # Embeddings of pictures ten times as large as those of words would hardly be changed by any layer.
            self.nano.resampler_model.after_norm.weight.data *= SEEN_SCALE
            self.head.weight.data /= SEEN_SCALE
        if options.resume:
            state = load_checkpoint(options.resume) if options.resume.is_dir() else torch.load(options.resume)
            self.nano.load_state_dict(state["nano"])
            self.head.load_state_dict(state["head"])
        width = documents().model.text.hidden_size
        self.heads = nn.ModuleDict(
            {
                "early": nn.Linear(width, 3 * PLACE_CLASSES + 2 * DIGITS * DIGIT_CLASSES),
                "late": nn.Linear(width, EVENT_CLASSES),
                "things": nn.Linear(width, sum(THING_CLASSES)),
                "corners": nn.Linear(width, 4 * CORNER_BINS),
                "ordinals": nn.Linear(width, 3 * ORDINALS),
            }
        )
        for name, head in self.heads.items():
            if state is not None and name in state:
                head.load_state_dict(state[name])
        self.language = [p for p in self.nano.language_model.parameters() if p.requires_grad]
        self.language += self.heads.parameters()
        self.vision = [
            *self.nano.vision_tower.parameters(), *self.nano.resampler_model.parameters(), *self.head.parameters(),
        ]  # fmt: skip
        self.sees = options.vision_lr > 0
        matrices = [p for name, p in self.nano.language_model.layers.named_parameters() if is_matrix(name, p)]
        held = {id(p) for p in matrices}
        groups = [{"params": [p for p in self.language if id(p) not in held], "lr": options.lr}]
        if self.sees:
            groups.append({"params": self.vision, "lr": options.vision_lr})
        self.optimisers = [
            torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.03),
            Muon(matrices, lr=options.matrix_lr),
        ]
        if state is not None and state.get("sees") == self.sees and not options.fresh_optimiser:
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
        self.bases = [options.lr, *([options.vision_lr] if self.sees else []), options.matrix_lr]
        self.first_vision_id = documents().model.im_patch_id
        self.banks = [m for m in self.nano.language_model.modules() if isinstance(m, Bank)]
        self.forward = torch.compile(self._forward, dynamic=False) if options.compile else self._forward

    def _forward(self, *args: Tensor) -> Passed:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found: Passed = self.nano.language_model(*args)
        return found

    def see(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows of the resampler's output, and the loss of the head that tells what lies on each patch."""
        if not len(batch.frames.pairs):
            return torch.zeros(1, documents().model.text.hidden_size), torch.zeros(())
        with torch.set_grad_enabled(self.sees), torch.autocast("cpu", dtype=torch.bfloat16):
            seen = self.nano.see(*map(torch.from_numpy, batch.frames.arrays))
            if not self.sees:
                return seen.flatten(0, 1), torch.zeros(())
            classes, box, _ = losses(self.head(seen), batch.vision)
        return seen.flatten(0, 1), classes + 2 * box

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
        """Total loss, its answer part, expert loads [layers, 2, E], and where the most likely token is right."""
        rows = batch.rows
        slots = next(size for size in SLOTS if size >= len(rows.slot))
        padded = np.zeros(slots, np.int64)
        padded[: len(rows.slot)] = rows.slot
        ids, positions, branch, source, slot = (
            torch.from_numpy(x) for x in (rows.ids, rows.positions, rows.branch, rows.source, padded)
        )
        seen, patches = self.see(batch)
        x = self.nano.language_model.embed(ids, seen, source, slot[: len(source)])
        special = ids >= self.first_vision_id
        passed = self.forward(x, positions, branch, special, slot)
        wanted = torch.from_numpy(rows.weights) > 0
        weights, targets = torch.from_numpy(rows.weights)[wanted], torch.from_numpy(rows.targets)[wanted]
        logits = F.linear(passed.hidden[wanted], self.nano.language_model.embed_tokens.weight)
        answers = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        experts = passed.loads.shape[-1]
        balance = (passed.loads.detach() * passed.probabilities).sum(-1).mean() * experts
        hits = np.zeros(rows.ids.shape, bool)
        hits[wanted.numpy()] = (logits.argmax(-1) == targets).numpy()
        known = self.known(passed.early[: len(source)], passed.late[: len(source)], batch)
        total = answers + BALANCE * balance + PATCHES * patches + KNOWN * known
        total = total + BEFORE * passed.before + WRITTEN * passed.written + LOOKS * passed.looks
        self.notes = f"before {passed.before:.2f} written {passed.written:.2f} looks {passed.looks:.3f}"
        return total, answers, passed.loads.detach(), hits

    def known(self, early: Tensor, late: Tensor, batch: Batch) -> Tensor:
        """Loss of telling, from the states [V, width] of the tokens of pictures and clips, where each lies (frame pair,
        row, column), which digits are in it, in reading order, and which thing has its centre in it; and, some layers
        later, what changes there, how far the thing reaches, and the how-manieth it is."""
        if not len(early):
            return torch.zeros(())
        early, late = early.float(), late.float()
        source = torch.from_numpy(batch.rows.source)
        there = source >= 0
        at = source[there]
        places, digits = self.heads["early"](early).split([3 * PLACE_CLASSES, 2 * DIGITS * DIGIT_CLASSES], dim=-1)
        wanted = torch.from_numpy(batch.rows.places).clamp_max(PLACE_CLASSES - 1)
        lost = F.cross_entropy(places.reshape(-1, PLACE_CLASSES), wanted.flatten(), ignore_index=-1)
        wanted = torch.from_numpy(digits_of_tokens(batch.vision.classes)).flatten(0, 1)[at].flatten()
        lost = lost + per_find(digits[there].reshape(-1, DIGIT_CLASSES), wanted)
        things = torch.from_numpy(batch.things).flatten(0, 1)[at]
        for k, guesses in enumerate(self.heads["things"](early[there]).split(THING_CLASSES, dim=-1)):
            lost = lost + per_find(guesses, things[:, k])
        lost = lost + per_find(self.heads["late"](late[there]), torch.from_numpy(batch.events).flatten()[at])
        parts = (("corners", things[:, 2:6], CORNER_BINS, 1.0), ("ordinals", things[:, 6:], ORDINALS, 3.0))
        for name, wanted, classes, weight in parts:
            guesses = self.heads[name](late[there]).reshape(-1, classes)
            sums = F.cross_entropy(guesses, wanted.flatten(), reduction="sum", ignore_index=-1)
            lost = lost + weight * sums / (wanted >= 0).sum().clamp_min(1)
        return lost

    def step(self, batch: Batch, scale: float) -> tuple[float, np.ndarray]:
        total, answers, loads, hits = self.loss(batch)
        total.backward()
        trained = [*self.language, *(self.vision if self.sees else [])]
        for p in trained:
            # Every process averages the same list, also where its own batch had no picture.
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        average([*(p.grad for p in trained if p.grad is not None), loads])
        nn.utils.clip_grad_norm_(trained, 1.0)
        step(self.optimisers, self.bases, scale)
        for bank, load in zip(self.banks, loads.flatten(0, 1), strict=True):
            bias = bank.gate.moe_statics["e_score_correction_bias"]
            bias.data += BIAS_STEP * torch.sign(load.mean() - load)
        self.step_count += 1
        return float(answers.detach()), hits

    def state(self) -> dict[str, object]:
        return {
            "nano": self.nano.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "sees": self.sees,
            "head": self.head.state_dict(),
            **{name: head.state_dict() for name, head in self.heads.items()},
        }


def train(rank: int, options: argparse.Namespace) -> None:
    learner = Learner(options)
    rng = random.Random(f"language/{options.seed}/{rank}")
    clock, scores, mean = Clock(options.minutes), Scores(), 0.0
    while (share := clock.share) < 1:
        warm = min(1.0, (learner.step_count + 1) / options.warmup)
        scale = warm * min(1.0, max(0.02, (1 - share) / options.decay))
        batch = language_batch(rng, options.rows, MIXES[options.mix])
        loss, hits = learner.step(batch, scale)
        scores.add(batch.rows, hits)
        mean = loss if not mean else SMOOTH * mean + (1 - SMOOTH) * loss
        if rank == 0 and learner.step_count % 100 == 0:
            at = f"{clock.minutes:6.1f} min  step {learner.step_count}"
            print(f"{at}  loss {mean:.4f}  {learner.notes}  {scores}", flush=True)
        if rank == 0 and learner.step_count % 500 == 0:
            save(options.out, learner.state())
    if rank == 0:
        save(options.out, learner.state())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", type=Path, help="the outcome of stage one")
    parser.add_argument("--resume", type=Path, help="an earlier outcome of this stage, or a checkpoint directory")
    parser.add_argument("--fresh-optimiser", action="store_true")
    parser.add_argument("--rows", type=int, default=8, help="of each process and step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--matrix-lr", type=float, default=0.015, help="of the language model's matrices, by Muon")
    parser.add_argument("--vision-lr", type=float, default=0.0, help="0 keeps the tower as it is")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--decay", type=float, default=0.3, help="last share of the time in which the rate falls")
    parser.add_argument("--mix", choices=sorted(MIXES), default="full", help="what is asked about")
    parser.add_argument("--compile", action="store_true")
    launch(train, parser)


if __name__ == "__main__":
    main()
