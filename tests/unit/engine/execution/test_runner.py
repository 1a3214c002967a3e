"""The runner's tokens, whatever it is given together, are those of every sequence computed alone without a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.engine.execution import attention_varlen
from actors.engine.execution.decode_graphs import DecodeGraphs, Replay, graph_sizes
from actors.engine.execution.forms import AttentionForm
from actors.engine.plan import RankPlan, Slice, StepShape
from actors.ernie.text import LanguageModel
from actors.kernels.cpu import CpuKernels
from actors.parallel.dispatch import Dispatched, LocalDispatcher, LocalMetadata
from tests.small_models import language_model, text_config
from tests.unit.engine.execution.runner_rig import RunnerRig
from tests.unit.engine.execution.varlen_double import varlen_double


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return language_model(text_config())


def drive(rig: RunnerRig, steps: int, *, sequences: int, longest: int) -> int:
    """Random steps: chunks of any size, decoding, new sequences and ended ones, which are checked. Tokens drawn."""
    random, drawn = rig.random, 0
    for _ in range(steps):
        while len(rig.driven) < sequences:
            kind = random.random()
            rig.add(int(random.integers(1, longest)), media=kind < 0.3, outputs=int(random.integers(4)) * (kind > 0.8))
        counts = {}
        for id in random.permutation(list(rig.driven)).tolist()[: int(random.integers(1, sequences + 1))]:
            driven = rig.driven[id]
            left = len(driven.tokens) - driven.computed
            counts[id] = int(random.integers(1, left + 1)) if random.random() < 0.5 else left
        drawn += len(rig.step(counts).tokens)
        for id in list(rig.driven):
            driven = rig.driven[id]
            if len(driven.tokens) > len(driven.new.token_ids) and random.random() < 0.1:
                rig.check(id)
                rig.end(id)
    return drawn


@pytest.mark.parametrize("form", [AttentionForm.PAGED, AttentionForm.PLAIN])
@pytest.mark.parametrize("seed", range(3))
def test_random_mixes_equal_the_reference(model: LanguageModel, form: AttentionForm, seed: int) -> None:
    rig = RunnerRig(model, blocks=400, block_size=3, seed=seed, attention=form)
    assert drive(rig, 40, sequences=7, longest=40) > 50
    for id in list(rig.driven):
        if len(rig.driven[id].tokens) > len(rig.driven[id].new.token_ids):
            rig.check(id)
        rig.end(id)
    rig.step({})
    assert rig.runner.resident_count == 0


def test_slots_and_block_tables_grow_and_are_used_again(model: LanguageModel) -> None:
    rig = RunnerRig(model, blocks=1500, block_size=1, seed=5)
    for _ in range(3):
        ids = [rig.add(length) for length in range(1, 41)]
        rig.step({id: len(rig.driven[id].tokens) for id in ids})
        for _ in range(4):
            rig.step(dict.fromkeys(reversed(ids), 1))
        for id in ids[::7]:
            rig.check(id)
        for id in ids:
            rig.end(id)
    residents = rig.runner._residents
    assert residents.blocks.shape == (64, 64)
    rig.step({})
    assert len(residents) == 0 and sorted(residents._free) == list(range(64))


def test_decoding_goes_on_where_a_prompt_with_outputs_ends(model: LanguageModel) -> None:
    """As on a decode engine: everything but the last token is in the cache already."""
    rig = RunnerRig(model, blocks=40, block_size=4)
    id = rig.add(0, media=True, outputs=5)
    driven = rig.driven[id]
    rig.step({id: len(driven.tokens) - 1})
    rig.step({id: 1})
    rig.step({id: 1})
    rig.check(id)


def test_a_slice_beyond_what_is_known_is_a_defect(model: LanguageModel) -> None:
    rig = RunnerRig(model, blocks=40, block_size=4)
    id = rig.add(5)
    rig.driven[id].tokens.append(7)
    with pytest.raises(ValueError, match=r"tokens 0 \.\. 6 of sequence 0 of 5"):
        rig.step({id: 6})


def test_prompt_logprobs_are_of_the_tokens_that_follow(model: LanguageModel) -> None:
    whole, cut = (RunnerRig(model, blocks=60, block_size=4) for _ in range(2))
    results = []
    for rig, pieces in ((whole, [39]), (cut, [7, 1, 20, 11])):
        id = rig.add(39, prompt_logprobs=2)
        results.append([entry for count in pieces for entry in rig.step({id: count}).prompt_logprobs.get(id, ())])
    assert len(results[0]) == len(results[1]) == 39 and results[0][0] is None
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert one is not None and other is not None
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert [id for id, _ in one.top] == [id for id, _ in other.top]
        assert one.logprob == pytest.approx(other.logprob, abs=1e-9)
    assert [entry.token_id for entry in results[0][1:] if entry] == whole.driven[0].tokens[1:39]


# Varlen attention and graphs, on a CPU: the kernel's double, and a recorder that calls again.


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_varlen, "torch_kernel", lambda: varlen_double)


@pytest.mark.usefixtures("varlen")
def test_varlen_attention_equals_the_reference(model: LanguageModel) -> None:
    rig = RunnerRig(model, blocks=400, block_size=3, seed=11, attention=AttentionForm.VARLEN)
    assert drive(rig, 30, sequences=6, longest=40) > 30


@pytest.mark.usefixtures("varlen")
def test_graphs_equal_the_reference(model: LanguageModel) -> None:
    replayed: list[int] = []

    def recorder(work: Replay) -> Replay:
        """As a graph: the result always lies in the same place."""
        out = work().clone()

        def replay() -> torch.Tensor:
            replayed.append(len(out))
            out.copy_(work())
            return out

        return replay

    rig = RunnerRig(model, blocks=400, block_size=3, seed=12, attention=AttentionForm.VARLEN)
    rig.runner.graphs = DecodeGraphs(model, rig.cache, sizes=(1, 2, 4, 8), max_context=94, recorder=recorder)
    ids = [rig.add(length, media=length == 9) for length in (9, 30, 1, 17, 5, 80)]
    for id in ids:
        rig.step({id: len(rig.driven[id].tokens)})
    for count in (6, 5, 3, 2, 1, 6):
        for _ in range(2):
            rig.step(dict.fromkeys(np.roll(ids, count).tolist()[:count], 1))
    assert replayed == [8, 8, 8, 8, 4, 4, 2, 2, 1, 1, 8, 8]
    rig.step({ids[0]: 1, (mixed := rig.add(4)): 4})
    for _ in range(4):
        rig.step({ids[5]: 1})
    assert len(replayed) == 12 + 2, "a prompt in the step, and contexts beyond the graphs', run eagerly"
    for id in (*ids, mixed):
        rig.check(id)


@pytest.mark.usefixtures("varlen")
def test_graphs_replay_only_what_decodes_on_every_rank(model: LanguageModel) -> None:
    replayed: list[int] = []

    def recorder(work: Replay) -> Replay:
        return lambda: (replayed.append(1), work())[1]

    rig = RunnerRig(model, blocks=40, block_size=4, attention=AttentionForm.VARLEN)
    rig.runner.graphs = DecodeGraphs(model, rig.cache, sizes=(1,), max_context=40, recorder=recorder)
    id = rig.add(5)
    rig.step({id: 5})
    for rig.prompts_elsewhere in (False, True, True, False):
        rig.step({id: 1})
    assert len(replayed) == 2
    rig.check(id)


# A rank among others: what it does must not depend on what it has itself.


class CountingDispatcher(LocalDispatcher):
    """Remembers how many tokens each layer sent."""

    def __init__(self, num_experts: int, kernels: CpuKernels | None) -> None:
        super().__init__(num_experts, kernels)
        self.sent: list[int] = []
        self.came_home: list[int] = []

    def dispatch(
        self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
    ) -> Dispatched[LocalMetadata]:
        self.sent.append(len(x_TD))
        return super().dispatch(layer, x_TD, expert_ids_TK, weights_TK)

    def combine(self, rows_ND: Tensor, metadata: LocalMetadata) -> Tensor:
        out_TD = super().combine(rows_ND, metadata)
        self.came_home.append(len(out_TD))
        return out_TD


@pytest.mark.usefixtures("varlen")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", list(AttentionForm))
def test_a_part_without_tokens_meets_the_others_in_every_layer(form: AttentionForm, dtype: torch.dtype) -> None:
    model = language_model(text_config(), dtype)
    dispatcher = model.dispatcher = CountingDispatcher(2 * model.config.moe_num_experts, model.kernels)
    rig = RunnerRig(model, blocks=400, block_size=4, seed=3, attention=form)
    rig.step({})
    assert dispatcher.sent == [], "nobody has tokens"
    rig.tokens_elsewhere = 50
    for rig.vision_elsewhere in (False, True):
        assert not rig.step({}).tokens
        assert dispatcher.sent == dispatcher.came_home == [0, 0], "once a sparse layer"
        dispatcher.sent.clear()
        dispatcher.came_home.clear()
        if dtype == torch.float64:
            assert drive(rig, 12, sequences=4, longest=30) > 5
        dispatcher.sent.clear()
        dispatcher.came_home.clear()
    for id in list(rig.driven):
        rig.end(id)
    rig.step({})
    assert rig.runner.resident_count == 0


def test_vision_tokens_that_were_not_planned_are_a_defect(model: LanguageModel) -> None:
    rig = RunnerRig(model, blocks=40, block_size=4)
    id = rig.add(0, media=True)
    shape = StepShape(step=1, max_tokens=5, decodes=False, vision=False)
    part = Slice(id=id, first=0, count=5, new_blocks=(0, 1), sample=False)
    for (media, unit), embedding in rig.driven[id].embeddings.items():
        rig.runner.supply_embedding(id, media, unit, embedding)
    with pytest.raises(ValueError, match="step 1 was planned without tokens for the vision experts and has some"):
        rig.runner.run(RankPlan(shape=shape, ended=(), new=(rig.driven[id].new,), slices=(part,)))


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, (1,)),
        (6, (1, 2, 4, 6)),
        (32, (1, 2, 4, 8, 16, 24, 32)),
        (70, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 70)),
        (128, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 128)),
    ],
)
def test_graph_sizes(most: int, sizes: tuple[int, ...]) -> None:
    assert graph_sizes(most) == sizes
