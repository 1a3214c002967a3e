"""Waiting for what other tasks, threads and processes bring about, and no event tells of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

LIMIT_S = 60.0
"""Far more than it takes: how fast the machine is decides no test."""


async def eventually(condition: Callable[[], bool]) -> None:
    """Lets the loop run until ``condition`` holds. Raises TimeoutError after ``LIMIT_S``."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.002)


def wait_until(condition: Callable[[], bool]) -> None:
    """The same for a thread."""
    until = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.01)
