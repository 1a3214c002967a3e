"""Keeps a lease at the planner, and gives it back at an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

log = logging.getLogger(__name__)

RENEW_S = 1.0
LEAVE_TIMEOUT_S = 1.0
LEAVE_POLL_S = 0.25


async def renew_for_ever(renew: Callable[[], Awaitable[None]]) -> NoReturn:
    """Calls ``renew`` every second; one that fails or hangs is tried again with the next. Cancel the task to stop."""
    unheard = 0
    while True:
        try:
            async with asyncio.timeout(RENEW_S):
                await renew()
            unheard = 0
        except Exception as error:
            unheard += 1
            if unheard == 3:
                log.warning("the planner does not answer: %r", error)
        await asyncio.sleep(RENEW_S)


class Registration:
    """Keeps a worker in the planner's registry until ``end``. ``planner``: its Serve handle."""

    def __init__(self, planner: Any, incarnation: str, renew: Callable[[], Awaitable[None]]) -> None:
        self._planner = planner
        self._incarnation = incarnation
        self._task = asyncio.create_task(renew_for_ever(renew))

    def check(self) -> None:
        """Raises RuntimeError when renewal has stopped."""
        if self._task.done():
            raise RuntimeError("the registration with the planner stopped") from self._task.exception()

    async def wait_for_leave(self, timeout_s: float) -> None:
        """Goes on until the planner can do without this engine. A planner that does not answer is not waited for."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(timeout_s):
                while True:
                    if await self._may_leave():
                        return
                    await asyncio.sleep(LEAVE_POLL_S)

    async def _may_leave(self) -> bool:
        async with asyncio.timeout(LEAVE_TIMEOUT_S):
            leave: bool = await self._planner.may_leave.remote(self._incarnation)
        return leave

    async def end(self) -> None:
        self._task.cancel()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await self._planner.leave.remote(self._incarnation)
