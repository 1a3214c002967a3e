"""What all of them have."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from typing import Any, Protocol, TypeVar

from ray import serve

from actors.config import EngineReplicaConfig, PreprocessorConfig, VisionEncoderConfig
from actors.wire.audit import Audit
from cluster.hub import local_directory
from cluster.scaling_policy import Echo

log = logging.getLogger(__name__)

AnyConfig = TypeVar("AnyConfig", PreprocessorConfig, VisionEncoderConfig, EngineReplicaConfig)

ECHO_TIMEOUT_S = 1.0
LET_GO_POLL_S = 0.05
LET_GO_S = 5.0
"""For routers to fetch or give up what a worker that ends keeps for their requests."""


class ScaleEcho:
    """What a replica of a pool that scales tells Serve of the planner's wishes (``cluster/scaling_policy.py``)."""

    def __init__(self, planner: Any, pool: str) -> None:
        self._planner = planner
        self._pool = pool
        self._heard: Echo = {}

    async def hear(self) -> Echo:
        """While no planner answers, what the last one said."""
        try:
            async with asyncio.timeout(ECHO_TIMEOUT_S):
                self._heard = await self._planner.scale_of.remote(self._pool, self._heard)
        except Exception as error:
            log.info("no planner says how many of %s there are to be: %r", self._pool, error)
        return self._heard


class Audited(Protocol):
    """Serves media, and tells what it holds for requests."""

    def audit(self) -> Audit: ...


async def let_go(part: Audited) -> None:
    """Waits until nothing here is kept for a request; what still is after ``LET_GO_S`` will be made again elsewhere."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LET_GO_S):
            while True:
                if not any(part.audit().held.values()):
                    return
                await asyncio.sleep(LET_GO_POLL_S)


async def with_files(config: AnyConfig) -> AnyConfig:
    """The settings with the model's directory on this node, fetched first where a hub has it."""
    directory = await asyncio.to_thread(local_directory, config.model_dir)
    return dataclasses.replace(config, model_dir=directory)


def replica_id() -> str:
    replica: str = serve.get_replica_context().replica_id.unique_id
    return replica
