"""What all parts of a description are made of."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _shareable(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"a share of one GPU or a whole number of them, not {gpus:g}")
    return gpus


Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Gpus = Annotated[Amount, AfterValidator(_shareable)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=1, le=65535)]


_T = TypeVar("_T")


def settled(value: _T | None) -> _T:
    """A field of a description that its reader need not give.

    Raises:
        ValueError: it is still open: ``resolve`` was not called.
    """
    if value is None:
        raise ValueError("the description is not settled: call resolve() first")
    return value


class Section(BaseModel):
    """Base of every part: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
