"""A packed row of the training model gives each branch the logits transformers gives the conversation alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Ernie4_5_VLMoeForConditionalGeneration

from actors.types import Grid, MediaKind
from nano.export import export
from nano.files import documents
from nano.language_data import FULL, MAKERS, Album, Batch
from nano.model import Nano
from nano.packing import Row
from tests.conformance.hf_reference import Prompt, reference_inputs

TOLERANCE = 1e-4


def conversation(batch: Batch, row: Row, branch: int) -> tuple[Prompt, list[int]]:
    """The conversation of one branch, and where its tokens are in the row."""
    ids = documents().model
    where = [i for i in range(row.length) if batch.rows.branch[0, i] in (0, branch)]
    tokens = batch.rows.ids[0, where]
    media, patches = [], []
    offset = 0
    while offset < len(tokens):
        if tokens[offset] not in (ids.image_token_id, ids.video_token_id):
            offset += 1
            continue
        kind = MediaKind.IMAGE if tokens[offset] == ids.image_token_id else MediaKind.VIDEO
        units = [unit for unit, first, end in media_units(row, branch) if first == offset for unit in range(unit, end)]
        frames = [f for unit in units for f in batch.frames.pairs[unit]][:: 2 if kind is MediaKind.IMAGE else 1]
        pixels = np.concatenate([batch.frames.patches[f][batch.frames.valid[f]] for f in frames])
        high, wide = batch.frames.places[frames[0]][batch.frames.valid[frames[0]]].max(0) + 1
        grid = Grid(len(frames), int(high), int(wide))
        media.append((kind, offset, grid))
        patches.append(pixels)
        offset += grid.tokens
    return Prompt(ids=tokens, media=tuple(media), patches=tuple(patches)), where


def media_units(row: Row, branch: int) -> list[tuple[int, int, int]]:
    """First unit, place of its first token in the conversation, and the unit after the last, of every medium."""
    sources = [s for p in (row.pieces[0], row.pieces[branch]) for s in p.sources]
    found: list[tuple[int, int, int]] = []
    for place, source in enumerate(sources):
        if source is None or source.unit < 0:
            continue
        before = sources[place - 1]
        if before is None or before.unit < 0:
            found.append((source.unit, place, source.unit + 1))
        else:
            first, start, _ = found[-1]
            found[-1] = (first, start, source.unit + 1)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Nano, Ernie4_5_VLMoeForConditionalGeneration]:
    torch.manual_seed(0)
    directory: Path = tmp_path_factory.mktemp("nano")
    nano = Nano(documents().model)
    with torch.no_grad():
        for name, parameter in nano.named_parameters():
            # Larger than at the start of training: attention and routers that decide something.
            parameter.mul_(3 if "q_proj" in name or "k_proj" in name or "gate.weight" in name else 1)
            parameter.copy_(parameter.bfloat16())
    export(nano.state_dict(), directory)
    peer = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    peer.train(False)
    return nano, peer


@pytest.mark.parametrize("kind", sorted(FULL.kinds))
@torch.no_grad()
def test_branches_are_conversations(kind: str, models: tuple[Nano, Ernie4_5_VLMoeForConditionalGeneration]) -> None:
    nano, peer = models
    rng = random.Random(f"conformance/{kind}")
    album = Album(rng)
    row = MAKERS[kind](rng, album)
    batch = album.batch([row])
    rows, frames = batch.rows, batch.frames
    ids, source, slot = (torch.from_numpy(x) for x in (rows.ids, rows.source, rows.slot))
    seen = torch.zeros(1, documents().model.text.hidden_size)
    if len(frames.pairs):
        seen = nano.see(*map(torch.from_numpy, frames.arrays)).flatten(0, 1)
    x = nano.language_model.embed(ids, seen, source, slot)
    special = ids >= documents().model.im_patch_id
    positions, branch = torch.from_numpy(rows.positions), torch.from_numpy(rows.branch)
    hidden = nano.language_model(x, positions, branch, special, slot).hidden
    logits = (hidden @ nano.language_model.embed_tokens.weight.T)[0]
    assert len(row.pieces) > 1
    for branch_index in range(1, len(row.pieces)):
        case, where = conversation(batch, row, branch_index)
        peer.model.rope_deltas = None
        expected = peer(**reference_inputs(case, documents().model)).logits[0]
        assert (logits[where] - expected).abs().max() < TOLERANCE * expected.abs().max()
