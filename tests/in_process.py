"""A whole cluster in one process and event loop, without Ray: every part real, only Serve's handles are doubles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import grpc.aio

from actors.config import EngineReplicaConfig, PreprocessorConfig, VisionEncoderConfig
from actors.engine_group import start_processes
from actors.engine_replica import EngineReplica
from actors.preprocessor import Preprocessor
from actors.types import EngineRole
from actors.vision_encoder import VisionEncoder
from actors.wire.audit import Audit
from actors.wire.renewal import renew_for_ever
from cluster.config import ClusterConfig, EnginePool, Roles, RouterPool
from cluster.metrics.workers import encoder_sheet, engine_sheet, preprocessor_sheet
from cluster.planner import Planner
from cluster.router.assembly import RouterParts

HOST = "127.0.0.1"
ALWAYS_PAIRS: Mapping[str, Any] = {"router": RouterPool(alone_tokens=0)}
"""For ``described``: texts go through prefill engines however short they are."""


class Handle:
    """Calls objects of this process, one after the other, as a Serve handle would: ``handle.method.remote(...)`` is
    awaitable."""

    def __init__(self, *targets: object) -> None:
        self._targets = list(targets)

    def __getattr__(self, name: str) -> Any:
        target = self._targets.pop(0)
        self._targets.append(target)
        return _Method(getattr(target, name))

    def drop(self, target: object) -> None:
        self._targets.remove(target)


class _Method:
    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *args: object) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(self._method(*args))


class InProcessCluster:
    """The parts, for tests that look inside."""

    def __init__(self) -> None:
        self.engines: list[EngineReplica] = []
        self.encoders: list[VisionEncoder] = []
        self.preprocessors: list[Preprocessor] = []
        self.planner: Planner
        self.pool: Handle
        """Of the preprocessors."""
        self.parts: RouterParts
        self._renewals: dict[object, asyncio.Task[NoReturn]] = {}

    @property
    def encoder(self) -> VisionEncoder:
        (encoder,) = self.encoders
        return encoder

    @property
    def preprocessor(self) -> Preprocessor:
        (preprocessor,) = self.preprocessors
        return preprocessor

    def keep_known(self, part: object, renew: Callable[[], Awaitable[None]]) -> asyncio.Task[NoReturn]:
        """Renews a part's lease until it is killed."""
        self._renewals[part] = task = asyncio.create_task(renew_for_ever(renew))
        return task

    async def kill(self, part: EngineReplica | VisionEncoder | Preprocessor) -> None:
        """Ends a part as the death of its process would: connections break, nothing is said, its lease runs out."""
        if isinstance(part, EngineReplica):
            self.engines.remove(part)
            part._registration._task.cancel()
            await part._server.stop(None)
            part._config = replace(part._config, drain_timeout_s=0.0)
            part._planner = part._registration._planner = None
        else:
            self._renewals[part].cancel()
            await _server_of(part).stop(None)
            if isinstance(part, Preprocessor):
                self.preprocessors.remove(part)
                self.pool.drop(part)
            else:
                self.encoders.remove(part)
        await part.close()

    async def audits(self) -> dict[str, Audit]:
        """Of every worker that lives, engines in the order of their roles."""
        found = {engine._info.engine_id: await engine.audit() for engine in self.engines}
        found |= {f"preprocessor {index}": part.audit() for index, part in enumerate(self.preprocessors)}
        return found | {f"encoder {index}": part.audit() for index, part in enumerate(self.encoders)}

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


def _server_of(part: VisionEncoder | Preprocessor) -> grpc.aio.Server:
    server = part._server._server
    assert server is not None
    return server


