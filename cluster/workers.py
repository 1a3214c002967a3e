"""Workers as Serve replicas: a name of their own, a place in the planner's registry, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from functools import partial
from typing import Any, TypeVar

from ray import serve

from actors.config import EngineReplicaConfig, PreprocessorConfig, VisionEncoderConfig
from actors.engine_replica import EngineReplica
from actors.preprocessor import Preprocessor
from actors.processing.config import ProcessingLimits
from actors.rank_actors import start_actors
from actors.vision_encoder import VisionEncoder
from actors.wire.renewal import Registration
from cluster.config import PREPROCESSORS, VISION_ENCODERS
from cluster.hub import local_directory
from cluster.logs import log_as_serve_does
from cluster.metrics.ray_export import RayExport
from cluster.metrics.workers import encoder_sheet, engine_sheet, preprocessor_sheet
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


async def _let_go(part: Preprocessor | VisionEncoder) -> None:
    """Waits until nothing here is kept for a request; what still is after ``LET_GO_S`` will be made again elsewhere."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LET_GO_S):
            while True:
                if not any(part.audit().held.values()):
                    return
                await asyncio.sleep(LET_GO_POLL_S)


class PreprocessorReplica(Preprocessor):
    """A preprocessor the planner knows, so that its Media server can be audited."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: PreprocessorConfig, limits: ProcessingLimits, planner: Any, host: str | None
    ) -> None:
        log_as_serve_does()
        await super().__init__(await _with_files(config), limits, host, lambda part: preprocessor_sheet(part).text())
        export = RayExport()

        async def renew() -> None:
            await planner.renew_preprocessor.remote(self.incarnation, self.address, self.queue_age_s, self.busy)
            export.tell(preprocessor_sheet(self))

        self._registration = Registration(planner, self.incarnation, renew)
        self._scale = ScaleEcho(planner, PREPROCESSORS)

    async def record_autoscaling_stats(self) -> Echo:
        return await self._scale.hear()

    async def check_health(self) -> None:
        self._registration.check()
        await super().check_health()

    async def __del__(self) -> None:
        await self._registration.end()
        await _let_go(self)
        await self.close()


class VisionEncoderReplica(VisionEncoder):
    """A vision encoder known to the planner by its replica's id."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: VisionEncoderConfig, planner: Any, host: str | None
    ) -> None:
        log_as_serve_does()
        config = dataclasses.replace(await _with_files(config), encoder_id=f"encoder-{_replica_id()}")
        await super().__init__(config, host, lambda part: encoder_sheet(part).text())
        export = RayExport()

        async def renew() -> None:
            await planner.renew_encoder.remote(self.identity, self.queued_patches, self.busy)
            export.tell(encoder_sheet(self))

        self._registration = Registration(planner, self.identity.incarnation, renew)
        self._scale = ScaleEcho(planner, VISION_ENCODERS)

    async def record_autoscaling_stats(self) -> Echo:
        return await self._scale.hear()

    async def check_health(self) -> None:
        self._registration.check()
        await super().check_health()

    async def __del__(self) -> None:
        await self._registration.end()
        await _let_go(self)
        await self.close()


class EngineGroupReplica(EngineReplica):
    """An engine known to the planner by its replica's id, its further ranks actors beside it; it drains when its
    replica ends."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineReplicaConfig, planner: Any, host: str | None
    ) -> None:
        log_as_serve_does()
        self._export = RayExport()
        name = f"{config.pool}-{_replica_id()}"
        start_group = partial(start_actors, partial(local_directory, config.model_dir))
        await super().__init__(
            await _with_files(config), planner, name, host, start_group, lambda stats: engine_sheet(stats).text()
        )
        self._scale = ScaleEcho(planner, config.pool)

    async def record_autoscaling_stats(self) -> Echo:
        return await self._scale.hear()

    async def _renew(self) -> None:
        await super()._renew()
        self._export.tell(engine_sheet(self.stats()))

    async def __del__(self) -> None:
        await self.close()


async def _with_files(config: AnyConfig) -> AnyConfig:
    """The settings with the model's directory on this node, fetched first where a hub has it."""
    directory = await asyncio.to_thread(local_directory, config.model_dir)
    return dataclasses.replace(config, model_dir=directory)


def _replica_id() -> str:
    replica: str = serve.get_replica_context().replica_id.unique_id
    return replica
