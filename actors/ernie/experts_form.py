"""Which form of the products a model uses, chosen once at start from what the machine has."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from actors.kernels.cpu import find_cpu_kernels


class ExpertsForm(enum.StrEnum):
    """How expert products are computed."""

    LOOP = "loop"
    """The plain form: one product per expert. Any dtype and device."""
    GROUPED = "grouped"
    """One grouped product of torch per bank. Not float64."""
    NATIVE = "native"
    """Compiled kernels while experts have few rows, LOOP beyond; the dense layers use them too. bfloat16 on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FormChoice:
    """A form and why it was chosen."""

    form: ExpertsForm
    reason: str


def choose_experts_form(
    device: str, dtype: torch.dtype, native_problem: str | None, wanted: ExpertsForm | None = None
) -> FormChoice:
    """The wanted form, or the fastest there is for a torch device type. ``native_problem``: why NATIVE cannot be.

    Raises ValueError if the wanted form cannot be.
    """
    if wanted is ExpertsForm.GROUPED and dtype == torch.float64:
        raise ValueError("grouped expert products do not exist in float64")
    if wanted is ExpertsForm.NATIVE and native_problem is not None:
        raise ValueError(f"native expert products cannot be had: {native_problem}")
    if wanted is not None:
        return FormChoice(form=wanted, reason="as configured")
    if native_problem is None:
        return FormChoice(form=ExpertsForm.NATIVE, reason="bfloat16 on a CPU with a C compiler")
    if device == "cuda" and dtype == torch.bfloat16:
        return FormChoice(form=ExpertsForm.GROUPED, reason="bfloat16 on a GPU")
    return FormChoice(form=ExpertsForm.LOOP, reason=f"no compiled kernels: {native_problem}")


def resolve_experts_form(device: torch.device, dtype: torch.dtype, wanted: ExpertsForm | None = None) -> FormChoice:
    """``choose_experts_form`` for this machine. Builds the kernels if the choice may need them."""
    problem: str | None = "another form was asked for"
    if wanted is None or wanted is ExpertsForm.NATIVE:
        kernels, reason = find_cpu_kernels(device.type, dtype)
        problem = None if kernels is not None else reason
    return choose_experts_form(device.type, dtype, problem, wanted)
