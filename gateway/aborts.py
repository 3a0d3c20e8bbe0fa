"""Tells engines that a hung-up request is over, where they would notice the closed connection only seconds later.

A courtesy beside closing the connection, not in place of it: nobody waits for it, an engine's answer is not looked at,
and at most `MAX_WAITING` are waiting to be sent. Each is sent again after a while, because the first may overtake the
request itself: an SGLang engine that has not read the request yet ignores its abort, then starts it, and sees only 4 s
later that nobody is there (seen in one of forty trials with clients that left at once). To one that knows the request
no more, an abort means nothing.
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
AGAIN_AFTER_S = (0.4, 1.2)
"""Seconds from one sending of an abort to the next."""


class Aborts:
    """The aborts still to be sent, and what sends them."""

    def __init__(self, api_key: Callable[[str], str | None]) -> None:
        self._api_key = api_key
        self._waiting: asyncio.Queue[tuple[Call, int]] = asyncio.Queue(MAX_WAITING)
        self._resting_count = 0
        self.left_out_count = 0
        """Aborts that were not sent because too many were waiting."""

    def put(self, call: Call) -> None:
        """Has the engine of this call told; nothing where the call has no abort."""
        if call.abort is not None:
            self._put(call, 0)

    def _put(self, call: Call, sent_count: int) -> None:
        try:
            self._waiting.put_nowait((call, sent_count))
        except asyncio.QueueFull:
            self.left_out_count += 1

    def _rest(self, call: Call, sent_count: int) -> None:
        """Has the call's abort sent again later; at most `MAX_WAITING` rest at a time, the others are not repeated."""

        def wake() -> None:
            self._resting_count -= 1
            self._put(call, sent_count)

        if sent_count <= len(AGAIN_AFTER_S) and self._resting_count < MAX_WAITING:
            self._resting_count += 1
            asyncio.get_running_loop().call_later(AGAIN_AFTER_S[sent_count - 1], wake)

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
            call, sent_count = await self._waiting.get()
            assert call.abort is not None, "put keeps only those"
            path, body = call.abort
            headers = {"content-type": "application/json"} | bearer(self._api_key(call.engine.id))
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with session.post(call.engine.url + path, data=body, headers=headers, allow_redirects=False):
                    pass
            self._rest(call, sent_count + 1)
