"""Where replicas run: what each claims of a node, and the topology as people read it. Pure."""

from __future__ import annotations

from typing import TypedDict

from cluster.config import ClusterConfig, EnginePool, PreprocessorPool

PLANNER_CPUS = 0.1


class Claim(TypedDict):
    """Resources of one replica, as Ray names them."""

    num_cpus: float
    num_gpus: float


def engine_claim(pool: EnginePool) -> Claim:
    return Claim(num_cpus=pool.num_cpus, num_gpus=pool.num_gpus or 0.0)


def encoder_claim(config: ClusterConfig) -> Claim:
    return Claim(num_cpus=config.vision_encoder.num_cpus, num_gpus=config.vision_encoder.num_gpus or 0.0)


def preprocessor_claim(config: ClusterConfig) -> Claim:
    return Claim(num_cpus=config.preprocessor.num_cpus, num_gpus=0.0)


def router_claim(config: ClusterConfig) -> Claim:
    return Claim(num_cpus=config.router.num_cpus, num_gpus=0.0)


def planner_claim() -> Claim:
    return Claim(num_cpus=PLANNER_CPUS, num_gpus=0.0)


def claimed_cpus(config: ClusterConfig) -> float:
    """CPUs all replicas of a settled description claim together."""
    claims = [
        (planner_claim(), 1),
        (router_claim(config), config.router.replicas),
        (preprocessor_claim(config), config.preprocessor.replicas),
        (encoder_claim(config), config.vision_encoder.replicas),
        *((engine_claim(pool), pool.replicas) for pool in config.pools),
    ]
    return sum(claim["num_cpus"] * count for claim, count in claims)


def lacking_gpus(config: ClusterConfig, gpus: int) -> str:
    """What a settled description claims beyond so many GPUs, by field; empty when all of it fits."""
    claims = [("vision_encoder.num_gpus", encoder_claim(config)["num_gpus"], config.vision_encoder.replicas)]
    claims += [
        (f"engines.{index}.num_gpus", engine_claim(pool)["num_gpus"], pool.replicas)
        for index, pool in enumerate(config.pools)
    ]
    if sum(share * replicas for _, share, replicas in claims) <= gpus:
        return ""
    told = ", ".join(f"{field} {share:g} x {replicas}" for field, share, replicas in claims if share)
    return f"{told}: more GPUs than the {gpus} of this machine"


def describe(config: ClusterConfig) -> list[tuple[str, str, str]]:
    """Rows (pool, replicas, what each has) of a settled description."""
    rows = [
        ("router", str(config.router.replicas), "HTTP and gRPC"),
        ("planner", "1", "registry and roles"),
        ("preprocessor", str(config.preprocessor.replicas), _preprocessing(config.preprocessor)),
        ("vision_encoder", str(config.vision_encoder.replicas), _encoding(config)),
    ]
    for pool in config.pools:
        roles = " + ".join(f"{count} {role}" for role, count in pool.role_counts().items())
        window = f"{_size(pool.media_window_bytes)} of embeddings ahead of use"
        rows.append((pool.name, roles, f"{_device(engine_claim(pool), config.dtype)}; {window}"))
    return rows


def _preprocessing(pool: PreprocessorPool) -> str:
    return f"{pool.concurrency} at once; {_size(pool.patch_bytes)} of patches, made or in the making"


def _encoding(config: ClusterConfig) -> str:
    pool = config.vision_encoder
    held = f"{_size(pool.embedding_bytes)} of embeddings, {_size(pool.cache_bytes)} of them kept for later"
    window = f"{_size(pool.patch_window_bytes)} of patches ahead of use"
    return f"{_device(encoder_claim(config), config.dtype)}; {window}; {held}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _device(claim: Claim, dtype: str) -> str:
    share = claim["num_gpus"]
    if not share:
        return f"CPU, {dtype}"
    if share < 1:
        return f"{share:.0%} of a GPU, {dtype}"
    return f"{share:g} GPU{'s' if share > 1 else ''}, {dtype}"
