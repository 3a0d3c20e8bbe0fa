"""Waiting for something to become true, with a deadline: no test sleeps for a guessed time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

POLL_S = 0.002
DEADLINE_S = 5.0


async def until(condition: Callable[[], bool | Awaitable[bool]], timeout_s: float = DEADLINE_S) -> None:
    """Returns when the condition is true. Raises TimeoutError when that takes too long."""
    async with asyncio.timeout(timeout_s):
        while not (result if isinstance(result := condition(), bool) else await result):
            await asyncio.sleep(POLL_S)