@asynccontextmanager
async def in_process_cluster(
    model_dir: Path,
    *roles: EngineRole,
    dtype: str = "float64",
    compat: str = "original",
    kv_cache_gib: float = 0.02,
    embedding_cache_bytes: int | None = None,
    encoders: int = 1,
    preprocessors: int = 1,
    ranks: Sequence[int] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
    encoder: Mapping[str, Any] | None = None,
    described: Mapping[str, Any] | None = None,
    **engine: Any,
) -> AsyncIterator[InProcessCluster]:
    """Starts preprocessors, encoders, one router and an engine per role; ends them all.

    ``embedding_cache_bytes``: what the encoder keeps without a lease; its default when None. ``ranks``: of each engine;
    one when None. ``preprocessor``, ``encoder`` and ``engine``: further fields of the parts' configs; ``described``: of
    the cluster's.
    """
    counts = {role.value: roles.count(role) for role in set(roles)}
    config = ClusterConfig(
        model=str(model_dir),
        dtype=dtype,  # type: ignore[arg-type]
        compat=compat,  # type: ignore[arg-type]
        engines=(EnginePool(name="engine", roles=Roles(**counts)),),
        **(described or {}),
    )
    cluster = InProcessCluster()
    async with AsyncExitStack() as stack:
        planner = Planner.__new__(Planner)
        await planner.__init__(config, term=1)  # type: ignore[func-returns-value,misc]
        stack.callback(planner.close)
        cluster.planner, handle = planner, Handle(planner)
        preprocessor_config = PreprocessorConfig(model_dir=str(model_dir), **(preprocessor or {}))
        for _ in range(preprocessors):
            part = await _made(
                Preprocessor, preprocessor_config, None, HOST, lambda part: preprocessor_sheet(part).text()
            )
            cluster.preprocessors.append(part)
            stack.push_async_callback(part.close)
            renew = partial(planner.renew_preprocessor, part.incarnation, part.address)
            stack.callback(cluster.keep_known(part, renew).cancel)
        for index in range(encoders):
            encoder_config = VisionEncoderConfig(
                model_dir=str(model_dir), encoder_id=f"encoder-{index}", dtype=dtype, **(encoder or {})
            )
            if embedding_cache_bytes is not None:
                encoder_config = replace(encoder_config, cache_bytes=embedding_cache_bytes)
            place = await _made(VisionEncoder, encoder_config, HOST, lambda part: encoder_sheet(part).text())
            cluster.encoders.append(place)
            stack.push_async_callback(place.close)
            stack.callback(cluster.keep_known(place, partial(planner.renew_encoder, place.identity, 0)).cancel)
        for size in ranks or [1] * len(roles):
            engine_config = EngineReplicaConfig(
                model_dir=str(model_dir),
                pool="engine",
                dtype=dtype,
                compat=compat,
                kv_cache_gib=kv_cache_gib,
                drain_timeout_s=5.0,
                ranks=size,
                **engine,
            )
            replica = await _made(
                EngineReplica,
                engine_config,
                handle,
                None,
                HOST,
                start_processes,
                lambda stats: engine_sheet(stats).text(),
            )
            cluster.engines.append(replica)
            stack.push_async_callback(_close_once, replica, cluster)
        cluster.pool = Handle(*cluster.preprocessors)
        cluster.parts = await RouterParts.start(config, handle, cluster.pool)
        stack.push_async_callback(cluster.parts.close)
        # All are to end: none waits for another one to take its role.
        stack.callback(lambda: planner._leaving.update(replica._incarnation for replica in cluster.engines))
        async with asyncio.timeout(10):
            while await cluster.parts.router.not_ready() is not None or len(cluster.parts.fleet.engines()) < len(roles):
                await asyncio.sleep(0.01)
        yield cluster


async def _close_once(replica: EngineReplica, cluster: InProcessCluster) -> None:
    if replica in cluster.engines:
        await replica.close()


async def _made(kind: Any, *args: object) -> Any:
    """Builds a class whose ``__init__`` is a coroutine, as Serve does."""
    instance = kind.__new__(kind)
    await instance.__init__(*args)
    return instance
