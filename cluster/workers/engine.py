"""Engines, of one rank or a group."""

from __future__ import annotations

from functools import partial
from typing import Any

from actors.config import EngineReplicaConfig
from actors.engine_replica import EngineReplica
from actors.rank_actors import start_actors
from cluster.hub import local_directory
from cluster.logs import log_as_serve_does
from cluster.metrics.ray_export import RayExport
from cluster.metrics.workers import engine_sheet
from cluster.scaling_policy import Echo
from cluster.workers.common import ScaleEcho, replica_id, with_files


class EngineGroupReplica(EngineReplica):
    """An engine known to the planner by its replica's id, its further ranks actors beside it; it drains when its
    replica ends."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineReplicaConfig, planner: Any, host: str | None
    ) -> None:
        log_as_serve_does()
        self._export = RayExport()
        name = f"{config.pool}-{replica_id()}"
        start_group = partial(start_actors, partial(local_directory, config.model_dir))
        await super().__init__(
            await with_files(config), planner, name, host, start_group, lambda stats: engine_sheet(stats).text()
        )
        self._scale = ScaleEcho(planner, config.pool)

    async def record_autoscaling_stats(self) -> Echo:
        return await self._scale.hear()

    async def _renew(self) -> None:
        await super()._renew()
        self._export.tell(engine_sheet(self.stats()))

    async def __del__(self) -> None:
        await self.close()
