"""Workers as Serve replicas: a name of their own, a place in the planner's registry, an orderly end."""

from __future__ import annotations

import asyncio
import dataclasses
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
from cluster.hub import local_directory
from cluster.metrics.ray_export import RayExport
from cluster.metrics.workers import encoder_sheet, engine_sheet, preprocessor_sheet

AnyConfig = TypeVar("AnyConfig", PreprocessorConfig, VisionEncoderConfig, EngineReplicaConfig)


class PreprocessorReplica(Preprocessor):
    """A preprocessor the planner knows, so that its Media server can be audited."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: PreprocessorConfig, limits: ProcessingLimits, planner: Any, host: str | None
    ) -> None:
        await super().__init__(await _with_files(config), limits, host, lambda part: preprocessor_sheet(part).text())
        export = RayExport()

        async def renew() -> None:
            await planner.renew_preprocessor.remote(self.incarnation, self.address)
            export.tell(preprocessor_sheet(self))

        self._registration = Registration(planner, self.incarnation, renew)

    async def check_health(self) -> None:
        self._registration.check()
        await super().check_health()

    async def __del__(self) -> None:
        await self._registration.end()
        await self.close()


class VisionEncoderReplica(VisionEncoder):
    """A vision encoder known to the planner by its replica's id."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: VisionEncoderConfig, planner: Any, host: str | None
    ) -> None:
        config = dataclasses.replace(await _with_files(config), encoder_id=f"encoder-{_replica_id()}")
        await super().__init__(config, host, lambda part: encoder_sheet(part).text())
        export = RayExport()

        async def renew() -> None:
            await planner.renew_encoder.remote(self.identity, self.queued_patches)
            export.tell(encoder_sheet(self))

        self._registration = Registration(planner, self.identity.incarnation, renew)

    async def check_health(self) -> None:
        self._registration.check()
        await super().check_health()

    async def __del__(self) -> None:
        await self._registration.end()
        await self.close()


class EngineGroupReplica(EngineReplica):
    """An engine known to the planner by its replica's id, its further ranks actors beside it; it drains when its
    replica ends."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineReplicaConfig, planner: Any, host: str | None
    ) -> None:
        self._export = RayExport()
        name = f"{config.pool}-{_replica_id()}"
        start_group = partial(start_actors, partial(local_directory, config.model_dir))
        await super().__init__(
            await _with_files(config), planner, name, host, start_group, lambda part: engine_sheet(part).text()
        )

    async def _renew(self) -> None:
        await super()._renew()
        self._export.tell(engine_sheet(self))

    async def __del__(self) -> None:
        await self.close()


async def _with_files(config: AnyConfig) -> AnyConfig:
    """The settings with the model's directory on this node, fetched first where a hub has it."""
    directory = await asyncio.to_thread(local_directory, config.model_dir)
    return dataclasses.replace(config, model_dir=directory)


def _replica_id() -> str:
    replica: str = serve.get_replica_context().replica_id.unique_id
    return replica
