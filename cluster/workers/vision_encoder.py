"""Vision encoders."""

from __future__ import annotations

import dataclasses
from typing import Any

from actors.config import VisionEncoderConfig
from actors.vision_encoder import VisionEncoder
from actors.wire.renewal import Registration
from cluster.config import VISION_ENCODERS
from cluster.logs import log_as_serve_does
from cluster.metrics.ray_export import RayExport
from cluster.metrics.workers import encoder_sheet
from cluster.scaling_policy import Echo
from cluster.workers.common import ScaleEcho, let_go, replica_id, with_files


class VisionEncoderReplica(VisionEncoder):
    """A vision encoder known to the planner by its replica's id."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: VisionEncoderConfig, planner: Any, host: str | None
    ) -> None:
        log_as_serve_does()
        config = dataclasses.replace(await with_files(config), encoder_id=f"encoder-{replica_id()}")
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
        await let_go(self)
        await self.close()
