"""The on-premises cluster file, run by the commands of deploy/README.md against machines made of namespaces.

Takes minutes: ``make test-ray-up`` runs it, ``make test`` does not. The tests are one story and run in order.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import machines
from tests.deploy.machines import Machine, Network
from tests.deploy.stage import CHECKOUT, ROOT, WHEEL_COMMAND, add_node, add_operator, build_wheel

README = ROOT / "deploy" / "README.md"
HEAD, WORKERS, OPERATOR = "10.0.0.10", ("10.0.0.11", "10.0.0.12"), "10.0.0.5"
STEP_LIMIT_S = 300.0
STREAM_LIMIT_S = 240.0
DONE = "FINISH_REASON_LENGTH"
JOINED = "worker-start: in the cluster already"
ENGINE_TITLE = "ray::ServeReplica:ernie:engine"

SKIP = machines.lacking() if os.environ.get("ERNIE_TEST_RAY_UP") else "`make test-ray-up` runs it"
pytestmark = [pytest.mark.skipif(bool(SKIP), reason=SKIP), pytest.mark.timeout(900), pytest.mark.ray]


def steps(heading: str) -> list[str]:
    """The shell blocks below a heading of the README."""
    _, below = re.split(rf"^#+ {re.escape(heading)}$", README.read_text(), flags=re.MULTILINE)
    section = re.split(r"^#+ ", below, flags=re.MULTILINE)[0]
    blocks: list[str] = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert blocks, heading
    return blocks


class Site:
    """An operator's machine and three others."""

    def __init__(self, network: Network, operator: Machine) -> None:
        self.network, self.operator = network, operator
        self.nodes = {
            address: add_node(network, name, address)
            for name, address in zip(("head", "worker1", "worker2"), (HEAD, *WORKERS), strict=True)
        }

    def type(self, block: str) -> str:
        """Types a block of the README at the operator's, in the checkout, with its environment active."""
        began = time.monotonic()
        output = self.operator.run(f"source .venv/bin/activate\n{block}", cwd=CHECKOUT, limit_s=STEP_LIMIT_S)
        print(f"--- {time.monotonic() - began:.1f} s: {block}{output}", flush=True)
        return output

    def power_on(self, address: str) -> None:
        """A machine that lost its power starts again, with its disk as it was."""
        self.nodes[address] = add_node(self.network, self.nodes[address].name, address)

    def has(self, word: str) -> str:
        """Address of the machine that runs a process with a word in its title."""
        (address,) = (
            address for address, node in self.nodes.items() if any(word in line for line in node.processes().values())
        )
        return address

    def status(self, address: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.operator.run(f"curl -sf http://{address}:8000/status"))
        return found

    def wait(self, what: str, done: Callable[[], bool], limit_s: float = STEP_LIMIT_S) -> None:
        """Returns once it is done; raises AssertionError with what the cluster says of itself."""
        began = time.monotonic()
        while not done():
            if time.monotonic() - began > limit_s:
                raise AssertionError(f"not within {limit_s:.0f} s: {what}\n{self.told()}")
            time.sleep(1.0)
        print(f"--- {time.monotonic() - began:.1f} s until {what}", flush=True)

    def told(self) -> str:
        """What the head and the machines say, for failures."""
        lines = [f"{node.name}: {sorted(node.processes().values())}" for node in self.nodes.values()]
        try:
            lines.append(self.type("ray exec deploy/onprem.yaml 'ray status; serve status'"))
            lines += [line[:300] for line in self.autoscaler_log().splitlines() if "Full command is" not in line][-80:]
        except AssertionError as error:
            lines.append(str(error))
        return "\n".join(lines)

    def is_whole(self) -> bool:
        """Both engines are there, and every address answers. The proxy of a worker starts after its replicas."""
        ready = "\n".join(f"curl -sfo /dev/null http://{address}:8000/ready" for address in self.nodes)
        try:
            self.operator.run(ready)
            return len(self.running(HEAD)) == len(WORKERS)
        except AssertionError:
            return False

    def engines(self, address: str) -> set[str]:
        """Ids of the engines, which change with their processes."""
        return {item["id"] for item in self.status(address)["engines"] if item["ready"]}

    def kill_an_engine(self) -> None:
        running = self.nodes[WORKERS[0]].processes()
        (process,) = (process for process, title in running.items() if title.startswith(ENGINE_TITLE))
        os.kill(process, signal.SIGKILL)

    def autoscaler_log(self) -> str:
        return self.nodes[HEAD].run("cat /tmp/ray/session_latest/logs/monitor.out")

    def start_redis(self) -> None:
        """On the operator's machine, with which it ends: a head does not outlive the Redis it began with."""
        self.operator.popen(
            ["redis-server", "--bind", OPERATOR, "--protected-mode", "no", "--save", "", "--dir", "/tmp"]
        )

    def running(self, address: str) -> dict[str, int]:
        """Sequences in the engine of each machine, as the router knows them."""
        engines = self.status(address)["engines"]
        return {item["address"].split(":")[0]: (item["load"] or {"running": 0})["running"] for item in engines}


