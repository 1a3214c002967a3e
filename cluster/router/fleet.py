"""The engines and encoders a router can reach: follows the planner and keeps one link per ready engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from actors.reports import EngineInfo
from cluster.policy.views import EngineView, admissible
from cluster.registry import EncoderEntry, Snapshot
from cluster.roles import can_answer
from cluster.router.link import EngineLink

log = logging.getLogger(__name__)

POLL_S = 1.0
"""After so long the planner answers although nobody came, went or changed: with loads and progress as they are."""
ANSWER_TIMEOUT_S = 10.0
RETRY_S = 0.5


class SnapshotSource(Protocol):
    """The planner: answers as soon as its snapshot differs from the known one."""

    def __call__(self, known_version: int, known_term: int, timeout_s: float) -> Awaitable[Snapshot]: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    rank: float
    token_count: int
    future: asyncio.Future[None]


class Fleet:
    """Lives on the router's event loop. The last snapshot stays in force while the planner is away."""

    def __init__(
        self,
        source: SnapshotSource,
        router_incarnation: str,
        *,
        lost_after_s: float,
        suspect_after_s: float | None = None,
    ) -> None:
        """Silence after which an engine counts as lost, and after which it gets nothing new (EngineLink's)."""
        self._source = source
        self._router_incarnation = router_incarnation
        self._lost_after_s = lost_after_s
        self._suspect_after_s = suspect_after_s
        self._snapshot = Snapshot(term=0, version=-1)
        self._links: dict[str, EngineLink] = {}
        self._waiting: list[_Waiter] = []
        self._path_came = asyncio.Event()
        self._path_waiters = 0
        self._context_limit: int | None = None
        self.had_path = False
        """Some engines could once answer a request together: they are replaced when they are lost."""
        self.had_encoder = False
        self._follow: asyncio.Task[None] | None = None
        self._retries: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._follow = asyncio.get_running_loop().create_task(self._follow_planner())

    async def close(self) -> None:
        for task in [*self._retries, self._follow]:
            if task is not None:
                task.cancel()
        links, self._links = self._links, {}
        await asyncio.gather(*(link.close() for link in links.values()))

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    def live_snapshot(self) -> Snapshot:
        """The snapshot with roles and loads as the engines' links heard them last."""
        known = self._snapshot
        linked = {name: link for name, link in self._links.items() if link.load is not None}
        engines = tuple(
            replace(entry, info=link.info, load=link.load)
            if (link := linked.get(entry.info.incarnation)) is not None
            else entry
            for entry in known.engines
        )
        return replace(known, engines=engines)

    def speaking(self) -> frozenset[str]:
        """Incarnations of the engines this router has heard of just now."""
        return frozenset(name for name, link in self._links.items() if link.speaks)

    @property
    def encoders(self) -> tuple[EncoderEntry, ...]:
        return self._snapshot.encoders

    def engines(self) -> list[EngineView]:
        """Engines the planner lists, with a live link, as they last described themselves. One that left, leaves or is
        suspect may still finish what it has but gets nothing new."""
        return [view for link, view in self._listed() if link.takes_new]

    @property
    def has_path(self) -> bool:
        """Some engines could answer a request together, if those that are only suspect speak again."""
        return can_answer(view.info for _, view in self._listed())

    def set_aside(self) -> dict[str, str]:
        """Why engines of the registry get nothing new now, by their ids."""
        found = {}
        for entry in self._snapshot.engines:
            link = self._links.get(entry.info.incarnation)
            if not entry.ready:
                found[entry.info.engine_id] = "it is not ready"
            elif link is None or not link.usable:
                found[entry.info.engine_id] = "no link to it"
            elif not link.takes_new:
                silent = f"silent for {link.silent_s:.1f} s"
                found[entry.info.engine_id] = "it leaves" if link.load is not None and link.load.draining else silent
        return found

    def _listed(self) -> Iterator[tuple[EngineLink, EngineView]]:
        ready = self._ready()
        for incarnation, link in self._links.items():
            if incarnation in ready and link.usable and (load := link.claimed_load) is not None:
                yield link, EngineView(info=link.info, load=load, cached_blocks=link.cached_blocks)

    def context_limit(self, bound: int) -> int:
        """Longest prompt and reply every engine can hold together, at most ``bound``; while there is none, what those
        before could."""
        lengths = [view.info.max_model_len for view in self.engines()]
        if lengths:
            self._context_limit = min(lengths)
        return bound if self._context_limit is None else min(bound, self._context_limit)

    def link(self, info: EngineInfo) -> EngineLink | None:
        link = self._links.get(info.incarnation)
        return link if link is not None and link.usable else None

    async def wait_for_path(self) -> None:
        """Returns when some engines could take a prompt up."""
        self._path_waiters += 1
        try:
            while not self._takes_new():
                await self._path_came.wait()
        finally:
            self._path_waiters -= 1

    def _takes_new(self) -> bool:
        return can_answer(view.info for view in self.engines())

    @property
    def waiting_for_room(self) -> int:
        return len(self._waiting)

    def is_behind(self, rank: float) -> bool:
        """Whether somebody of a lower rank waits for room."""
        return any(waiter.rank < rank and not waiter.future.done() for waiter in self._waiting)

    async def wait_for_room(self, token_count: int, rank: float) -> None:
        """Returns when some engine that decodes could hold ``token_count`` tokens and nobody of a lower rank
        (``service_rank``) waits.
        """
        waiter = _Waiter(rank, token_count, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._waiting.sort(key=lambda waiting: waiting.rank)
        try:
            await waiter.future
        finally:
            self._waiting.remove(waiter)

    def _wake(self, link: EngineLink) -> None:
        """Wakes the first of those who wait, as far as the engine that just told its load has room for them."""
        load = link.claimed_load
        if load is None or not link.takes_new or link.info.incarnation not in self._ready():
            return
        if (self._path_waiters or not self.had_path) and self._takes_new():
            self.had_path = True
            self._path_came.set()
            self._path_came = asyncio.Event()
        waiting = [waiter for waiter in self._waiting if not waiter.future.done()]
        view = EngineView(info=link.info, load=load)
        for place in admissible(view, [waiter.token_count for waiter in waiting]):
            waiting[place].future.set_result(None)

    async def _follow_planner(self) -> None:
        while True:
            try:
                known = self._snapshot
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    snapshot = await self._source(known.version, known.term, POLL_S)
                self._adopt(snapshot)
            except Exception as error:
                log.warning("the planner does not answer (%r): going on with the last snapshot", error)
                await asyncio.sleep(RETRY_S)

    def _ready(self) -> dict[str, EngineInfo]:
        """Engines the planner lists as loaded and warmed up, by incarnation."""
        return {entry.info.incarnation: entry.info for entry in self._snapshot.engines if entry.ready}

    def _adopt(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.had_encoder |= bool(snapshot.encoders)
        ready = self._ready()
        for incarnation, info in ready.items():
            known = self._links.get(incarnation)
            if known is None:
                self._connect(info)
            elif info.epoch >= known.info.epoch:
                known.info = info
        for incarnation in self._links.keys() - ready.keys():
            link = self._links[incarnation]
            if not link.usable:
                del self._links[incarnation]
                self._spawn(link.close())

    def _connect(self, info: EngineInfo) -> None:
        link = EngineLink(
            info,
            self._router_incarnation,
            lost_after_s=self._lost_after_s,
            suspect_after_s=self._suspect_after_s,
            on_load=self._wake,
            on_lost=self._lost,
        )
        self._links[info.incarnation] = link
        link.start()

    def _lost(self, link: EngineLink) -> None:
        if self._links.get(link.info.incarnation) is link:
            self._spawn(self._reconnect(link.info, link))

    async def _reconnect(self, info: EngineInfo, lost: EngineLink) -> None:
        """Tries again while the planner still lists the engine as ready."""
        await asyncio.sleep(RETRY_S)
        if self._links.get(info.incarnation) is not lost:
            return
        del self._links[info.incarnation]
        if (listed := self._ready().get(info.incarnation)) is not None:
            self._connect(listed)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._retries.add(task)
        task.add_done_callback(self._retries.discard)


def call_planner(handle: object) -> SnapshotSource:
    """Wraps a Serve handle of the planner as a snapshot source."""

    async def source(known_version: int, known_term: int, timeout_s: float) -> Snapshot:
        snapshot = await handle.snapshot.remote(known_version, known_term, timeout_s)  # type: ignore[attr-defined]
        assert isinstance(snapshot, Snapshot)
        return snapshot

    return source
