"""One rank of an engine: the model on its device and the arena that holds its KV blocks and vision experts."""

from __future__ import annotations

import contextlib
import logging
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from actors.config import EngineReplicaConfig
from actors.engine.constraints.vocabulary import ConstraintVocabulary
from actors.engine.execution import memory
from actors.engine.execution.arena import Arena, ArenaPlan, arena_bytes
from actors.engine.execution.decode_graphs import CudaRecorder, DecodeGraphs, graph_sizes
from actors.engine.execution.expert_steps import ExpertSteps
from actors.engine.execution.forms import AttentionForm, Forms, choose_forms, recording_obstacle, varlen_obstacle
from actors.engine.execution.kv_cache import KvCache, KvLayout
from actors.engine.execution.runner import PROMPT_LOGPROB_ROWS, RoleChange, Runner
from actors.engine.execution.vision_tail import VisionTail
from actors.engine.group.meeting import Invitation
from actors.engine.group.rank_process import Loaded, follow
from actors.engine.plan import NewSequence, RankPlan, Slice, StepShape
from actors.ernie.attention import PackedAttention
from actors.ernie.bank import VisionBank, vision_bank_bytes
from actors.ernie.config import ErnieConfig, Rules, TextConfig
from actors.ernie.experts_form import ExpertsForm
from actors.ernie.text import LanguageModel
from actors.ernie.vocabulary import generated_token_ids
from actors.ernie.weights import Checkpoint, LoadReport, Progress, load_language, load_vision_bank
from actors.parallel.group import ExpertGroup
from actors.parallel.kv_threads import LocalKvRank
from actors.parallel.kv_transfer import KvGeometry, KvTransferConfig
from actors.parallel.layout import ExpertShare, even_placement
from actors.parallel.torch_pairs import TorchMeeting
from actors.parallel.world import Seat
from actors.sizes import told_bytes
from actors.tokenization.files import tokenizer_path
from actors.types import EngineRole, SamplingParams

log = logging.getLogger(__name__)

SEPARATOR = "<|end_of_sentence|>"
PAGED_BYTES = 256 << 20
"""Gathered pages and masks of attention without block tables."""


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
    vocabulary: ConstraintVocabulary | None
    """What structured output and thinking budgets need; None without a tokenizer."""
    notes: tuple[str, ...]
    """What it holds and how it computes, for people."""


def load_rank(
    config: EngineReplicaConfig,
    role: EngineRole,
    progress: Progress | None = None,
    seat: Seat | None = None,
    stop: threading.Event | None = None,
) -> Rank:
    """Loads what ``role`` needs: a decode engine reads no vision experts and uses their room for KV blocks.

    ``progress`` is called with (bytes done, bytes in all), for the language model and then for the vision experts.
    ``seat``: in the world of a group, whose ranks each hold a share of the experts and do the same here at the same
    time, with the same configuration. ``stop`` ends the waiting for the others. ``Runner.close`` leaves the world.

    Raises:
        ValueError: the checkpoint is broken, a form that the configuration names cannot run here, the memory does not
            hold one block or a sequence of the configured ``max_model_len``, or there are too few experts to share.
        WorldError: the group broke.
    """
    with contextlib.ExitStack() as on_failure:
        rank = _load(config, role, progress, seat, stop, on_failure)
        on_failure.pop_all()
    log.info("%s engine loaded %.2f GB in %.1f s", role, rank.loaded.total_bytes / 1e9, rank.loaded.seconds)
    return rank


def _load(
    config: EngineReplicaConfig,
    role: EngineRole,
    progress: Progress | None,
    seat: Seat | None,
    stop: threading.Event | None,
    on_failure: contextlib.ExitStack,
) -> Rank:
    rules = Rules.transformers() if config.compat == "transformers" else Rules.original()
    dtype: torch.dtype = getattr(torch, config.dtype)
    with Checkpoint(config.model_dir) as checkpoint:
        model_config = _with_end_guard(checkpoint.config, config)
        text = model_config.text
        share = None if seat is None else _share(text, seat)
        model = load_language(
            checkpoint,
            checkpoint.config,
            dtype=dtype,
            device=config.device,
            share=share,
            experts_form=None if config.experts is None else ExpertsForm(config.experts),
            progress=progress,
        )
        peak = _peak_bytes()
        layout = KvLayout(
            num_layers=text.num_hidden_layers,
            block_size=config.block_size,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            dtype=dtype,
        )
        experts = f"experts: {model.experts_form} ({model.experts_choice.reason})"
        log.info("%s", experts)
        forms = _forms(config, layout, model)
        steps: ExpertSteps | None = None
        if seat is not None and share is not None:
            # Ranks read at different speeds: whoever is done waits here, and not in a collective.
            group = ExpertGroup(seat.join(model.device, stop), share.placement)
            on_failure.callback(group.world.close)
            steps = ExpertSteps(model, group)
            experts += f"; a share of them on rank {seat.rank} of {seat.size}"
        arena, room = _arena(config, layout, model, forms, steps, has_bank=role.prefills)
        tail = VisionTail(arena, model)
        if role.prefills:
            tail.hold_bank(lambda bank: load_vision_bank(checkpoint, bank, progress=progress))
        cache = KvCache(layout, arena.block_storage())
        rank = Rank(
            config=model_config,
            rules=rules,
            runner=Runner(
                model,
                model_config,
                rules,
                cache,
                attention=forms.attention,
                experts=steps,
                roles=RoleChange(tail=tail, fill=partial(_read_bank, config.model_dir)),
            ),
            arena=arena,
            fingerprint=checkpoint.fingerprint("language"),
            loaded=checkpoint.report,
            vocabulary=_vocabulary(config, model_config),
            notes=(_load_note(checkpoint.report, peak), *room, experts, *forms.lines, *forms.warnings),
        )
    if steps is not None and seat is not None:
        steps.meet("loaded", seat.config.join_timeout_s, stop)
    _warm_up(rank.runner)
    if forms.cuda_graphs:
        rank.runner.graphs = _record_graphs(config, model, cache)
    return rank


