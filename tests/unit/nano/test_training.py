from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from actors.processing.images import smart_resize
from cluster.eval.world.scenes import dense
from cluster.eval.world.seeds import EVALUATION_SEEDS
from cluster.eval.world.things import Box, Ground, Scene, Thing
from nano.export import HEADS, export, load_checkpoint, save_heads
from nano.files import documents
from nano.frames import BOUNDS, MAX_TOKENS, MIN_TOKENS, places, smaller
from nano.model import BLIND, Mlp, Nano
from nano.train import Muon, check_seed, orthogonalise
from nano.vision_data import (
    COLOUR_INDEX,
    SHAPE_INDEX,
    THING_INDEX,
    digits_of_tokens,
    targets,
    things_of_tokens,
    vision_batch,
)


def test_seeds_of_the_evaluation_are_refused() -> None:
    check_seed(EVALUATION_SEEDS.stop)
    with pytest.raises(SystemExit, match="evaluation"):
        check_seed(EVALUATION_SEEDS.stop - 1)


def test_pictures_get_as_many_tokens_as_said() -> None:
    rng = random.Random(0)
    for _ in range(20_000):
        height, width = rng.randint(28, 1200), rng.randint(28, 1200)
        if max(height, width) < 4 * min(height, width):
            high, wide = smart_resize(height, width, BOUNDS)
            assert MIN_TOKENS - 4 <= high * wide // 784 <= MAX_TOKENS


def test_export_writes_what_was_trained(tmp_path: Path) -> None:
    nano = Nano(documents().model)
    nbytes = export(nano.state_dict(), tmp_path)
    assert nbytes < 10_000_000
    stored = load_file(tmp_path / "model.safetensors")
    state = nano.state_dict()
    assert {name.removeprefix("model.") for name in stored} == set(state)
    for name, tensor in stored.items():
        expected = state[name.removeprefix("model.")]
        assert tensor.dtype is (torch.float32 if "gate.weight" in name or "correction_bias" in name else torch.bfloat16)
        assert torch.equal(tensor, expected.to(tensor.dtype))


def test_export_refuses_another_models_state(tmp_path: Path) -> None:
    state = Nano(documents().model).state_dict()
    del state["language_model.norm.weight"]
    with pytest.raises(ValueError, match=r"language_model\.norm"):
        export(state, tmp_path / "short")
    state = Nano(documents().model).state_dict() | {"other": torch.zeros(1)}
    with pytest.raises(ValueError, match="other"):
        export(state, tmp_path / "long")


def test_targets_lie_on_the_patch_of_the_centre() -> None:
    rng = random.Random(1)
    for _ in range(50):
        made = dense(rng)
        rows, columns = frame_grid(made)
        found = targets(made, (rows, columns))
        order = places(rows, columns)
        for thing in made.shapes:
            x, y = thing.box.centre
            i = next(i for i, (r, c) in enumerate(order) if r == int(y * 2 * rows) and c == int(x * 2 * columns))
            assert found.classes[1, i] == SHAPE_INDEX[thing.kind] or sum_in_patch(made, rows, columns, (x, y)) > 1
            assert found.classes[0, i] == COLOUR_INDEX[thing.colour] or sum_in_patch(made, rows, columns, (x, y)) > 1
        assert (~np.isnan(found.boxes[:, 0])).sum() <= len(made.shapes)


def frame_grid(made: Scene) -> tuple[int, int]:
    high, wide = smart_resize(made.height, made.width, BOUNDS)
    return high // 28, wide // 28


def sum_in_patch(made: Scene, rows: int, columns: int, centre: tuple[float, float]) -> int:
    """Things and digits whose centre shares a patch with this one."""
    cell = (int(centre[0] * 2 * columns), int(centre[1] * 2 * rows))
    count = 0
    for thing in made.things:
        width = (thing.box.x2 - thing.box.x1) / max(1, len(thing.text))
        xs = [thing.box.x1 + (k + 0.5) * width for k in range(len(thing.text))] or [thing.box.centre[0]]
        count += sum((int(x * 2 * columns), int(thing.box.centre[1] * 2 * rows)) == cell for x in xs)
    return count


def test_batches_of_frames_are_padded_alike() -> None:
    batch = vision_batch(random.Random(2), 3, 2)
    assert batch.frames.patches.shape == (7, 4 * batch.frames.tokens, 588)
    assert batch.classes.shape == (5, 2, 4, 4 * batch.frames.tokens)
    assert (batch.classes.transpose(0, 1, 3, 2)[~batch.frames.valid[batch.frames.pairs]] == 0).all()


