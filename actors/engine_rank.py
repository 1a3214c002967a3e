"""One rank of an engine: the model on its device and the arena that holds its KV blocks and vision experts."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import torch

from actors.config import EngineReplicaConfig
from actors.engine.arena import Arena, ArenaPlan, arena_bytes
from actors.engine.kv_cache import KvCache, KvLayout
from actors.engine.plan import NewSequence, Slice, StepPlan
from actors.engine.runner import Runner
from actors.ernie.attention import PackedAttention
from actors.ernie.bank import VisionBank, empty_bank_buffer, vision_bank_bytes
from actors.ernie.config import ErnieConfig, Rules
from actors.ernie.text import LanguageModel
from actors.ernie.vocabulary import generated_token_ids
from actors.ernie.weights import Checkpoint, LoadReport, Progress, load_language, load_vision_bank
from actors.types import EngineRole, SamplingParams

log = logging.getLogger(__name__)

GIB = 1 << 30
SEPARATOR = "<|end_of_sentence|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """A loaded rank, ready to execute its part of step plans."""

    config: ErnieConfig
    rules: Rules
    runner: Runner
    arena: Arena
    fingerprint: bytes
    """Of the language weights, loaded here or not."""
    loaded: LoadReport


def load_rank(config: EngineReplicaConfig, role: EngineRole, progress: Progress | None = None) -> Rank:
    """Loads what ``role`` needs: a decode engine reads no vision experts and uses their room for KV blocks.

    ``progress`` is called with (bytes done, bytes in all), for the language model and then for the vision experts.

    Raises:
        ValueError: the checkpoint is broken, or the memory does not hold one block.
    """
    rules = Rules.transformers() if config.compat == "transformers" else Rules.original()
    dtype: torch.dtype = getattr(torch, config.dtype)
    with Checkpoint(config.model_dir) as checkpoint:
        model_config = _with_end_guard(checkpoint.config, config)
        text = model_config.text
        model = load_language(checkpoint, checkpoint.config, dtype=dtype, device=config.device, progress=progress)
        layout = KvLayout(
            num_layers=text.num_hidden_layers,
            block_size=config.block_size,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            dtype=dtype,
        )
        bank_bytes = vision_bank_bytes(text, dtype)
        plan = ArenaPlan(
            size_bytes=_arena_bytes(config, layout, bank_bytes, model),
            block_bytes=layout.block_bytes,
            bank_bytes=bank_bytes,
        )
        arena = Arena(plan, config.device)
        if role.prefills:
            # A model without sparse layers has a bank all the same, of no bytes.
            storage = arena.bank_storage() if bank_bytes else empty_bank_buffer(text, dtype, config.device)
            bank = VisionBank(text, dtype, storage)
            load_vision_bank(checkpoint, bank, progress=progress)
            model.attach_vision_bank(bank)
        rank = Rank(
            config=model_config,
            rules=rules,
            runner=Runner(model, model_config, rules, KvCache(layout, arena.block_storage(with_bank=role.prefills))),
            arena=arena,
            fingerprint=checkpoint.fingerprint("language"),
            loaded=checkpoint.report,
        )
    _warm_up(rank.runner)
    log.info(
        "%s engine loaded %.2f GB in %.1f s; %d blocks hold %d tokens",
        role,
        rank.loaded.total_bytes / 1e9,
        rank.loaded.seconds,
        rank.runner.block_count,
        rank.runner.block_count * layout.block_size,
    )
    return rank


def _with_end_guard(model: ErnieConfig, config: EngineReplicaConfig) -> ErnieConfig:
    """The original also stops at the separator, which ends a turn in its training data; transformers does not."""
    separator = generated_token_ids(config.model_dir).get(SEPARATOR)
    if config.compat == "transformers" or separator is None or separator in model.eos_token_ids:
        return model
    return replace(model, eos_token_ids=(*model.eos_token_ids, separator))


def _arena_bytes(config: EngineReplicaConfig, layout: KvLayout, bank_bytes: int, model: LanguageModel) -> int:
    """Room for KV blocks beside the bank: as configured, or what the GPU has left after weights and activations.

    Raises:
        ValueError: naming the field that leaves no room for one block.
    """
    if config.kv_cache_gib is not None:
        blocks = int(config.kv_cache_gib * GIB) // layout.block_bytes
        if blocks == 0:
            raise ValueError(f"kv_cache_gib: {config.kv_cache_gib} holds no KV block of {layout.block_bytes} bytes")
        return arena_bytes(blocks, layout.block_bytes, bank_bytes)
    device = torch.device(config.device)
    activations = _activation_bytes(model, config.max_batched_tokens)
    free, total = torch.cuda.mem_get_info(device)
    room = int(free - (1 - config.gpu_memory_utilization) * total) - activations
    if room < bank_bytes + layout.block_bytes:
        raise ValueError(
            f"gpu_memory_utilization: {config.gpu_memory_utilization} leaves {room / 1e9:.2f} GB after weights and "
            f"activations, too little for {bank_bytes / 1e9:.2f} GB of vision experts and a KV block"
        )
    return room


@torch.inference_mode()
def _activation_bytes(model: LanguageModel, token_count: int) -> int:
    """Peak device memory of one forward pass over ``token_count`` text tokens beside what is there already."""
    device = model.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    ids = torch.zeros(token_count, dtype=torch.int64, device=device)
    positions = torch.arange(token_count, device=device).expand(3, -1)
    model.logits(model.forward(model.embed(ids), positions, None, PackedAttention([0, token_count])))
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


def _warm_up(runner: Runner) -> None:
    """One prompt step and one decode step, so that the first request does not pay for lazy initialisation."""
    sampling = SamplingParams(temperature=1.0, max_tokens=2)
    prompt = NewSequence(id=-1, token_ids=(0,) * 8, prompt_length=8, spans=(), sampling=sampling, seed=0, choice=0)
    blocks = tuple(range(-(-10 // runner.cache.layout.block_size)))
    steps = [
        ((prompt,), Slice(id=-1, first=0, count=8, new_blocks=blocks, sample=True)),
        ((), Slice(id=-1, first=8, count=1, new_blocks=(), sample=True)),
    ]
    started = time.monotonic()
    for new, part in steps:
        runner.run(StepPlan(step=0, ended=(), new=new, slices=(part,)))
    runner.run(StepPlan(step=0, ended=(-1,), new=(), slices=()))
    log.info("warmed up in %.2f s", time.monotonic() - started)
