"""`sluice serve` as a process of its own: how it starts, stops, and says that it cannot."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.integration.harness import CHAT, chat_body, events
from tests.integration.scripted_engine import CHUNKED, DONE, chunk, serving, token
from tests.polling import until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
START_S = 20.0


@asynccontextmanager
async def sluice(*words: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command as a process; it has ended afterwards."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "gateway", *words)
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, cwd=ROOT)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def log_line(process: asyncio.subprocess.Process, event: str) -> dict[str, object]:
    """The first log line that says this."""
    async with asyncio.timeout(START_S):
        while line := await process.stderr.readline():
            if line.startswith(b"{") and (told := json.loads(line))["event"] == event:
                return told
    raise AssertionError(f"it ended without {event!r}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_a_stream_end_whole_takes_nobody_new_and_exits_with_0(number):
    is_told = asyncio.Event()

    async def play(received, writer):
        writer.write(CHUNKED + chunk(token("one")))
        await is_told.wait()
        writer.write(chunk(token("two") + DONE) + b"0\r\n\r\n")

    async with serving(play) as engine, sluice("serve", "--engine", engine.url, "--port", "0") as process:
        url = str((await log_line(process, "listening"))["url"])
        await log_line(process, "engine up")
        request = aiohttp.request("POST", url + CHAT, json=chat_body(stream=True))
        async with request as response:
            first = await response.content.readuntil(b"\n\n")
            process.send_signal(number)
            await log_line(process, "stopping")
            await until(lambda: refuses(url))
            is_told.set()
            rest = await response.read()
        assert events(first + rest) == events(token("one") + token("two") + DONE)
        _, said = await asyncio.wait_for(process.communicate(), START_S)
        assert (process.returncode, b"Traceback" in said) == (0, False)


async def refuses(url: str) -> bool:
    """Whether a new client gets no connection."""
    host, port = url.removeprefix("http://").split(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except ConnectionError:  # refused, or reset with the listener
        return True
    writer.transport.abort()
    return False


async def test_a_port_that_is_taken_is_one_clear_line_and_exit_code_2():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        async with sluice("serve", "--engine", "http://127.0.0.1:9", "--port", port) as process:
            _, said = await asyncio.wait_for(process.communicate(), START_S)
    assert process.returncode == 2
    assert said.decode() == f"sluice: server.port: cannot listen on 127.0.0.1:{port}: Address already in use\n"


async def test_an_unknown_plug_in_is_one_clear_line_and_exit_code_2(tmp_path):
    file = tmp_path / "sluice.toml"
    file.write_text('[policy]\nname = "best"\n[[engines]]\nurl = "http://127.0.0.1:9"\n')
    async with sluice("serve", "--config", str(file), "--port", "0") as process:
        _, said = await asyncio.wait_for(process.communicate(), START_S)
    assert process.returncode == 2
    assert said.decode().startswith("sluice: policy.name: unknown 'best'; known: sluice")
