"""What clients may do wrong, or on purpose: each gets one clear answer, and no engine is bothered."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from gateway.config import ServerSettings
from tests.integration.harness import CHAT, COMPLETIONS, MODEL, RawClient, Site, a_post, chat_body, head_and_body, words

SMALL = ServerSettings(port=0, max_body_bytes=4096, max_header_bytes=2048, body_timeout_s=0.2, shutdown_grace_s=0.5)

WRONG_BODIES = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b'{"model": "emulated", "messages": [', "not valid JSON"),
    (b"[]", "must be a JSON object"),
    (b"\xff\xfe{}", "not valid"),
    (b"[" * 100_000, "not valid JSON|nested too deep"),
    (b'{"messages": [{"role": "user", "content": "x"}]}', "model"),
    (b'{"model": 7, "messages": []}', "model"),
    (b'{"model": "", "messages": [{"role": "user", "content": "x"}]}', "`model` must not be empty"),
    (b'{"model": "emulated"}', "messages"),
    (b'{"model": "emulated", "messages": []}', "messages"),
    (b'{"model": "emulated", "messages": "hi"}', "messages"),
    (b'{"model": "emulated", "messages": [{"role": "user", "content": "x"}], "max_tokens": "9"}', "max_tokens"),
    (b'{"model": "emulated", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', "max_tokens"),
    (b'{"model": "emulated", "messages": [{"role": "user", "content": "x"}], "n": 0}', "n"),
    (b'{"model": "emulated", "messages": [{"role": "user", "content": "x"}], "stream": "yes"}', "stream"),
]


@pytest.mark.parametrize(("raw", "said"), WRONG_BODIES, ids=range(len(WRONG_BODIES)))
async def test_a_wrong_body_is_refused_with_what_is_wrong(pair, raw, said):
    status, body, _ = await pair.post(CHAT, data=raw)
    assert status == 400
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
    assert any(part in json.dumps(body["error"]) for part in said.split("|"))
    assert pair["p0"].engine.counters.prompt_tokens == 0


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], None, ["a", 1], [1, "a"], [1, [2]], [-1], {"a": 1}, [None]])
async def test_a_wrong_prompt_is_refused(pair, prompt):
    status, body, _ = await pair.post(COMPLETIONS, {"model": MODEL, "prompt": prompt})
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")


async def test_an_unknown_model_is_404_with_the_models_there_are(pair):
    status, body, response = await pair.post(CHAT, chat_body(model="gpt-5"))
    assert (status, body["error"]["code"]) == (404, "unknown_model")
    assert MODEL in body["error"]["message"]
    assert response.headers["x-sluice-reason"] == "unknown_model"


async def test_a_prompt_longer_than_the_model_takes_is_refused(start):
    site = await start("pd", engine={"max_model_tokens": 256})
    status, body, _ = await site.post(CHAT, chat_body(words(2000)))
    assert status == 400
    assert "256" in body["error"]["message"]


async def test_token_ids_longer_than_the_model_takes_are_refused_here(start):
    site = await start("pd", engine={"max_model_tokens": 256})
    status, body, _ = await site.post(COMPLETIONS, {"model": MODEL, "prompt": [70] * 300})
    assert (status, body["error"]["code"]) == (400, "prompt_too_long")
    assert site["p0"].engine.counters.prompt_tokens == 0


# ---- what must not reach an engine -----------------------------------------------------------------------------------


async def test_routing_internal_fields_and_headers_never_reach_an_engine(start):
    from tests.integration.scripted_engine import serving

    async with serving() as engine:
        site = await start("", engines=[engine.settings("b0")], is_awaited=False)
        await engine.is_up(site)
        params = {"do_remote_prefill": True, "remote_engine_id": "x", "remote_block_ids": [1]}
        body = chat_body(
            kv_transfer_params=params,
            ec_transfer_params=params,
            bootstrap_host="evil",
            bootstrap_room=7,
            routed_dp_rank=3,
            data_parallel_rank=3,
            disagg_prefill_dp_rank=1,
            mm_hashes=["x"],
            request_id="a,b",
            rid="r",
            vllm_xargs={"kv_transfer_params": params, "kept": 1},
        )
        headers = {
            "X-Data-Parallel-Rank": "3",
            "X-Vllm-Priority": "-9",
            "X-Request-Id": "mine,yours",
            "Connection": "keep-alive, X-Hop",
            "X-Hop": "1",
            "TE": "trailers",
            "X-Kept": "yes",
        }
        status, _, response = await site.post(CHAT, body, headers=headers)
        assert status == 200
        (seen,) = [received for received in engine.received if received.path == CHAT]
    assert seen.body == chat_body(vllm_xargs={"kept": 1})
    assert seen.headers["x-kept"] == "yes"
    assert not {"x-data-parallel-rank", "x-vllm-priority", "x-hop", "te"} & seen.headers.keys()
    assert "," not in seen.headers["x-request-id"] == response.headers["x-request-id"]


async def test_a_sound_request_id_is_echoed_and_another_is_replaced(pair):
    for sent, is_kept in (("abc-1:2", True), ("a,b", False), ("x" * 200, False)):
        _, _, response = await pair.post(CHAT, chat_body(), headers={"x-request-id": sent})
        assert (response.headers["x-request-id"] == sent) is is_kept
        assert response.headers["x-request-id"]


# ---- sizes and time --------------------------------------------------------------------------------------------------


async def test_a_body_announced_too_large_is_refused_before_a_byte_of_it_came(start):
    site = await start("b", server=SMALL)
    async with await RawClient.to(site) as client:
        client.send(b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ncontent-length: 100000000\r\n\r\n")
        status, headers, body = await client.read_answer()
    assert (status, headers["connection"]) == (413, "close")
    assert "100000000 bytes" in json.loads(body)["error"]["message"]


async def test_a_chunked_body_is_read_to_the_limit_and_no_further(start):
    site = await start("b", server=SMALL)
    async with await RawClient.to(site) as client:
        client.send(b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n")
        client.send(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        client.send(b"1\r\ny\r\n")
        status, _, body = await client.read_answer()
    assert status == 413
    assert "more than the 4096 bytes" in json.loads(body)["error"]["message"]


async def test_a_compressed_body_is_measured_as_it_unfolds(start):
    site = await start("b", server=SMALL)
    bomb = gzip.compress(b'{"a": "' + b"x" * 10_000_000 + b'"}')
    status, body, _ = await site.post(CHAT, data=bomb[:4000], headers={"content-encoding": "gzip"})
    assert status in (400, 413), body


async def test_a_small_compressed_body_is_understood(pair):
    raw = gzip.compress(json.dumps(chat_body()).encode())
    status, _, _ = await pair.post(CHAT, data=raw, headers={"content-encoding": "gzip"})
    assert status == 200


async def test_a_body_that_claims_a_compression_it_has_not_is_a_bad_request(pair):
    status, body, _ = await pair.post(CHAT, data=b"{}" * 50, headers={"content-encoding": "gzip"})
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")


async def test_a_body_that_stalls_is_answered_408(start):
    site = await start("b", server=SMALL)
    async with await RawClient.to(site) as client:
        client.send(b'POST /v1/completions HTTP/1.1\r\nhost: g\r\ncontent-length: 100\r\n\r\n{"model"')
        status, _, body = await client.read_answer()
    assert (status, json.loads(body)["error"]["code"]) == (408, 408)


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing(pair):
    async with await RawClient.to(pair) as client:
        client.send(b'POST /v1/completions HTTP/1.1\r\nhost: g\r\ncontent-length: 100\r\n\r\n{"model"')
        await asyncio.sleep(0)
    await pair.assert_clean()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\nhost: g\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: g\r\nx-bomb: " + b"x" * 10_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: g\r\n" + b"".join(b"x-%d: y\r\n" % n for n in range(5000)) + b"\r\n",
        b"GET /health HTTP/1.1\r\nhost: g\r\n" + b"x" * 10_000,
    ],
    ids=["line", "header", "headers", "endless"],
)
async def test_a_header_bomb_is_refused_in_our_error_shape(start, request_bytes):
    site = await start("b", server=SMALL)
    async with await RawClient.to(site) as client:
        client.send(request_bytes)
        status, headers, body = head_and_body(await client.read_all())
    assert status == 400
    assert headers["server"] == "sluice"
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300


# ---- HTTP itself -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\nabc",
        b"GET /health HTTP/1.1\r\nhost: g\r\nbad header: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: g\r\nx-a: b\x00c\r\n\r\n",
    ],
    ids=["words", "tls", "version", "length", "smuggled", "header", "nul"],
)
async def test_what_is_not_http_is_answered_in_our_error_shape_and_closed(pair, request_bytes):
    async with await RawClient.to(pair) as client:
        client.send(request_bytes)
        status, headers, body = head_and_body(await client.read_all())
    assert status == 400
    assert headers["content-type"].startswith("application/json")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_a_broken_chunk_is_a_bad_request(pair):
    async with await RawClient.to(pair) as client:
        client.send(b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nabc\r\n")
        status, _, body = head_and_body(await client.read_all())
    assert (status, json.loads(body)["error"]["type"]) == (400, "invalid_request_error")


async def test_a_client_that_waits_for_100_continue_gets_it_and_its_answer(pair):
    raw = json.dumps(chat_body()).encode()
    async with await RawClient.to(pair) as client:
        client.send(f"POST {CHAT} HTTP/1.1\r\nhost: g\r\nexpect: 100-continue\r\n".encode())
        client.send(f"content-length: {len(raw)}\r\nconnection: close\r\n\r\n".encode())
        assert await client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(raw)
        status, _, body = head_and_body(await client.read_all())
    assert status == 200
    assert json.loads(body)["choices"]


async def test_a_client_that_waits_for_100_continue_with_too_much_gets_413_instead(start):
    site = await start("b", server=SMALL)
    async with await RawClient.to(site) as client:
        client.send(f"POST {CHAT} HTTP/1.1\r\nhost: g\r\nexpect: 100-continue\r\ncontent-length: 9999\r\n\r\n".encode())
        assert (await client.read_answer())[0] == 413


@pytest.mark.parametrize("is_stream", [False, True])
async def test_http_1_0_is_served_without_chunks_and_closed(pair, is_stream):
    async with await RawClient.to(pair) as client:
        client.send(a_post(chat_body(stream=is_stream), version="1.0"))
        status, headers, body = head_and_body(await client.read_all())
    assert status == 200
    assert "transfer-encoding" not in headers
    assert body.endswith(b"data: [DONE]\n\n") if is_stream else json.loads(body)["choices"]


async def test_pipelined_requests_are_answered_in_order(pair):
    requests = [a_post(chat_body(max_tokens=n), headers=f"x-request-id: r{n}\r\n") for n in (12, 1, 6)]
    async with await RawClient.to(pair) as client:
        client.send(b"".join(requests) + b"GET /health HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n")
        raw = await client.read_all()
    assert [part.split(b"\r\n")[0] for part in raw.split(b"x-request-id: ")[1:4]] == [b"r12", b"r1", b"r6"]
    assert raw.count(b"HTTP/1.1 200 OK") == 4
    assert raw.endswith(b'{"status":"ok"}')


async def test_a_request_to_upgrade_is_answered_as_if_it_had_not_been_made(pair):
    upgrade = "connection: Upgrade, HTTP2-Settings, close\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
    async with await RawClient.to(pair) as client:
        client.send(a_post(chat_body(), headers=upgrade))
        status, _, body = head_and_body(await client.read_all())
    assert status == 200, body


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("PUT", CHAT, 405),
        ("GET", "/", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/metrics/../health", 404),
        ("OPTIONS", "*", 404),
        ("HEAD", "/health", 200),
    ],
)
async def test_other_methods_and_paths(pair, method, path, status):
    async with await RawClient.to(pair) as client:
        client.send(f"{method} {path} HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n".encode())
        answered, headers, body = head_and_body(await client.read_all())
    assert answered == status
    assert headers["x-request-id"]
    assert status == 200 or json.loads(body)["error"]["code"] == status
    assert headers.get("allow") == ({CHAT: "POST"}.get(path, "GET") if status == 405 else None)


async def test_no_answer_says_what_the_gateway_is_made_of(pair: Site):
    for _, _, response in (
        await pair.get("/health"),
        await pair.post(CHAT, chat_body()),
        await pair.post(CHAT, chat_body(stream=True)),
        await pair.post(CHAT, chat_body(model="nope")),
        await pair.get("/nothing"),
    ):
        assert response.headers["server"] == "sluice"
