"""How much memory the KV cache gets, and what it holds. Pure, but for ``available_host_bytes``.

GPU: what ``gpu_memory_utilization`` of the device leaves after weights, activations, sampling and CUDA graphs. CPU: as
configured, or a share of what the machine has free.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from actors.engine.execution.arena import ArenaPlan
from actors.engine.execution.kv_cache import KvLayout

GIB = 1 << 30
HOST_SHARE = 8
"""An engine on a CPU takes one part in so many of what is free: other engines and the encoder start beside it."""
HOST_MOST_BYTES = 4 * GIB
SAMPLING_BYTES_PER_LOGIT = 48
"""float32 logits, their raw copy, and a sort of the whole vocabulary with ids and float64 weights."""
LOGPROB_BYTES_PER_LOGIT = 16
"""Logits in two dtypes, their log-softmax and comparisons."""
GRAPH_BYTES = 32 << 20
"""What a recorded graph takes beside its activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What an engine's blocks hold."""

    blocks: int
    block_size: int
    max_model_len: int

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_size

    @property
    def sequences(self) -> float:
        """Of full length."""
        return self.tokens / self.max_model_len

    def __str__(self) -> str:
        return f"{self.tokens} tokens in {self.blocks} blocks, {self.sequences:.1f} sequences of {self.max_model_len}"


def describe(plan: ArenaPlan, layout: KvLayout, max_model_len: int, *, has_bank: bool) -> str:
    """One line for people: the arena's size and what it holds with and without the vision experts."""
    beside, alone = (
        Held(blocks=blocks, block_size=layout.block_size, max_model_len=max_model_len)
        for blocks in (plan.blocks_beside_bank, plan.blocks_without_bank)
    )
    size = f"KV arena of {plan.size_bytes / GIB:.2f} GiB"
    if not plan.bank_bytes:
        return f"{size}: {alone}"
    bank = f"{plan.bank_bytes / GIB:.2f} GiB of vision experts"
    if has_bank:
        return f"{size}: {beside}, beside {bank}; without them {alone}"
    return f"{size}: {alone}; beside {bank} {beside}"


def check_model_len(
    plan: ArenaPlan, layout: KvLayout, max_model_len: int, *, has_bank: bool, configured: bool, option: str
) -> str | None:
    """A warning if a sequence of ``max_model_len`` tokens does not fit, which then bounds sequences; None if it does.

    Raises ValueError if the length was ``configured`` and does not fit; ``option`` is the one that gives more memory.
    """
    blocks = plan.blocks_beside_bank if has_bank else plan.blocks_without_bank
    tokens = blocks * layout.block_size
    if tokens >= max_model_len:
        return None
    need = -(-max_model_len // layout.block_size) * layout.block_bytes
    room = (
        f"a sequence of {max_model_len} tokens needs {need / GIB:.2f} GiB of KV cache, and there is room for "
        f"{tokens} tokens ({blocks * layout.block_bytes / GIB:.2f} GiB)"
    )
    if configured:
        raise ValueError(f"max_model_len: {room}: set it to {tokens} or less, or give more with {option}")
    return f"prompt and reply together are bounded by {tokens} tokens: {room}; give more with {option}"


def gpu_room(
    *,
    free: int,
    total: int,
    utilization: float,
    activations: int,
    max_num_seqs: int,
    prompt_logprob_rows: int,
    vocab_size: int,
    graphs: int,
) -> int:
    """Bytes for the arena: of ``total``, ``utilization`` may be used by all; ``free`` is what is not used yet.

    ``activations``: peak of a forward pass over the most tokens of a step. ``prompt_logprob_rows`` is how many rows of
    logits they take at once. ``graphs``: how many are recorded; their shared pool holds the activations of one pass
    over ``max_num_seqs`` tokens, which those of a step bound.
    """
    sampling = vocab_size * max(max_num_seqs * SAMPLING_BYTES_PER_LOGIT, prompt_logprob_rows * LOGPROB_BYTES_PER_LOGIT)
    recorded = graphs * GRAPH_BYTES + (activations if graphs else 0)
    return int(free - (1 - utilization) * total) - activations - sampling - recorded


def host_share(available: int) -> int:
    """Bytes of KV cache an engine on a CPU takes by itself."""
    return min(available // HOST_SHARE, HOST_MOST_BYTES)


def available_host_bytes(root: Path = Path("/")) -> int:
    """Memory a new allocation may take: what the system has available, or what is left under this cgroup's limit.

    Where the system does not tell (no /proc/meminfo), a quarter of its physical memory.
    """
    try:
        text = (root / "proc/meminfo").read_text()
    except FileNotFoundError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    if match is None:
        raise ValueError("/proc/meminfo tells no MemAvailable")
    available = int(match.group(1)) * 1024
    for limit_file, used_file in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = ((root / name).read_text().strip() for name in (limit_file, used_file))
        except FileNotFoundError:
            continue
        if limit != "max":
            available = min(available, max(0, int(limit) - int(used)))
    return available
