"""The emulated vLLM beside the real one: the same requests, against what vLLM 0.32.0 answered (tests/recorded)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace

import aiohttp
import msgspec
import pytest

from gateway.core.types import Role
from loadtest.engine_types import EngineSettings
from loadtest.fake_engine import FakeCluster, FakeEngine, FakeSettings
from loadtest.kv_cache import BlockStored
from loadtest.kv_publisher import KvEventSettings, wire_event
from tests.engines.record import BAD, GOOD, HAND_OFFS, PREFILL_LEG, RECORDED, STREAM_WITH_USAGE, Recorded, fresh
from tests.engines.shapes import Shape, body_shape, differences

EXCHANGES = json.loads((RECORDED / "exchanges.json").read_text())
NOT_SERVED = {"chat_logprobs.sse"}
"""The emulator has no probabilities to tell."""
OWN_WORDS = {"error_wrong_type.json", "error_prompt_too_long_stream.json"}
"""A type error is told by another parser; the tokenizer of a chat too long for the model stops at the limit."""
ENGINE = EngineSettings(block_tokens=128, kv_blocks=512, max_model_tokens=8192, mean_output_tokens=10_000)
PREFILL = FakeSettings(
    engine=replace(ENGINE, role=Role.PREFILL),
    model="tiny",
    has_prompt_tokens_details=True,
    kv_events=KvEventSettings(replay_endpoint="tcp://127.0.0.1:0"),
)
DECODE = replace(PREFILL, engine=replace(ENGINE, role=Role.DECODE), kv_events=None)


@pytest.fixture
async def pair() -> AsyncIterator[dict[str, FakeEngine]]:
    async with FakeCluster(speed=100) as cluster:
        yield {"p0": await cluster.start(PREFILL), "d0": await cluster.start(DECODE)}


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def answer(http: aiohttp.ClientSession, pair: dict[str, FakeEngine], request: Recorded) -> tuple[bytes, Shape]:
    """The emulator's body and shape, once its status and content type are found to be the recorded ones."""
    async with request.send(http, pair[request.engine].url) as response:
        body = await response.read()
        expected = EXCHANGES[request.file]
        assert response.status == expected["status"]
        assert response.headers.get("Content-Type") == expected["headers"].get("Content-Type")
        return body, body_shape(response.headers.get("Content-Type", ""), body)


def recorded_shape(file: str) -> Shape:
    content_type = EXCHANGES[file]["headers"].get("Content-Type", "")
    return body_shape(content_type, (RECORDED / file).read_bytes())


@pytest.mark.parametrize("request_", [r for r in GOOD if r.file not in NOT_SERVED], ids=lambda r: r.file)
async def test_an_answer_has_the_shape_of_the_real_one(
    http: aiohttp.ClientSession, pair: dict[str, FakeEngine], request_: Recorded
) -> None:
    _, shape = await answer(http, pair, request_)
    assert differences(recorded_shape(request_.file), shape) == []


@pytest.mark.parametrize("request_", BAD, ids=lambda r: r.file)
async def test_an_error_has_the_words_of_the_real_one(
    http: aiohttp.ClientSession, pair: dict[str, FakeEngine], request_: Recorded
) -> None:
    body, shape = await answer(http, pair, request_)
    assert differences(recorded_shape(request_.file), shape) == []
    if request_.file not in OWN_WORDS:
        assert json.loads(body) == json.loads((RECORDED / request_.file).read_bytes())


@pytest.mark.parametrize(("name", "path", "body"), HAND_OFFS)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_both_legs_of_a_hand_off_have_the_shape_of_the_real_ones(
    http: aiohttp.ClientSession,
    pair: dict[str, FakeEngine],
    name: str,
    path: str,
    body: dict[str, object],
    is_stream: bool,
) -> None:
    first, second = (f"prefill_{name}_for_stream.json", f"decode_{name}.sse")
    if not is_stream:
        first, second = f"prefill_{name}.json", f"decode_{name}.json"
    own = fresh(body, second)
    prefilled, shape = await answer(http, pair, Recorded(first, "p0", path, own | PREFILL_LEG))
    assert differences(recorded_shape(first), shape) == []
    params = {"kv_transfer_params": json.loads(prefilled)["kv_transfer_params"]}
    extra = STREAM_WITH_USAGE if is_stream else {}
    _, shape = await answer(http, pair, Recorded(second, "d0", path, own | extra | params))
    assert differences(recorded_shape(second), shape) == []


async def test_kv_that_is_gone_fails_as_it_really_does(
    http: aiohttp.ClientSession, pair: dict[str, FakeEngine]
) -> None:
    _, path, body = HAND_OFFS[0]
    prefilled, _ = await answer(http, pair, Recorded("prefill_chat_lost.json", "p0", path, body | PREFILL_LEG))
    await pair["p0"].die()
    params = {"kv_transfer_params": json.loads(prefilled)["kv_transfer_params"]}
    for file, extra in [("error_kv_load.json", {}), ("error_kv_load.sse", {"stream": True})]:
        got, shape = await answer(http, pair, Recorded(file, "d0", path, body | extra | params))
        assert differences(recorded_shape(file), shape) == []
        assert got.split(b"\n\n")[-3:-1] == (RECORDED / file).read_bytes().split(b"\n\n")[-3:-1]


@pytest.mark.parametrize(("engine", "file"), [("p0", "metrics_prefill.txt"), ("d0", "metrics_decode.txt")])
async def test_every_metric_a_router_reads_has_the_real_type_and_labels(
    http: aiohttp.ClientSession, pair: dict[str, FakeEngine], engine: str, file: str
) -> None:
    _, shape = await answer(http, pair, Recorded(file, engine, "/metrics"))
    missing = [line for line in differences(recorded_shape(file), shape) if not line.endswith(": surplus")]
    assert [line for line in missing if "cache_config_info" not in line] == []


def test_a_kv_event_has_the_fields_of_the_real_one() -> None:
    _, _, payload = [bytes.fromhex(line) for line in (RECORDED / "kv_event_frames.hex").read_text().split("\n")[:3]]
    _, (real,), _ = msgspec.msgpack.decode(payload)
    count = len(real["block_hashes"])
    event = BlockStored(tuple(range(count)), None, tuple(real["token_ids"]), real["block_size"])
    assert list(wire_event(event)) == list(real)
    told = msgspec.msgpack.decode(msgspec.msgpack.encode(wire_event(event)))
    assert told == real | {"block_hashes": list(range(count))}
