"""The memory store over a unix socket: what the workers of one machine share.

The supervisor of the workers (gateway/workers.py) keeps one hub; each worker asks it over a connection of its own, in
frames of four bytes of length and a MessagePack array:

    worker -> hub     [number, method, arguments]
    hub -> worker     [number, result]

Why a socket and not shared memory: the workers then follow the very messages that gateways on different machines do,
with the same fencing, bounds and recovery; a worker that dies in the middle of anything leaves no lock held and no
half-written word; and a message costs the machine some ten microseconds where the decision it tells of cost hundreds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gateway.stores import Entry, StoreUnavailable
from gateway.stores.memory import Hub, MemoryStore

MAX_FRAME_BYTES = 2**30
"""A snapshot of a hundred million blocks."""
LENGTH_BYTES = 4
TIMEOUT_S = 2.0

_ENCODER = msgspec.msgpack.Encoder()
_REQUEST = msgspec.msgpack.Decoder(tuple[int, str, list[Any]])
_ANSWER = msgspec.msgpack.Decoder(tuple[int, Any])


def _frame(value: object) -> bytes:
    data = _ENCODER.encode(value)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


# ---- the hub's side --------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving_hub(path: Path, hub: Hub) -> AsyncIterator[None]:
    """Serves the hub at that path inside this block."""
    server = await asyncio.start_unix_server(_Served(MemoryStore(hub)), str(path))
    try:
        yield
    finally:
        server.close()


class _Served:
    """Answers the connections of workers. A worker that sends nonsense loses its connection, nobody else anything."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError, BaseExceptionGroup):
            async with asyncio.TaskGroup() as group:
                while True:
                    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
                    if length > MAX_FRAME_BYTES:
                        raise ConnectionError("a frame that is too long")
                    number, method, arguments = _REQUEST.decode(await reader.readexactly(length))
                    group.create_task(self._answer(writer, number, method, arguments))
        writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, number: int, method: str, arguments: list[Any]) -> None:
        result: object = None
        match method, arguments:
            case "open", []:
                result = await self._store.open()
            case "append", [shard, data]:
                await self._store.append(shard, data)
            case "end", [shard]:
                result = await self._store.end(shard)
            case "covers", [shard, position]:
                result = await self._store.covers(shard, position)
            case "read", [shard, after, wait_s]:
                result = await self._store.read(shard, after, wait_s=wait_s)
            case "acquire", [name, owner, ttl_s]:
                result = await self._store.acquire(name, owner, ttl_s=ttl_s)
            case "release", [name, owner]:
                await self._store.release(name, owner)
            case "save_snapshot", [parts]:
                await self._store.save_snapshot(parts)
            case "load_snapshot", []:
                result = await self._store.load_snapshot()
            case "spend", [amounts, window, window_s]:
                result = await self._store.spend(amounts, window=window, window_s=window_s)
            case _:
                raise ConnectionError(f"no such method: {method}")
        writer.write(_frame((number, result)))
        await writer.drain()


# ---- a worker's side -------------------------------------------------------------------------------------------------


class _Answers(asyncio.Protocol):
    """One connection to the hub: hands each answer to the one who asked."""

    def __init__(self) -> None:
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.is_lost = False
        self._bytes = bytearray()

    def data_received(self, data: bytes) -> None:
        self._bytes += data
        while len(self._bytes) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(self._bytes[:LENGTH_BYTES], "big")
            if len(self._bytes) < end:
                return
            number, result = _ANSWER.decode(self._bytes[LENGTH_BYTES:end])
            del self._bytes[:end]
            waiting = self.waiting.pop(number, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(result)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        for waiting in self.waiting.values():
            if not waiting.done():
                waiting.set_exception(StoreUnavailable("the workers' supervisor is gone"))
        self.waiting.clear()


class SocketStore:
    """A worker's end of the memory store."""

    def __init__(self, path: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        """Connects to nothing yet; a call that is not answered within `timeout_s` has failed."""
        self._path = path
        self._timeout_s = timeout_s
        self._transport: asyncio.WriteTransport | None = None
        self._answers = _Answers()
        self._next_number = 1

    async def open(self) -> str:
        await self.close()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                self._transport, self._answers = await loop.create_unix_connection(_Answers, str(self._path))
        except (OSError, TimeoutError) as error:
            raise StoreUnavailable(f"cannot reach the workers' supervisor: {error}") from None
        return str(await self._ask("open"))

    async def close(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    async def append(self, shard: int, data: bytes) -> None:
        await self._ask("append", shard, data)

    async def end(self, shard: int) -> str:
        return str(await self._ask("end", shard))

    async def covers(self, shard: int, position: str) -> bool:
        return bool(await self._ask("covers", shard, position))

    async def read(self, shard: int, after: str, *, wait_s: float) -> Sequence[Entry]:
        entries = await self._ask("read", shard, after, wait_s, extra_s=wait_s)
        return [Entry(position, data) for position, data in entries]

    async def acquire(self, name: str, owner: str, *, ttl_s: float) -> int | None:
        token: int | None = await self._ask("acquire", name, owner, ttl_s)
        return token

    async def release(self, name: str, owner: str) -> None:
        await self._ask("release", name, owner)

    async def save_snapshot(self, parts: Sequence[bytes]) -> None:
        await self._ask("save_snapshot", parts)

    async def load_snapshot(self) -> Sequence[bytes] | None:
        parts: Sequence[bytes] | None = await self._ask("load_snapshot")
        return parts

    async def spend(self, amounts: Mapping[str, int], *, window: int, window_s: float) -> Mapping[str, int]:
        totals: Mapping[str, int] = await self._ask("spend", amounts, window, window_s)
        return totals

    async def _ask(self, method: str, *arguments: object, extra_s: float = 0.0) -> Any:
        if self._transport is None or self._answers.is_lost:
            raise StoreUnavailable("not connected to the workers' supervisor")
        number = self._next_number
        self._next_number += 1
        waiting = self._answers.waiting[number] = asyncio.get_running_loop().create_future()
        self._transport.write(_frame((number, method, arguments)))
        try:
            async with asyncio.timeout(self._timeout_s + extra_s):
                return await waiting
        except TimeoutError:
            raise StoreUnavailable(f"no answer within {self._timeout_s + extra_s:g} s") from None
        finally:
            self._answers.waiting.pop(number, None)
