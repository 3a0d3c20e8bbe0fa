"""What the vLLM adapter relies on, asked of real engines without a gateway, so that a change is caught."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import cycle

import aiohttp
import msgspec
import pytest
import zmq
import zmq.asyncio

from gateway.core.types import Role
from loadtest.vllm_process import BLOCK_TOKENS, MODEL, VllmFleet
from tests.engines.conftest import PAIR_PROMPTS, until
from tests.engines.metrics import read_metrics
from tests.engines.prompts import COMPLETIONS, Answer, Prompt, ask, hand_off, make_prompts, prefill, wrong_answers
from tests.engines.record import BAD, GOOD, RECORDED, Recorded
from tests.engines.shapes import body_shape, differences, sse_data

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]

References = dict[str, dict[str, Answer]]
TRANSFER_KEYS = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": list,
    "remote_engine_id": str,
    "remote_request_id": str,
    "remote_host": "localhost",
    "remote_port": int,
    "tp_size": 1,
    "dcp_size": 1,
    "pp_size": 1,
    "remote_num_tokens": int,
    "remote_blocks_expiry_time": None,
    "transfer_mode": "pull",
    "remote_prefill_cached_tokens": 0,
}
IDLE_S = 3.0
"""Within this time after its client left, a request is gone from its engine."""


def long_prompt(seed: int, output_tokens: int = 400) -> Prompt:
    """A streamed completion that keeps an engine busy for some seconds."""
    prompt = make_prompts(seed, lengths_tokens=[3000])[-1]
    return Prompt(f"long-{seed}", prompt.path, prompt.body | {"max_tokens": output_tokens, "ignore_eos": True}, True)


async def is_idle(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether the engine has no request running or waiting."""
    return (await read_metrics(session, url)).busy_count == 0


async def test_every_reference_differs_so_that_a_lost_prefix_would_show(reference_answers: References) -> None:
    texts = [answer.text for answers in reference_answers.values() for answer in answers.values()]
    assert len(set(texts)) == len(texts)


async def test_the_forty_prompts_span_one_to_six_thousand_tokens(reference_answers: References) -> None:
    lengths = [answer.prompt_tokens for answer in reference_answers["forty"].values()]
    assert len(lengths) == 40
    assert min(lengths) == 1
    assert 5900 < max(lengths) <= 6000


