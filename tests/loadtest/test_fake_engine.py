"""The emulated vLLM over real HTTP and ZMQ: shapes, errors, hand-off, KV events, and each way to misbehave."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq
import zmq.asyncio

from loadtest import tokenizer
from loadtest.engine_types import EngineSettings, LoadFailure
from loadtest.fake_engine import FakeCluster, FakeEngine, FakeSettings
from loadtest.kv_publisher import KvEventSettings

PROMPT = "The sluice keeper counts the boats that wait below the gate. " * 3
ASK: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 6, "ignore_eos": True}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3, "ignore_eos": True}
PREFILL_LEG = {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}
FIRST_HEAD = ["id", "object", "created", "model", "choices"]


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster(speed=100) as cluster:
        yield cluster


@pytest.fixture
async def fake(cluster: FakeCluster) -> FakeEngine:
    return await cluster.start()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        yield session


async def post(http: aiohttp.ClientSession, fake: FakeEngine, body: object, path: str = "/v1/completions") -> Any:
    async with http.post(fake.url + path, json=body) as response:
        return response.status, await response.json()


async def events(http: aiohttp.ClientSession, fake: FakeEngine, body: dict[str, Any], path: str) -> list[Any]:
    """The decoded events of a stream, the `[DONE]` included as text."""
    async with http.post(fake.url + path, json=body | {"stream": True}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        parts = (await response.text()).split("\n\n")
    assert parts.pop() == ""
    data = [part.removeprefix("data: ") for part in parts]
    return [d if d == "[DONE]" else json.loads(d) for d in data]


async def text(http: aiohttp.ClientSession, fake: FakeEngine, **changes: Any) -> str:
    status, answer = await post(http, fake, ASK | changes)
    assert status == 200
    return str(answer["choices"][0]["text"])


async def prefilled(http: aiohttp.ClientSession, fake: FakeEngine) -> dict[str, Any]:
    _, answer = await post(http, fake, ASK | PREFILL_LEG)
    return dict(answer["kv_transfer_params"])


async def metric(http: aiohttp.ClientSession, fake: FakeEngine, name: str, labels: str = "") -> float:
    async with http.get(fake.url + "/metrics") as response:
        lines = (await response.text()).splitlines()
    (line,) = [line for line in lines if line.startswith(f"vllm:{name}{{") and labels in line]
    return float(line.rsplit(" ", 1)[1])


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.002)


# ---- shapes ----------------------------------------------------------------------------------------------------------


async def test_a_chat_answer_has_the_fields_of_vllm(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    _, answer = await post(http, fake, CHAT, "/v1/chat/completions")
    rest = ["service_tier", "system_fingerprint", "usage", "prompt_logprobs", "prompt_token_ids", "prompt_text"]
    assert list(answer) == [*FIRST_HEAD, *rest, "kv_transfer_params", "ec_transfer_params", "metrics"]
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["kv_transfer_params"] is None


async def test_a_chat_stream_opens_with_the_role_and_ends_with_done(
    http: aiohttp.ClientSession, fake: FakeEngine
) -> None:
    first, *middle, last, done = await events(http, fake, CHAT, "/v1/chat/completions")
    assert list(first) == [*FIRST_HEAD, "prompt_token_ids", "prompt_text"]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [list(chunk) for chunk in middle] == [FIRST_HEAD] * 2
    assert list(middle[0]["choices"][0]) == ["index", "delta", "logprobs", "finish_reason", "token_ids"]
    assert last["choices"][0]["finish_reason"] == "length"
    assert list(last) == [*FIRST_HEAD, "system_fingerprint"]
    assert done == "[DONE]"


async def test_streamed_and_whole_text_are_the_same(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    chunks = await events(http, fake, ASK, "/v1/completions")
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == await text(http, fake)
    assert {c["object"] for c in chunks[:-1]} == {"text_completion"}
    fields = ["index", "text", "logprobs", "finish_reason", "stop_reason", "prompt_token_ids", "token_ids"]
    assert list(chunks[0]["choices"][0]) == fields


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_usage_comes_in_a_chunk_of_its_own_and_continuously_when_asked(
    http: aiohttp.ClientSession, fake: FakeEngine, path: str
) -> None:
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "max_tokens": 3}
    body = (CHAT if "chat" in path else ASK) | options
    *chunks, total, _ = await events(http, fake, body, path)
    assert total["choices"] == []
    assert total["usage"]["completion_tokens"] == 3
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == ([0, 1, 2, 3] if "chat" in path else [1, 2, 3])


async def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(
    http: aiohttp.ClientSession, fake: FakeEngine
) -> None:
    body = {"prompt": ["one", "another"], "n": 2, "max_tokens": 4, "temperature": 1, "ignore_eos": True}
    _, answer = await post(http, fake, body)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert len({c["text"] for c in answer["choices"]}) == 4
    _, greedy = await post(http, fake, body | {"temperature": 0})
    assert len({c["text"] for c in greedy["choices"]}) == 2


async def test_token_ids_go_in_and_come_out(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    _, answer = await post(http, fake, ASK | {"return_token_ids": True})
    choice = answer["choices"][0]
    assert choice["prompt_token_ids"] == tokenizer.encode(PROMPT)
    assert tokenizer.decode(choice["token_ids"]) == choice["text"]
    assert await text(http, fake, prompt=choice["prompt_token_ids"]) == choice["text"]


async def test_a_chat_can_bring_its_token_ids_along(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    _, plain = await post(http, fake, CHAT | {"return_token_ids": True}, "/v1/chat/completions")
    ready = {"messages": [], "kv_transfer_params": {"prompt_token_ids": plain["prompt_token_ids"]}}
    _, again = await post(http, fake, CHAT | ready, "/v1/chat/completions")
    assert again["choices"][0]["message"] == plain["choices"][0]["message"]


async def test_a_stop_string_ends_the_text_before_it(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    whole = await text(http, fake, max_tokens=20)
    stop = whole[17:22]
    _, answer = await post(http, fake, ASK | {"max_tokens": 20, "stop": [stop, "never"]})
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["text"] == whole[: whole.index(stop)]
    chunks = await events(http, fake, ASK | {"max_tokens": 20, "stop": stop}, "/v1/completions")
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == choice["text"]


async def test_the_request_id_is_the_base_of_every_id(cluster: FakeCluster, http: aiohttp.ClientSession) -> None:
    fake = await cluster.start(FakeSettings(has_request_id_headers=True))
    async with http.post(fake.url + "/v1/completions", json=ASK | PREFILL_LEG, headers={"X-Request-Id": "r1"}) as r:
        answer = await r.json()
        assert r.headers["X-Request-Id"] == "r1"
    assert answer["id"] == "cmpl-r1"
    assert answer["kv_transfer_params"]["remote_request_id"].startswith("cmpl-r1-0-")


async def test_a_load_header_comes_when_asked_for(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    headers = {"endpoint-load-metrics-format": "JSON"}
    async with http.post(fake.url + "/v1/completions", json=ASK, headers=headers) as response:
        kind, _, report = response.headers["endpoint-load-metrics"].partition(" ")
    assert kind == "JSON"
    assert set(json.loads(report)["named_metrics"]) == {"kv_cache_usage_perc", "num_requests_waiting"}


async def test_text_survives_the_tokenizer(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    prompt = "Schleuse, écluse, 水门 \n\t end"
    _, encoded = await post(http, fake, {"prompt": prompt}, "/tokenize")
    assert encoded["count"] == len(encoded["tokens"])
    assert await post(http, fake, {"tokens": encoded["tokens"]}, "/detokenize") == (200, {"prompt": prompt})


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [("/version", "version", "0.32.0"), ("/load", "server_load", 0), ("/v1/models", "object", "list")],
)
async def test_the_small_routes_answer(
    http: aiohttp.ClientSession, fake: FakeEngine, path: str, key: str, value: object
) -> None:
    async with http.get(fake.url + path) as response:
        assert (await response.json())[key] == value


async def test_adapters_are_models_with_a_parent_and_a_text_of_their_own(
    cluster: FakeCluster, http: aiohttp.ClientSession
) -> None:
    fake = await cluster.start(FakeSettings(model="base", loras=("sql",)))
    async with http.get(fake.url + "/v1/models") as response:
        cards = (await response.json())["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("base", None), ("sql", "base")]
    assert await text(http, fake, model="base") != await text(http, fake, model="sql")


async def test_metrics_say_what_a_router_needs(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    await text(http, fake)
    await text(http, fake)
    count = len(tokenizer.encode(PROMPT))
    assert await metric(http, fake, "cache_config_info", 'block_size="16"') == 1
    assert await metric(http, fake, "prompt_tokens_total") == 2 * count
    assert await metric(http, fake, "prompt_tokens_by_source_total", "local_cache_hit") == count // 16 * 16
    assert await metric(http, fake, "num_requests_running") == 0
    assert await metric(http, fake, "request_success_total", "length") == 2
    assert await metric(http, fake, "inter_token_latency_seconds_count") == 10


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "kind", "param"),
    [
        ({"model": "unknown"}, 404, "NotFoundError", "model"),
        ({"prompt": "word " * 40_000}, 400, "BadRequestError", "input_tokens"),
        ({"max_tokens": 10**6}, 400, "BadRequestError", "max_tokens"),
        ({"max_tokens": 0}, 400, "BadRequestError", "max_tokens"),
        ({"min_tokens": 7}, 400, "BadRequestError", None),
        ({"n": 0}, 400, "BadRequestError", "n"),
        ({"logprobs": 1}, 400, "BadRequestError", None),
        ({"prompt": None}, 400, "BadRequestError", "prompt"),
        ({"prompt": [1, "a"]}, 400, "Bad Request", "prompt"),
        ({"max_tokens": "many"}, 400, "Bad Request", None),
        ({"stream_options": {"include_usage": True}}, 400, "BadRequestError", "stream_options"),
        ({"cache_salt": "a/b"}, 400, "Bad Request", None),
        ({"kv_transfer_params": {"do_remote_prefill": True, "remote_port": "x"}}, 400, "Bad Request", None),
    ],
)
async def test_a_bad_request_is_refused_in_vllms_words(
    http: aiohttp.ClientSession, fake: FakeEngine, change: dict[str, Any], status: int, kind: str, param: str | None
) -> None:
    got, answer = await post(http, fake, ASK | change)
    error = answer["error"]
    assert (got, error["type"], error["code"]) == (status, kind, status)
    assert list(error) == ["message", "type", "param", "code"]
    assert error["param"] == param or param is None


async def test_routes_of_vllm_without_a_model_behind_them_say_so(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    status, answer = await post(http, fake, {}, "/v1/messages")
    assert (status, answer["error"]["type"]) == (501, "NotImplementedError")


async def test_only_json_is_read(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    async with http.post(fake.url + "/v1/completions", data=b"{}", headers={"Content-Type": "text/plain"}) as response:
        assert response.status == 400
    async with http.post(fake.url + "/tokenize", data=b"{", headers={"Content-Type": "application/json"}) as response:
        assert response.status == 400


async def test_the_key_guards_the_api_but_not_the_probes(cluster: FakeCluster, http: aiohttp.ClientSession) -> None:
    fake = await cluster.start(FakeSettings(api_key="secret"))
    assert await post(http, fake, ASK) == (401, {"error": "Unauthorized"})
    async with http.get(fake.url + "/health") as response:
        assert response.status == 200
    async with http.get(fake.url + "/v1/models", headers={"Authorization": "Bearer secret"}) as response:
        assert response.status == 200


# ---- hand-off --------------------------------------------------------------------------------------------------------


async def test_a_pair_says_what_a_single_engine_says(cluster: FakeCluster, http: aiohttp.ClientSession) -> None:
    single, prefill, decode = [await cluster.start() for _ in range(3)]
    params = await prefilled(http, prefill)
    assert params["remote_engine_id"] == prefill.engine.id
    assert params["remote_num_tokens"] == len(tokenizer.encode(PROMPT))
    assert await text(http, decode, kv_transfer_params=params) == await text(http, single)
    assert await metric(http, decode, "prompt_tokens_by_source_total", "external_kv_transfer") > 0
    assert await metric(http, decode, "nixl_bytes_transferred_count") == 1
    assert prefill.engine.load().held_count == 0


async def test_parameters_of_another_request_give_another_text(
    cluster: FakeCluster, http: aiohttp.ClientSession
) -> None:
    single, prefill, decode = [await cluster.start() for _ in range(3)]
    params = await prefilled(http, prefill)
    other = "Another prompt of the very same length and no other thing. " * 4
    assert await text(http, decode, prompt=other[: len(PROMPT)], kv_transfer_params=params) != await text(
        http, single, prompt=other[: len(PROMPT)]
    )


async def test_a_second_read_shows_on_the_prefill_engine(cluster: FakeCluster, http: aiohttp.ClientSession) -> None:
    prefill, *decodes = [await cluster.start() for _ in range(3)]
    params = await prefilled(http, prefill)
    for decode in decodes:
        await text(http, decode, kv_transfer_params=params)
    assert await metric(http, prefill, "nixl_num_notifications_after_expiry_total") == 1


async def test_an_unread_lease_expires(cluster: FakeCluster, http: aiohttp.ClientSession) -> None:
    prefill = await cluster.start(FakeSettings(engine=EngineSettings(lease_s=0.5)))
    await prefilled(http, prefill)
    await eventually(lambda: prefill.engine.load().held_count == 0)
    assert await metric(http, prefill, "nixl_num_kv_expired_reqs_total") == 1


async def test_a_request_refused_by_the_decode_engine_frees_the_blocks(
    cluster: FakeCluster, http: aiohttp.ClientSession
) -> None:
    prefill, decode = await cluster.start(), await cluster.start()
    params = await prefilled(http, prefill)
    status, _ = await post(http, decode, ASK | {"model": "unknown", "kv_transfer_params": params})
    assert status == 404
    assert prefill.engine.load().held_count == 0


async def test_a_missing_field_parks_the_request_until_the_client_leaves(
    cluster: FakeCluster, http: aiohttp.ClientSession
) -> None:
    prefill, decode = await cluster.start(), await cluster.start()
    params = await prefilled(http, prefill)
    del params["remote_request_id"]
    asked = asyncio.create_task(post(http, decode, ASK | {"kv_transfer_params": params}))
    await eventually(lambda: decode.engine.load().deferred_count == 1)
    await text(http, decode, prompt="others are served")
    assert not asked.done()
    asked.cancel()
    await eventually(lambda: decode.engine.load().deferred_count == 0)


async def test_a_remote_prefill_without_blocks_kills_the_engine(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await post(http, fake, ASK | {"kv_transfer_params": {"do_remote_prefill": True}})
    async with http.get(fake.url + "/health") as response:
        assert response.status == 503
    status, answer = await post(http, fake, ASK)
    assert (status, answer["error"]["type"]) == (500, "InternalServerError")


async def test_kv_of_a_restarted_engine_fails_the_request(cluster: FakeCluster, http: aiohttp.ClientSession) -> None:
    prefill, decode = await cluster.start(), await cluster.start()
    params = await prefilled(http, prefill)
    await prefill.die()
    await prefill.revive()
    body = ASK | {"kv_transfer_params": params}
    status, answer = await post(http, decode, body)
    assert (status, answer["error"]["code"]) == (500, 500)
    error, done = await events(http, decode, body, "/v1/completions")
    assert (error["error"]["type"], done) == ("InternalServerError", "[DONE]")
    assert await metric(http, decode, "nixl_num_failed_transfers_total") == 2


async def test_or_it_is_computed_again_when_configured_so(cluster: FakeCluster, http: aiohttp.ClientSession) -> None:
    settings = FakeSettings(engine=EngineSettings(load_failure=LoadFailure.RECOMPUTE))
    prefill, decode, single = await cluster.start(), await cluster.start(settings), await cluster.start()
    params = await prefilled(http, prefill) | {"remote_engine_id": "restarted since"}
    assert await text(http, decode, kv_transfer_params=params) == await text(http, single)


async def test_without_a_connector_the_parameters_are_ignored(
    cluster: FakeCluster, http: aiohttp.ClientSession
) -> None:
    plain = await cluster.start(FakeSettings(has_connector=False))
    _, answer = await post(http, plain, ASK | PREFILL_LEG)
    assert answer["kv_transfer_params"] is None


# ---- clients that leave ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_aborts_its_request(
    http: aiohttp.ClientSession, fake: FakeEngine, is_stream: bool
) -> None:
    asked = asyncio.create_task(post(http, fake, ASK | {"max_tokens": 30_000, "stream": is_stream}))
    await eventually(lambda: fake.engine.load().running_count == 1)
    asked.cancel()
    await eventually(lambda: fake.engine.load().running_count == 0)
    assert await metric(http, fake, "request_success_total", "abort") == 1


# ---- KV events -------------------------------------------------------------------------------------------------------


async def test_kv_events_reach_a_subscriber_and_can_be_replayed(
    cluster: FakeCluster, http: aiohttp.ClientSession
) -> None:
    fake = await cluster.start(FakeSettings(kv_events=KvEventSettings(replay_endpoint="tcp://127.0.0.1:0", topic="kv")))
    async with http.get(fake.url + "/kv_event_sources") as response:
        source = (await response.json())["0"]
    with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as sub, context.socket(zmq.DEALER) as dealer:
        sub.connect(source["endpoint"])
        sub.subscribe(b"kv")
        dealer.connect(source["replay_endpoint"])
        await text(http, fake)
        await dealer.send_multipart((b"", (0).to_bytes(8, "big")))
        replayed = [await asyncio.wait_for(dealer.recv_multipart(), 5)]
        while replayed[-1][2] != b"\xff" * 8:
            replayed.append(await asyncio.wait_for(dealer.recv_multipart(), 5))
        resets = 0
        while resets == 0 or not await sub.poll(200):  # a subscription takes a moment to reach its publisher
            fake.reset_prefix_cache()
            resets += 1
        topic, seq, payload = await asyncio.wait_for(sub.recv_multipart(), 5)
        while not any(event["type"] == "AllBlocksCleared" for event in msgspec.msgpack.decode(payload)[1]):
            topic, seq, payload = await asyncio.wait_for(sub.recv_multipart(), 5)
    _, stored_topic, first_seq, batch = replayed[0]
    at, (stored,), rank = msgspec.msgpack.decode(batch)
    assert (topic, stored_topic, int.from_bytes(first_seq, "big"), rank) == (b"kv", b"kv", 0, 0)
    assert len(replayed) - 1 <= int.from_bytes(seq, "big") < len(replayed) - 1 + resets
    assert at > 1e9
    assert stored["token_ids"] == tokenizer.encode(PROMPT)[: stored["block_size"] * len(stored["block_hashes"])]
    assert list(stored)[:5] == ["type", "block_hashes", "parent_block_hash", "token_ids", "block_size"]


# ---- faults ----------------------------------------------------------------------------------------------------------


async def test_fault_connections_are_refused_and_accepted_again(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    fake.refuse_connections()
    with pytest.raises(aiohttp.ClientConnectorError):
        await post(http, fake, ASK)
    await fake.accept_connections()
    await text(http, fake)


async def test_fault_nothing_is_ever_answered(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    fake.faults.is_silent = True
    with pytest.raises(TimeoutError):
        await http.get(fake.url + "/health", timeout=aiohttp.ClientTimeout(total=0.05))


async def test_fault_garbage_instead_of_http(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    fake.faults.garbage = b"\x00\x01 what is this\r\n\r\n"
    with pytest.raises(aiohttp.ClientError):
        await post(http, fake, ASK)


async def test_fault_the_next_requests_fail_with_500(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    fake.faults.errors_left = 2
    assert [(await post(http, fake, ASK))[0] for _ in range(3)] == [500, 500, 200]


async def test_fault_an_error_event_in_the_stream(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    fake.faults.error_after_tokens = 2
    *chunks, error, done = await events(http, fake, ASK, "/v1/completions")
    assert len(chunks) == 2
    assert (error["error"]["code"], done) == (500, "[DONE]")


async def test_fault_the_connection_drops_in_the_stream(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    fake.faults.drop_after_tokens = 2
    async with http.post(fake.url + "/v1/completions", json=ASK | {"stream": True}) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    await eventually(lambda: fake.engine.load().running_count == 0)


async def test_fault_a_frozen_engine_goes_on_where_it_stood(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    expected = await text(http, fake)
    fake.freeze()
    asked = asyncio.create_task(text(http, fake))
    await eventually(lambda: fake.engine.load().waiting_count == 1)
    assert not asked.done()
    fake.thaw()
    assert await asked == expected


async def test_fault_a_slow_engine_takes_its_factor_longer(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    await text(http, fake)
    quick_s = fake.engine.counters.busy_s
    fake.reset_prefix_cache()
    fake.slow_down(7)
    await text(http, fake)
    assert fake.engine.counters.busy_s - quick_s == pytest.approx(7 * quick_s)


async def test_fault_a_prefill_without_parameters(http: aiohttp.ClientSession, fake: FakeEngine) -> None:
    fake.faults.omits_kv_params = True
    _, answer = await post(http, fake, ASK | PREFILL_LEG)
    assert answer["kv_transfer_params"] is None
    assert fake.engine.load().held_count == 0


async def test_fault_a_death_breaks_streams_and_a_revival_has_a_new_id(
    http: aiohttp.ClientSession, fake: FakeEngine
) -> None:
    old_id, old_url = fake.engine.id, fake.url
    asked = asyncio.create_task(post(http, fake, ASK | {"max_tokens": 30_000}))
    await eventually(lambda: fake.engine.load().running_count == 1)
    await fake.die()
    with pytest.raises((aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
        await asked
    with pytest.raises(aiohttp.ClientConnectorError):
        await post(http, fake, ASK)
    await fake.revive()
    await text(http, fake)
    assert (fake.url, fake.engine.id == old_id) == (old_url, False)


# ---- command line ----------------------------------------------------------------------------------------------------


async def test_the_command_line_prints_one_address_per_engine(http: aiohttp.ClientSession) -> None:
    command = (sys.executable, "-m", "loadtest.fake_engine", "--role", "prefill", "--role", "decode", "--kv-events")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    lines = [(await process.stdout.readline()).decode().split() for _ in range(2)]
    for _, url in lines:
        async with http.get(url + "/health") as response:
            assert response.status == 200
    process.terminate()
    await process.wait()
    assert [role for role, _ in lines] == ["prefill", "decode"]
