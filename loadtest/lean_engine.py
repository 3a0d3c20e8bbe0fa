"""An engine that costs next to nothing: HTTP of vLLM's shape from bytes made up in advance, for measuring what stands
in front of it. `python -m loadtest.lean_engine --port 8101 --role decode` (port 0: free ones, printed as JSON).

It speaks `/health`, `/metrics`, `/v1/models` and the two generating routes, and looks at a request's bytes only for its
length, `stream`, `max_tokens` and whether it is the prefill of a hand-off. The tokens of all its streams go out in one
turn per step, as from a real engine whose batch makes one step; the first one at once. `loadtest/fake_engine.py` is the
engine that behaves; this one is the engine that does not disturb the measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import cast

import httptools
import uvloop

from gateway.core.types import Role

MODEL = "emulated"
MARK = b" tok"
"""The text of every token: what the client looks for to tell a token from the event that only names the role."""
_COUNT = re.compile(rb'"max_(?:completion_)?tokens":\s*(\d+)')
_STREAM = (b'"stream":true', b'"stream": true')
_PREFILL = (b'"do_remote_decode":true', b'"do_remote_decode": true')

_ID = "chatcmpl-3f2a51c09e7b4d0f8a6c5b1e2d3f4a5b"


STAMP = b"x-written-ns:"
"""What stands before the instant at which a token was written, on the clock of `time.monotonic_ns`."""


def _event(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    """One event of a chat stream with the fields that vLLM 0.32.0 writes, about 250 bytes."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason, "token_ids": None}
    told = {"id": _ID, "object": "chat.completion.chunk", "created": 1764547200, "model": MODEL, "choices": [choice]}
    return b"data: " + json.dumps(told, separators=(",", ":")).encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _whole(body: bytes, content_type: bytes = b"application/json") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-length: %d\r\ncontent-type: %b\r\n\r\n"
    return head % (len(body), content_type) + body


_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_ROLE = _chunk(_event({"role": "assistant", "content": ""}))
_TOKEN = _chunk(_event({"content": MARK.decode()}))
_STAMPED = _event({"content": MARK.decode() + STAMP.decode() + "%019d"})
_END = _chunk(_event({"content": ""}, "stop")) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_USAGE = {"prompt_tokens": 100, "completion_tokens": 8, "total_tokens": 108, "prompt_tokens_details": None}
_MESSAGE: dict[str, object] = {
    "role": "assistant",
    "content": MARK.decode() * 8,
    "tool_calls": [],
    "reasoning_content": None,
}
_ANSWER = {
    "id": _ID,
    "object": "chat.completion",
    "created": 1764547200,
    "model": MODEL,
    "choices": [{"index": 0, "message": _MESSAGE, "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
    "usage": _USAGE,
    "kv_transfer_params": None,
}
_TRANSFER = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [list(range(8))],
    "remote_engine_id": "5b1e2d3f-4a5b-4d0f-8a6c-3f2a51c09e7b",
    "remote_request_id": _ID,
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
}
_WHOLE_ANSWER = _whole(json.dumps(_ANSWER).encode())
_PREFILL_ANSWER = _whole(json.dumps(_ANSWER | {"kv_transfer_params": _TRANSFER}).encode())
_METRICS = (
    b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n"
    b'vllm:cache_config_info{block_size="16",num_gpu_blocks="100000"} 1\n'
)
_MODELS = {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 131072}]}
_PAGES = {
    b"/health": _whole(b"", b"text/plain"),
    b"/metrics": _whole(_METRICS, b"text/plain"),
    b"/v1/models": _whole(json.dumps(_MODELS).encode()),
    b"/kv_event_sources": _whole(b"{}"),
}
_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\ncontent-type: application/json\r\n\r\n{}"


class LeanEngine:
    """The streams of one engine, and the steps that carry them on."""

    def __init__(self, role: Role, step_s: float, *, stamps: bool = False) -> None:
        """`step_s`: seconds per output token of every stream. `stamps`: tokens say when they were written."""
        self.is_prefill = role is Role.PREFILL
        self._stamps = stamps
        self._step_s = step_s
        self._streams: dict[LeanConnection, int] = {}
        """Tokens that each stream still has to get."""
        self._loop = asyncio.get_running_loop()
        self._next_at: float | None = None

    def begin(self, connection: LeanConnection, tokens: int) -> None:
        """Starts a stream: its head, its role and its first token now, a token per step from then on."""
        connection.write(_STREAM_HEAD + _ROLE + self._token())
        if tokens == 1:
            connection.write(_END)
            return
        self._streams[connection] = tokens - 1
        if self._next_at is None:
            self._next_at = self._loop.time() + self._step_s
            self._loop.call_at(self._next_at, self._step)

    def drop(self, connection: LeanConnection) -> None:
        """Forgets the stream of a connection that is gone."""
        self._streams.pop(connection, None)

    def _step(self) -> None:
        """A token for every stream. Steps are counted from the one before: lateness does not add up."""
        assert self._next_at is not None
        self._next_at += self._step_s
        token = self._token()
        for connection, left in list(self._streams.items()):
            connection.write(token if left > 1 else token + _END)
            if left > 1:
                self._streams[connection] = left - 1
            else:
                del self._streams[connection]
        if self._streams:
            self._loop.call_at(self._next_at, self._step)
        else:
            self._next_at = None

    def _token(self) -> bytes:
        """A token's chunk, written now."""
        return _chunk(_STAMPED % time.monotonic_ns()) if self._stamps else _TOKEN


class LeanConnection(asyncio.Protocol):
    """One connection to the engine: requests one after the other."""

    def __init__(self, engine: LeanEngine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Sends bytes of an answer."""
        self._transport.write(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.drop(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._transport.close()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        url, self._url = self._url, b""
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if url not in (b"/v1/chat/completions", b"/v1/completions"):
            self.write(_PAGES.get(url, _NOT_FOUND))
            return
        found = _COUNT.search(body)
        tokens = 1 if self._engine.is_prefill or found is None else max(1, int(found[1]))
        if any(mark in body for mark in _PREFILL):
            self.write(_PREFILL_ANSWER)
        elif any(mark in body for mark in _STREAM):
            self._engine.begin(self, tokens)
        else:
            self.write(_WHOLE_ANSWER)


async def serve(ports: Sequence[int], role: Role, step_s: float, *, stamps: bool = False) -> None:
    """Serves an engine on each of these loopback ports until the process ends; prints `{"ports": [...]}` first."""
    loop = asyncio.get_running_loop()
    bound = []
    for port in ports:
        engine = LeanEngine(role, step_s, stamps=stamps)
        server = await loop.create_server(partial(LeanConnection, engine), "127.0.0.1", port, backlog=4096)
        bound.append(server.sockets[0].getsockname()[1])
    print(json.dumps({"ports": bound}), flush=True)
    await asyncio.Event().wait()


def main(words: Sequence[str]) -> int:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.lean_engine", description="An engine that costs little.")
    parser.add_argument("--port", type=int, action="append", required=True, help="repeatable: one engine each")
    parser.add_argument("--role", choices=[*Role], type=Role, default=Role.BOTH)
    parser.add_argument("--step-s", type=float, default=0.01, help="seconds per output token")
    parser.add_argument("--stamps", action="store_true", help="tokens say when they were written")
    flags = parser.parse_args(words)
    uvloop.run(serve(flags.port, flags.role, flags.step_s, stamps=flags.stamps))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
