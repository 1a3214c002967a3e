"""One attempt at one choice on one route: submits it, tells its owner what engines say, and ends it everywhere."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Protocol

from actors.errors import ServingError
from actors.types import AttemptMode, EngineRequest, MediaSpan, PromptLogprobs, SequenceKey, TokenEvent
from cluster.policy.views import Route
from cluster.router.fleet import Fleet
from cluster.router.link import AttemptError, AttemptEvent, EngineLink, EngineLost, MediaNeed, Milestone

_OF_ITS_PEER = frozenset({"ENGINE_LOST", "PEER_CANCELLED"})
"""What an engine says when the other one is to blame."""
CAUSE_WAIT_S = 0.5
"""The death of an engine is known within this time, by its own link."""


class AttemptOwner(Protocol):
    """The choice an attempt is made for."""

    def take_tokens(self, tokens: list[TokenEvent]) -> bool:
        """In any order, also tokens known already. Returns whether the choice is over."""

    def take_prompt_scores(self, piece: PromptLogprobs) -> None: ...

    def pass_milestone(self, milestone: Milestone) -> None: ...

    async def make_media_again(self) -> tuple[MediaSpan, ...]: ...

    @property
    def engine_finished(self) -> bool:
        """The last token came from the engine: it needs no cancelling."""

    @property
    def decodes(self) -> bool:
        """The engine that decodes has the whole prompt, and the attempt's first token came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteLinks:
    """The links of a route. ``decode`` is None when one engine does all."""

    prefill: EngineLink
    decode: EngineLink | None

    @classmethod
    def of(cls, fleet: Fleet, route: Route) -> RouteLinks:
        """Raises Unavailable when an engine was lost since the route was picked."""
        prefill = fleet.link(route.prefill)
        if prefill is None:
            raise EngineLost(route.prefill, "link closed")
        if route.decode is None:
            return cls(prefill=prefill, decode=None)
        decode = fleet.link(route.decode)
        if decode is None:
            raise EngineLost(route.decode, "link closed")
        return cls(prefill=prefill, decode=decode)


class Attempt:
    """Runs once. Both engines are told to stop on any way out but a last token of theirs."""

    def __init__(self, owner: AttemptOwner, key: SequenceKey, request: EngineRequest, links: RouteLinks) -> None:
        self._owner = owner
        self._key = key
        self._request = request
        self._links = links
        self._events: asyncio.Queue[AttemptEvent] = asyncio.Queue()

    async def run(self) -> None:
        """Returns when the choice is over.

        Raises:
            ServingError: the attempt ended and the choice is not over.
        """
        prefill, decode = self._links.prefill, self._links.decode
        over = False
        try:
            if decode is None:
                prefill.submit(self._key, self._request, AttemptMode.COLOCATED, None, self._events)
            else:
                decode.submit(self._key, self._request, AttemptMode.DECODE, prefill.info, self._events)
                prefill.submit(self._key, self._request, AttemptMode.PREFILL, decode.info, self._events)
            await self._follow()
            over = self._owner.engine_finished
        finally:
            for link in (prefill, decode):
                if link is not None:
                    link.forget(self._key, cancel=not over)

    async def _follow(self) -> None:
        owner = self._owner
        while True:
            batch = [await self._events.get()]
            while not self._events.empty():
                batch.append(self._events.get_nowait())
            # What was told before a token belongs to it, whichever stream was faster.
            for event in batch:
                if isinstance(event, Milestone):
                    owner.pass_milestone(event)
                elif isinstance(event, PromptLogprobs):
                    owner.take_prompt_scores(event)
            tokens = [event for event in batch if isinstance(event, TokenEvent)]
            if tokens and owner.take_tokens(tokens):
                return
            for event in batch:
                if isinstance(event, AttemptError) and not self._is_over_there(event):
                    raise await self._cause(event.error, batch)
                if isinstance(event, MediaNeed):
                    self._links.prefill.supply_media(self._key, await owner.make_media_again())

    def _is_over_there(self, event: AttemptError) -> bool:
        """The engine that prefilled has done its part: its end is no matter any more."""
        links = self._links
        return links.decode is not None and event.engine == links.prefill.info.incarnation and self._owner.decodes

    async def _cause(self, error: ServingError, batch: list[AttemptEvent]) -> ServingError:
        """An engine whose peer gave up or was lost says only that; what the peer, or its link, says came with it in the
        ``batch`` or follows at once.
        """
        if self._links.decode is None or _is_own(error):
            return error
        for event in batch:
            if isinstance(event, AttemptError) and _is_own(event.error):
                return event.error
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CAUSE_WAIT_S):
                while True:
                    event = await self._events.get()
                    if isinstance(event, AttemptError) and _is_own(event.error):
                        return event.error
        return error


def _is_own(error: ServingError) -> bool:
    """It tells of the engine itself, and not of its peer."""
    return isinstance(error, EngineLost) or error.reason not in _OF_ITS_PEER
