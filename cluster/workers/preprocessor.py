"""Preprocessors, which load no torch."""

from __future__ import annotations

from typing import Any

from actors.config import PreprocessorConfig
from actors.preprocessor import Preprocessor
from actors.processing.config import ProcessingLimits
from actors.wire.renewal import Registration
from cluster.config import PREPROCESSORS
from cluster.logs import log_as_serve_does
from cluster.metrics.ray_export import RayExport
from cluster.metrics.workers import preprocessor_sheet
from cluster.scaling_policy import Echo
from cluster.workers.common import ScaleEcho, let_go, with_files


class PreprocessorReplica(Preprocessor):
    """A preprocessor the planner knows, so that its Media server can be audited."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: PreprocessorConfig, limits: ProcessingLimits, planner: Any, host: str | None
    ) -> None:
        log_as_serve_does()
        await super().__init__(await with_files(config), limits, host, lambda part: preprocessor_sheet(part).text())
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
        await let_go(self)
        await self.close()
