"""Keeps a lease at the planner for as long as a task runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

log = logging.getLogger(__name__)

RENEW_S = 1.0


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