class Streams:
    """Long replies streamed on the operator's machine, one through each address."""

    def __init__(self, site: Site, tokens: int, addresses: list[str]) -> None:
        self.tokens = tokens
        self._lines: list[dict[str, Any]] = []
        self._count = len(addresses)
        self._process = site.operator.popen(
            [sys.executable, "tests/deploy/streams.py", str(tokens), str(STREAM_LIMIT_S)]
            + [f"{address}:9000" for address in addresses],
            cwd=CHECKOUT,
            env={"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'proto'}"},
        )

    def wait_started(self) -> None:
        """Every stream has had a token."""
        assert self._process.stdout is not None
        while len({line["stream"] for line in self._lines}) < self._count:
            self._lines.append(json.loads(self._process.stdout.readline()))
        assert not any(line["end"] for line in self._lines), self._lines

    def ends(self) -> dict[int, tuple[str, int]]:
        """How each ended, and its count of tokens, once all have."""
        output, _ = self._process.communicate(timeout=STREAM_LIMIT_S + 30)
        self._lines += [json.loads(line) for line in output.splitlines()]
        found = {line["stream"]: (line["end"], line["tokens"]) for line in self._lines if line["end"]}
        print(f"--- streams: {found}", flush=True)
        assert len(found) == self._count, output
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    (command,) = (block for block in steps("Bring it up") if "wheel" in block)
    assert command.strip() == WHEEL_COMMAND
    folder = tmp_path_factory.mktemp("site")
    with machines.network(folder) as network:
        site = Site(network, add_operator(network, build_wheel(folder), OPERATOR))
        spaces = {
            os.readlink(f"/proc/{machine.process}/ns/{space}")
            for machine in network.machines
            for space in ("net", "pid", "mnt")
        }
        yield site
    assert not spaces & set(_spaces_in_use())
    assert str(folder) not in Path("/proc/self/mounts").read_text()


def _spaces_in_use() -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        for space in ("net", "pid", "mnt"):
            try:
                yield os.readlink(process / "ns" / space)
            except OSError:
                continue


def test_up(site: Site) -> None:
    for block in steps("Bring it up"):
        if block.strip() != WHEEL_COMMAND:
            site.type(block)


def test_deploy_and_call(site: Site) -> None:
    deploy, *calls = steps("Deploy and call")
    site.type(deploy)
    site.wait("both engines are there and every machine answers", site.is_whole)
    for block in calls:
        output = site.type(block)
        assert output.count("ended by stop") == block.count("ernie chat")
        assert ("data: [DONE]" in output) == ("curl" in block)
    assert site.has("ServeReplica:ernie:router") in WORKERS


def test_a_lost_worker_ends_no_stream_through_the_others(site: Site) -> None:
    router = site.has("ServeReplica:ernie:router")
    (lost,) = set(WORKERS) - {router}
    streams = Streams(site, 1500, [HEAD, router, HEAD, router])
    streams.wait_started()
    running: dict[str, int] = {}

    def all_run() -> bool:
        running.update(site.running(router))
        return sum(running.values()) == 4

    site.wait("the router knows of all four", all_run, limit_s=20)
    assert min(running.values()) > 0, f"one engine has them all: {running}"
    site.nodes[lost].lose_power()
    assert set(streams.ends().values()) == {(DONE, streams.tokens)}
    site.operator.run(f"{CHECKOUT}/.venv/bin/ernie chat Hello --address {HEAD}:9000")

    site.power_on(lost)
    site.wait("the autoscaler has brought the worker back", site.is_whole)


def test_a_lost_head_takes_no_stream_of_others_along(site: Site) -> None:
    streams = Streams(site, 1000, [*WORKERS, *WORKERS])
    streams.wait_started()
    site.nodes[HEAD].lose_power()
    for address in WORKERS:
        site.operator.run(f"{CHECKOUT}/.venv/bin/ernie chat Hello --address {address}:9000")
    assert set(streams.ends().values()) == {(DONE, streams.tokens)}

    site.power_on(HEAD)
    for block in steps("When the head was lost"):
        site.type(block)
    site.wait(
        "all three are in the new cluster",
        lambda: "3 local.cluster.node" in site.type("ray exec deploy/onprem.yaml 'ray status'"),
    )


def test_a_head_that_kept_its_state_comes_back_to_its_cluster(site: Site) -> None:
    site.start_redis()
    for block in steps("Keep the head's state"):
        site.type(block)
    site.type(steps("Deploy and call")[0])
    site.wait("both engines are there and every machine answers", site.is_whole)
    engines = site.engines(WORKERS[0])
    site.nodes[HEAD].lose_power()
    for address in WORKERS:
        site.operator.run(f"{CHECKOUT}/.venv/bin/ernie chat Hello --address {address}:9000")

    site.power_on(HEAD)
    for block in steps("When the head was lost"):
        site.type(block)
    site.wait("the head answers as well, without another deployment", site.is_whole)
    site.wait("the autoscaler has looked after all nodes", lambda: site.autoscaler_log().count(JOINED) >= 2)
    assert site.engines(WORKERS[0]) == engines

    site.kill_an_engine()
    site.wait("an engine that was killed is replaced", lambda: len(site.engines(HEAD) - engines) == 1)


def test_down_leaves_nothing(site: Site) -> None:
    for block in steps("Take it down"):
        site.type(block)
    for node in site.nodes.values():
        assert node.processes() == {}
