"""Tells engines that a hung-up request is over, where they would notice the closed connection only seconds later.

A courtesy beside closing the connection, not in place of it: an engine that does not answer, or does not know the
request any more, is not asked again. Nobody waits for it, and at most `MAX_WAITING` are waiting to be sent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import aiohttp

from adapters.base import Call
from gateway.control_http import bearer

MAX_WAITING = 1024
"""More hang-ups at once than that are left to the engines' own notice."""
SENDERS = 8
"""Aborts under way at once: an engine answers in a millisecond, and one that is gone must not hold up the others'."""
TIMEOUT_S = 2.0


class Aborts:
    """The aborts still to be sent, and what sends them."""

    def __init__(self, api_key: Callable[[str], str | None]) -> None:
        self._api_key = api_key
        self._waiting: asyncio.Queue[Call] = asyncio.Queue(MAX_WAITING)
        self.left_out_count = 0
        """Aborts that were not sent because too many were waiting."""

    def put(self, call: Call) -> None:
        """Has the engine of this call told; nothing where the call has no abort."""
        if call.abort is None:
            return
        try:
            self._waiting.put_nowait(call)
        except asyncio.QueueFull:
            self.left_out_count += 1

    async def run(self) -> None:
        """Sends what is put, until cancelled."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        connector = aiohttp.TCPConnector(force_close=True)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(SENDERS):
                group.create_task(self._send_all(session))

    async def _send_all(self, session: aiohttp.ClientSession) -> None:
        while True:
            call = await self._waiting.get()
            assert call.abort is not None, "put keeps only those"
            path, body = call.abort
            headers = {"content-type": "application/json"} | bearer(self._api_key(call.engine.id))
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with session.post(call.engine.url + path, data=body, headers=headers, allow_redirects=False):
                    pass
