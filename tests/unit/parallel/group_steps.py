"""Random steps of a group against the same tokens on one rank that holds all experts."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from actors.ernie.attention import PackedAttention
from actors.ernie.bank import VisionBank, empty_bank_buffer
from actors.ernie.config import TextConfig
from actors.ernie.experts_form import ExpertsForm
from actors.ernie.moe import SparseMlp, run_experts
from actors.ernie.text import LanguageModel
from actors.parallel.dispatch import Dispatcher, LocalDispatcher
from actors.parallel.group import ExpertGroup, GroupStep
from actors.parallel.group_dispatch import AllToAllDispatcher, FixedShapeDispatcher
from actors.parallel.layout import ExpertLayout, ExpertPlacement, ExpertShare, even_placement
from actors.parallel.placement import ExpertMemory, plan_layers, skew
from actors.parallel.world import World
from tests.small_models import language_model, text_config

CONFIG = text_config(num_hidden_layers=2, mlp_layer_types=("dense", "sparse"))
TEXT, VISION, MIXED = "text", "vision", "mixed"


def even(config: TextConfig, ranks: int) -> ExpertPlacement:
    return even_placement(config.num_hidden_layers, config.sparse_layers, config.moe_num_experts, ranks)


def shuffled(config: TextConfig, ranks: int, rng: random.Random) -> ExpertPlacement:
    """As many experts on each rank as in the even placement, drawn anew for every layer and bank."""

    def draw() -> tuple[tuple[int, ...], ...]:
        ids = rng.sample(range(config.moe_num_experts), config.moe_num_experts)
        sizes = [len(held) for held in even(config, ranks).layout(config.sparse_layers[0]).text]
        return tuple(tuple(ids.pop() for _ in range(size)) for size in sizes)

    sparse = config.sparse_layers
    return ExpertPlacement(
        tuple(
            ExpertLayout(text=draw(), vision=draw()) if layer in sparse else None
            for layer in range(config.num_hidden_layers)
        )
    )


def share_of(model: LanguageModel, share: ExpertShare, *, bank: bool = True) -> LanguageModel:
    """A model with its share of another's experts, and a copy of everything else."""
    part = LanguageModel(model.config, dtype=model.dtype, share=share, experts_form=model.experts_form)
    copy_rows(model.parameters_by_name(), part.parameters_by_name(), part.expert_rows())
    if bank:
        assert model.vision_bank is not None
        buffer = empty_bank_buffer(model.config, model.dtype, share=share)
        vision = VisionBank(model.config, model.dtype, buffer, share)
        copy_rows(model.vision_bank.parameters_by_name(), vision.parameters_by_name(), vision.expert_rows())
        part.attach_vision_bank(vision)
    return part


def copy_rows(source: dict[str, Tensor], target: dict[str, Tensor], rows: dict[str, tuple[int, ...]]) -> None:
    assert source.keys() == target.keys() and rows.keys() <= target.keys()
    for name, view in target.items():
        view.copy_(source[name][list(rows[name])] if name in rows else source[name])


@dataclass(frozen=True)
class Batch:
    """Tokens of one rank in one step: whole sequences."""

    lengths: tuple[int, ...]
    kinds: tuple[str, ...]
    seed: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def has_vision(self) -> bool:
        return any(kind != TEXT for kind in self.kinds)

    def logits(self, model: LanguageModel) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x_TD = torch.randn(self.tokens, model.config.hidden_size, generator=generator, dtype=torch.float64)
        masks = {
            TEXT: torch.zeros,
            VISION: torch.ones,
            MIXED: lambda n, dtype: torch.rand(n, generator=generator) < 0.5,
        }
        vision_T = torch.cat(
            [torch.zeros(0, dtype=torch.bool)]
            + [masks[kind](n, dtype=torch.bool) for kind, n in zip(self.kinds, self.lengths, strict=True)]
        )
        bounds = [0]
        for length in self.lengths:
            bounds.append(bounds[-1] + length)
        positions_3T = torch.cat([torch.arange(n) for n in (*self.lengths, 0)]).expand(3, -1)
        h_TD = model.forward(
            x_TD.to(model.dtype), positions_3T, vision_T if self.has_vision else None, PackedAttention(bounds)
        )
        return model.logits(h_TD)