def test_smaller_keeps_the_shape_of_a_picture() -> None:
    made = dense(random.Random(3))
    less = smaller(made, random.Random(4))
    assert less.things == made.things
    assert abs(less.width / less.height / (made.width / made.height) - 1) < 0.05


def test_orthogonalised_updates_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 64, 32), (1, 16, 48)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert values.min() > 0.5 and values.max() < 1.4


def test_muon_lowers_a_loss() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16, bias=False), torch.randn(64, 16)
    wanted = x @ torch.randn(16, 16)
    muon = Muon([layer.weight], lr=0.05)
    losses = []
    for _ in range(60):
        loss = (layer(x) - wanted).square().mean()
        losses.append(loss.item())
        muon.zero_grad()
        loss.backward()
        muon.step()
    assert losses[-1] < 0.5 * losses[0]


def test_training_goes_on_from_the_exported_checkpoint(tmp_path: Path) -> None:
    nano, head = Nano(documents().model), nn.Linear(4, 2)
    state = {"nano": nano.state_dict()} | {name: head.state_dict() for name in HEADS}
    export(state["nano"], tmp_path / "nano")
    save_heads(state, tmp_path / "heads.safetensors")
    again = load_checkpoint(tmp_path / "nano", tmp_path / "heads.safetensors")
    assert set(again) == set(state)
    for part, tensors in again.items():
        assert set(tensors) == set(state[part])
        for name, tensor in tensors.items():
            assert torch.allclose(tensor, state[part][name], rtol=1e-2, atol=1e-6)


def test_digits_of_tokens_are_read_from_left_to_right() -> None:
    number = Thing("number", "red", Box(0.55, 0.1, 0.95, 0.4), "47")
    made = Scene(112, 112, Ground((255, 255, 255)), (number,))
    seen = targets(made, (2, 2))
    classes = np.stack([seen.classes, np.zeros_like(seen.classes)])[None]
    digits = digits_of_tokens(classes)
    assert digits.shape == (1, 4, 6)
    assert digits[0, 1].tolist() == [5, 8, 0, 0, 0, 0]
    assert not digits[0, [0, 2, 3]].any()
    assert (digits_of_tokens(np.full((1, 2, 4, 16), -1)) == -1).all()


def test_things_are_known_at_the_token_of_their_centre() -> None:
    star = Thing("star", "blue", Box(0.5, 0.0, 0.9, 0.4))
    ring = Thing("ring", "blue", Box(0.6, 0.6, 0.8, 0.8))
    number = Thing("number", "red", Box(0.1, 0.75, 0.3, 0.95), "7")
    found = things_of_tokens(Scene(112, 112, Ground((255, 255, 255)), (ring, star, number)), (2, 2))
    assert found.tolist() == [
        [0, 0, -1, -1, -1, -1, -1, -1, -1],
        [THING_INDEX["star"], COLOUR_INDEX["blue"], 20, 0, 36, 16, 0, 0, 0],
        [THING_INDEX["number"], COLOUR_INDEX["red"], 4, 30, 12, 38, -1, -1, -1],
        # The second blue shape, the first ring.
        [THING_INDEX["ring"], COLOUR_INDEX["blue"], 24, 24, 32, 32, 0, 1, 1],
    ]


def test_a_pass_tells_how_much_words_look_at_pictures_and_what_is_written_there() -> None:
    torch.manual_seed(0)
    model = Nano(documents().model).language_model
    x = torch.randn(1, 12, documents().model.text.hidden_size)
    positions, branch = torch.arange(12)[None, :, None].expand(1, 12, 3), torch.zeros(1, 12, dtype=torch.int64)
    special = torch.zeros(1, 12, dtype=torch.bool)
    special[0, 4:8] = True
    slot = torch.arange(4, 8)
    with torch.no_grad():
        passed = model(x, positions, branch, special, slot)
        for layer in model.layers:
            layer.self_attn.q_proj.weight.zero_()
        even = model(x, positions, branch, special, slot)
    # Queries of zero look at all tokens before them alike: words after the picture give it 4 of 9 .. 12 parts.
    expected = BLIND * sum(4 / n for n in range(9, 13)) / 8
    assert float(even.looks) == pytest.approx(expected, rel=1e-5)
    assert 0 < float(passed.looks) < BLIND
    assert float(passed.before) > 0.3 and float(passed.written) > 0.1
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight.zero_()
            if isinstance(layer.mlp, Mlp):
                layer.mlp.down_proj.weight.zero_()
            else:
                layer.mlp.shared_experts.down_proj.weight.zero_()
        silent = model(x, positions, branch, special, slot)
    assert float(silent.before) == pytest.approx(float(x[0, 4:8].square().mean(-1).sqrt().mean()), rel=1e-3)
    assert float(silent.written) < 0.02
