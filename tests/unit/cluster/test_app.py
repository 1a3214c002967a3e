from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from actors.checkpoint import nano_directory
from actors.config import EngineReplicaConfig
from cluster.app import _deployed, _deployment, engine_config
from cluster.config import ClusterConfig, EnginePool
from cluster.config_scaling import PreprocessorAutoscaling
from cluster.placement import Claim
from cluster.workers.preprocessor import PreprocessorReplica


def test_an_engine_is_told_all_that_its_pool_says() -> None:
    values = {
        "num_gpus": 0.0,
        "kv_cache_gib": 0.25,
        "gpu_memory_utilization": 0.5,
        "block_size": 8,
        "max_num_seqs": 3,
        "max_batched_tokens": 77,
        "max_waiting": 5,
        "prefix_caching": False,
        "attention": "plain",
        "experts": "loop",
        "cuda_graphs": False,
    }
    pool = EnginePool.model_validate({"roles": {"colocated": 1}} | values)
    config = ClusterConfig(model="m", dtype="float32", engines=(pool,))
    told = engine_config(config, pool)
    shared = {field.name for field in dataclasses.fields(EngineReplicaConfig)} & EnginePool.model_fields.keys()
    assert shared >= values.keys() - {"num_gpus"}
    for name in shared:
        assert getattr(told, name) == getattr(pool, name), name


def test_a_deploy_file_lets_nobody_change_roles_without_a_token() -> None:
    with pytest.raises(ValueError, match=r"^args: admin\.token: must be set$"):
        _deployed({"admin": {}})
    assert _deployed({"admin": {"token": "0" * 16}}).admin is not None


def test_a_deploy_file_without_a_model_serves_nano() -> None:
    config = _deployed({"max_model_len": 512})
    assert (config.model, config.model_name) == (str(nano_directory()), "nano")


def test_serve_follows_the_planner_at_once_within_the_bounds() -> None:
    """It finds the policy where it unpickles it, and asks replicas every second."""
    made = _deployment(
        PreprocessorReplica,
        "preprocessor",
        Claim(num_cpus=1.0),
        replicas=2,
        autoscaling=PreprocessorAutoscaling(min_replicas=0, max_replicas=3, downscale_delay_s=600),
    )
    config = made._deployment_config.autoscaling_config
    assert config is not None
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 2, 3)
    assert (config.upscale_delay_s, config.downscale_delay_s, config.metrics_interval_s) == (0, 0, 1)
    policy = config.policy.get_policy()
    assert policy(SimpleNamespace(raw_metrics={}, target_num_replicas=2)) == (2, {})
    fixed = _deployment(PreprocessorReplica, "preprocessor", Claim(num_cpus=1.0), replicas=2)
    assert fixed._deployment_config.autoscaling_config is None and fixed.num_replicas == 2
