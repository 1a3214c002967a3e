"""Which forms run where."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.engine.execution.forms import AttentionForm, choose_forms, recording_obstacle, try_varlen, varlen_obstacle
from actors.engine.execution.kv_cache import KvLayout
from actors.ernie.experts_form import ExpertsForm
from tests.unit.engine.execution.varlen_double import varlen_double

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LOOP, GROUPED = ExpertsForm.LOOP, ExpertsForm.GROUPED
PLAIN, PAGED, VARLEN = AttentionForm.PLAIN, AttentionForm.PAGED, AttentionForm.VARLEN


@pytest.mark.parametrize(
    ("device", "experts", "no_varlen", "asked", "attention", "graphs", "warnings"),
    [
        (CPU, LOOP, "no", {}, PAGED, False, 0),
        (CPU, LOOP, "no", {"attention": PLAIN, "cuda_graphs": False}, PLAIN, False, 0),
        (CUDA, GROUPED, None, {}, VARLEN, True, 0),
        (CUDA, GROUPED, None, {"cuda_graphs": False}, VARLEN, False, 0),
        (CUDA, GROUPED, None, {"attention": PAGED, "cuda_graphs": False}, PAGED, False, 0),
        (CUDA, GROUPED, None, {"attention": PAGED}, PAGED, False, 1),
        (CUDA, LOOP, None, {}, VARLEN, False, 1),
        (CUDA, GROUPED, None, {"no_recording": "old GPU"}, VARLEN, False, 1),
        (CUDA, GROUPED, None, {"no_recording": "old GPU", "cuda_graphs": False}, VARLEN, False, 0),
        (CUDA, GROUPED, "old torch", {}, PAGED, False, 2),
        (CUDA, GROUPED, "old torch", {"attention": PAGED, "cuda_graphs": False}, PAGED, False, 0),
    ],
)
def test_the_choice(
    device: torch.device,
    experts: ExpertsForm,
    no_varlen: str | None,
    asked: dict[str, Any],
    attention: AttentionForm,
    graphs: bool,
    warnings: int,
) -> None:
    forms = choose_forms(device, experts, no_varlen, **asked)
    assert (forms.attention, forms.cuda_graphs, len(forms.warnings)) == (attention, graphs, warnings)
    assert forms.lines[0].startswith(f"attention: {attention}")
    assert ("CUDA graphs" in forms.lines[1]) == graphs
    if no_varlen and warnings:
        assert no_varlen in forms.warnings[0]


@pytest.mark.parametrize(
    ("device", "experts", "no_varlen", "asked", "message"),
    [
        (CPU, LOOP, "the device is a cpu", {"attention": VARLEN}, "attention: varlen .* the device is a cpu"),
        (CPU, LOOP, "no", {"cuda_graphs": True}, "cuda_graphs: .* the device is a cpu"),
        (CUDA, GROUPED, "old torch", {"cuda_graphs": True}, "cuda_graphs: .* paged attention"),
        (CUDA, LOOP, None, {"cuda_graphs": True}, "cuda_graphs: .* loop form of the experts"),
        (CUDA, GROUPED, None, {"no_recording": "old GPU", "cuda_graphs": True}, "cuda_graphs: .* old GPU"),
    ],
)
def test_what_was_named_and_cannot_run_is_refused(
    device: torch.device, experts: ExpertsForm, no_varlen: str | None, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_forms(device, experts, no_varlen, **asked)


def layout(dtype: torch.dtype = torch.bfloat16, block_size: int = 16) -> KvLayout:
    return KvLayout(num_layers=28, block_size=block_size, num_kv_heads=2, head_dim=8, dtype=dtype)


def test_obstacles_that_need_no_device_to_be_seen() -> None:
    assert varlen_obstacle(CPU, layout(), 4) == "the device is a cpu"
    assert varlen_obstacle(CUDA, layout(torch.float32), 4) == "torch.float32 is not of 16 bits"


def test_a_kernel_is_tried_before_it_is_trusted() -> None:
    def refusing(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("Paged KV cache block size must be divisible by 256\nC++ stack")

    def forgetful(*args: Any, **options: Any) -> torch.Tensor:
        out = varlen_double(*args, **options)
        out[1:2] = 0
        return out

    for block_size in (1, 2, 16, 256):
        assert try_varlen(CPU, layout(block_size=block_size), 4, varlen_double) is None
    assert str(try_varlen(CPU, layout(), 4, refusing)).endswith("block size must be divisible by 256")
    assert "off by" in str(try_varlen(CPU, layout(), 4, forgetful))


@pytest.mark.parametrize(("capability", "records"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 3), True)])
def test_grouped_products_ask_the_host_on_some_devices(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], records: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (recording_obstacle(CUDA) is None) == records
    assert recording_obstacle(CPU) is None
