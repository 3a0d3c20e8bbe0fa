"""Locust as people start it, in a process of its own, against scripted servers and emulated engines."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from gateway.core.types import Role
from loadtest.engine_types import EngineSettings
from loadtest.fake_engine import FakeCluster, FakeSettings
from loadtest.replay import Target, client_requests
from loadtest.traces import read_trace
from tests.loadtest.scripted_server import (
    CLOSE,
    DONE,
    STREAM_HEAD,
    Received,
    Script,
    ScriptedServer,
    answer,
    event,
    serve,
    stream,
)

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
WITHIN_S = 60.0
OK = stream(event("a"), event("b"), DONE)


def trace_of(folder: Path, *output_tokens: int, every_ms: int = 10) -> Path:
    """A Mooncake trace with one request of 10 prompt tokens each `every_ms`."""
    lines = [
        {"timestamp": number * every_ms, "input_length": 10, "output_length": tokens, "hash_ids": [number]}
        for number, tokens in enumerate(output_tokens)
    ]
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


async def start(locustfile: str, url: str, *words: str) -> asyncio.subprocess.Process:
    command = (sys.executable, "-m", "locust", "-f", f"loadtest/{locustfile}", "--host", url, "--model", "m", *words)
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, cwd=REPOSITORY, stdout=pipe, stderr=pipe)


async def locust(locustfile: str, url: str, folder: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the figures it wrote, and all it printed, of a run without a page."""
    figures = folder / "figures.json"
    process = await start(locustfile, url, "--headless", "--only-summary", "--report-json", str(figures), *words)
    out, err = await asyncio.wait_for(process.communicate(), WITHIN_S)
    said = (out + err).decode()
    assert process.returncode is not None
    assert "Traceback" not in said, said
    return process.returncode, json.loads(figures.read_text()) if figures.exists() else {}, said