async def test_a_prefill_leg_answers_with_these_transfer_parameters(
    fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    prompt = make_prompts(21, [300])[0]
    params = await prefill(session, fleet["p0"].url, prompt)
    assert params.keys() == TRANSFER_KEYS.keys()
    for key, expected in TRANSFER_KEYS.items():
        value = params[key]
        assert isinstance(value, expected) if isinstance(expected, type) else value == expected, key
    tokens = params["remote_num_tokens"]
    assert [len(group) for group in params["remote_block_ids"]] == [-(-tokens // BLOCK_TOKENS)]
    await ask(session, fleet["d0"].url, prompt, kv_transfer_params=params)  # gives the blocks back


async def test_a_plain_answer_carries_null_transfer_parameters(
    fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    body = {"model": MODEL, "prompt": "The gate", "max_tokens": 1}
    async with session.post(fleet["p0"].url + COMPLETIONS, json=body) as response:
        assert (await response.json())["kv_transfer_params"] is None


async def test_a_hand_off_answers_as_a_single_engine_and_computes_nothing_on_decode(
    fleet: VllmFleet, session: aiohttp.ClientSession, reference_answers: References
) -> None:
    prefills, decodes = fleet.urls(Role.PREFILL), fleet.urls(Role.DECODE)
    before = [await read_metrics(session, url) for url in decodes]
    pairs = cycle([(p, d) for p in prefills for d in decodes])
    answers = {each.name: await hand_off(session, *next(pairs), each) for each in PAIR_PROMPTS}
    assert wrong_answers(answers, reference_answers["pair"]) == []
    after = [await read_metrics(session, url) for url in decodes]
    grown = {
        source: sum(b.prompt_tokens(source) - a.prompt_tokens(source) for a, b in zip(before, after, strict=True))
        for source in ("local_compute", "local_cache_hit", "external_kv_transfer")
    }
    # All of a prompt counts as moved, not only its full blocks. A prompt of one token is computed again.
    lengths = [answer.prompt_tokens for answer in answers.values()]
    single = lengths.count(1)
    assert grown == {"local_compute": single, "local_cache_hit": 0, "external_kv_transfer": sum(lengths) - single}
    assert all([(await read_metrics(session, engine.url)).failed_transfer_count == 0 for engine in fleet])


async def test_concurrent_hand_offs_answer_as_a_single_engine(
    fleet: VllmFleet, session: aiohttp.ClientSession, reference_answers: References
) -> None:
    legs = [hand_off(session, fleet["p1"].url, fleet["d1"].url, each) for each in PAIR_PROMPTS]
    answers = dict(zip([each.name for each in PAIR_PROMPTS], await asyncio.gather(*legs), strict=True))
    assert wrong_answers(answers, reference_answers["pair"]) == []


async def test_no_stream_chunk_carries_transfer_parameters(fleet: VllmFleet, session: aiohttp.ClientSession) -> None:
    for prompt in make_prompts(22, [200]):
        if prompt.is_stream:
            params = await prefill(session, fleet["p0"].url, prompt)
            body = prompt.body | {"kv_transfer_params": params}
            async with session.post(fleet["d0"].url + prompt.path, json=body) as response:
                assert b"kv_transfer_params" not in await response.read()


@pytest.mark.parametrize("recorded", GOOD + BAD, ids=lambda recorded: recorded.file)
async def test_an_answer_has_the_recorded_status_and_shape(
    recorded: Recorded, fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    exchange = json.loads((RECORDED / "exchanges.json").read_text())[recorded.file]
    async with recorded.send(session, fleet[recorded.engine].url) as response:
        assert response.status == exchange["status"]
        content_type = exchange["headers"].get("Content-Type", "")
        assert response.headers.get("Content-Type", "") == content_type
        expected = body_shape(content_type, (RECORDED / recorded.file).read_bytes())
        assert differences(expected, body_shape(content_type, await response.read())) == []


@pytest.mark.parametrize(("engine", "file"), [("p0", "metrics_prefill.txt"), ("d0", "metrics_decode.txt")])
async def test_the_recorded_metrics_are_still_there(
    engine: str, file: str, fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    async with session.get(f"{fleet[engine].url}/metrics") as response:
        now = body_shape("text/plain", await response.read())
    lost = differences(body_shape("text/plain", (RECORDED / file).read_bytes()), now)
    assert [line for line in lost if not line.endswith("surplus")] == []


async def test_an_idle_connection_is_closed_by_the_engine_after_five_seconds(fleet: VllmFleet) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", fleet["d0"].port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: engine\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    idle_since = time.monotonic()
    await reader.read()
    assert 4.5 < time.monotonic() - idle_since < 7.0
    writer.close()


@pytest.mark.parametrize("engine", ["p0", "d0"])
async def test_a_request_whose_client_left_is_gone_from_the_engine(
    engine: str, fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    url = fleet[engine].url
    client = asyncio.create_task(ask(session, url, long_prompt(seed=23)))
    assert await until(lambda: is_busy(session, url), 20)
    client.cancel()
    assert await until(lambda: is_idle(session, url), IDLE_S)


async def is_busy(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether the engine has a request running or waiting."""
    return not await is_idle(session, url)


async def test_a_refused_decode_leg_releases_the_blocks_held_by_prefill(
    fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    prompt = make_prompts(24, [1000])[0]
    params = await prefill(session, fleet["p0"].url, prompt)
    body = prompt.body | {"kv_transfer_params": params, "max_tokens": -1}
    async with session.post(fleet["d0"].url + prompt.path, json=body) as response:
        assert response.status == 400
    expired_before = (await read_metrics(session, fleet["p0"].url)).value("vllm:nixl_num_kv_expired_reqs_total")

    async def is_released() -> bool:
        await ask(session, fleet["p0"].url, make_prompts(25, [1])[0])  # gauges move only when the engine steps
        metrics = await read_metrics(session, fleet["p0"].url)
        assert metrics.value("vllm:nixl_num_kv_expired_reqs_total") == expired_before
        return metrics.value("vllm:kv_cache_usage_perc") == 0

    assert await until(is_released, 10)


async def test_kv_event_sources_name_the_port_and_new_blocks_are_announced(
    fleet: VllmFleet, session: aiohttp.ClientSession
) -> None:
    async with session.get(f"{fleet['p0'].url}/kv_event_sources") as response:
        source = (await response.json())["0"]
    port = source["endpoint"].rpartition(":")[2]
    assert int(port) == fleet["p0"].kv_events_port
    with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.connect(f"tcp://127.0.0.1:{port}")
        subscriber.subscribe(b"")
        frames = subscriber.recv_multipart()
        prompts = (prompt for seed in range(100, 120) for prompt in make_prompts(seed, [300])[2:3])
        while not frames.done():  # a subscription takes effect some time after it is made
            await ask(session, fleet["p0"].url, next(prompts), max_tokens=1)
            await asyncio.wait([frames], timeout=1.0)
    topic, number, payload = frames.result()
    assert (topic, len(number)) == (b"", 8)
    _, (event, *_), rank = msgspec.msgpack.decode(payload)
    assert (event["type"], event["block_size"], event["medium"], rank) == ("BlockStored", BLOCK_TOKENS, "GPU", 0)
    assert len(event["token_ids"]) == BLOCK_TOKENS * len(event["block_hashes"])


async def test_lost_kv_fails_or_is_recomputed_as_each_decode_engine_was_told(
    fleet: VllmFleet, session: aiohttp.ClientSession, reference_answers: References
) -> None:
    whole, stream = PAIR_PROMPTS[8], PAIR_PROMPTS[9]
    lost = make_prompts(26, [700])[:2]
    failing = [(each, await prefill(session, fleet["p1"].url, each)) for each in lost]
    recomputed = [(each, await prefill(session, fleet["p1"].url, each)) for each in (whole, stream)]
    await fleet["p1"].kill()
    (first, first_params), (second, second_params) = failing
    async with session.post(
        fleet["d0"].url + first.path, json=first.body | {"kv_transfer_params": first_params}
    ) as response:
        assert response.status == 500
    async with session.post(
        fleet["d0"].url + second.path, json=second.body | {"kv_transfer_params": second_params}
    ) as response:
        assert response.status == 200
        role, error, end = sse_data(await response.read())
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert error["error"]["code"] == 500
        assert end == "[DONE]"
    answers = {
        each.name: await ask(session, fleet["d1"].url, each, kv_transfer_params=params) for each, params in recomputed
    }
    assert wrong_answers(answers, reference_answers["pair"]) == []
