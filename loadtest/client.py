"""An open-loop load client: each request leaves at its own instant, whether or not earlier ones were answered.

A closed loop waits for answers and so slows down exactly when the server does, hiding the delay it should measure.
Here latencies count from the instant a request was due; when the client itself is late (its bound on requests in
flight, or a busy processor) the lag stands in the result. Nothing is ever sent twice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from itertools import islice
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from loadtest.answer import AnswerRecord, ClientResult, ErrorKind, TooLarge

IDLE_CONNECTION_S = 3.0
"""Idle connections are dropped before servers drop them (uvicorn, which vLLM uses, after 5 s): a request sent on a
connection that is being closed would count as lost."""

AHEAD_COUNT = 64
"""Requests made before they are due: making one with 12,000 prompt tokens takes about 0.5 ms, and traces send up to 28
at the same instant."""

MAX_BODY_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """One request to send. `due_s` counts from the start of the run."""

    due_s: float
    body: bytes
    is_stream: bool = True
    path: str = "/v1/chat/completions"
    headers: tuple[tuple[str, str], ...] = ()
    prompt_tokens: int = 0
    """What the sender knows of the prompt's size; 0 leaves it to the server's count."""


def chat_request(
    prompt: str,
    *,
    model: str,
    due_s: float = 0.0,
    max_tokens: int | None = None,
    is_stream: bool = True,
    prompt_tokens: int = 0,
    headers: tuple[tuple[str, str], ...] = (),
    **extra: object,
) -> ClientRequest:
    """A chat completion with one user message; `extra` members join the body (`ignore_eos=True`, `temperature=0`)."""
    body: dict[str, object] = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": is_stream}
    if is_stream:
        body["stream_options"] = {"include_usage": True}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    return ClientRequest(
        due_s=due_s,
        body=msgspec.json.encode(body | extra),
        is_stream=is_stream,
        headers=headers,
        prompt_tokens=prompt_tokens,
    )


class LoadClient:
    """Sends requests to one base URL. Use as an async context manager, inside a running loop."""

    def __init__(
        self, base_url: str, *, max_in_flight: int = 1024, timeout_s: float = 600.0, keep_text: bool = True
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._slots = asyncio.Semaphore(max_in_flight)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._keep_text = keep_text
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._timeout,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def run(
        self, requests: Iterable[ClientRequest], on_result: Callable[[ClientResult], None] | None = None
    ) -> list[ClientResult]:
        """Send all requests at their instants, counted from when the first have been made; results in their order.

        `requests` is drawn from at most AHEAD_COUNT before their instants, so a long workload is never whole in
        memory. Cancelling the run closes every connection; what had ended by then was told to `on_result`.
        """
        tasks: list[asyncio.Task[ClientResult]] = []
        async with asyncio.TaskGroup() as group, aclosing(_when_due(requests)) as due:
            async for request, scheduled_at in due:
                await self._slots.acquire()
                task = group.create_task(self._exchange(request, scheduled_at, on_result))
                # Not a `finally` in the task: one that is cancelled before its first step never runs any of it.
                task.add_done_callback(lambda _: self._slots.release())
                tasks.append(task)
        return [task.result() for task in tasks]

    async def send(self, request: ClientRequest) -> ClientResult:
        """Send one request now, whatever its `due_s`."""
        scheduled_at = asyncio.get_running_loop().time()
        async with self._slots:
            return await self._exchange(request, scheduled_at, None)

    async def _exchange(
        self, request: ClientRequest, scheduled_at: float, on_result: Callable[[ClientResult], None] | None
    ) -> ClientResult:
        record = AnswerRecord(
            scheduled_at=scheduled_at,
            prompt_tokens=request.prompt_tokens,
            clock=asyncio.get_running_loop().time,
            keep_text=self._keep_text,
        )
        try:
            await self._converse(request, record)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            record.fail(ErrorKind.CONNECT, str(error))
        except TimeoutError:
            record.fail(ErrorKind.TIMEOUT, f"no whole answer within {self._timeout.total:g} s")
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            record.fail(ErrorKind.LOST, str(error))
        except (aiohttp.ClientError, msgspec.MsgspecError, UnicodeDecodeError, TooLarge) as error:
            record.fail(ErrorKind.MALFORMED, str(error))
        result = record.result()
        if on_result is not None:
            on_result(result)
        return result

    async def _converse(self, request: ClientRequest, record: AnswerRecord) -> None:
        assert self._session is not None, "use the client inside `async with`"
        headers = {"content-type": "application/json", **dict(request.headers)}
        url = self._base_url + request.path
        async with self._session.post(url, data=request.body, headers=headers, allow_redirects=False) as response:
            record.head(response.status, response.headers)
            if response.status != HTTPStatus.OK:
                body = await _read_bounded(response)
                record.fail(ErrorKind.HTTP_STATUS, body[:500].decode(errors="replace"))
            elif not request.is_stream:
                record.whole(await _read_bounded(response))
            else:
                async for data in response.content.iter_any():
                    record.feed(data)
                record.end_of_stream()


async def _when_due(requests: Iterable[ClientRequest]) -> AsyncGenerator[tuple[ClientRequest, float], None]:
    """Each request at its instant, and the instant. Spare time goes into making the next: a burst leaves together."""
    clock = asyncio.get_running_loop().time
    source = iter(requests)
    ready = deque(islice(source, AHEAD_COUNT))
    start_at = clock()
    while ready:
        due_at = start_at + ready[0].due_s
        while len(ready) < AHEAD_COUNT and clock() < due_at and (following := next(source, None)) is not None:
            ready.append(following)
        await asyncio.sleep(max(0.0, due_at - clock()))
        yield ready.popleft(), due_at
        if not ready:
            ready.extend(islice(source, 1))


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for data in response.content.iter_any():
        body += data
        if len(body) > MAX_BODY_BYTES:
            raise TooLarge(f"the answer is longer than {MAX_BODY_BYTES} bytes")
    return bytes(body)
