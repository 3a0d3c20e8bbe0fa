"""Replaying a workload against a real socket, from the function and from the command line."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.core.types import Slo
from loadtest.generators import generate
from loadtest.replay import Progress, Target, main, replay
from loadtest.report import Outcome, Status
from loadtest.workload import TraceRequest, WorkloadError, sliced
from tests.loadtest.scripted_server import (
    CLOSE,
    DONE,
    STREAM_HEAD,
    Received,
    ScriptedServer,
    answer,
    event,
    serve,
    stream,
)

REPOSITORY = Path(__file__).parents[2]
SLO = Slo(ttft_s=5.0, tbt_s=5.0)
TARGET = Target(model="m")
OK = stream(event("a"), event("b"), DONE)


async def command(server: ScriptedServer, *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of `python -m loadtest.replay` against that server."""
    process = await start(server, *arguments)
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def start(server: ScriptedServer, *arguments: str) -> asyncio.subprocess.Process:
    everything = [sys.executable, "-m", "loadtest.replay", "--url", server.url, *arguments]
    pipes: dict[str, Any] = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    return await asyncio.create_subprocess_exec(*everything, cwd=REPOSITORY, **pipes)


async def test_every_request_is_sent_with_its_sizes_and_counted() -> None:
    seen: list[Outcome] = []
    workload = list(sliced(generate("conversation", seed=1), count=5))
    async with serve(OK) as server:
        report = await replay(server.url, workload, TARGET, slo=SLO, speed=1000, on_progress=seen.append)
    assert (report.requests, report.attained, len(seen)) == (5, 5, 5)
    asked = [(received.body["max_tokens"], received.body["ignore_eos"]) for received in server.received]
    assert sorted(asked) == sorted((request.output_tokens, True) for request in workload)
    prompts = [len(received.body["messages"][0]["content"]) for received in server.received]
    assert sorted(prompts) == sorted(request.prompt_tokens * 5 for request in workload)


async def test_requests_leave_at_their_instants_divided_by_the_speed() -> None:
    arrived: list[Outcome] = []
    workload = [TraceRequest(arrival_s, 10, 2) for arrival_s in (0.0, 1.0, 3.0)]
    async with serve(OK) as server:
        await replay(server.url, workload, TARGET, slo=SLO, speed=100, on_progress=arrived.append)
    first, *rest = sorted(outcome.arrived_at for outcome in arrived)
    assert [at - first for at in rest] == pytest.approx([0.01, 0.03])


async def test_refusals_and_failures_are_reported_apart() -> None:
    async def play(received: Received, writer: asyncio.StreamWriter) -> None:
        statuses = {1: 429, 2: 500}
        await answer(statuses[received.body["max_tokens"]], b"no")(received, writer)

    workload = [TraceRequest(0.0, 10, output_tokens) for output_tokens in (1, 2, 1)]
    async with serve(play) as server:
        report = await replay(server.url, workload, TARGET, slo=SLO)
    assert (report.refused, report.errors, report.reasons) == (2, 1, {"http_429": 2, "http_500": 1})


async def test_an_answer_that_is_not_streamed_meets_no_bound_on_tokens() -> None:
    body = b'{"choices": [{"message": {"content": "a"}}]}'
    async with serve(answer(200, body)) as server:
        target = Target(model="m", is_stream=False, is_output_forced=False)
        report = await replay(server.url, [TraceRequest(0.0, 10, 2)], target, slo=SLO)
    assert (report.ok, report.attained) == (1, 0)
    assert "ignore_eos" not in server.received[0].body


async def test_an_impossible_speed_is_refused_before_anything_is_sent() -> None:
    async with serve(OK) as server:
        with pytest.raises(WorkloadError, match="speed"):
            await replay(server.url, [TraceRequest(0.0, 10, 2)], TARGET, slo=SLO, speed=0)
    assert not server.received


async def test_the_command_replays_a_trace_and_prints_json(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,40,2\n2023-11-16 18:15:56,50,2\n")
    async with serve(OK) as server:
        status, out, err = await command(
            server, "--trace", str(trace), "--limit=1", "--slo-ttft-ms=5000", "--header=x-tenant: t", "--json"
        )
    report = json.loads(out)
    assert (status, err, report["requests"], report["attained"]) == (0, "", 1, 1)
    assert report["slo"] == {"ttft_s": 5.0, "tbt_s": None, "tpot_s": None, "deadline_s": None}
    assert server.received[0].headers["x-tenant"] == "t"


async def test_the_command_prints_a_table_and_fails_when_a_request_failed() -> None:
    async with serve(answer(500, b"no")) as server:
        status, out, _ = await command(server, "--workload=toolagent", "--limit=2", "--seed=7")
    assert status == 1
    assert "2: 0 ok, 0 refused, 2 failed" in out
    assert "http_500 2" in out


async def test_an_interrupted_command_reports_what_had_ended() -> None:
    second_has_come = asyncio.Event()

    async def play(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + CLOSE + event("a"))
        if len(server.received) == 1:
            writer.write(DONE)
            return
        second_has_come.set()
        await writer.drain()
        await asyncio.Event().wait()

    async with serve(play) as server:
        process = await start(server, "--workload=conversation", "--limit=5", "--max-in-flight=1")
        await second_has_come.wait()
        process.send_signal(signal.SIGINT)
        out, _ = await process.communicate()
    assert process.returncode == 130
    assert "requests  1: 1 ok" in out.decode()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--trace=nowhere.jsonl"], "nowhere.jsonl:0: No such file"),
        (["--workload=toolagent"], "--seconds or --limit"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--url=http://127.0.0.1:1", *arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument", ["--speed=0", "--limit=0", "--slo-tbt-ms=nan", "--url=gateway:80", "--header=plain", "--seconds=x"]
)
def test_impossible_options_are_refused(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--url=http://127.0.0.1:1", "--workload=toolagent", "--limit=1", argument])
    assert argument.split("=")[0] in capsys.readouterr().err


class Screen(io.StringIO):
    """Text output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "line"), [(Screen(), "1 ok, 1 refused, 0 error"), (io.StringIO(), "")])
def test_only_a_terminal_gets_a_line_of_progress(stream: io.StringIO, line: str) -> None:
    progress = Progress(stream)
    for status in (Status.OK, Status.REFUSED):
        progress.add(Outcome(arrived_at=0.0, status=status, prompt_tokens=1))
    assert stream.getvalue().endswith(line)
    assert len(progress.outcomes) == 2
    assert bool(stream.getvalue()) is bool(line)


async def test_the_bounds_are_asked_for_in_headers_and_scaled_with_time() -> None:
    async with serve(OK) as server:
        status, out, _ = await command(
            server,
            *("--workload", "conversation", "--limit", "2", "--scale", "1000", "--send-slo", "--json"),
            *("--slo-ttft-ms", "60000", "--slo-tbt-ms", "60000", "--slo-deadline-ms", "600000"),
        )
    assert status == 0
    assert json.loads(out)["slo"] == {"ttft_s": 0.06, "tbt_s": 0.06, "deadline_s": 0.6, "tpot_s": None}
    asked = {name: value for name, value in server.received[0].headers.items() if name.startswith("x-")}
    assert asked == {"x-slo-ttft-ms": "60.000", "x-slo-tbt-ms": "60.000", "x-request-deadline-ms": "600.000"}


async def test_without_being_told_to_no_bound_is_asked_for() -> None:
    async with serve(OK) as server:
        await command(server, *("--workload", "conversation", "--limit", "1", "--slo-ttft-ms", "60000"))
    assert not [name for name in server.received[0].headers if name.startswith("x-")]
