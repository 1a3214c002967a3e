"""Composition root: the Serve application, from one description.

``serve deploy`` with a file of deploy/serve/ and ``ernie serve`` both call ``build``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from actors.config import EngineReplicaConfig, PreprocessorConfig, VisionEncoderConfig
from actors.engine_replica import SUCCESSOR_S
from cluster.builtin import locate
from cluster.config import (
    PLANNERS,
    PREPROCESSORS,
    ROUTERS,
    VISION_ENCODERS,
    ClusterConfig,
    EnginePool,
    parse,
    resolve,
)
from cluster.config_base import settled
from cluster.config_scaling import Autoscaling
from cluster.hub import locate_checkpoint, repository_name
from cluster.ingress import Ingress
from cluster.model_check import check_model
from cluster.placement import (
    Claim,
    encoder_claim,
    engine_claim,
    planner_claim,
    preprocessor_claim,
    router_claim,
)
from cluster.planner import Planner
from cluster.router.traces import load_exporter
from cluster.scaling_policy import follow_planner
from cluster.workers.engine import EngineGroupReplica
from cluster.workers.preprocessor import PreprocessorReplica
from cluster.workers.vision_encoder import VisionEncoderReplica

log = logging.getLogger(__name__)

HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 2.0
CONTROL_CALLS = 1000
"""Calls a replica accepts at once where Serve is not the one to bound them."""
SHUTDOWN_MARGIN_S = 5.0
"""For a replica to close its servers after its own drain."""
ECHO_PERIOD_S = 1.0
"""Between two times a replica says how many of its pool the planner wants."""
CONSTRUCTOR_TRIES = 2
"""Of a first deployment: what a replica cannot load once it seldom can later."""
DEPLOY_FILE_PLACES = {
    "host": "http_options.host",
    "http_port": "http_options.port",
    "grpc_port": "grpc_options.port",
    "log_level": "logging_config.log_level",
    "log_format": "logging_config.encoding",
}
"""Fields only ``ernie serve`` reads, and where a file for ``serve deploy`` says the same."""


def build(args: ClusterConfig | Mapping[str, Any]) -> Application:
    """The application, its open choices settled from the GPUs of the cluster at hand.

    Serve passes a mapping, which is checked here, the model included: one named by its repository is fetched to this
    node first. A ``ClusterConfig`` names a directory.

    Raises:
        ValueError: one line per wrong field, with its path.
    """
    described = args if isinstance(args, ClusterConfig) else _deployed(args)
    if described.otlp_endpoint is not None:
        load_exporter()
    config = resolve(described, gpus=cluster_gpus())
    planner = _deployment(Planner, PLANNERS, planner_claim()).bind(config)
    preprocessor = _deployment(
        PreprocessorReplica,
        PREPROCESSORS,
        preprocessor_claim(config),
        replicas=config.preprocessor.replicas,
        autoscaling=config.preprocessor.autoscaling,
        max_ongoing=config.preprocessor.max_ongoing,
    ).bind(preprocessor_config(config), config.preprocessor.limits, planner, config.worker_host)
    encoders = _deployment(
        VisionEncoderReplica,
        VISION_ENCODERS,
        encoder_claim(config),
        replicas=config.vision_encoder.replicas,
        autoscaling=config.vision_encoder.autoscaling,
    ).bind(encoder_config(config), planner, config.worker_host)
    engines = [
        _deployment(
            EngineGroupReplica,
            pool.name,
            engine_claim(pool),
            replicas=pool.replicas,
            autoscaling=pool.autoscaling,
            # It may have to wait for another one to take its role, and moves what does not finish.
            shutdown_s=SUCCESSOR_S + config.role_drain_s + config.drain_timeout_s + 2 * SHUTDOWN_MARGIN_S,
        ).bind(engine_config(config, pool), planner, config.worker_host)
        for pool in config.pools
    ]
    router = _deployment(
        Ingress,
        ROUTERS,
        router_claim(config),
        replicas=config.router.replicas,
        # The router refuses by its own count, with a retry delay; Serve must not be the first to.
        max_ongoing=2 * config.router.max_active + CONTROL_CALLS,
        shutdown_s=config.drain_timeout_s + SHUTDOWN_MARGIN_S,
    )
    return router.bind(config, planner, preprocessor, encoders, *engines)


def _deployed(args: Mapping[str, Any]) -> ClusterConfig:
    config = parse(args, "args")
    wrong = [f"args: {name}: set {place} instead" for name, place in DEPLOY_FILE_PLACES.items() if name in args]
    if config.admin is not None and config.admin.token is None:
        # Who reaches the port is not known here.
        wrong.append("args: admin.token: must be set")
    if wrong:
        raise ValueError("\n".join(wrong))
    config = locate(config)
    if config.revision is None and repository_name(config.model) is None:
        check_model(config)
        return config
    found, snapshot = locate_checkpoint(config, log.warning)
    check_model(found)
    # The directory is this node's; the others resolve the reference for themselves.
    return found if snapshot is None else found.model_copy(update={"model": snapshot.reference})


def cluster_gpus() -> int:
    """GPUs of the running Ray cluster."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(resources.get("GPU", 0))


