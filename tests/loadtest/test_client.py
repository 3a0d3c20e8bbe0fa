"""The client against a real socket: what it measures, what it calls an error, and that it never waits for answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import count

import pytest

from loadtest.answer import ErrorKind
from loadtest.client import AHEAD_COUNT, ClientRequest, ClientResult, LoadClient, chat_request
from loadtest.report import Status
from tests.loadtest.scripted_server import CLOSE, DONE, STREAM_HEAD, Received, Script, answer, event, serve, stream

HELLO = chat_request("hi", model="m")
WHOLE = chat_request("hi", model="m", is_stream=False)
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}\n\n'


async def ask(script: Script, request: ClientRequest = HELLO, *, timeout_s: float = 5.0) -> ClientResult:
    async with serve(script) as server, LoadClient(server.url, timeout_s=timeout_s) as client:
        return await client.send(request)


async def test_a_stream_gives_its_text_its_tokens_and_the_gateways_headers() -> None:
    result = await ask(stream(event(), event("Hel"), event("lo"), USAGE, DONE))
    assert (result.error, result.status, result.text) == (None, 200, "Hello")
    assert (result.prompt_tokens, result.output_tokens) == (7, 5)
    assert result.headers == {"x-sluice-pair": "p0/d1"}
    assert result.outcome.status is Status.OK


async def test_the_first_token_is_timed_at_its_own_event_not_at_the_head() -> None:
    instants: list[float] = []

    async def play(_: Received, writer: asyncio.StreamWriter) -> None:
        for part in (STREAM_HEAD + CLOSE + event(), event("a"), event("b") + DONE):
            await asyncio.sleep(0.01)
            instants.append(asyncio.get_running_loop().time())
            writer.write(part)

    result = await ask(play)
    assert result.first_token_at is not None
    assert result.sent_at < instants[0] < instants[1] <= result.first_token_at
    assert instants[2] <= result.ended_at


async def test_an_answer_that_is_not_streamed_has_no_first_token() -> None:
    body = b'{"choices":[{"message":{"content":"Hello"}}],"usage":{"prompt_tokens":7,"completion_tokens":2}}'
    result = await ask(answer(200, body), WHOLE)
    assert (result.error, result.text, result.output_tokens, result.first_token_at) == (None, "Hello", 2, None)


@pytest.mark.parametrize("status", [429, 503])
async def test_a_refusal_is_told_apart_from_an_error_and_keeps_retry_after(status: int) -> None:
    result = await ask(answer(status, b'{"error":{}}', b"Retry-After: 3\r\n"))
    assert result.is_refused
    assert result.headers == {"retry-after": "3"}
    assert (result.outcome.status, result.outcome.reason) == (Status.REFUSED, f"http_{status}")


async def test_an_error_status_is_an_error_with_the_servers_words() -> None:
    result = await ask(answer(500, b"out of memory"))
    assert (result.status, result.error, result.detail) == (500, ErrorKind.HTTP_STATUS, "out of memory")


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (stream(event("a"), b'data: {"error": {"message": "boom"}}\n\n', DONE), ErrorKind.STREAM_ERROR),
        (stream(event("a")), ErrorKind.INCOMPLETE),
        (stream(b"data: {nonsense\n\n", DONE), ErrorKind.MALFORMED),
        (stream(b"data: " + b"x" * (1 << 21)), ErrorKind.MALFORMED),
        (answer(200, b"[1, 2]"), ErrorKind.INCOMPLETE),
    ],
    ids=["error event", "no end", "not JSON", "endless event", "not a stream"],
)
async def test_a_broken_stream_under_status_200_is_an_error(script: Script, kind: ErrorKind) -> None:
    result = await ask(script)
    assert (result.status, result.error, result.outcome.status) == (200, kind, Status.ERROR)


async def test_a_connection_cut_in_the_middle_is_lost_and_keeps_what_was_seen() -> None:
    async def play(_: Received, writer: asyncio.StreamWriter) -> None:
        part = event("a")
        writer.write(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(part), part))

    result = await ask(play)
    assert (result.error, result.output_tokens, result.text) == (ErrorKind.LOST, 1, "a")


async def test_a_connection_cut_before_the_head_is_lost_and_never_sent_again() -> None:
    async def play(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with serve(play) as server, LoadClient(server.url) as client:
        result = await client.send(HELLO)
    assert (result.error, result.status, len(server.received)) == (ErrorKind.LOST, None, 1)


async def test_bytes_that_are_not_http_are_malformed() -> None:
    async def play(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

    result = await ask(play)
    assert (result.error, result.status) == (ErrorKind.MALFORMED, None)


async def test_a_port_where_nobody_listens_is_a_connect_error() -> None:
    async with serve(answer(200, b"")) as server:
        url = server.url
    async with LoadClient(url) as client:
        assert (await client.send(HELLO)).error is ErrorKind.CONNECT


async def test_a_body_slower_than_the_limit_is_a_timeout() -> None:
    async def play(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + CLOSE + event("a"))
        await asyncio.Event().wait()

    result = await ask(play, timeout_s=0.3)
    assert (result.error, result.output_tokens) == (ErrorKind.TIMEOUT, 1)


async def test_the_body_asks_for_usage_and_carries_extra_members_and_headers() -> None:
    request = chat_request("hi", model="m", max_tokens=3, headers=(("x-slo-ttft-ms", "500"),), ignore_eos=True)
    async with serve(stream(DONE)) as server, LoadClient(server.url + "/") as client:
        await client.send(request)
    received = server.received[0]
    assert received.path == "/v1/chat/completions"
    assert received.headers["x-slo-ttft-ms"] == "500"
    assert received.body["max_tokens"] == 3
    assert received.body["ignore_eos"] is True
    assert received.body["stream_options"] == {"include_usage": True}


async def test_a_run_sends_on_time_without_waiting_for_answers() -> None:
    everybody = asyncio.Barrier(3)

    async def play(_: Received, writer: asyncio.StreamWriter) -> None:
        await everybody.wait()
        writer.write(STREAM_HEAD + CLOSE + event("a") + DONE)

    async with serve(play) as server, LoadClient(server.url, timeout_s=5.0) as client:
        results = await client.run([chat_request("hi", model="m", due_s=due_s) for due_s in (0.0, 0.01, 0.03)])
    assert [result.error for result in results] == [None] * 3
    assert all(result.sent_at >= result.scheduled_at for result in results)
    assert results[2].scheduled_at - results[0].scheduled_at == pytest.approx(0.03)


async def test_a_client_at_its_bound_is_late_and_counts_the_delay_in_the_latency() -> None:
    async def play(_: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.02)
        writer.write(STREAM_HEAD + CLOSE + event("a") + DONE)

    async with serve(play) as server, LoadClient(server.url, max_in_flight=1) as client:
        first, second = await client.run([HELLO, HELLO])
    assert second.sent_at >= first.ended_at
    assert second.lag_s >= 0.02
    assert second.outcome.ttft_s is not None
    assert second.outcome.ttft_s >= 0.04


async def test_cancelling_a_run_closes_its_connections_and_keeps_what_had_ended() -> None:
    is_slow_begun, is_slow_cut = asyncio.Event(), asyncio.Event()

    async def play(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + CLOSE + event("a"))
        if received.body["model"] == "quick":
            writer.write(DONE)
            return
        is_slow_begun.set()
        try:
            while True:
                writer.write(event("b"))
                await writer.drain()
                await asyncio.sleep(0)
        finally:
            is_slow_cut.set()

    ended: list[ClientResult] = []
    async with serve(play) as server, LoadClient(server.url, max_in_flight=1) as client:
        requests = [chat_request("hi", model=model) for model in ("quick", "slow", "never")]
        run = asyncio.create_task(client.run(requests, ended.append))
        await is_slow_begun.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        await asyncio.wait_for(is_slow_cut.wait(), 5.0)
        assert [received.body["model"] for received in server.received] == ["quick", "slow"]
        assert (await client.send(requests[0])).text == "a"
    assert [result.text for result in ended] == ["a"]


async def test_a_run_makes_its_requests_only_a_bounded_number_ahead() -> None:
    made: list[int] = []

    def requests() -> Iterator[ClientRequest]:
        for number in count():
            made.append(number)
            yield chat_request("hi", model="m", due_s=3600.0 if number else 0.0)

    def cancel() -> None:
        run.cancel()

    async with serve(stream(DONE)) as server, LoadClient(server.url) as client:
        run = asyncio.create_task(client.run(requests(), lambda _: cancel()))
        with pytest.raises(asyncio.CancelledError):
            await run
    assert AHEAD_COUNT <= len(made) <= AHEAD_COUNT + 1
