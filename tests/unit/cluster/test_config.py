"""The description of a cluster: paths in errors, settled topologies, files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from actors.types import EngineRole
from cluster.config import ClusterConfig, parse, read_file, resolve
from cluster.placement import claimed_cpus, describe, encoder_claim, engine_claim, lacking_gpus

COLOCATED = {"roles": {"colocated": 1}}


def made(**values: Any) -> ClusterConfig:
    return parse({"model": "/models/m", **values}, "test")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"model": None}, "f: model: Input should be a valid string"),
        ({"model": ""}, "f: model: String should have at least 1 character"),
        ({"model": "m", "modle": 1}, "f: modle: Extra inputs are not permitted"),
        ({"model": "m", "dtype": "int8"}, "f: dtype: Input should be 'auto'"),
        ({"model": "m", "http_port": 70000}, "f: http_port: Input should be less than or equal to 65535"),
        ({"model": "m", "max_model_len": 1}, "f: max_model_len: Input should be greater"),
        ({"model": "m", "default_timeout_s": float("inf")}, "f: default_timeout_s: Input should be a finite number"),
        ({"model": "m", "router": {"num_cpus": float("inf")}}, "f: router.num_cpus: Input should be a finite number"),
        ({"model": "m", "router": {"suspect_after_s": 4}}, "f: router: suspect_after_s 4 is over lost_after_s 3"),
        (
            {"model": "m", "engines": [COLOCATED | {"kv_cache_gib": float("inf")}]},
            "f: engines.0.kv_cache_gib: Input should be a finite number",
        ),
        (
            {"model": "m", "vision_encoder": {"num_gpus": 1.5}},
            "f: vision_encoder.num_gpus: a share of one GPU or a whole number of them, not 1.5",
        ),
        ({"model": "m", "http_port": 9000}, "f: config: http_port and grpc_port are both 9000"),
        (
            {"model": "m", "host": "0.0.0.0", "admin": {}},
            "f: config: admin.token must be set where host is 0.0.0.0",
        ),
        ({"model": "m", "router": {"replicas": 2}}, "f: router.replicas: more than one router is not built yet"),
        (
            {"model": "m", "preprocessor": {"limits": {"max_imags": 1}}},
            "f: preprocessor.limits.max_imags: Unexpected keyword argument",
        ),
        ({"model": "m", "preprocessor": {"limits": {"max_images": -1}}}, "f: preprocessor.limits: max_images must not"),
        ({"model": "m", "engines": []}, "f: engines: at least one pool"),
        ({"model": "m", "engines": [{"roles": {"prefil": 1}}]}, "f: engines.0.roles.prefil: Extra inputs"),
        ({"model": "m", "engines": [{"roles": {}}]}, "f: engines.0.roles: at least one of prefill, decode"),
        ({"model": "m", "engines": [{"roles": {"prefill": 1}}]}, "f: engines: no engine is to decode"),
        ({"model": "m", "engines": [{"roles": {"decode": 2}}]}, "f: engines: no engine is to prefill"),
        ({"model": "m", "engines": [COLOCATED, COLOCATED]}, "f: engines: two pools are called engine"),
        ({"model": "m", "engines": [COLOCATED | {"name": "router"}]}, "f: engines.0.name: 'router' is the name of"),
        ({"model": "m", "engines": [COLOCATED | {"placement": "tight"}]}, "f: engines.0.placement: Input should be"),
        ({"model": "m", "engines": [COLOCATED | {"expert_parallel": 0}]}, "f: engines.0.expert_parallel: Input should"),
        (
            {"model": "m", "engines": [COLOCATED | {"max_num_seqs": 65, "max_batched_tokens": 64}]},
            "f: engines.0: max_num_seqs 65 is over max_batched_tokens 64",
        ),
        ({"model": "m", "engines": [COLOCATED, {"roles": {"decode": -1}}]}, "f: engines.1.roles.decode: Input should"),
        (
            {"model": "m", "preprocessor": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}},
            "f: preprocessor.autoscaling: min_replicas 3 is over max_replicas 2",
        ),
        (
            {"model": "m", "preprocessor": {"replicas": 3, "autoscaling": {"max_replicas": 2}}},
            "f: preprocessor: replicas 3: with autoscaling it begins with so many, and they must be 1 to 2",
        ),
        (
            {"model": "m", "vision_encoder": {"autoscaling": {"min_replicas": 0, "max_replicas": 2}}},
            "f: vision_encoder.autoscaling.min_replicas: Input should be greater than or equal to 1",
        ),
        (
            {"model": "m", "vision_encoder": {"autoscaling": {}}},
            "f: vision_encoder.autoscaling.max_replicas: Field req",
        ),
        (
            {"model": "m", "engines": [{"roles": {"prefill": 1, "decode": 2}, "autoscaling": {"max_replicas": 4}}]},
            "f: engines.0: autoscaling.min_replicas 1 is below 2: each of the roles needs an engine",
        ),
        (
            {"model": "m", "engines": [COLOCATED | {"autoscaling": {"min_replicas": 2, "max_replicas": 4}}]},
            "f: engines.0: roles: the total of 1: with autoscaling it begins with so many, and they must be 2 to 4",
        ),
        ({"model": "m", "slo": {"ttft": 1}}, "f: slo.ttft: Extra inputs are not permitted"),
    ],
)
def test_every_error_names_its_field(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(values, "f")
    assert [told for told in str(caught.value).splitlines() if told.startswith(line)], str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"admin": {}},
        {"admin": {}, "host": "::1"},
        {"admin": {"token": "0" * 16}, "host": "0.0.0.0"},
        {"host": "0.0.0.0"},
    ],
)
def test_roles_are_changed_without_a_token_on_loopback_only(values: dict[str, Any]) -> None:
    assert (made(**values).admin is None) == ("admin" not in values)


def test_all_errors_are_told_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        made(http_port=0, router={"max_active": 0}, dtype="x")
    assert len(str(caught.value).splitlines()) == 3


def test_without_a_gpu_prefill_and_decode_are_split() -> None:
    config = resolve(made(), gpus=0)
    (pool,) = config.pools
    assert pool.role_counts() == {EngineRole.PREFILL: 1, EngineRole.DECODE: 1}
    assert pool.replicas == 2
    assert config.dtype == "float32"
    assert engine_claim(pool).num_gpus == encoder_claim(config).num_gpus == 0
    assert pool.block_size == 16


def test_one_gpu_is_shared_by_a_colocated_engine_and_the_encoder() -> None:
    config = resolve(made(), gpus=1)
    (pool,) = config.pools
    assert pool.role_counts() == {EngineRole.COLOCATED: 1}
    assert config.dtype == "bfloat16"
    assert engine_claim(pool).num_gpus + encoder_claim(config).num_gpus == 1
    assert pool.block_size == 256


@pytest.mark.parametrize(("gpus", "prefills", "decodes"), [(2, 1, 1), (3, 1, 2), (8, 4, 4)])
def test_more_gpus_split_and_the_encoder_fits_beside_a_prefill_engine_only(
    gpus: int, prefills: int, decodes: int
) -> None:
    config = resolve(made(), gpus=gpus)
    prefill, decode = config.pools
    assert prefill.role_counts() == {EngineRole.PREFILL: prefills}
    assert decode.role_counts() == {EngineRole.DECODE: decodes}
    share = encoder_claim(config).num_gpus
    assert engine_claim(prefill).num_gpus + share <= 1 < engine_claim(decode).num_gpus + share


def test_what_is_written_wins_over_what_would_be_picked() -> None:
    config = resolve(
        made(
            dtype="float64",
            served_model_name="ernie",
            vision_encoder={"num_gpus": 1},
            engines=[{"name": "all", "roles": {"colocated": 2}, "num_gpus": 2, "block_size": 8}],
        ),
        gpus=8,
    )
    assert (config.dtype, config.model_name, encoder_claim(config).num_gpus) == ("float64", "ernie", 1)
    assert [(pool.name, pool.num_gpus, pool.block_size) for pool in config.pools] == [("all", 2, 8)]
    assert resolve(config, gpus=0) == config


def test_pools_of_an_unsettled_description_are_refused() -> None:
    with pytest.raises(ValueError, match="resolve"):
        _ = made().pools


def test_the_model_is_called_after_its_directory_unless_named() -> None:
    assert made().model_name == "m"
    assert made(served_model_name="other").model_name == "other"
    assert resolve(made(), gpus=0).served_model_name == "m"


def test_without_a_model_nano_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse({}, "test").model == parse({}, "test").model_name == "nano"
    (tmp_path / "nano").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert made(model="nano").model_name == "nano"


def test_claims_cover_every_replica() -> None:
    config = resolve(
        made(
            router={"num_cpus": 1},
            preprocessor={"replicas": 3, "num_cpus": 2},
            vision_encoder={"replicas": 2, "num_cpus": 0.5},
            engines=[{"roles": {"prefill": 2, "decode": 1}, "num_cpus": 4}],
        ),
        gpus=0,
    )
    assert claimed_cpus(config) == pytest.approx(0.1 + 1 + 6 + 1 + 12)


def test_gpus_that_are_not_there_are_named_by_field() -> None:
    config = resolve(made(vision_encoder={"num_gpus": 0.5}, engines=[COLOCATED | {"num_gpus": 1}]), gpus=1)
    assert lacking_gpus(config, 2) == ""
    assert lacking_gpus(config, 1) == (
        "vision_encoder.num_gpus 0.5 x 1, engines.0.num_gpus 1 x 1: more GPUs than the 1 of this machine"
    )
    assert lacking_gpus(resolve(made(), gpus=0), 0) == ""


def test_the_topology_is_told_in_rows() -> None:
    rows = {pool: (replicas, what) for pool, replicas, what in describe(resolve(made(), gpus=1))}
    assert rows["engine"] == ("1 colocated", "75% of a GPU, bfloat16; 64 MB of embeddings ahead of use")
    assert rows["vision_encoder"] == (
        "1",
        "25% of a GPU, bfloat16; 64 MB of patches ahead of use; 2.1 GB of embeddings, 1.1 GB of them kept for later",
    )
    assert rows["preprocessor"] == ("1", "2 at once; 2.1 GB of patches, made or in the making")


def test_a_description_survives_pickling() -> None:
    config = made(preprocessor={"limits": {"allowed_media_domains": ["example.com"]}})
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.preprocessor.limits.allowed_media_domains == ("example.com",)


def test_it_never_changes() -> None:
    with pytest.raises(ValueError, match="frozen"):
        made().http_port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("- a\n", "must be a mapping"), ("1: 2\n", "must be a mapping"), ("a: [\n", "not YAML")],
)
def test_files_that_are_no_description(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        read_file(file)
    assert str(file) in str(caught.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml"):
        read_file(tmp_path / "none.yaml")


def test_an_empty_file_leaves_everything_open(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("# nothing\n")
    assert read_file(file) == {}
