"""Workers as Serve replicas: a name of their own, a place in the planner's registry, an orderly end."""

from __future__ import annotations

import dataclasses
from typing import Any

from ray import serve

from actors.config import EngineReplicaConfig, PreprocessorConfig, VisionEncoderConfig
from actors.engine_replica import EngineReplica
from actors.preprocessor import Preprocessor
from actors.processing.config import ProcessingLimits
from actors.rank_actors import start_actors
from actors.vision_encoder import VisionEncoder
from actors.wire.renewal import Registration
from cluster.metrics import GroupMetrics


class PreprocessorReplica(Preprocessor):
    """A preprocessor the planner knows, so that its Media server can be audited."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: PreprocessorConfig, limits: ProcessingLimits, planner: Any, host: str | None
    ) -> None:
        await super().__init__(config, limits, host)

        async def renew() -> None:
            await planner.renew_preprocessor.remote(self.incarnation, self.address)

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
        await super().__init__(dataclasses.replace(config, encoder_id=f"encoder-{_replica_id()}"), host)

        async def renew() -> None:
            await planner.renew_encoder.remote(self.identity, self.queued_patches)

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
        self._metrics = GroupMetrics() if config.ranks > 1 else None
        await super().__init__(config, planner, f"{config.pool}-{_replica_id()}", host, start_actors)

    async def _renew(self) -> None:
        report = self.group_report()
        if self._metrics is not None and report is not None:
            self._metrics.tell(report)
        await super()._renew()

    async def __del__(self) -> None:
        await self.close()


def _replica_id() -> str:
    replica: str = serve.get_replica_context().replica_id.unique_id
    return replica
