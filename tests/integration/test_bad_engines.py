"""Engines that answer anything but what they should: clients get a typed error within its time, never a traceback."""

from __future__ import annotations

import asyncio

import pytest

from gateway.config import AdmissionSettings, EngineClientSettings
from tests.integration.harness import CHAT, Site, Start, chat_body, events
from tests.integration.scripted_engine import (
    CHUNKED,
    DONE,
    STREAM_HEAD,
    UNTIL_CLOSE,
    ScriptedEngine,
    chunk,
    says,
    serving,
    silence,
    text_answer,
    token,
    whole,
)
from tests.polling import until

HASTY = EngineClientSettings(
    connect_timeout_s=0.4,
    first_event_timeout_s=0.4,
    answer_timeout_s=0.8,
    idle_timeout_s=0.4,
    max_response_bytes=2**20,
)
ONCE = AdmissionSettings(max_attempts=1)


@pytest.fixture
async def engine():
    async with serving() as engine:
        yield engine


@pytest.fixture
async def site(start: Start, engine: ScriptedEngine) -> Site:
    """A gateway in a hurry in front of the one engine, which it asks only once."""
    site = await start("", engines=[engine.settings("b0")], engine_client=HASTY, admission=ONCE, is_awaited=False)
    await engine.is_up(site)
    return site


async def drip(received, writer):
    """A head that never ends."""
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x-more: yes\r\n")
        await writer.drain()
        await asyncio.sleep(0.005)


async def flood_of_headers(received, writer):
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x-more: yes\r\n" * 1000)
        await writer.drain()


async def flood_of_body(received, writer):
    writer.write(CHUNKED.replace(b"text/event-stream", b"application/json"))
    while True:
        writer.write(chunk(b"[" * 10_000))
        await writer.drain()


async def flood_without_events(received, writer):
    writer.write(CHUNKED)
    while True:
        writer.write(chunk(b": nothing\n" * 1000))
        await writer.drain()


async def flood_of_one_event(received, writer):
    writer.write(CHUNKED + chunk(b"data: "))
    while True:
        writer.write(chunk(b"x" * 10_000))
        await writer.drain()


async def only_comments(received, writer):
    writer.write(CHUNKED)
    while True:
        writer.write(chunk(b": keep-alive\n\n"))
        await writer.drain()
        await asyncio.sleep(0.005)


