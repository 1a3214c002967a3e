"""What a decode step costs beside the model: scheduler, batch building, sampler. CPU time of one thread.

Scheduler, runner, sampler, prefix cache and block pool are the real ones; the model answers at once with stored
tensors. The vocabulary is small by default, so that torch has next to nothing to compute: what is left of each part is
Python, numpy and the dispatch of torch operations, an upper bound of what the part costs outside of them. With
``--vocab 103424`` the sampler's figure includes its work on logits of the full size.

    python benchmarks/step_overhead.py --batch 32 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from actors.engine.config import EngineConfig
from actors.engine.execution import runner as runner_module
from actors.engine.execution.kv_cache import KvCache, KvLayout
from actors.engine.execution.runner import Runner
from actors.engine.scheduling.block_hash import BlockHasher
from actors.engine.scheduling.block_pool import BlockPool
from actors.engine.scheduling.scheduler import Scheduler
from actors.engine.scheduling.sequence import Sequence
from actors.ernie.config import ErnieConfig, Rules, TextConfig, VisionConfig
from actors.ernie.text import LanguageModel
from actors.reports import KvIdentity
from actors.types import AttemptMode, EngineRequest, EngineRole, SamplingParams, SequenceKey

MEDIA_IDS = 16
BLOCK_SIZE = 16
PARTS = ("plan", "batch", "attention", "sampler", "apply")
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.95, "top_k": 20},
    "penalised": {"temperature": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.5, "min_tokens": 10_000},
}


class StoredAnswers:
    """Stands in for a language model: same shapes, no computation."""

    def __init__(self, config: TextConfig, rows: int) -> None:
        self.config = config
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        generator = torch.Generator().manual_seed(0)
        self._hidden_TD = torch.zeros(rows, config.hidden_size)
        self._logits_NV = torch.randn(rows, config.vocab_size, generator=generator)

    def embed(self, ids_T: Tensor) -> Tensor:
        return self._hidden_TD[: len(ids_T)]

    def forward(self, x_TD: Tensor, positions_3T: Tensor, vision_T: Tensor | None, attention: object) -> Tensor:
        return x_TD

    def logits(self, h_ND: Tensor) -> Tensor:
        return self._logits_NV[: len(h_ND)].clone()


class Stopwatch:
    """Seconds by part of the present step."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            started = time.thread_time()
            try:
                return work(*args, **options)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + time.thread_time() - started

        return run


def text_config(vocab_size: int) -> TextConfig:
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        mrope_section=(3, 3, 2),
        max_position_embeddings=131072,
        mlp_layer_types=("dense", "dense"),
        moe_intermediate_size=(32, 16),
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=0,
        moe_norm_min=1e-12,
        use_bias=False,
        tie_word_embeddings=True,
    )


def ernie_config(text: TextConfig) -> ErnieConfig:
    media = range(text.vocab_size - MEDIA_IDS, text.vocab_size)
    return ErnieConfig(
        text=text,
        vision=VisionConfig(depth=1, hidden_size=32, num_heads=4, intermediate_size=64, output_size=64),
        image_token_id=media[0],
        video_token_id=media[5],
        image_start_token_id=media[1],
        image_end_token_id=media[2],
        video_start_token_id=media[3],
        video_end_token_id=media[4],
        eos_token_ids=(2,),
    )


def measure(batch: int, prompt: int, steps: int, vocab: int, sampling: dict[str, Any]) -> dict[str, float]:
    """Medians over ``steps`` decode steps, in milliseconds."""
    watch = Stopwatch()
    text = text_config(vocab)
    config = ernie_config(text)
    longest = prompt + steps + 64
    blocks = batch * (-(-longest // BLOCK_SIZE) + 1)
    pool = BlockPool(blocks)
    engine = EngineConfig(
        role=EngineRole.COLOCATED,
        max_model_len=longest,
        block_size=BLOCK_SIZE,
        max_num_seqs=batch,
        max_batched_tokens=batch * prompt,
    )
    scheduler = Scheduler(engine, [pool], frozenset(config.eos_token_ids), config.im_patch_id)
    layout = KvLayout(num_layers=2, block_size=BLOCK_SIZE, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    model = cast(LanguageModel, StoredAnswers(text, batch * prompt))
    runner = Runner(model, config, Rules.original(), KvCache.allocate(layout, blocks))
    identity = KvIdentity(fingerprint="", dtype="float32", block_size=BLOCK_SIZE, switches="")
    for index in range(batch):
        ids = tuple(3 + (index * 31 + at * 7) % (vocab - MEDIA_IDS - 3) for at in range(prompt))
        params = SamplingParams(max_tokens=steps + 32, ignore_eos=True, **sampling)
        request = EngineRequest(
            prompt_ids=ids,
            media=(),
            output_ids=(),
            sampling=params,
            seed=index,
            arrival_s=0.0,
            deadline_s=4e9,
            priority=0,
        )
        hasher = BlockHasher(identity, (), b"")
        hasher.extend(ids)
        sequence = Sequence(
            key=SequenceKey(str(index), 0, 0),
            request=request,
            mode=AttemptMode.COLOCATED,
            deadline=4e9,
            hasher=hasher,
            needs_constraint=False,
        )
        scheduler.submit(sequence, 0.0)
    plan_step = watch.timed("plan", scheduler.plan)
    apply = watch.timed("apply", scheduler.apply)
    run = watch.timed("runner", runner.run)
    original = runner_module.build_batch
    runner_module.build_batch = watch.timed("batch", original)
    runner._attention = watch.timed("attention", runner._attention)  # type: ignore[method-assign]
    runner.sampler.sample = watch.timed("sampler", runner.sampler.sample)  # type: ignore[method-assign]
    samples: list[dict[str, float]] = []
    try:
        for _ in range(steps + 10):
            watch.parts.clear()
            plan = plan_step(0.0)
            result = run(plan.parts[0])
            apply(plan, result, 0.001)
            scheduler.take_events()
            pool.take_changes()
            if plan.token_count == len(plan.slices) == batch:
                samples.append(dict(watch.parts))
    finally:
        runner_module.build_batch = original
    samples = samples[5:]
    medians = {part: 1e3 * statistics.median(one[part] for one in samples) for part in PARTS}
    inside = ("batch", "attention", "sampler")
    rest = statistics.median(one["runner"] - sum(one[part] for part in inside) for one in samples)
    both = statistics.median(one["plan"] + one["apply"] + one["sampler"] for one in samples)
    total = statistics.median(one["plan"] + one["apply"] + one["runner"] for one in samples)
    return medians | {"runner_rest": 1e3 * rest, "scheduler_and_sampler": 1e3 * both, "total": 1e3 * total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = {
        name: measure(options.batch, options.prompt, options.steps, options.vocab, sampling)
        for name, sampling in SAMPLING.items()
    }
    if options.json:
        print(json.dumps({"batch": options.batch, "vocab": options.vocab, "unit": "ms per step", **measured}))
        return
    print(f"batch {options.batch}, vocabulary {options.vocab}, ms per step (median)")
    names = list(next(iter(measured.values())))
    print(f"{'':12}" + "".join(f"{name:>23}" for name in names))
    for name, figures in measured.items():
        print(f"{name:12}" + "".join(f"{figures[column]:23.3f}" for column in names))


if __name__ == "__main__":
    main()
