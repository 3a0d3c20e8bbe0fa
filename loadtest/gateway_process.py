"""`sluice serve` as a process of its own on a free port of loopback, ended with the block that started it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from gateway.core.errors import GatewayError

READY_S = 30.0
POLL_S = 0.1


@asynccontextmanager
async def served(words: Sequence[str], log: Path) -> AsyncIterator[str]:
    """The base URL of `sluice serve WORDS`, once some pair can serve. Raises GatewayError when that takes too long."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    leash = str(Path(__file__).with_name("leash.py"))
    command = (sys.executable, leash, sys.executable, "-m", "gateway", "serve", *words, "--port", str(port))
    with log.open("ab") as lines:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=lines, stderr=lines
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        if not await _is_ready(base_url, process):
            raise GatewayError(f"sluice serve did not become ready: {_end_of(log)}")
        yield base_url
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _is_ready(base_url: str, process: asyncio.subprocess.Process) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READY_S), aiohttp.ClientSession() as session:
            while process.returncode is None:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{base_url}/ready") as response:
                        if response.status == 200:
                            return True
                await asyncio.sleep(POLL_S)
    return False


def _end_of(log: Path) -> str:
    return log.read_text()[-500:]