def draw_batches(rng: random.Random, ranks: int) -> list[Batch]:
    """Of all ranks: some have no token, no vision token or nothing else; now and then nobody has any."""
    wanted = rng.choice(["any", "any", "text", "vision", "one", "none"])
    batches = []
    alone = rng.randrange(ranks)
    for rank in range(ranks):
        count = rng.randrange(4)
        if wanted == "none" or (wanted == "one" and rank != alone):
            count = 0
        kinds = [wanted if wanted in (TEXT, VISION) else rng.choice([TEXT, VISION, MIXED]) for _ in range(count)]
        batches.append(Batch(tuple(rng.randint(1, 6) for _ in kinds), tuple(kinds), rng.getrandbits(32)))
    return batches


def begin(group: ExpertGroup, number: int, batches: list[Batch]) -> None:
    group.begin_step(
        GroupStep(
            number=number,
            most_tokens=max(batch.tokens for batch in batches),
            vision=any(batch.has_vision for batch in batches),
        )
    )


def forms(group: ExpertGroup) -> list[Dispatcher[Any]]:
    return [AllToAllDispatcher(group), FixedShapeDispatcher(group)]


def random_steps(world: World, steps: int, seed: int) -> dict[str, Any]:
    """The largest difference from one rank, and what kinds of steps there were."""
    rng = random.Random(seed)
    whole = language_model(CONFIG)
    group = ExpertGroup(world, shuffled(CONFIG, world.size, rng))
    model = share_of(whole, group.share)
    worst = 0.0
    seen: set[str] = set()
    for number in range(steps):
        batches = draw_batches(rng, world.size)
        mine = batches[world.rank]
        begin(group, number, batches)
        model.dispatcher = rng.choice(forms(group))
        logits = mine.logits(model)
        expected = mine.logits(whole)
        assert logits.shape == expected.shape
        if mine.tokens:
            worst = max(worst, float((logits - expected).abs().max()))
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        seen |= kinds_of_step(batches)
    return {"worst": worst, "seen": seen}


def other_forms(world: World, steps: int) -> dict[str, list[float]]:
    """Distances from one rank, per standard deviation of its logits: decode steps whose shapes follow from the plan
    alone (grouped experts, float32), and the fastest form for bfloat16 here."""
    rng = random.Random(5)
    found: dict[str, list[float]] = {"static": [], "bfloat16": []}
    for name, dtype, experts_form in (
        ("static", torch.float32, ExpertsForm.GROUPED),
        ("bfloat16", torch.bfloat16, None),
    ):
        whole = language_model(CONFIG, dtype, experts_form=experts_form)
        group = ExpertGroup(world, even(CONFIG, world.size))
        model = share_of(whole, group.share, bank=name != "static")
        for number in range(steps):
            batches = draw_batches(rng, world.size)
            if name == "static":
                batches = [replace(batch, kinds=(TEXT,) * len(batch.kinds)) for batch in batches]
                model.dispatcher = FixedShapeDispatcher(group, static_rows=True)
            else:
                model.dispatcher = rng.choice(forms(group))
            begin(group, number, batches)
            logits, expected = (batches[world.rank].logits(m) for m in (model, whole))
            if len(logits):
                found[name].append(float((logits - expected).abs().mean() / expected.std()))
    return found


