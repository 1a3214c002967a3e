"""Parts of a description that say when a cluster changes by itself: counts and roles, and the latencies to keep."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from cluster.config_base import Amount, Count, Seconds, Section


class Slo(Section):
    """What latencies should be, for 95 of 100 requests: pools scale and roles move to keep them."""

    ttft_s: Seconds | None = None
    """From arrival to the first token."""
    tpot_s: Seconds | None = None
    """From token to token of a reply, on average."""


class Autoscaling(Section):
    """How many replicas a pool may have, and when it takes more or gives one up. Names as in Ray Serve."""

    min_replicas: Count = 1
    max_replicas: Count
    upscale_delay_s: Amount = 5.0
    """For how long work must have been too much."""
    downscale_delay_s: Amount = 120.0
    """For how long the others could have done the work of one; one goes at a time."""
    idle: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """How much of what is well the others may have to do then."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is over max_replicas {self.max_replicas}")
        return self


class PreprocessorAutoscaling(Autoscaling):
    """Of preprocessors, which may go altogether while nobody asks for anything: the next request then waits for one."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    queue_age_s: Seconds = 0.5
    """How long a request may have waited to be begun."""


class VisionEncoderAutoscaling(Autoscaling):
    """Of vision encoders."""

    queued_patches: Count = 16384
    """Patches an encoder may have in its queue and in hand, on average."""


class EngineBounds(Section):
    """What engines bear well."""

    queued_tokens: Count = 16384
    """Prompt tokens in the queue of a prefill engine, on average, that are too many."""
    kv_use: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of KV blocks in use on decode engines, on average, that is too much."""


class EngineAutoscaling(Autoscaling, EngineBounds):
    """Of engines: those that prefill and those that decode are looked at apart."""


def check_initial(replicas: int, autoscaling: Autoscaling | None, field: str) -> None:
    if autoscaling is not None and not autoscaling.min_replicas <= replicas <= autoscaling.max_replicas:
        bounds = f"{autoscaling.min_replicas} to {autoscaling.max_replicas}"
        raise ValueError(f"{field} {replicas}: with autoscaling it begins with so many, and they must be {bounds}")


class RoleMoves(EngineBounds):
    """When engines of a pool change between prefilling and decoding by themselves."""

    idle: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Of these bounds, what the other kind of engines may have for one of them to be spared."""
    hold_s: Amount = 5.0
    """For how long it must be so."""
    cooldown_s: Amount = 30.0
    """From one change to the next."""