def _read_bank(model_dir: str, bank: VisionBank) -> None:
    with Checkpoint(model_dir) as checkpoint:
        read = load_vision_bank(checkpoint, bank)
    log.info("read the vision experts, %.2f GB, in %.1f s", read.bytes_read["vision_experts"] / 1e9, read.seconds)


def _peak_bytes() -> int:
    """Of host memory, so far; pages of mapped files are in it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _load_note(report: LoadReport, peak: int) -> str:
    """``peak``: before the arena was taken."""
    read = f"read {told_bytes(report.total_bytes)} in {report.seconds:.1f} s"
    return f"{read}, with at most {told_bytes(peak)} of host memory, mapped files among it"


def rank_main(
    invitation: Invitation,
    seat: Seat,
    config: EngineReplicaConfig,
    role: EngineRole,
    find_model: Callable[[], str] | None = None,
) -> None:
    """All that the process of a rank other than the leader's does, however it was started; returns when the leader ends
    the group. See ``follow`` for what happens when it does not.

    ``find_model``: the model's directory on this node, which may have to be fetched first; the configuration's if None.
    """

    def load(progress: Progress) -> Loaded:
        here = config if find_model is None else replace(config, model_dir=find_model())
        rank = load_rank(here, role, progress, seat)
        return Loaded(rank.runner, rank.notes)

    follow(
        invitation,
        seat.rank,
        load,
        lambda runner: kv_rank(runner.cache, seat.host),
    )


def kv_rank(cache: KvCache, host: str, config: KvTransferConfig | None = None) -> LocalKvRank:
    """The KV of the rank of this process, whichever it is, for transfers. ``host``: this node's own address."""
    layout = cache.layout
    geometry = KvGeometry(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        device=cache.device,
    )
    meeting = TorchMeeting(host=host, device=cache.device, config=config or KvTransferConfig())
    return LocalKvRank(cache, geometry, meeting)


def _share(text: TextConfig, seat: Seat) -> ExpertShare:
    experts = text.moe_num_experts if text.sparse_layers else 0
    if experts < seat.size:
        raise ValueError(f"a group of {seat.size} ranks cannot share the {experts} experts of this model")
    return ExpertShare(even_placement(text.num_hidden_layers, text.sparse_layers, experts, seat.size), seat.rank)


def _forms(config: EngineReplicaConfig, layout: KvLayout, model: LanguageModel) -> Forms:
    """Chooses the forms of attention and decode steps, and says which; the model has said how its experts run."""
    named = None if config.attention is None else AttentionForm(config.attention)
    forms = choose_forms(
        model.device,
        model.experts_form,
        varlen_obstacle(model.device, layout, model.config.num_attention_heads),
        no_recording=recording_obstacle(model.device) if model.share is None else "those of a group are not built",
        attention=named,
        cuda_graphs=config.cuda_graphs,
    )
    for line in forms.lines:
        log.info("%s", line)
    for warning in forms.warnings:
        log.warning("%s", warning)
    return forms


def _arena(
    config: EngineReplicaConfig,
    layout: KvLayout,
    model: LanguageModel,
    forms: Forms,
    steps: ExpertSteps | None,
    *,
    has_bank: bool,
) -> tuple[Arena, list[str]]:
    """Plans the arena, says what it holds, and takes the memory; also what was said.

    Raises ValueError if it holds no block, or no sequence of the configured length.
    """
    bank_bytes = vision_bank_bytes(model.config, model.dtype, model.share)
    plan = ArenaPlan(
        size_bytes=_arena_bytes(config, layout, bank_bytes, model, forms, steps),
        block_bytes=layout.block_bytes,
        bank_bytes=bank_bytes,
    )
    longest = config.max_model_len or model.config.max_position_embeddings
    said = [memory.describe(plan, layout, longest, has_bank=has_bank)]
    log.info("%s", said[0])
    warning = memory.check_model_len(
        plan,
        layout,
        longest,
        has_bank=has_bank,
        configured=config.max_model_len is not None,
        option="kv_cache_gib" if config.kv_cache_gib is not None or not _on_gpu(config) else "gpu_memory_utilization",
    )
    if warning is not None:
        log.warning("%s", warning)
        said.append(warning)
    return Arena(plan, config.device), said


