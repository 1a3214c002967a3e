"""Every file in deploy/ is read by the parsers that will read it: Serve's, ours, Ray's. KubeRay's fields are listed."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from cluster.app import DEPLOY_FILE_PLACES
from cluster.config import ClusterConfig, parse, resolve
from cluster.placement import claimed_cpus, lacking_gpus
from cluster.session import GRPC_SERVICERS

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SERVE_FILES = sorted(DEPLOY.glob("serve/*.yaml"))
CLUSTER_FILES = [DEPLOY / name for name in ("aws.yaml", "gcp.yaml", "onprem.yaml")]
SIZES = {"laptop": 0, "first-try": 0, "gpu-1": 1, "gpu-8": 8, "prefill-2-decode-4": 7}
"""GPUs each file is for."""
SPLIT_SIZE = DEPLOY / "serve" / "prefill-2-decode-4.yaml"
INSTANCES = {"m7i.xlarge": (4, 0), "m7i.4xlarge": (16, 0), "p5.4xlarge": (16, 1)}
"""(CPUs, GPUs), which Ray itself asks AWS for."""


def load(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(file.read_text())
    return values


def described(serve: Mapping[str, Any]) -> ClusterConfig:
    (application,) = ServeDeploySchema.model_validate(serve).applications
    return parse(application.args, "args")


def environment() -> dict[str, str]:
    lines = (DEPLOY / "serve.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def ids(file: Path) -> str:
    return file.stem


def test_every_size_is_known() -> None:
    assert {file.stem for file in SERVE_FILES} == set(SIZES)


@pytest.mark.parametrize("file", SERVE_FILES, ids=ids)
def test_serve_file(file: Path) -> None:
    values = load(file)
    config = described(values)
    assert not set(values["applications"][0]["args"]) & set(DEPLOY_FILE_PLACES)
    assert values["applications"][0]["import_path"] == "cluster.app:build"
    assert tuple(values["grpc_options"]["grpc_servicer_functions"]) == GRPC_SERVICERS
    # What a settled description would take from the GPUs that happen to have joined must be in the file.
    gpus = SIZES[file.stem]
    assert config.dtype != "auto"
    assert config.vision_encoder.num_gpus is not None
    assert all(pool.num_gpus is not None and pool.block_size is not None for pool in config.pools)
    assert resolve(config, gpus=0).pools == resolve(config, gpus=gpus).pools
    assert lacking_gpus(resolve(config, gpus=gpus), gpus) == ""
    assert gpus == 0 or lacking_gpus(resolve(config, gpus=gpus), gpus - 1)


@pytest.mark.parametrize("file", CLUSTER_FILES, ids=ids)
def test_cluster_file(file: Path) -> None:
    config = prepare_config(load(file))
    validate_config(config)
    assert set(config["file_mounts"]) == {"~/ernie/deploy", "~/ernie/dist", "~/.ray/auth_token"}
    for node_kind in ("head", "worker"):
        commands = "\n".join(config[f"{node_kind}_start_ray_commands"])
        commands = re.sub(r".*/deploy/(worker-start\.sh)", lambda match: (DEPLOY / match[1]).read_text(), commands)
        assert -1 < commands.find("node-stop.sh") < commands.rfind("ray start")
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    assert "bash ~/ernie/deploy/node-setup.sh" in config["worker_setup_commands"]


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_cloud_nodes_fit_their_serve_file(name: str) -> None:
    config = prepare_config(load(DEPLOY / f"{name}.yaml"))
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}
    cpus = gpus = 0
    had = Counter[str]()
    for label, node in types.items():
        assert node["labels"] == {"pool": label}
        if label == "head":
            continue
        assert node["min_workers"] == node["max_workers"]
        if name == "aws":
            node_cpus, node_gpus = INSTANCES[node["node_config"]["InstanceType"]]
        else:
            node_cpus, node_gpus = node["resources"]["CPU"], node["resources"].get("GPU", 0)
        cpus += node["min_workers"] * node_cpus
        gpus += node["min_workers"] * node_gpus
        had[label] = node["min_workers"] * node_gpus
    assert sum(node.get("min_workers", 0) for node in types.values()) <= config["max_workers"]
    settled = resolve(described(load(SPLIT_SIZE)), gpus=gpus)
    assert gpus == SIZES[SPLIT_SIZE.stem]
    assert lacking_gpus(settled, gpus) == ""
    assert claimed_cpus(settled) <= cpus
    assert wanted_gpus(settled) == had


def wanted_gpus(config: ClusterConfig) -> Counter[str]:
    """GPUs that pools claim, by the label `pool` of the nodes they name; each pool must name some."""
    wanted = Counter({config.router.node_labels["pool"]: 0, config.preprocessor.node_labels["pool"]: 0})
    for pool in (config.vision_encoder, *config.pools):
        wanted[pool.node_labels["pool"]] += int(pool.replicas * (pool.num_gpus or 0))
    return wanted


def test_kuberay() -> None:
    service = load(DEPLOY / "kuberay.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert set(service["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == load(SPLIT_SIZE)
    cluster = service["spec"]["rayClusterConfig"]
    assert set(cluster) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]
    assert set(head) == {"rayStartParams", "labels", "template"}
    assert head["rayStartParams"]["num-cpus"] == "0"
    ports = {port["name"]: port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}
    serve = load(SPLIT_SIZE)
    assert ports["serve"] == serve["http_options"]["port"]
    assert ports["serve-grpc"] == serve["grpc_options"]["port"]
    had = Counter[str]()
    config = described(serve)
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == {
            "groupName",
            "replicas",
            "minReplicas",
            "maxReplicas",
            "rayStartParams",
            "labels",
            "template",
        }
        assert group["labels"] == {"pool": group["groupName"]}
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > config.drain_timeout_s
        (container,) = pod["containers"]
        assert container["image"] == head["template"]["spec"]["containers"][0]["image"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        had[group["groupName"]] = group["replicas"] * container["resources"]["limits"].get("nvidia.com/gpu", 0)
    assert had.total() == SIZES[SPLIT_SIZE.stem]
    assert wanted_gpus(config) == had
    assert Path(config.model).is_relative_to("/models")


def test_table_of_sizes() -> None:
    """The arithmetic of README.md; the weights are those of the main README, held by a test of their own."""
    token_bytes = 2 * 28 * 4 * 128 * 2
    usable = 0.9 * 85e9
    cells = r"\| (\d) \| ([\d.]+) GB, ([\d,]+) \| ([\d.]+) GB, ([\d,]+) \|"
    rows = re.findall(cells, (DEPLOY / "README.md").read_text())
    assert [row[0] for row in rows] == ["1", "2", "4", "8"]
    for _, *pairs in rows:
        for weight, tokens in (pairs[:2], pairs[2:]):
            held = (usable - float(weight) * 1e9) / token_bytes
            assert int(held) // 1000 == int(tokens.replace(",", "")) // 1000
    main = (DEPLOY.parent / "README.md").read_text()
    for ranks, prefill, _, decode, _ in rows:
        assert f"| {ranks} | {prefill} GB | {decode} GB |" in main


def test_ray_versions_agree() -> None:
    import ray

    assert load(DEPLOY / "kuberay.yaml")["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__


def test_image_has_the_environment_of_nodes() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    (line,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", dockerfile, re.MULTILINE)
    assert dict(pair.split("=", 1) for pair in line.replace("\\\n", " ").split()) == environment()


def test_tokens_are_asked_for() -> None:
    assert environment()["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("script", sorted(DEPLOY.glob("*.sh")), ids=ids)
def test_scripts_are_bash(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
