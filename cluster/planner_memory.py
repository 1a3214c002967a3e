"""What a planner leaves for the one that follows it, in the key-value store of Ray's head: how many planners there
were, and how many engines are wanted of each role. Roles that engines happen to have are not always wanted: a planner
may end between an accident and its repair.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import ray
from ray.experimental import internal_kv

from actors.types import EngineRole

log = logging.getLogger(__name__)

_NAMESPACE = b"ernie-serving"

Mix = Mapping[str, Mapping[EngineRole, int]]
"""Engines of each pool by role."""


class PlannerMemory:
    """Of the planners of one application."""

    def __init__(self, application: str) -> None:
        self._name = f"{ray.get_runtime_context().get_job_id()}/{application}"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planner-memory")

    def take_term(self) -> int:
        """Claims the next planner term. Terms start at 1 and only grow."""
        term = 1
        while internal_kv._internal_kv_put(
            f"planner-term/{self._name}/{term}".encode(), b"", overwrite=False, namespace=_NAMESPACE
        ):
            term += 1
        return term

    async def load(self, configured: Mix) -> dict[str, Counter[EngineRole]]:
        """What was wanted last; empty if nothing was kept, or under another configuration."""
        kept = await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: internal_kv._internal_kv_get(self._key, namespace=_NAMESPACE)
        )
        return read(kept, configured)

    def keep(self, configured: Mix, wanted: Mix) -> None:
        """Does not wait. Where the store is away, the planner that follows goes by what engines have."""
        self._thread.submit(self._put, write(configured, wanted))

    @property
    def _key(self) -> bytes:
        return f"planner-roles/{self._name}".encode()

    def _put(self, written: bytes) -> None:
        try:
            internal_kv._internal_kv_put(self._key, written, namespace=_NAMESPACE)
        except Exception as error:
            log.warning("the wanted roles could not be kept for a planner that follows: %s", error)


def write(configured: Mix, wanted: Mix) -> bytes:
    """For ``read``."""
    told = {"configured": _told(configured), "wanted": _told(wanted)}
    return json.dumps(told, sort_keys=True).encode()


def read(written: bytes | None, configured: Mix) -> dict[str, Counter[EngineRole]]:
    """What was wanted, if it was written under this configuration; else nothing."""
    if written is None:
        return {}
    kept = json.loads(written)
    if kept["configured"] != _told(configured):
        return {}
    return {
        pool: Counter({EngineRole(role): count for role, count in roles.items()})
        for pool, roles in kept["wanted"].items()
    }


def _told(mix: Mix) -> dict[str, dict[str, int]]:
    return {pool: {str(role): count for role, count in roles.items() if count} for pool, roles in mix.items()}
