"""Where replicas run: what each claims of which nodes, and the topology as people read it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.sizes import told_bytes
from cluster.config import (
    PLANNERS,
    PREPROCESSORS,
    ROUTERS,
    VISION_ENCODERS,
    ClusterConfig,
    EnginePool,
    PreprocessorPool,
    VisionEncoderPool,
)
from cluster.config_base import settled
from cluster.config_scaling import Autoscaling

PLANNER_CPUS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """Of one replica. With several ``ranks`` each claims so much, in a placement group of the replica."""

    num_cpus: float
    num_gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    """Nodes must have them."""
    ranks: int = 1
    strategy: str = "pack"

    @property
    def options(self) -> dict[str, Any]:
        """As Serve's ``deployment`` takes them. A replica is the first rank of its placement group."""
        actor: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        if self.ranks == 1:
            return {"ray_actor_options": actor | ({"label_selector": dict(self.labels)} if self.labels else {})}
        bundle = {name: amount for name, amount in (("CPU", self.num_cpus), ("GPU", self.num_gpus)) if amount}
        options: dict[str, Any] = {
            "ray_actor_options": actor,
            "placement_group_bundles": [bundle] * self.ranks,
            "placement_group_strategy": self.strategy.upper(),
        }
        if self.labels:
            options["placement_group_bundle_label_selector"] = [dict(self.labels)] * self.ranks
        return options


def engine_claim(pool: EnginePool) -> Claim:
    return Claim(
        num_cpus=pool.num_cpus,
        num_gpus=settled(pool.num_gpus),
        labels=pool.node_labels,
        ranks=pool.expert_parallel,
        strategy=pool.placement,
    )


def encoder_claim(config: ClusterConfig) -> Claim:
    pool = config.vision_encoder
    return Claim(num_cpus=pool.num_cpus, num_gpus=settled(pool.num_gpus), labels=pool.node_labels)


def preprocessor_claim(config: ClusterConfig) -> Claim:
    return Claim(num_cpus=config.preprocessor.num_cpus, labels=config.preprocessor.node_labels)


def router_claim(config: ClusterConfig) -> Claim:
    return Claim(num_cpus=config.router.num_cpus, labels=config.router.node_labels)


def planner_claim() -> Claim:
    return Claim(num_cpus=PLANNER_CPUS)


def claimed_cpus(config: ClusterConfig) -> float:
    """CPUs all replicas of a settled description claim together, where pools scale when they are largest."""
    claims = [
        (planner_claim(), 1),
        (router_claim(config), config.router.replicas),
        (preprocessor_claim(config), config.preprocessor.most_replicas),
        (encoder_claim(config), config.vision_encoder.most_replicas),
        *((engine_claim(pool), pool.most_replicas) for pool in config.pools),
    ]
    return sum(claim.num_cpus * claim.ranks * count for claim, count in claims)


def lacking_gpus(config: ClusterConfig, gpus: int) -> str:
    """What a settled description claims beyond so many GPUs, by field; empty when all of it fits."""
    claims = [("vision_encoder.num_gpus", encoder_claim(config), config.vision_encoder.most_replicas)]
    claims += [
        (f"engines.{index}.num_gpus", engine_claim(pool), pool.most_replicas) for index, pool in enumerate(config.pools)
    ]
    if sum(claim.num_gpus * claim.ranks * replicas for _, claim, replicas in claims) <= gpus:
        return ""
    told = ", ".join(
        f"{field} {claim.num_gpus:g} x {_count(replicas, claim.ranks)}"
        for field, claim, replicas in claims
        if claim.num_gpus
    )
    return f"{told}: more GPUs than the {gpus} of this machine"


def describe(config: ClusterConfig) -> list[tuple[str, str, str]]:
    """Rows (pool, replicas, what each has) of a settled description."""
    rows = [
        (ROUTERS, str(config.router.replicas), "HTTP and gRPC"),
        (PLANNERS, "1", "registry and roles"),
        (PREPROCESSORS, _scaled(config.preprocessor), _preprocessing(config.preprocessor)),
        (VISION_ENCODERS, _scaled(config.vision_encoder), _encoding(config)),
    ]
    for pool in config.pools:
        roles = " + ".join(f"{count} {role}" for role, count in pool.role_counts().items())
        window = f"{told_bytes(pool.media_window_bytes)} of embeddings ahead of use"
        device = _device(engine_claim(pool), config.dtype)
        rows.append((pool.name, roles + _bounds(pool.autoscaling), f"{device}; {window}"))
    return rows


def _count(replicas: int, ranks: int) -> str:
    return f"{replicas}" if ranks == 1 else f"{replicas} x {ranks} ranks"


def _scaled(pool: PreprocessorPool | VisionEncoderPool) -> str:
    return f"{pool.replicas}{_bounds(pool.autoscaling)}"


def _bounds(autoscaling: Autoscaling | None) -> str:
    return "" if autoscaling is None else f" ({autoscaling.min_replicas} to {autoscaling.max_replicas})"


def _preprocessing(pool: PreprocessorPool) -> str:
    return f"{pool.concurrency} at once; {told_bytes(pool.patch_bytes)} of patches, made or in the making"


def _encoding(config: ClusterConfig) -> str:
    pool = config.vision_encoder
    held = f"{told_bytes(pool.embedding_bytes)} of embeddings, {told_bytes(pool.cache_bytes)} of them kept for later"
    window = f"{told_bytes(pool.patch_window_bytes)} of patches ahead of use"
    return f"{_device(encoder_claim(config), config.dtype)}; {window}; {held}"


def _device(claim: Claim, dtype: str) -> str:
    share = claim.num_gpus
    device = f"{share:g} GPU{'s' if share > 1 else ''}" if share >= 1 else f"{share:.0%} of a GPU" if share else "CPU"
    if claim.ranks > 1:
        device = f"{claim.ranks} ranks, each {'on ' if not share else ''}{device}"
    return f"{device}, {dtype}"
