"""What replicas claim of which nodes, as Serve is told."""

from __future__ import annotations

import pytest
from ray import serve

from cluster.config import ClusterConfig, parse, resolve
from cluster.placement import (
    Claim,
    claimed_cpus,
    describe,
    encoder_claim,
    engine_claim,
    lacking_gpus,
    preprocessor_claim,
    router_claim,
)

GROUP = {"roles": {"colocated": 2}, "expert_parallel": 4, "num_cpus": 2, "num_gpus": 1}


def made(gpus: int = 0, **values: object) -> ClusterConfig:
    return resolve(parse({"model": "m", **values}, "test"), gpus=gpus)


def test_one_rank_is_an_actor() -> None:
    (pool,) = made().pools
    assert engine_claim(pool).options == {"ray_actor_options": {"num_cpus": 1.0, "num_gpus": 0.0}}


def test_several_ranks_are_a_placement_group_whose_first_bundle_is_the_replicas() -> None:
    (pool,) = made(gpus=8, engines=[GROUP | {"placement": "strict_spread"}]).pools
    assert engine_claim(pool).options == {
        "ray_actor_options": {"num_cpus": 2.0, "num_gpus": 1.0},
        "placement_group_bundles": [{"CPU": 2.0, "GPU": 1.0}] * 4,
        "placement_group_strategy": "STRICT_SPREAD",
    }


def test_labels_bind_every_rank_and_every_pool() -> None:
    labels = {"pool": "in(a, b)"}
    config = made(
        router={"node_labels": labels},
        preprocessor={"node_labels": labels},
        vision_encoder={"node_labels": labels},
        engines=[GROUP | {"node_labels": labels}, {"name": "one", "roles": {"colocated": 1}, "node_labels": labels}],
    )
    group, one = (engine_claim(pool).options for pool in config.pools)
    assert group["placement_group_bundle_label_selector"] == [labels] * 4
    others = (claim(config).options for claim in (router_claim, preprocessor_claim, encoder_claim))
    for options in (one, *others):
        assert options["ray_actor_options"]["label_selector"] == labels


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("strategy", ["pack", "strict_pack", "spread", "strict_spread"])
def test_serve_takes_what_is_claimed(ranks: int, strategy: str) -> None:
    claim = Claim(num_cpus=0.5, num_gpus=1, labels={"pool": "!b"}, ranks=ranks, strategy=strategy)
    deployment = serve.deployment(name="engine", **claim.options)(type("Engine", (), {}))
    assert deployment.ray_actor_options["num_gpus"] == 1


def test_all_ranks_count() -> None:
    config = made(gpus=8, engines=[GROUP], vision_encoder={"num_cpus": 0, "num_gpus": 0})
    alone = made(gpus=8, engines=[GROUP | {"expert_parallel": 1}], vision_encoder={"num_cpus": 0, "num_gpus": 0})
    assert claimed_cpus(config) - claimed_cpus(alone) == pytest.approx(2 * 2 * 3)
    assert lacking_gpus(config, 8) == ""
    assert lacking_gpus(config, 7) == "engines.0.num_gpus 1 x 2 x 4 ranks: more GPUs than the 7 of this machine"
    assert describe(config)[-1] == (
        "engine",
        "2 colocated",
        "4 ranks, each 1 GPU, bfloat16; 64 MB of embeddings ahead of use",
    )
    on_cpus = made(engines=[GROUP | {"num_gpus": 0}])
    assert describe(on_cpus)[-1] == (
        "engine",
        "2 colocated",
        "4 ranks, each on CPU, float32; 64 MB of embeddings ahead of use",
    )


def test_pools_that_scale_claim_for_as_many_as_they_may_have() -> None:
    config = parse(
        {
            "model": "m",
            "preprocessor": {"autoscaling": {"min_replicas": 0, "max_replicas": 3}},
            "engines": [{"roles": {"colocated": 1}, "num_gpus": 1, "autoscaling": {"max_replicas": 4}}],
        },
        "test",
    )
    settled = resolve(config, gpus=2)
    assert claimed_cpus(settled) == pytest.approx(0.1 + 0.5 + 3 + 1 + 4)
    assert lacking_gpus(settled, 4).startswith("vision_encoder.num_gpus 0.25 x 1, engines.0.num_gpus 1 x 4: more GPUs")
    shown = {row[0]: row[1] for row in describe(settled)}
    assert (shown["preprocessor"], shown["engine"]) == ("1 (0 to 3)", "1 colocated (1 to 4)")
