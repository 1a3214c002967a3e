"""The processes of a running cluster's parts, and what is done to them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import psutil

from tests.chaos.plan import Victim
from tests.cluster.launcher import LaunchedCluster

WANTED = {Victim.PREPROCESSOR: 2, Victim.ENCODER: 2, Victim.PREFILL: 2, Victim.DECODE: 2}
RESTORE_LIMIT_S = 180.0


class Processes:
    """Parts by kind and address, as last looked for."""

    def __init__(self, cluster: LaunchedCluster, http: httpx.AsyncClient) -> None:
        self._cluster = cluster
        self._http = http
        self.pids: dict[Victim, dict[str, int]] = {}

    async def status(self) -> dict[str, Any]:
        response = await self._http.get("/status", params={"requests": "true"})
        found: dict[str, Any] = response.raise_for_status().json()
        return found

    async def wait_whole(self) -> None:
        """Returns when every part is there in the wanted number, registered and alive. Raises AssertionError if that
        takes too long."""
        missing: object = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESTORE_LIMIT_S):
                while True:
                    try:
                        missing = await self._missing()
                    except (httpx.HTTPError, KeyError, psutil.Error) as error:
                        missing = repr(error)
                    if missing is None:
                        return
                    await asyncio.sleep(0.25)
        raise AssertionError(f"the cluster is not whole again: {missing}")

    async def _missing(self) -> object:
        status = await self.status()
        addresses = _addresses(status)
        counts = {victim: len(found) for victim, found in addresses.items()}
        if not status["ready"] or counts != WANTED:
            return counts
        listening = await asyncio.to_thread(self._listening)
        pids = {
            victim: {address: listening[int(address.rpartition(":")[2])] for address in found}
            for victim, found in addresses.items()
        }
        pids[Victim.PLANNER] = {"planner": self._planner()}
        self.pids = pids
        return None

    def _listening(self) -> dict[int, int]:
        found = {}
        for pid in self._cluster.processes():
            with contextlib.suppress(psutil.Error):
                for connection in psutil.Process(pid).net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        found[connection.laddr.port] = pid
        return found

    def _planner(self) -> int:
        for pid, command in self._cluster.processes().items():
            if "planner" in command and "ray::" in command:
                return pid
        raise KeyError("planner")

    def pid_of(self, victim: Victim, address: str | None) -> int:
        """The part a request is on, or any of its kind when it is on none yet."""
        pids = self.pids[victim]
        return pids[address] if address in pids else next(iter(pids.values()))

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


def _addresses(status: dict[str, Any]) -> dict[Victim, set[str]]:
    engines = [engine for engine in status["engines"] if engine["ready"]]
    return {
        Victim.PREPROCESSOR: {part["address"] for part in status["preprocessors"]},
        Victim.ENCODER: {part["address"] for part in status["encoders"]},
        Victim.PREFILL: {engine["address"] for engine in engines if engine["role"] == "prefill"},
        Victim.DECODE: {engine["address"] for engine in engines if engine["role"] == "decode"},
    }
