"""Which forms of attention and decode steps run on this device: chosen once at start, told, never changed silently.

``varlen_obstacle`` and ``recording_obstacle`` say what the device cannot do; ``choose_forms`` decides, and is pure. The
form of the experts is chosen beside the experts, and given here.

    device             attention              decode steps
    any                paged (plain on wish)  eager
    CUDA, 16 bits      varlen                 CUDA graphs, with varlen attention and grouped experts
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from actors.engine.execution.attention import PlainAttention
from actors.engine.execution.attention_varlen import VarlenAttention, torch_kernel
from actors.engine.execution.kv_cache import KvCache, KvLayout
from actors.engine.execution.step_batch import Chunk, StepLayout
from actors.ernie.experts_form import ExpertsForm

NEEDED_OPTIONS = frozenset({"block_table", "seqused_k", "enable_gqa", "num_splits", "window_size"})
"""Of varlen_attn: torch 2.12 and 2.13 have them, 2.10 has not; 2.11 was not looked at."""
PROBE_TOLERANCE = 0.05
"""Absolute, of attention over normal noise in 16 bits; a wrong page or row is off by about 1."""


class AttentionForm(enum.StrEnum):
    """How attention reads the paged cache."""

    PLAIN = "plain"
    """Every sequence alone: the reference."""
    PAGED = "paged"
    """Pages gathered, decoding rows in groups, scaled_dot_product_attention."""
    VARLEN = "varlen"
    """torch's varlen kernel with block tables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forms:
    """The choice. ``lines`` say it to people; ``warnings`` what a GPU was expected to run and cannot, and why."""

    attention: AttentionForm
    cuda_graphs: bool
    lines: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def choose_forms(
    device: torch.device,
    experts: ExpertsForm,
    no_varlen: str | None,
    *,
    no_recording: str | None = None,
    attention: AttentionForm | None = None,
    cuda_graphs: bool | None = None,
) -> Forms:
    """Decides from what can run: ``no_varlen`` and ``no_recording`` are what the two functions below say.

    ``attention`` and ``cuda_graphs`` are what the configuration names, None to leave it to us.

    Raises ValueError naming the option for a form that cannot run here.
    """
    on_gpu = device.type == "cuda"
    if attention is AttentionForm.VARLEN and no_varlen is not None:
        raise ValueError(f"attention: varlen cannot run here: {no_varlen}")
    warnings = []
    chosen = attention
    if chosen is None:
        chosen = AttentionForm.PAGED if no_varlen is not None else AttentionForm.VARLEN
        if on_gpu and no_varlen is not None:
            warnings.append(f"attention: paged runs instead of varlen, which cannot run here: {no_varlen}")
    no_graphs = _graphs_obstacle(device, experts, chosen, no_recording)
    if cuda_graphs and no_graphs is not None:
        raise ValueError(f"cuda_graphs: they cannot run here: {no_graphs}")
    if cuda_graphs is None and on_gpu and no_graphs is not None:
        warnings.append(f"decode steps: eager instead of CUDA graphs, which cannot run here: {no_graphs}")
    graphs = cuda_graphs is not False and no_graphs is None
    lines = (f"attention: {_DESCRIPTIONS[chosen]}", f"decode steps: {'CUDA graphs' if graphs else 'eager'}")
    return Forms(attention=chosen, cuda_graphs=graphs, lines=lines, warnings=tuple(warnings))


_DESCRIPTIONS = {
    AttentionForm.PLAIN: "plain (one sequence at a time)",
    AttentionForm.PAGED: "paged (gathered pages, scaled_dot_product_attention)",
    AttentionForm.VARLEN: "varlen (block tables)",
}


def _graphs_obstacle(
    device: torch.device, experts: ExpertsForm, attention: AttentionForm, no_recording: str | None
) -> str | None:
    if device.type != "cuda":
        return f"the device is a {device.type}"
    if attention is not AttentionForm.VARLEN:
        return f"{attention} attention asks the host for the contexts in each step"
    if experts is not ExpertsForm.GROUPED:
        return f"the {experts} form of the experts asks the host for their rows in each step"
    return no_recording


def recording_obstacle(device: torch.device) -> str | None:
    """Why grouped expert products cannot be recorded on this device; None when they can.

    torch's grouped_mm is one kernel on compute capability 9 and 10. Elsewhere it fetches the rows of experts, which a
    capture refuses: read from its source.
    """
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return None
    return f"grouped_mm asks the host for the rows of experts on compute capability {major}.{minor}"


def varlen_obstacle(device: torch.device, layout: KvLayout, num_heads: int) -> str | None:
    """Why varlen attention cannot run with this cache on this device; None when it can.

    Where device, dtype and torch allow it a small batch is run and compared with the plain form: which kernels a build
    of torch has, and which block sizes they take, cannot be asked.
    """
    if device.type != "cuda":
        return f"the device is a {device.type}"
    if layout.dtype not in (torch.bfloat16, torch.float16):
        return f"{layout.dtype} is not of 16 bits"
    try:
        kernel = torch_kernel()
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    missing = NEEDED_OPTIONS - inspect.signature(kernel).parameters.keys()
    if missing:
        return f"varlen_attn of torch {torch.__version__} lacks {', '.join(sorted(missing))}"
    return try_varlen(device, layout, num_heads, kernel)


@torch.inference_mode()
def try_varlen(device: torch.device, layout: KvLayout, num_heads: int, kernel: Callable[..., Any]) -> str | None:
    """Runs decoding rows and chunks of ragged contexts through the kernel; what went wrong, or None."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=layout.dtype)

    block = layout.block_size
    caches = [KvCache.allocate(replace(layout, num_layers=2), 32, device) for _ in range(2)]
    caches[0].pages.copy_(noise(*caches[0].pages.shape))
    caches[1].pages.copy_(caches[0].pages)
    tables = np.random.default_rng(0).permutation(32).reshape(4, 8)
    step = StepLayout(
        contexts_n=np.array([3, 3 * block + 1]),
        tables_nP=tables[:2],
        chunks=(
            Chunk(start=2, first=0, count=5, blocks=tables[2]),
            Chunk(start=7, first=3 * block - 1, count=block + 5, blocks=tables[3]),
        ),
    )
    q, k, v = (noise(step.token_count, heads, layout.head_dim) for heads in (num_heads, *[layout.num_kv_heads] * 2))
    want = PlainAttention(caches[0], step).attend(1, q, k, v)
    try:
        got = VarlenAttention.of_layout(caches[1], step, kernel=kernel).attend(1, q, k, v)
        error = float((got.float() - want.float()).abs().max())
    except (RuntimeError, ValueError, TypeError) as failure:
        return f"with block_size {block} torch {torch.__version__} says: {str(failure).splitlines()[0]}"
    if not error < PROBE_TOLERANCE:
        return f"with block_size {block} its results are off by {error:.3g}"
    return None
