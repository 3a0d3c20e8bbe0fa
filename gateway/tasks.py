"""The one way to run something beside a block of code that is not a TaskGroup of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs `work` while the block runs and cancels it at its end. If `work` fails, the block is cancelled and the
    failure raised in its place: a part that died in silence would leave a gateway that knows nothing new."""
    owner = asyncio.current_task()
    assert owner is not None
    failures: list[BaseException] = []

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            failures.append(failure)
            owner.cancel()

    task = asyncio.create_task(work)
    task.add_done_callback(ended)
    try:
        yield
    except asyncio.CancelledError:
        if failures:
            owner.uncancel()
            raise failures[0] from None
        raise
    finally:
        task.remove_done_callback(ended)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
