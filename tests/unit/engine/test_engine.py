"""The engine on a small real model in float64, against recomputation without cache, batch or engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.engine.sampling import batch as sampling_batch
from actors.engine.sampling.drawing import stream_keys, uniforms
from actors.ernie.attention import PackedAttention
from actors.ernie.config import ErnieConfig, Rules
from actors.ernie.positions import prompt_positions
from actors.ernie.text import LanguageModel
from actors.types import EngineRequest, FinishReason, MilestoneKind
from tests.unit.engine.harness import EOS, IMAGE, Rig, ernie_config, key, media_request, request

Embeddings = dict[tuple[int, int], torch.Tensor]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randint(3, IMAGE, (length,), generator=generator).tolist() for length in lengths]


def plain_greedy(
    model: LanguageModel, config: ErnieConfig, rules: Rules, wanted: EngineRequest, embeddings: Embeddings | None = None
) -> list[int]:
    """Recomputes the whole sequence for every token."""
    ids = list(wanted.prompt_ids)
    spans = [(s.offset, s.grid) for s in wanted.media]
    positions, following = prompt_positions(len(ids), spans, rules.positions)
    output: list[int] = []
    while len(output) < wanted.sampling.max_tokens:
        all_ids = torch.tensor(ids + output)
        tail = torch.arange(following, following + len(output)).expand(3, -1)
        x_TD = model.embed(all_ids)
        for (media, unit), embedding in (embeddings or {}).items():
            start = wanted.media[media].offset + unit * wanted.media[media].grid.tokens_per_unit
            x_TD[start : start + len(embedding)] = embedding
        vision_T = rules.vision_tokens(all_ids, config)
        attention = PackedAttention([0, len(all_ids)])
        h_TD = model.forward(x_TD, torch.cat((torch.from_numpy(positions), tail), 1), vision_T, attention)
        output.append(int(model.logits(h_TD[-1:])[0, : config.im_patch_id].argmax()))
    return output


def mixed_requests() -> list[tuple[EngineRequest, Embeddings | None]]:
    """Text and media, greedy and sampled, of various lengths."""
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "seed": 2**63},
    ]
    texts = [(request(prompt, max_tokens=4 + i, **ways[i % 3]), None) for i, prompt in enumerate(prompts(5, seed=1))]
    media = [media_request(seed, max_tokens=6 + seed, **ways[seed]) for seed in range(3)]
    return [*texts, *media]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """What each of ``mixed_requests`` gives by itself, unchunked, in the plain form."""
    outputs = []
    for one in mixed_requests():
        with Rig(batched_decode=False) as rig:
            outputs += rig.run(one)
    return outputs


@pytest.mark.parametrize("rules", [Rules.original(), Rules.transformers()])
def test_greedy_equals_recomputation(rules: Rules) -> None:
    wanted = [*((request(prompt), None) for prompt in prompts(3)), *(media_request(seed) for seed in range(2))]
    with Rig(rules=rules) as rig:
        assert rig.run(*wanted) == [plain_greedy(rig.model, rig.config, rules, *one) for one in wanted]


def test_outputs_vary_enough_to_tell_things_apart(alone: list[list[int]]) -> None:
    assert len({tuple(output) for output in alone}) == len(alone)
    assert len({token for output in alone for token in output}) > 20


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batched_decode": False},
        {"block_size": 1, "blocks": 300},
        {"block_size": 16},
        {"max_num_seqs": 8, "max_batched_tokens": 9},
        {"max_num_seqs": 3, "max_batched_tokens": 5},
    ],
)
def test_batched_equals_alone(options: dict[str, Any], alone: list[list[int]]) -> None:
    with Rig(**options) as rig:
        assert rig.run(*mixed_requests()) == alone


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 7, 11, 13, 25, 39])
def test_chunked_equals_whole(budget: int, alone: list[list[int]]) -> None:
    with Rig(max_num_seqs=1, max_batched_tokens=budget) as rig:
        assert rig.run(mixed_requests()[-1], mixed_requests()[2]) == [alone[-1], alone[2]]


def test_another_batch_order_and_staggered_arrival_change_nothing(alone: list[list[int]]) -> None:
    wanted = mixed_requests()
    with Rig(max_batched_tokens=16) as rig:
        names = []
        for number in reversed(range(len(wanted))):
            names.append(rig.submit(number, *wanted[number]))
            rig.sink.wait(lambda: bool(rig.sink.tokens[names[-1]]))
        rig.wait_released(*names)
        assert [rig.sink.ids(key(number)) for number in range(len(wanted))] == alone


@pytest.mark.parametrize("split", [1, 3, 5])
def test_resumed_reply_goes_on_as_if_nothing_had_happened(split: int, alone: list[list[int]]) -> None:
    """Also for a sampled media sequence: positions, randomness and bounds follow from the request."""
    for number in (5, 6, 7):
        wanted, embeddings = mixed_requests()[number]
        resumed = request(
            wanted.prompt_ids,
            media=wanted.media,
            outputs=alone[number][:split],
            max_tokens=wanted.sampling.max_tokens,
            seed=wanted.seed,
            temperature=wanted.sampling.temperature,
            top_k=wanted.sampling.top_k,
            top_p=wanted.sampling.top_p,
        )
        with Rig(max_batched_tokens=11) as rig:
            assert rig.run((resumed, embeddings)) == [alone[number][split:]]
            assert rig.sink.tokens[key(0)][0].index == split


def test_seed_decides() -> None:
    prompt = prompts(1)[0]
    with Rig() as rig:
        same, again, other = rig.run(*(request(prompt, max_tokens=12, temperature=1.5, seed=s) for s in (1, 1, 2)))
    assert same == again != other


def test_eos_and_stop_ids_end_the_reply_and_are_told() -> None:
    prompt = prompts(1)[0]
    with Rig() as rig:
        free = rig.run(request(prompt, max_tokens=10))[0]
    at = next(i for i in range(1, 10) if free[i] not in free[:i])
    with Rig() as rig:
        assert rig.run(request(prompt, stop_token_ids=(free[at],))) == [free[: at + 1]]
        assert rig.sink.finish(key(0)) is FinishReason.STOP
    with Rig(config=ernie_config(eos_token_ids=(EOS, free[at]))) as rig:
        got = rig.run(request(prompt, ignore_eos=False), request(prompt, max_tokens=10))
        assert got == [free[: at + 1], free]
    with Rig(max_model_len=len(prompt) + 3) as rig:
        assert rig.run(request(prompt, max_tokens=10)) == [free[:3]]
        assert rig.sink.finish(key(0)) is FinishReason.LENGTH


def test_embeddings_may_come_late_one_by_one_and_out_of_order(alone: list[list[int]]) -> None:
    wanted, embeddings = mixed_requests()[-1]
    with Rig(max_batched_tokens=8) as rig:
        name = rig.submit(0, wanted)
        rig.sink.wait(lambda: ("admitted", name) in rig.sink.calls)
        for (media, unit), embedding in reversed(embeddings.items() if embeddings else ()):
            assert not rig.sink.tokens[name]
            rig.engine.supply_embedding(name, media, unit, embedding)
            rig.engine.supply_embedding(name, media, unit, embedding)
        rig.wait_released(name)
        assert rig.sink.ids(name) == alone[-1]
        consumed = [call[2:] for call in rig.sink.calls if call[0] == "consumed"]
        assert consumed == sorted(embeddings or ())


def test_milestones_come_in_order_with_busy_time() -> None:
    with Rig() as rig:
        rig.run(request(prompts(1)[0], max_tokens=3))
        assert [kind for _, kind, _ in rig.sink.milestones] == [MilestoneKind.PREFILL_STARTED, MilestoneKind.RELEASED]
        assert all(token.busy_s > 0 for token in rig.sink.tokens[key(0)])


def test_tokens_of_one_step_come_in_one_call() -> None:
    with Rig() as rig:
        names = [rig.submit(i, request(prompt, max_tokens=40)) for i, prompt in enumerate(prompts(4))]
        rig.wait_released(*names)
        assert max(len(step) for step in rig.sink.steps) == 4
        assert all(len({token.key for token in step}) == len(step) for step in rig.sink.steps)


def test_memory_bounds_the_context() -> None:
    with Rig(blocks=3, block_size=4, max_model_len=200) as rig:
        assert rig.engine.max_model_len == 12
        assert len(rig.run(request([5] * 4, max_tokens=100))[0]) == 8


def test_randomness_is_keyed_by_seed_choice_and_output_index(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def watched(keys: Any, indices: Any) -> Any:
        seen.extend(zip(keys.tolist(), indices.tolist(), strict=True))
        return uniforms(keys, indices)

    monkeypatch.setattr(sampling_batch, "uniforms", watched)
    with Rig() as rig:
        rig.run(request([5] * 9, outputs=[6, 7], max_tokens=5, temperature=1.0, seed=77))
    (stream,) = stream_keys([77], [0]).tolist()
    assert seen == [(stream, 2), (stream, 3), (stream, 4)]