GARBAGE = {
    "nonsense": says(b"\x00\x01 not HTTP at all\r\n\r\n", closes=True),
    "ssh": says(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "hangs up": says(closes=True),
    "half a head": says(b"HTTP/1.1 200 OK\r\ncontent-ty", closes=True),
    "short body": says(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{}", closes=True),
    "not JSON": says(whole(b"<html>busy</html>")),
    "no body": says(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "bad chunk": says(CHUNKED, b"zz\r\nnot hex\r\n"),
    "redirect": says(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"),
    "upgrade": says(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\nPRI"),
    "bad event": says(CHUNKED, chunk(b"data: {nonsense\n\n")),
    "no event": says(CHUNKED, chunk(b": hello\n\n"), b"0\r\n\r\n"),
    "500": says(whole(b'{"error": {"message": "secret path /root/x.py"}}', status=500)),
    "401": says(whole(b'{"error": "Unauthorized"}', status=401)),
    "error event": says(CHUNKED, chunk(b'data: {"error": {"message": "oops", "code": 500}}\n\n'), chunk(DONE)),
    "endless head": flood_of_headers,
    "endless body": flood_of_body,
}


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_becomes_a_typed_502(site, engine, name, is_stream):
    engine.script = GARBAGE[name]
    status, body, response = await site.post(CHAT, chat_body(stream=is_stream))
    assert status == 502, body
    assert body["error"]["type"] == "engine_error"
    assert "secret" not in str(body)
    assert response.headers["x-sluice-reason"] == "too_many_attempts"
    await until(lambda: engine.closed >= engine.connections - 1)


@pytest.mark.parametrize("flood", [flood_without_events, flood_of_one_event])
async def test_an_endless_stream_without_an_event_ends_at_the_bound_or_the_time_limit(site, engine, flood):
    engine.script = flood
    status, _, _ = await site.post(CHAT, chat_body(stream=True))
    assert status in (502, 504)
    await until(lambda: engine.closed == engine.connections)


SILENCE = {
    "nothing": silence,
    "dripping head": drip,
    "head only": says(CHUNKED),
    "comments": only_comments,
    "role only": says(CHUNKED, chunk(token(role="assistant", content=""))),
}


@pytest.mark.parametrize("name", SILENCE)
async def test_an_engine_that_accepts_and_never_answers_becomes_a_typed_504_in_time(site, engine, name):
    engine.script = SILENCE[name]
    async with asyncio.timeout(2):
        status, body, _ = await site.post(CHAT, chat_body(stream=True))
    assert (status, body["error"]["type"]) == (504, "engine_timeout")
    await until(lambda: engine.closed == engine.connections)


async def test_a_whole_answer_may_take_longer_than_a_first_event_but_not_for_ever(site, engine):
    async def slowly(received, writer):
        await asyncio.sleep(0.5)
        writer.write(whole(text_answer()))

    engine.script = slowly
    assert (await site.post(CHAT, chat_body()))[0] == 200
    engine.script = silence
    assert (await site.post(CHAT, chat_body()))[0] == 504


async def test_an_engine_that_takes_no_connection_is_tried_once_and_then_known_to_be_down(site, engine):
    engine.server.close()
    await engine.server.wait_closed()
    status, body, _ = await site.post(CHAT, chat_body())
    assert (status, body["error"]["type"]) in [(502, "engine_error"), (503, "service_unavailable_error")]
    assert not site.is_up("b0")


# ---- after the first byte --------------------------------------------------------------------------------------------


async def garbage_later(received, writer):
    writer.write(CHUNKED + chunk(token("one")))
    await asyncio.sleep(0.03)  # else both are one read, and the gateway has committed nothing yet
    writer.write(b"zz\r\n")


BREAKS = {
    "hangs up": says(CHUNKED, chunk(token("one")), closes=True),
    "hangs up in an event": says(CHUNKED, chunk(token("one")), chunk(b'data: {"choi'), closes=True),
    "ends in an event": says(CHUNKED, chunk(token("one")), chunk(b'data: {"choi'), b"0\r\n\r\n"),
    "ends without [DONE]": says(CHUNKED, chunk(token("one")), b"0\r\n\r\n"),
    "ends by closing without [DONE]": says(UNTIL_CLOSE, token("one"), closes=True),
    "garbage": garbage_later,
    "stops": says(CHUNKED, chunk(token("one"))),
    "stops in an event": says(CHUNKED, chunk(token("one")), chunk(b'data: {"choi')),
    "short": says(STREAM_HEAD, b"content-length: 10000\r\n\r\n", token("one"), closes=True),
}


@pytest.mark.parametrize("name", BREAKS)
async def test_a_stream_that_breaks_ends_with_one_error_event_and_never_looks_complete(site, engine, name):
    engine.script = BREAKS[name]
    status, body, _ = await site.post(CHAT, chat_body(stream=True))
    assert status == 200
    first, last = events(body)
    assert "one" in first
    assert '"error"' in last
    assert "engine_error" in last


async def test_an_event_over_the_bound_ends_the_stream_with_an_error(site, engine):
    engine.script = says(CHUNKED, chunk(token("one")), *[chunk(b"x" * 2**20)] * 6)
    _, body, _ = await site.post(CHAT, chat_body(stream=True))
    assert '"error"' in events(body)[-1]


@pytest.mark.parametrize(
    "script",
    [
        says(CHUNKED, chunk(token("one")), chunk(DONE), closes=True),
        says(CHUNKED, chunk(token("one")), chunk(DONE)),
    ],
    ids=["hangs up", "stays"],
)
async def test_a_stream_that_said_done_is_complete_however_its_connection_ends(site, engine, script):
    engine.script = script
    _, body, _ = await site.post(CHAT, chat_body(stream=True))
    assert events(body) == events(token("one") + DONE)


EVENTS = token("one"), token("two"), DONE
WHOLE = b"".join(EVENTS)


@pytest.mark.parametrize(
    "stream",
    [
        [UNTIL_CLOSE, *EVENTS],
        [CHUNKED, chunk(WHOLE[:200]), chunk(WHOLE[200:-9]), chunk(WHOLE[-9:]), b"0\r\n\r\n"],
        [CHUNKED, *(chunk(bytes([byte])) for byte in WHOLE), b"0\r\n\r\n"],
        [STREAM_HEAD, b"content-length: %d\r\n\r\n" % len(WHOLE), *EVENTS],
        [b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", UNTIL_CLOSE, *EVENTS],
    ],
    ids=["until close", "cut", "bytes", "length", "interim"],
)
async def test_every_framing_gives_the_same_bytes(site, engine, stream):
    engine.script = says(*stream, closes=stream[-1] == DONE)
    _, body, _ = await site.post(CHAT, chat_body(stream=True))
    assert body.encode() == WHOLE


async def test_an_unasked_second_answer_never_becomes_the_answer_of_the_next_request(site, engine):
    engine.script = says(whole(text_answer("mine")), whole(text_answer("stolen")))
    for _ in range(5):
        _, body, _ = await site.post(CHAT, chat_body())
        assert body["choices"][0]["message"]["content"] == "mine"
