"""Ways to make two HTTP programs disagree on where a message ends: here each has one meaning, or none and an end.

What follows a trick on the same connection must never be answered as a request of its own, nor reach an engine.
"""

from __future__ import annotations

import asyncio
import io
import json
import re

import pytest

from gateway.config import AdmissionSettings, EngineClientSettings, ServerSettings
from tests.integration.harness import CHAT, RawClient, Site, a_post, chat_body, head_and_body
from tests.integration.scripted_engine import DONE, STREAM_HEAD, chunk, says, serving, text_answer, token, whole
from tests.polling import until

BODY = json.dumps(chat_body()).encode()
SIZE = len(BODY)
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\n"
NEXT = b"GET /health HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n"
"""What an attacker would have answered in another's place."""


def with_length(fields: bytes) -> bytes:
    """A request with these header lines and a body that is sent as it is."""
    return POST + fields + b"\r\n\r\n" + BODY


def chunked(body: bytes, fields: bytes = b"transfer-encoding: chunked") -> bytes:
    """A request with these header lines and a body of chunks."""
    return POST + fields + b"\r\n\r\n" + body


ONE_CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)
LENGTH = b"content-length: %d" % SIZE

TRICKS = {
    "length and chunks": chunked(ONE_CHUNK, LENGTH + b"\r\ntransfer-encoding: chunked"),
    "chunks and length": chunked(ONE_CHUNK, b"transfer-encoding: chunked\r\ncontent-length: 4"),
    "two lengths": with_length(LENGTH + b"\r\ncontent-length: %d" % (SIZE + len(NEXT))),
    "one length twice": with_length(LENGTH + b"\r\n" + LENGTH),
    "lengths in a list": with_length(LENGTH + b", %d" % SIZE),
    "length with a sign": with_length(b"content-length: +%d" % SIZE),
    "negative length": with_length(b"content-length: -1"),
    "length in hex": with_length(b"content-length: 0x%x" % SIZE),
    "space before the colon": with_length(b"content-length : %d" % SIZE),
    "no length": with_length(b"content-length: "),
    "length beyond 64 bits": with_length(b"content-length: 99999999999999999999999"),
    "identity": with_length(b"transfer-encoding: identity\r\n" + LENGTH),
    "nearly chunked": chunked(ONE_CHUNK, b"transfer-encoding: xchunked"),
    "chunked, but not last": chunked(ONE_CHUNK, b"transfer-encoding: chunked, identity"),
    "two encodings": chunked(ONE_CHUNK, b"transfer-encoding: chunked\r\ntransfer-encoding: identity"),
    "vertical tab": chunked(ONE_CHUNK, b"transfer-encoding: \x0bchunked"),
    "chunks in HTTP/1.0": chunked(ONE_CHUNK).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "negative chunk": chunked(b"-5\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk with 0x": chunked(b"0x" + ONE_CHUNK),
    "chunk too long": chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (SIZE + 5, BODY)),
    "chunk too short": chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (SIZE - 5, BODY)),
    "chunk beyond 64 bits": chunked(b"fffffffffffffffff\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size ended by LF": chunked(b"%x\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "chunk ended by LF": chunked(b"%x\r\n%b\n0\r\n\r\n" % (SIZE, BODY)),
    "LF in an extension": chunked(b"%x;a\nb\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "space behind a chunk size": chunked(b"%x \r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "a length in the trailers": chunked(b"%x\r\n%b\r\n0\r\ncontent-length: 5\r\n\r\n" % (SIZE, BODY)),
    "LF for every line": with_length(LENGTH).replace(b"\r\n", b"\n"),
    "LF for one line": with_length(b"x: y\n" + LENGTH),
    "CR within a value": with_length(b"x: y\rcontent-length: 3\r\n" + LENGTH),
    "folded line": with_length(b"x: y\r\n content-length: 3\r\n" + LENGTH),
    "folded encoding": chunked(ONE_CHUNK, b"transfer-encoding:\r\n chunked"),
    "NUL in a name": with_length(b"x\x00: y\r\n" + LENGTH),
    "two hosts": with_length(b"host: h\r\n" + LENGTH),
    "no host": with_length(LENGTH).replace(b"host: g\r\n", b""),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


def statuses(raw: bytes) -> list[int]:
    """Of all answers in these bytes."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] ([0-9]{3}) ", raw)]


@pytest.mark.parametrize("name", TRICKS)
async def test_a_request_of_doubtful_length_is_refused_and_nothing_behind_it_is_read(pair: Site, name):
    async with await RawClient.to(pair) as client:
        client.send(TRICKS[name] + NEXT)
        raw = await client.read_all()
    assert statuses(raw) == [400]
    assert json.loads(head_and_body(raw)[2])["error"]["type"] == "invalid_request_error"
    assert pair["p0"].engine.counters.prompt_tokens == 0


SOUND = {
    "an extension": (chunked(b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)), 200),
    "empty lines before": (b"\r\n\r\n" + with_length(LENGTH), 200),
    "absolute form": (with_length(LENGTH).replace(b" /v1", b" http://other/v1"), 200),
    "a request within a request": (
        b"GET /health HTTP/1.1\r\nhost: g\r\ncontent-length: %d\r\n\r\n" % len(NEXT) + NEXT,
        200,
    ),
    "CONNECT": (b"CONNECT other:80 HTTP/1.1\r\nhost: other:80\r\n\r\n", 404),
    "TRACE": (b"TRACE /health HTTP/1.1\r\nhost: g\r\n\r\n", 405),
    "WebSocket": (
        b"GET /v1/chat/completions HTTP/1.1\r\nhost: g\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n",
        405,
    ),
}


@pytest.mark.parametrize("name", SOUND)
async def test_what_is_odd_but_plain_is_one_request_and_the_next_is_the_next(pair: Site, name):
    request, status = SOUND[name]
    async with await RawClient.to(pair) as client:
        client.send(request + NEXT)
        raw = await client.read_all()
    assert statuses(raw) == [status, 200]
    assert raw.endswith(b'{"status":"ok"}')


# ---- sizes and paces -------------------------------------------------------------------------------------------------

MOST_BYTES = 64 * 2**20


@pytest.mark.slow
async def test_a_body_of_64_megabytes_is_taken_whole(start):
    async with serving() as engine:
        site = await start("", engines=[engine.settings("b0")], is_awaited=False)
        await engine.is_up(site)
        small = json.dumps(chat_body("")).encode()
        filler = b"x" * (MOST_BYTES - len(small))
        status, body, _ = await site.post(
            CHAT, data=io.BytesIO(small.replace(b'"content": ""', b'"content": "%b"' % filler))
        )
        assert (status, body["choices"][0]["message"]["content"]) == (200, "word")
        (seen,) = [each for each in engine.received if each.path == CHAT]
        assert len(seen.body["messages"][0]["content"]) == len(filler)


async def test_a_request_in_pieces_of_one_byte_is_the_same_request(pair: Site):
    async with await RawClient.to(pair) as client:
        for byte in a_post(chat_body(), headers="connection: close\r\n"):
            client.send(bytes([byte]))
            await asyncio.sleep(0)
        assert statuses(await client.read_all()) == [200]


@pytest.mark.parametrize("is_second", [False, True], ids=["first request", "second request"])
async def test_a_head_that_never_ends_is_answered_408_in_time_however_busily_it_grows(start, is_second):
    site = await start("b", server=ServerSettings(port=0, header_timeout_s=0.2, shutdown_grace_s=0.5))
    async with await RawClient.to(site) as client:
        if is_second:
            client.send(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")
            assert (await client.read_answer())[0] == 200
        client.send(b"GET /health HTTP/1.1\r\nhost: g\r\n")
        answer = asyncio.create_task(client.read_all())
        while not answer.done():
            client.send(b"x: y\r\n")
            await asyncio.wait([answer], timeout=0.01)
        status, headers, body = head_and_body(await answer)
    assert (status, headers["connection"]) == (408, "close")
    assert "longer than 0.2 s" in json.loads(body)["error"]["message"]
    await until(lambda: site.gateway.server.open_count == 0)


async def test_a_request_that_takes_longer_than_a_head_may_is_served(start):
    site = await start("b", server=ServerSettings(port=0, header_timeout_s=0.1, shutdown_grace_s=0.5))
    site["b0"].freeze()
    asked = asyncio.create_task(site.ask())
    await asyncio.wait([asked], timeout=0.3)
    site["b0"].thaw()
    assert (await asked).error is None


# ---- engines ---------------------------------------------------------------------------------------------------------

STOLEN = whole(text_answer("stolen"))
ANSWER = text_answer("mine")
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"

ENGINE_TRICKS = {
    "length and chunks": HEAD
    + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n"
    + chunk(ANSWER)
    + b"0\r\n\r\n",
    "two lengths": HEAD + b"content-length: %d\r\ncontent-length: 5\r\n\r\n" % len(ANSWER) + ANSWER,
    "length with a sign": HEAD + b"content-length: +%d\r\n\r\n" % len(ANSWER) + ANSWER,
    "length beyond 64 bits": HEAD + b"content-length: 99999999999999999999999\r\n\r\n" + ANSWER,
    "bad chunk size": HEAD + b"transfer-encoding: chunked\r\n\r\n0x" + chunk(ANSWER) + b"0\r\n\r\n",
    "chunk beyond 64 bits": HEAD + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + ANSWER,
    "chunk ended by LF": HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk(ANSWER).replace(b"\r\n", b"\n"),
    "folded line": HEAD + b"x: y\r\n content-length: 3\r\ncontent-length: %d\r\n\r\n" % len(ANSWER) + ANSWER,
    "LF for every line": (HEAD + b"content-length: %d\r\n\r\n" % len(ANSWER)).replace(b"\r\n", b"\n") + ANSWER,
    "NUL in a name": HEAD + b"x\x00: y\r\ncontent-length: %d\r\n\r\n" % len(ANSWER) + ANSWER,
    "answer behind the answer": whole(ANSWER),
    "short length": HEAD + b"content-length: %d\r\n\r\n" % (len(ANSWER) - 1) + ANSWER,
}


@pytest.mark.parametrize("name", ENGINE_TRICKS)
async def test_an_answer_of_doubtful_length_never_leaves_anything_for_the_next_request(start, name):
    async with serving(says(ENGINE_TRICKS[name], STOLEN)) as engine:
        once, hasty = AdmissionSettings(max_attempts=1), EngineClientSettings(answer_timeout_s=1.0)
        settings = {"admission": once, "engine_client": hasty, "is_awaited": False}
        site = await start("", engines=[engine.settings("b0")], **settings)
        await engine.is_up(site)
        for number in range(3):
            status, body, _ = await site.post(CHAT, chat_body())
            assert status == 502 or body["choices"][0]["message"]["content"] == "mine", (number, body)
        assert engine.connections == 3  # none was used again


async def test_a_stream_of_doubtful_length_ends_where_it_is_told_and_its_connection_with_it(start):
    fields = STREAM_HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"
    stream = fields + chunk(token("one") + DONE) + b"0\r\n\r\n"
    async with serving(says(stream, STOLEN)) as engine:
        site = await start(
            "", engines=[engine.settings("b0")], admission=AdmissionSettings(max_attempts=1), is_awaited=False
        )
        await engine.is_up(site)
        status, body, _ = await site.post(CHAT, chat_body(stream=True))
        assert status == 502 or body == (token("one") + DONE).decode()
        assert "stolen" not in str(body)
