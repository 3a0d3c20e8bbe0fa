"""An open-loop load client: each request leaves at its own instant, whether or not earlier ones were answered.

A closed loop waits for answers and so slows down exactly when the server does, hiding the delay it should measure.
Here latencies count from the instant a request was due; when the client itself is late (its bound on requests in
flight, or a busy processor) the lag stands in the result. Nothing is ever sent twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from loadtest.answer import AnswerRecord, ClientResult, ErrorKind, TooLarge

IDLE_CONNECTION_S = 3.0
"""Idle connections are dropped before servers drop them (uvicorn, which vLLM uses, after 5 s): a request sent on a
connection that is being closed would count as lost."""

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
        """Send all requests at their instants, counted from now; results in the order they were given.

        `requests` is drawn from as the instants come, so a long workload is never whole in memory. Cancelling the run
        closes every connection; what had ended by then was told to `on_result`.
        """
        start_at = asyncio.get_running_loop().time()
        tasks: list[asyncio.Task[ClientResult]] = []
        async with asyncio.TaskGroup() as group:
            for request in requests:
                scheduled_at = start_at + request.due_s
                await _sleep_until(scheduled_at)
                await self._slots.acquire()
                tasks.append(group.create_task(self._send_in_slot(request, scheduled_at, on_result)))
        return [task.result() for task in tasks]

    async def send(self, request: ClientRequest) -> ClientResult:
        """Send one request now, whatever its `due_s`."""
        await self._slots.acquire()
        return await self._send_in_slot(request, asyncio.get_running_loop().time(), None)

    async def _send_in_slot(
        self, request: ClientRequest, scheduled_at: float, on_result: Callable[[ClientResult], None] | None
    ) -> ClientResult:
        try:
            result = await self._exchange(request, scheduled_at)
        finally:
            self._slots.release()
        if on_result is not None:
            on_result(result)
        return result

    async def _exchange(self, request: ClientRequest, scheduled_at: float) -> ClientResult:
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
        return record.result()

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


async def _sleep_until(at: float) -> None:
    delay_s = at - asyncio.get_running_loop().time()
    if delay_s > 0:
        await asyncio.sleep(delay_s)


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for data in response.content.iter_any():
        body += data
        if len(body) > MAX_BODY_BYTES:
            raise TooLarge(f"the answer is longer than {MAX_BODY_BYTES} bytes")
    return bytes(body)