def preprocessor_config(config: ClusterConfig) -> PreprocessorConfig:
    pool = config.preprocessor
    return PreprocessorConfig(
        model_dir=config.model,
        workers=pool.concurrency,
        patch_bytes=pool.patch_bytes,
        media=pool.media,
    )


def encoder_config(config: ClusterConfig) -> VisionEncoderConfig:
    pool = config.vision_encoder
    return VisionEncoderConfig(
        model_dir=config.model,
        encoder_id=VISION_ENCODERS,
        dtype=config.dtype,
        device=_device(encoder_claim(config)),
        max_batch_patches=pool.max_batch_patches,
        patch_window_bytes=pool.patch_window_bytes,
        embedding_bytes=pool.embedding_bytes,
        cache_bytes=pool.cache_bytes,
    )


def engine_config(config: ClusterConfig, pool: EnginePool) -> EngineReplicaConfig:
    return EngineReplicaConfig(
        model_dir=config.model,
        pool=pool.name,
        dtype=config.dtype,
        compat=config.compat,
        device=_device(engine_claim(pool)),
        ranks=pool.expert_parallel,
        rebalance_steps=pool.rebalance_steps,
        max_model_len=config.max_model_len,
        block_size=settled(pool.block_size),
        max_num_seqs=pool.max_num_seqs,
        max_batched_tokens=settled(pool.max_batched_tokens),
        max_waiting=pool.max_waiting,
        media_window_bytes=pool.media_window_bytes,
        media_cache_bytes=pool.media_cache_bytes,
        prefix_caching=pool.prefix_caching,
        kv_cache_gib=pool.kv_cache_gib,
        gpu_memory_utilization=pool.gpu_memory_utilization,
        attention=pool.attention,
        experts=pool.experts,
        cuda_graphs=pool.cuda_graphs,
        drain_timeout_s=config.drain_timeout_s,
        role_drain_s=config.role_drain_s,
    )


def _device(claim: Claim) -> str:
    return "cuda" if claim.num_gpus else "cpu"


def _deployment(
    worker: type[Any],
    name: str,
    claim: Claim,
    *,
    replicas: int = 1,
    autoscaling: Autoscaling | None = None,
    max_ongoing: int = CONTROL_CALLS,
    shutdown_s: float = 2 * SHUTDOWN_MARGIN_S,
) -> serve.Deployment:
    count: dict[str, Any] = {"num_replicas": replicas}
    if autoscaling is not None:
        count = {"autoscaling_config": _following_the_planner(replicas, autoscaling)}
    return serve.deployment(
        name=name,
        **count,
        max_ongoing_requests=max_ongoing,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=shutdown_s,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        **claim.options,
    )(worker)


def _following_the_planner(replicas: int, autoscaling: Autoscaling) -> AutoscalingConfig:
    """The planner has waited before it decides: Serve follows at once."""
    with warnings.catch_warnings():
        # The environment variables that are to replace the interval are read by no part of this version of Serve.
        warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=autoscaling.min_replicas,
            initial_replicas=replicas,
            max_replicas=autoscaling.max_replicas,
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            metrics_interval_s=ECHO_PERIOD_S,
            # Replicas are asked five times in it.
            look_back_period_s=5 * ECHO_PERIOD_S,
            policy=AutoscalingPolicy(policy_function=follow_planner),  # type: ignore[no-untyped-call]
        )