class Counting(LocalDispatcher):
    """Rows of every expert, by layer."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.rows: dict[int, Tensor] = {}

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Any:
        sent = super().dispatch(layer, x_TD, expert_ids_TK, weights_TK)
        self.rows[layer] = self.rows.get(layer, 0) + sent.rows_per_expert_X
        return sent


def steps_with_moves(world: World, rounds: int, seed: int) -> dict[str, Any]:
    """Steps, then experts move as their load asks, and so on; in the end without the vision bank."""
    rng = random.Random(seed)
    config = text_config()
    whole = language_model(config, dispatcher=(counting := Counting(2 * config.moe_num_experts)))
    group = ExpertGroup(world, even(config, world.size))
    model = share_of(whole, group.share)
    addresses = [view.data_ptr() for view in views_of(model).values()]
    room = (3 * config.moe_num_experts,) * world.size
    memory = ExpertMemory(text_expert=3, vision_expert=1, room=room)
    worst, moved = 0.0, 0
    skews: list[tuple[int, tuple[float, float], tuple[float, float]]] = []
    for number in range(rounds):
        batches = draw_batches(rng, world.size)
        model.dispatcher = rng.choice(forms(group))
        begin(group, number, batches)
        logits = batches[world.rank].logits(model)
        counting.rows.clear()
        for batch in batches:
            batch.logits(whole)
        load = group.take_load()
        assert load == {layer: tuple(rows.tolist()) for layer, rows in counting.rows.items()}
        assert not any(any(rows) for rows in group.take_load().values())
        wanted = plan_layers(load, group.placement, memory, least_gain=0.0)
        if number % 2:
            wanted = shuffled(config, world.size, rng)
        for layer, rows in load.items():
            skews.append((number, skew(rows, group.placement.layout(layer)), skew(rows, wanted.layout(layer))))
        report = model.move_experts(group, wanted)
        moved += report.experts
        assert (report.bytes_sent > 0) == (report.experts > 0)
        assert model.share == group.share and group.placement == wanted
        begin(group, number, batches)
        again, expected = batches[world.rank].logits(model), batches[world.rank].logits(whole)
        if len(logits):
            assert torch.equal(again.argmax(-1), logits.argmax(-1))
            worst = max(worst, float((again - logits).abs().max()), float((again - expected).abs().max()))
        require_held(model, whole)
        group.take_load()
    assert [view.data_ptr() for view in views_of(model).values()] == addresses
    model.detach_vision_bank()
    model.move_experts(group, shuffled(config, world.size, rng))
    require_held(model, whole)
    return {"worst": worst, "moved": moved, "skews": skews}


def views_of(model: LanguageModel) -> dict[str, Tensor]:
    bank = model.vision_bank
    return model.parameters_by_name() | ({} if bank is None else bank.parameters_by_name())


def require_held(model: LanguageModel, whole: LanguageModel) -> None:
    """Every expert lies where the share says."""
    bank, sources = model.vision_bank, views_of(whole)
    rows = model.expert_rows() | ({} if bank is None else bank.expert_rows())
    for name, view in views_of(model).items():
        assert torch.equal(view, sources[name][list(rows[name])] if name in rows else sources[name]), name


def refused_moves(world: World) -> str:
    """Storage does not grow."""
    model = share_of(language_model(CONFIG), ExpertShare(even(CONFIG, world.size), world.rank))
    group = ExpertGroup(world, even(CONFIG, world.size))
    uneven = ExpertLayout(text=((0, 1, 2, 3, 4), (5, 6, 7)), vision=even(CONFIG, 2).layout(1).vision)
    try:
        model.move_experts(group, ExpertPlacement((None, uneven)))
    except ValueError as error:
        require_held(model, language_model(CONFIG))
        return str(error)
    return "moved"


def wrong_plans(world: World) -> list[str]:
    """A plan that tells too few tokens, and one that forgets vision tokens where no vision experts are loaded."""
    whole = language_model(CONFIG)
    group = ExpertGroup(world, even(CONFIG, world.size))
    model = share_of(whole, group.share, bank=False)
    model.dispatcher = FixedShapeDispatcher(group)
    said = []
    for most_tokens in (2, 3):
        group.begin_step(GroupStep(number=0, most_tokens=most_tokens, vision=False))
        try:
            if most_tokens == 2:
                Batch((3,), (TEXT,), 0).logits(model)
            else:
                ids_TK = torch.tensor([[0, 1, 9]] * 3)
                sent = model.dispatcher.dispatch(1, torch.ones(3, 48, dtype=torch.float64), ids_TK, torch.ones(3, 3))
                mlp = model.layers[1].mlp
                assert isinstance(mlp, SparseMlp)
                run_experts(sent.rows_ND, sent.rows_per_expert_X, [mlp.text], text_rows=sent.text_rows)
            said.append("computed")
        except ValueError as error:
            said.append(str(error))
    return said


def kinds_of_step(batches: list[Batch]) -> set[str]:
    found = set()
    if any(b.tokens for b in batches) and not all(b.tokens for b in batches):
        found.add("a rank without tokens")
    if not any(b.tokens for b in batches):
        found.add("no tokens at all")
    if any(b.has_vision for b in batches) and any(b.tokens and not b.has_vision for b in batches):
        found.add("a rank without vision tokens")
    if any(b.tokens and set(b.kinds) == {VISION} for b in batches) and any(TEXT in b.kinds for b in batches):
        found.add("a rank of vision tokens only")
    return found


ALL_KINDS = {
    "a rank without tokens",
    "no tokens at all",
    "a rank without vision tokens",
    "a rank of vision tokens only",
}


def one_rank_fails(world: World, form: int, how: str, calm_steps: int) -> Any:
    """Rank 1 dies, or stands still, before its part of the step after the calm ones."""
    whole = language_model(CONFIG)
    group = ExpertGroup(world, even(CONFIG, world.size))
    model = share_of(whole, group.share)
    model.dispatcher = forms(group)[form]
    batches = [Batch((3,), (MIXED,), rank) for rank in range(world.size)]
    for number in range(calm_steps + 1):
        begin(group, number, batches)
        if number == calm_steps and world.rank == 1:
            if how == "dies":
                os._exit(3)
            time.sleep(3600)
        batches[world.rank].logits(model)
    return "went on"