async def replayed(server: ScriptedServer, trace: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    return await locust("locustfile_trace.py", server.url, trace.parent, "--trace", str(trace), *words)


async def test_a_replay_sends_what_sluice_replay_sends_and_counts_tokens_by_themselves(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, 2, 3, 4)
    async with serve(OK) as server:
        code, figures, said = await replayed(server, trace, "--slo-ttft-ms", "5000", "--slo-tbt-ms", "5000")
    assert (code, figures["requests"], figures["attained"]) == (0, 3, 3)
    expected = [json.loads(r.body) for r in client_requests(read_trace(trace), Target(model="m"))]
    assert sorted((r.body for r in server.received), key=str) == sorted(expected, key=str)
    rows = [line for line in said.splitlines() if line.startswith(("TTFT ms", "TBT ms", "tokens/s", "POST"))]
    assert len(rows) == 8, "each in the table of figures and in that of percentiles"
    assert "Aggregated" in said
    assert "goodput" in said


async def test_percentiles_are_those_of_services(tmp_path: Path) -> None:
    async with serve(OK) as server:
        _, _, said = await replayed(server, trace_of(tmp_path, 2))
    header = next(line for line in said.splitlines() if line.startswith("Type") and "%" in line)
    assert [word for word in header.split() if word.endswith("%")] == ["50%", "90%", "95%", "99%"]


def by_size(**scripts: Script) -> Script:
    """The script whose name ends with the number of output tokens that the request asks for."""

    async def play(received: Received, writer: asyncio.StreamWriter) -> None:
        await scripts[f"n{received.body['max_tokens']}"](received, writer)

    return play


async def cut(_: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"5\r\ndata:")
    await writer.drain()
    writer.close()


async def test_refusals_are_named_and_are_no_errors(tmp_path: Path) -> None:
    refuse = answer(429, b"{}", b"x-sluice-reason: ttft_slo\r\nretry-after: 3\r\n")
    async with serve(by_size(n1=OK, n2=refuse)) as server:
        code, figures, said = await replayed(server, trace_of(tmp_path, 1, 2, 2))
    assert (code, figures["refused"], figures["errors"]) == (0, 2, 0)
    assert "ttft_slo" in said


DISGUISES: dict[str, Script] = {
    "http_500": answer(500, b"no"),
    "incomplete": stream(event("a")),
    "stream_error": stream(event("a"), b'data: {"error": {"message": "boom"}}\n\n', DONE),
    "malformed": stream(b"data: {nonsense\n\n", DONE),
    "lost": cut,
}


async def test_every_disguise_of_an_error_is_one(tmp_path: Path) -> None:
    scripts = {f"n{number}": script for number, script in enumerate(DISGUISES.values(), 1)}
    async with serve(by_size(**scripts)) as server:
        code, figures, _ = await replayed(server, trace_of(tmp_path, *range(1, len(DISGUISES) + 1)))
    assert (code, figures["errors"]) == (1, len(DISGUISES))
    assert figures["reasons"] == dict.fromkeys(DISGUISES, 1)


async def test_an_answer_that_never_ends_is_given_up(tmp_path: Path) -> None:
    async def silent(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + CLOSE)
        await writer.drain()
        await asyncio.Event().wait()

    async with serve(silent) as server:
        code, figures, _ = await replayed(server, trace_of(tmp_path, 2), "--timeout-s", "0.5")
    assert (code, list(figures["reasons"])) == (1, ["timeout"])


async def test_no_server_is_an_error_not_a_hang(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        server = ScriptedServer(f"http://127.0.0.1:{unused.getsockname()[1]}")
    code, figures, _ = await replayed(server, trace_of(tmp_path, 2))
    assert (code, list(figures["reasons"])) == (1, ["connect"])


async def test_a_bad_trace_is_named_before_anything_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0}\n')
    async with serve(OK) as server:
        process = await start("locustfile_trace.py", server.url, "--headless", "--trace", str(path))
        out, err = await asyncio.wait_for(process.communicate(), WITHIN_S)
    said = (out + err).decode()
    assert process.returncode == 2, said
    assert f"{path}:1:" in said
    assert "Traceback" not in said
    assert not server.received


async def test_workers_share_a_replay_and_the_master_sums_it(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, *[2] * 20)
    async with serve(OK) as server:
        code, figures, _ = await replayed(server, trace, "--processes", "2", "--slo-ttft-ms", "5000")
    assert (code, figures["requests"], figures["attained"]) == (0, 20, 20)
    assert len({received.body["messages"][0]["content"] for received in server.received}) == 20, "none twice"


async def test_a_thousand_streams_are_open_at_once(tmp_path: Path) -> None:
    open_now = most = 0
    all_open = asyncio.Event()

    async def hold(_: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        writer.write(STREAM_HEAD + CLOSE + event("a"))
        if open_now == 1000:
            all_open.set()
        await all_open.wait()
        writer.write(event("b") + DONE)

    async with serve(hold) as server:
        trace = trace_of(tmp_path, *[2] * 1000, every_ms=1)
        code, figures, _ = await replayed(server, trace, "--streams", "1000", "--timeout-s", "50")
    assert (code, most, figures["ok"]) == (0, 1000, 1000)


async def test_people_keep_their_conversation(tmp_path: Path) -> None:
    async with FakeCluster(speed=50) as cluster:
        engine = await cluster.start(FakeSettings(engine=EngineSettings(role=Role.BOTH)))
        words = ("--model", engine.settings.model, "--users", "5", "--spawn-rate", "5", "-t", "8s")
        code, figures, said = await locust("locustfile.py", engine.url, tmp_path, *words)
    assert code == 0, said
    assert figures["requests"] >= 5
    assert figures["errors"] == 0


async def test_the_page_has_the_rows_and_the_goodput(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    async with serve(OK) as server:
        trace = str(trace_of(tmp_path, 2, 2))
        words = ("--web-host", "127.0.0.1", "--web-port", str(port), "--autostart", "--trace", trace)
        process = await start("locustfile_trace.py", server.url, *words, "--slo-ttft-ms", "5000")
        try:
            async with asyncio.timeout(WITHIN_S):
                figures = await until_ended(f"http://127.0.0.1:{port}/goodput", requests=2)
                stats = await fetch(f"http://127.0.0.1:{port}/stats/requests")
        finally:
            process.terminate()
            await process.communicate()
    assert figures["attained"] == 2
    assert {"TTFT ms", "TBT ms", "tokens/s", "POST"} <= {row["method"] for row in stats["stats"]}


async def until_ended(url: str, *, requests: int) -> dict[str, Any]:
    while True:
        try:
            figures = await fetch(url)
        except OSError:
            figures = {"requests": 0}
        if figures["requests"] == requests:
            return figures
        await asyncio.sleep(0.1)


async def fetch(url: str) -> dict[str, Any]:
    def read() -> bytes:
        with urllib.request.urlopen(url, timeout=5) as response:
            body: bytes = response.read()
        return body

    decoded: dict[str, Any] = json.loads(await asyncio.to_thread(read))
    return decoded
