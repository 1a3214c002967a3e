"""The processes of a running cluster's parts, and what is done to them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil

from tests.chaos.plan import Fault, Trial, Victim
from tests.cluster.launcher import LaunchedCluster

WANTED = dict.fromkeys(Victim, 2) | {Victim.PLANNER: 1}
RESTORE_LIMIT_S = 180.0
ROLE_LIMIT_S = 60.0
POLL_S = 0.1
OTHER_ROLE = {"prefill": "decode", "decode": "prefill"}


class Processes:
    """Parts by kind and address, as last looked for. A rank has the address of its leader."""

    def __init__(self, cluster: LaunchedCluster, http: httpx.AsyncClient) -> None:
        self._cluster = cluster
        self._http = http
        self._lost: set[int] = set()
        """Frozen for good, or killed and perhaps not gone yet."""
        self._lost_term = 0
        """Of the planner that was lost last."""
        self._term = 0
        self._engines: dict[str, dict[str, Any]] = {}
        self.pids: dict[Victim, dict[str, int]] = {}

    async def status(self) -> dict[str, Any]:
        response = await self._http.get("/status", params={"requests": "true"})
        found: dict[str, Any] = response.raise_for_status().json()
        return found

    async def wait_whole(self, trial: Trial | None = None) -> None:
        """Returns when every part is there in the wanted number, registered and alive. For a trial all those beside its
        victim, and one of each other kind, will do: the rest may still be on its way back from earlier ones.

        Raises AssertionError if that takes too long.
        """
        deadline = time.monotonic() + RESTORE_LIMIT_S
        while True:
            try:
                missing = await self._missing(trial)
            except (httpx.HTTPError, psutil.Error) as error:
                missing = repr(error)
            if missing is None:
                return
            assert time.monotonic() < deadline, f"the cluster is not whole again: {missing}"
            await asyncio.sleep(POLL_S)

    async def _missing(self, trial: Trial | None) -> object:
        status = await self.status()
        self._term = status["planner_term"]
        self._engines = {engine["address"]: engine for engine in status["engines"] if engine["ready"]}
        self.pids = await asyncio.to_thread(self._find, status)
        counts = {victim: len(found) for victim, found in self.pids.items()}
        wanted = (
            WANTED if trial is None else dict.fromkeys(WANTED, 1) | {trial.role: WANTED[trial.role], Victim.RANK: 0}
        )
        whole = status["ready"] and self._term > self._lost_term
        whole &= trial is None or bool(self._places(trial))
        return None if whole and all(counts[victim] >= count for victim, count in wanted.items()) else counts

    def _find(self, status: dict[str, Any]) -> dict[Victim, dict[str, int]]:
        processes = self._cluster.processes()
        self._lost.intersection_update(processes)  # or the next process of that number would count as lost
        processes = {pid: command for pid, command in processes.items() if pid not in self._lost}
        replicas = {pid: command for pid, command in processes.items() if "ServeReplica:" in command}
        listening = {}
        for pid in replicas:
            with contextlib.suppress(psutil.Error):
                for connection in psutil.Process(pid).net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        # gRPC listens on IPv6 sockets, for IPv4 as well.
                        ip = connection.laddr.ip.removeprefix("::ffff:")
                        listening[f"{ip}:{connection.laddr.port}"] = pid
        found: dict[Victim, dict[str, int]] = {victim: {} for victim in Victim}
        for victim, address in _addresses(status):
            pid = listening.get(address)
            if pid is not None:
                found[victim][address] = pid
                group = self._engines[address]["group"] if address in self._engines else None
                if group is not None and group["processes"][1] in processes:
                    found[Victim.RANK][address] = group["processes"][1]
        found[Victim.PLANNER] = {str(pid): pid for pid, command in replicas.items() if ":planner" in command}
        return found

    def pick(self, trial: Trial, where: dict[str, Any] | None) -> str:
        """The address of the part the first request is on, or of any of the kind when it is on none."""
        places = self._places(trial)
        at = None if where is None else where.get(trial.role)
        return at if at in places else next(iter(places))

    def _places(self, trial: Trial) -> dict[str, int]:
        """Parts that may be hit. Ranks are those of the group whose role it is; some of the requests are on it."""
        places = self.pids[trial.victim]
        if trial.victim is not Victim.RANK:
            return places
        return {address: pid for address, pid in places.items() if self._engines[address]["role"] == trial.role}

    async def hit(self, trial: Trial, address: str) -> None:
        """Lets the fault fall on the part there."""
        pid = self.pids[trial.victim][address]
        if trial.fault is Fault.SWITCH:
            await self.order(address, OTHER_ROLE[trial.victim])
            return
        self.send(pid, signal.SIGKILL if trial.fault is Fault.KILL else signal.SIGSTOP)
        if trial.fault is Fault.KILL or trial.thaw_after_s is None:
            self._lost |= {pid, self.pids[trial.role][address]}
            if trial.victim is Victim.PLANNER:
                self._lost_term = self._term

    async def order(self, address: str, role: str) -> None:
        """The engine there is to take the role, as soon as the others can do without it."""
        body = {"engine": self._engines[address]["id"], "role": role}
        deadline = time.monotonic() + RESTORE_LIMIT_S
        while (response := await self._http.post("/admin/role", json=body)).status_code == 503:
            assert time.monotonic() < deadline, response.text
            await asyncio.sleep(POLL_S)
        assert response.status_code == 200, response.text

    async def wait_role(self, address: str, role: str, pid: int) -> bool:
        """Whether the engine there has the role in time, as routers know it, and its process has not ended."""
        deadline = time.monotonic() + ROLE_LIMIT_S
        while self.lives(pid) and time.monotonic() < deadline:
            engines = (await self.status())["engines"]
            if (address, role) in [(engine["address"], engine["role"]) for engine in engines]:
                return True
            await asyncio.sleep(POLL_S)
        return False

    def lives(self, pid: int) -> bool:
        """Whether the process has not ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        return False

    def send(self, pid: int, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).send_signal(number)

    @contextlib.contextmanager
    def held(self, victim: Victim | None) -> Iterator[set[int]]:
        """All parts of a kind stand still, so that requests stay in the stage that needs them. Take out of the set
        what is to be left as it is then."""
        pids = set() if victim is None else set(self.pids[victim].values())
        for pid in pids:
            self.send(pid, signal.SIGSTOP)
        try:
            yield pids
        finally:
            for pid in pids:
                self.send(pid, signal.SIGCONT)


def _addresses(status: dict[str, Any]) -> Iterator[tuple[Victim, str]]:
    for part in status["preprocessors"]:
        yield Victim.PREPROCESSOR, part["address"]
    for part in status["encoders"]:
        yield Victim.ENCODER, part["address"]
    for engine in status["engines"]:
        if engine["ready"] and engine["role"] in OTHER_ROLE:
            yield Victim(engine["role"]), engine["address"]