def _record_graphs(config: EngineReplicaConfig, model: LanguageModel, cache: KvCache) -> DecodeGraphs:
    longest = config.max_model_len or model.config.max_position_embeddings
    graphs = DecodeGraphs(
        model,
        cache,
        sizes=graph_sizes(config.max_num_seqs),
        max_context=min(longest, cache.block_count * cache.layout.block_size),
        recorder=CudaRecorder(),
    )
    log.info("recorded CUDA graphs for %d batch sizes in %.1f s", len(graphs.sizes), graphs.seconds)
    return graphs


def _on_gpu(config: EngineReplicaConfig) -> bool:
    return torch.device(config.device).type == "cuda"


def _with_end_guard(model: ErnieConfig, config: EngineReplicaConfig) -> ErnieConfig:
    """The original also stops at the separator, which ends a turn in its training data; transformers does not."""
    separator = generated_token_ids(config.model_dir).get(SEPARATOR)
    if config.compat == "transformers" or separator is None or separator in model.eos_token_ids:
        return model
    return replace(model, eos_token_ids=(*model.eos_token_ids, separator))


def _vocabulary(config: EngineReplicaConfig, model: ErnieConfig) -> ConstraintVocabulary | None:
    if tokenizer_path(config.model_dir) is None:
        return None
    return ConstraintVocabulary.from_model_dir(config.model_dir, limit=model.im_patch_id, end_ids=model.eos_token_ids)


def _arena_bytes(
    config: EngineReplicaConfig,
    layout: KvLayout,
    bank_bytes: int,
    model: LanguageModel,
    forms: Forms,
    steps: ExpertSteps | None,
) -> int:
    """Room for KV blocks beside the bank: as configured, or what the device has left after weights and activations.

    Raises:
        ValueError: naming the field that leaves no room for one block.
    """
    if config.kv_cache_gib is not None or not _on_gpu(config):
        gib, size = config.kv_cache_gib, memory.host_share(memory.available_host_bytes())
        if gib is not None:
            size = int(gib * memory.GIB)
        if size < layout.block_bytes:
            given = f"{gib}" if gib is not None else f"{size / memory.GIB:.3g}, a share of the free memory,"
            raise ValueError(f"kv_cache_gib: {given} holds no KV block of {layout.block_bytes} bytes")
        return arena_bytes(size // layout.block_bytes, layout.block_bytes, bank_bytes)
    activations = _activation_bytes(model, config.max_batched_tokens, steps)
    if forms.attention is not AttentionForm.VARLEN:
        activations += PAGED_BYTES
    free, total = torch.cuda.mem_get_info(model.device)
    room = memory.gpu_room(
        free=free,
        total=total,
        utilization=config.gpu_memory_utilization,
        activations=activations,
        max_num_seqs=config.max_num_seqs,
        prompt_logprob_rows=PROMPT_LOGPROB_ROWS,
        vocab_size=model.config.vocab_size,
        graphs=len(graph_sizes(config.max_num_seqs)) if forms.cuda_graphs else 0,
    )
    if room < bank_bytes + layout.block_bytes:
        raise ValueError(
            f"gpu_memory_utilization: {config.gpu_memory_utilization} leaves {room / 1e9:.2f} GB after weights, "
            f"activations and graphs, too little for {bank_bytes / 1e9:.2f} GB of vision experts and a KV block"
        )
    return room


@torch.inference_mode()
def _activation_bytes(model: LanguageModel, token_count: int, steps: ExpertSteps | None) -> int:
    """Peak device memory of one forward pass over ``token_count`` text tokens beside what is there already.

    In a group every rank computes so many, and the peak is that of the rank whose experts had most of them.
    """
    device = model.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    if steps is not None:
        steps.begin(StepShape(step=0, max_tokens=token_count, decodes=False, vision=False))
    ids = torch.zeros(token_count, dtype=torch.int64, device=device)
    positions = torch.arange(token_count, device=device).expand(3, -1)
    model.forward(model.embed(ids), positions, None, PackedAttention([0, token_count]))
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak if steps is None else steps.largest(peak)


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
        shape = StepShape(step=0, max_tokens=part.count, decodes=not new, vision=False)
        runner.run(RankPlan(shape=shape, ended=(), new=new, slices=(part,)))
    nothing = StepShape(step=0, max_tokens=0, decodes=False, vision=False)
    runner.run(RankPlan(shape=nothing, ended=(-1,), new=(), slices=()))
    log.info("warmed up in %.2f s", time.monotonic() - started)
