"""A whole cluster in one process and event loop, without Ray: every part real, only Serve's handles are doubles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.config import EngineReplicaConfig, PreprocessorConfig, VisionEncoderConfig
from actors.engine_replica import EngineReplica
from actors.preprocessor import Preprocessor
from actors.types import EngineRole
from actors.vision_encoder import VisionEncoder
from actors.wire.audit import Audit
from actors.wire.renewal import renew_for_ever
from cluster.config import ClusterConfig, EnginePool, Roles
from cluster.planner import Planner
from cluster.router.assembly import RouterParts

HOST = "127.0.0.1"


class Handle:
    """Calls an object of this process as a Serve handle would: ``handle.method.remote(...)`` is awaitable."""

    def __init__(self, target: object) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return _Method(getattr(self._target, name))


class _Method:
    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *args: object) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(self._method(*args))


class InProcessCluster:
    """The parts, for tests that look inside."""

    def __init__(self) -> None:
        self.engines: list[EngineReplica] = []
        self.encoder: VisionEncoder
        self.preprocessor: Preprocessor
        self.parts: RouterParts

    async def audits(self) -> dict[str, Audit]:
        """Of every worker, engines in the order of their roles."""
        engines = {engine._info.engine_id: await engine.audit() for engine in self.engines}
        return engines | {"preprocessor": self.preprocessor.audit(), "encoder": self.encoder.audit()}

    async def wait_clean(self, timeout_s: float = 5.0) -> None:
        """Returns when nothing is held anywhere; raises AssertionError naming what still is."""
        try:
            async with asyncio.timeout(timeout_s):
                while await self.held():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"still held: {await self.held()}") from None

    async def held(self) -> dict[str, object]:
        found: dict[str, object] = {name: audit for name, audit in (await self.audits()).items() if not audit.clean}
        if self.parts.router.active_count:
            found["router"] = self.parts.router.active_count
        self.parts.router.check_integrity()
        return found


@asynccontextmanager
async def in_process_cluster(
    model_dir: Path,
    *roles: EngineRole,
    dtype: str = "float64",
    compat: str = "original",
    kv_cache_gib: float = 0.02,
    embedding_cache_bytes: int | None = None,
    preprocessor: Mapping[str, Any] | None = None,
    encoder: Mapping[str, Any] | None = None,
    **engine: Any,
) -> AsyncIterator[InProcessCluster]:
    """Starts one preprocessor, one encoder, one router and an engine per role; ends them all.

    ``embedding_cache_bytes``: what the encoder keeps without a lease; its default when None. ``preprocessor``,
    ``encoder`` and ``engine``: further fields of the parts' configs.
    """
    counts = {role.value: roles.count(role) for role in set(roles)}
    config = ClusterConfig(
        model=str(model_dir),
        dtype=dtype,  # type: ignore[arg-type]
        compat=compat,  # type: ignore[arg-type]
        engines=(EnginePool(name="engine", roles=Roles(**counts)),),
    )
    cluster = InProcessCluster()
    async with AsyncExitStack() as stack:
        planner = Planner.__new__(Planner)
        await planner.__init__(config, term=1)  # type: ignore[func-returns-value,misc]
        stack.callback(planner._expiry.cancel)
        handle = Handle(planner)
        preprocessor_config = PreprocessorConfig(model_dir=str(model_dir), **(preprocessor or {}))
        cluster.preprocessor = await _made(Preprocessor, preprocessor_config, None, HOST)
        stack.push_async_callback(cluster.preprocessor.close)
        encoder_config = VisionEncoderConfig(
            model_dir=str(model_dir), encoder_id="encoder", dtype=dtype, **(encoder or {})
        )
        if embedding_cache_bytes is not None:
            encoder_config = replace(encoder_config, cache_bytes=embedding_cache_bytes)
        cluster.encoder = await _made(VisionEncoder, encoder_config, HOST)
        stack.push_async_callback(cluster.encoder.close)
        for renew in (
            lambda: planner.renew_encoder(cluster.encoder.identity, queued_patches=0),
            lambda: planner.renew_preprocessor(cluster.preprocessor.incarnation, cluster.preprocessor.address),
        ):
            stack.callback(asyncio.create_task(renew_for_ever(renew)).cancel)
        for _ in roles:
            engine_config = EngineReplicaConfig(
                model_dir=str(model_dir),
                pool="engine",
                dtype=dtype,
                compat=compat,
                kv_cache_gib=kv_cache_gib,
                drain_timeout_s=5.0,
                **engine,
            )
            replica = await _made(EngineReplica, engine_config, handle, None, HOST)
            cluster.engines.append(replica)
            stack.push_async_callback(replica.close)
        cluster.parts = await RouterParts.start(config, handle, Handle(cluster.preprocessor))
        stack.push_async_callback(cluster.parts.close)
        async with asyncio.timeout(10):
            while await cluster.parts.router.not_ready() is not None or len(cluster.parts.fleet.engines()) < len(roles):
                await asyncio.sleep(0.01)
        yield cluster


async def _made(kind: Any, *args: object) -> Any:
    """Builds a class whose ``__init__`` is a coroutine, as Serve does."""
    instance = kind.__new__(kind)
    await instance.__init__(*args)
    return instance
