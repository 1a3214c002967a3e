from __future__ import annotations

import pytest
import torch

from actors.ernie import experts_form
from actors.ernie.experts_form import ExpertsForm, FormChoice, choose_experts_form, resolve_experts_form

LOOP, GROUPED, NATIVE = ExpertsForm.LOOP, ExpertsForm.GROUPED, ExpertsForm.NATIVE


@pytest.mark.parametrize(
    ("device", "dtype", "problem", "wanted", "form", "reason"),
    [
        ("cpu", torch.bfloat16, None, None, NATIVE, "bfloat16 on a CPU"),
        ("cpu", torch.bfloat16, "there is no C compiler", None, LOOP, "there is no C compiler"),
        ("cpu", torch.float32, "not float32", None, LOOP, "not float32"),
        ("cpu", torch.float64, "not float64", None, LOOP, "not float64"),
        ("cuda", torch.bfloat16, "the model is on cuda", None, GROUPED, "on a GPU"),
        ("cuda", torch.float32, "the model is on cuda", None, LOOP, "on cuda"),
        ("cpu", torch.bfloat16, None, LOOP, LOOP, "as configured"),
        ("cpu", torch.bfloat16, None, NATIVE, NATIVE, "as configured"),
        ("cpu", torch.float32, "not float32", GROUPED, GROUPED, "as configured"),
    ],
)
def test_choice(
    device: str,
    dtype: torch.dtype,
    problem: str | None,
    wanted: ExpertsForm | None,
    form: ExpertsForm,
    reason: str,
) -> None:
    choice = choose_experts_form(device, dtype, problem, wanted)
    assert choice.form is form
    assert reason in choice.reason


def test_a_form_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        choose_experts_form("cpu", torch.float64, "not float64", GROUPED)
    with pytest.raises(ValueError, match="no C compiler"):
        choose_experts_form("cpu", torch.bfloat16, "there is no C compiler", NATIVE)
    with pytest.raises(ValueError, match="not float32"):
        resolve_experts_form(torch.device("cpu"), torch.float32, NATIVE)


def broken(*_: object) -> tuple[None, str]:
    return None, "cc failed: bad target"


def test_a_kernel_that_does_not_build_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_form, "find_cpu_kernels", broken)
    choice = resolve_experts_form(torch.device("cpu"), torch.bfloat16)
    assert choice == FormChoice(form=LOOP, reason="no compiled kernels: cc failed: bad target")
    with pytest.raises(ValueError, match="bad target"):
        resolve_experts_form(torch.device("cpu"), torch.bfloat16, NATIVE)


def test_a_named_plain_form_looks_for_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_form, "find_cpu_kernels", None)
    assert resolve_experts_form(torch.device("cpu"), torch.bfloat16, LOOP).form is LOOP
