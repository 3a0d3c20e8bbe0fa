"""Engines that come, go, fall silent and lie about themselves: what the gateway believes and what clients notice."""

from __future__ import annotations

import asyncio
import json

import pytest

from gateway.config import DiscoverySettings, EngineSettings, WatchSettings
from gateway.core.types import Health, Role
from gateway.toml import Secret
from tests.integration.harness import CHAT, MODEL, Site, chat_body, events, words
from tests.integration.scripted_engine import CHUNKED, DONE, ScriptedEngine, chunk, says, serving, token
from tests.polling import until

LEASE_S = 25.0
"""Of KV that waits for its decode engine, by default."""
NERVOUS = WatchSettings(
    health_interval_s=0.03, report_interval_s=0.03, timeout_s=0.15, report_stale_s=1.0, failures_to_down=2
)


async def test_an_engine_that_dies_leaves_the_candidates_and_comes_back_by_itself(mesh):
    await mesh["p0"].die()
    await until(lambda: not mesh.is_up("p0"))
    assert {(await mesh.ask(words(20, n))).headers["x-sluice-prefill"] for n in range(4)} == {"p1"}
    await mesh["p0"].revive()
    await until(lambda: mesh.is_up("p0"))
    results = await asyncio.gather(*(mesh.ask(words(20, n)) for n in range(8)))
    assert {result.headers["x-sluice-prefill"] for result in results} == {"p0", "p1"}


async def test_ready_says_which_role_is_missing(pair):
    assert (await pair.get("/ready"))[:1] == (200,)
    for name, role in (("p0", "prefill"), ("d0", "decode")):
        await pair[name].die()
        await until(lambda name=name: not pair.is_up(name))
        status, body, _ = await pair.get("/ready")
        assert (status, body["ready"], body["reason"]) == (503, False, f"no {role} engine is up")
        (row,) = (row for row in body["engines"] if row["id"] == name)
        assert row["health"] == "down"
        assert row["reason"]
        assert (await pair.get("/health"))[0] == 200
        status, body, response = await pair.post(CHAT, chat_body())
        assert (status, body["error"]["code"]) == (503, f"no_{role}")
        assert int(response.headers["retry-after"]) >= 1
        await pair[name].revive()
        await until(lambda name=name: pair.is_up(name))
    assert (await pair.get("/ready"))[:1] == (200,)


async def test_what_waits_on_an_engine_that_falls_silent_is_retried_at_once(start):
    site = await start("ppd", watch=NERVOUS)
    site["p0"].freeze()
    site["p1"].freeze()
    asking = asyncio.create_task(site.ask())
    await until(lambda: site.busy("p0", "p1") == 1)
    victim, other = ("p0", "p1") if site.busy("p0") else ("p1", "p0")
    site[other].thaw()
    site[victim].faults.is_silent = True
    result = await asking
    assert (result.error, result.headers["x-sluice-prefill"]) == (None, other)
    site[victim].faults.is_silent = False
    await until(lambda: site.is_up(victim))


async def test_a_decode_engine_that_fell_silent_during_the_prefill_is_not_asked(start):
    """It was decided upon before, and would be waited for until the lease ends."""
    site = await start("pdd", watch=NERVOUS)
    site["p0"].freeze()
    asking = asyncio.create_task(site.ask(words(200)))
    await until(lambda: site.busy("p0") == 1)
    (reservation,) = site.state.reservations.values()
    victim = reservation.estimate.decode
    site[victim].freeze()
    site[victim].faults.is_silent = True
    await until(lambda: not site.is_up(victim))
    site["p0"].thaw()
    async with asyncio.timeout(LEASE_S / 2):
        result = await asking
    assert (result.error, result.headers["x-sluice-attempts"]) == (None, "2")
    assert result.headers["x-sluice-decode"] == ("d1" if victim == "d0" else "d0")
    assert not site[victim].engine.counters.generated_tokens
    site[victim].faults.is_silent = False


async def test_a_stream_goes_on_although_its_engine_answers_no_probe_any_more(start):
    is_told = asyncio.Event()

    async def play(received, writer):
        writer.write(CHUNKED + chunk(token("one")))
        await is_told.wait()
        writer.write(chunk(token("two") + DONE) + b"0\r\n\r\n")

    async with serving(play) as engine:
        site = await start("", engines=[engine.settings("b0")], is_awaited=False, watch=NERVOUS)
        await engine.is_up(site)
        asking = asyncio.create_task(site.post(CHAT, chat_body(stream=True)))
        await until(lambda: bool(engine.received))
        engine.probes["/health"] = engine.probes["/metrics"] = None
        await until(lambda: not site.is_up("b0"))
        is_told.set()
        status, body, _ = await asking
    assert (status, events(body)) == (200, events(token("one") + token("two") + DONE))


async def test_an_engine_that_leaves_the_list_ends_its_streams_in_peace(start, tmp_path):
    is_told = asyncio.Event()

    async def play(received, writer):
        writer.write(CHUNKED + chunk(token("one")))
        await is_told.wait()
        writer.write(chunk(DONE) + b"0\r\n\r\n")

    async with serving(play) as engine:
        file = tmp_path / "engines.json"
        file.write_text(json.dumps({"engines": [{"url": engine.url, "id": "b0"}]}))
        discovery = DiscoverySettings(file=str(file), poll_s=0.02)
        site = await start("", discovery=discovery, is_awaited=False)
        await engine.is_up(site)
        asking = asyncio.create_task(site.post(CHAT, chat_body(stream=True)))
        await until(lambda: bool(engine.received))
        file.write_text('{"engines": []}')
        await until(lambda: not site.state.engines)
        is_told.set()
        status, body, _ = await asking
        assert (status, events(body)[-1]) == (200, "[DONE]")
        assert (await site.post(CHAT, chat_body()))[0] == 503
        await until(lambda: engine.closed == 1)


async def test_an_engine_in_the_file_whose_adapter_nobody_has_harms_no_other(start, tmp_path):
    file = tmp_path / "engines.json"
    file.write_text(json.dumps({"engines": [{"url": "http://127.0.0.1:1", "id": "x", "adapter": "nonsense"}]}))
    site = await start("b", discovery=DiscoverySettings(file=str(file), poll_s=0.02))
    await until(lambda: "x" in site.state.engines)
    assert (await site.ask()).error is None
    assert "nonsense" in site.state.engines["x"].health_reason


# ---- reports ---------------------------------------------------------------------------------------------------------

BAD_METRICS = {
    "nothing": b"",
    "html": b"<html>" * 1000,
    "bytes": bytes(range(256)) * 10,
    "not a number": b"vllm:num_requests_running zero\nvllm:num_requests_waiting 0\n",
    "negative": b"vllm:num_requests_running -1\nvllm:num_requests_waiting 0\n",
    "NaN": b"vllm:num_requests_running NaN\nvllm:num_requests_waiting 0\n",
    "infinite": b"vllm:num_requests_running +Inf\nvllm:num_requests_waiting 0\n",
    "labels": b'vllm:num_requests_running{engine="0" 1\n',
    "half": b"vllm:num_requests_running 1\n",
    "endless": b"x" * (9 * 2**20),
    "silent": None,
}


@pytest.mark.parametrize("name", BAD_METRICS)
async def test_an_engine_whose_metrics_are_garbage_serves_on_with_a_report_that_grows_old(start, name):
    async with serving() as engine:
        site = await start("", engines=[engine.settings("b0")], is_awaited=False, watch=NERVOUS)
        await engine.is_up(site)
        await until(lambda: site.state.engines["b0"].reported_at is not None)
        engine.probes["/metrics"] = BAD_METRICS[name]
        await asyncio.sleep(NERVOUS.timeout_s + NERVOUS.report_interval_s)
        reported_at = site.state.engines["b0"].reported_at
        await asyncio.sleep(5 * NERVOUS.report_interval_s)
        assert site.state.engines["b0"].reported_at == reported_at
        assert site.is_up("b0")
        assert (await site.post(CHAT, chat_body()))[0] == 200


async def test_ready_says_whether_reports_are_fresh_stale_or_none(start):
    async with serving() as engine:
        site = await start("", engines=[engine.settings("b0")], is_awaited=False, watch=NERVOUS)
        await engine.is_up(site)

        async def says(word: str) -> bool:
            _, ready, _ = await site.get("/ready")
            return ready["engines"][0]["report"] == word

        await until(lambda: says("fresh"))
        engine.probes["/metrics"] = b""
        await until(lambda: says("stale"))
    async with serving() as engine:
        engine.probes["/metrics"] = b""
        site = await start("", engines=[engine.settings("b0")], is_awaited=False, watch=NERVOUS)
        await engine.is_up(site)
        _, ready, _ = await site.get("/ready")
        assert ready["engines"][0]["report"] == "none"


async def test_an_engine_that_never_had_metrics_serves(start):
    async with serving() as engine:
        engine.probes["/metrics"] = b""
        site = await start("", engines=[engine.settings("b0")], is_awaited=False, watch=NERVOUS)
        await engine.is_up(site)
        assert site.state.engines["b0"].report is None
        assert (await site.post(CHAT, chat_body()))[0] == 200


@pytest.mark.parametrize("models", [b"", b"{}", b'{"data": [{"id": 7}]}', b"[" * 10_000, b'{"data": {}}'])
async def test_an_engine_that_does_not_tell_its_models_is_no_candidate(start, models):
    async with serving() as engine:
        engine.probes["/v1/models"] = models
        site = await start("", engines=[engine.settings("b0")], is_awaited=False, watch=NERVOUS)
        await until(lambda: bool(site.state.engines) and site.state.engines["b0"].health is Health.DOWN)
        assert "model list" in site.state.engines["b0"].health_reason
        assert (await site.post(CHAT, chat_body()))[0] == 503


# ---- keys ------------------------------------------------------------------------------------------------------------


def with_key(site_engine: ScriptedEngine, **fields: object) -> EngineSettings:
    return EngineSettings(url=site_engine.url, role=Role.BOTH, id="b0", **fields)


async def test_an_engines_own_key_replaces_the_clients(start):
    async with serving() as engine:
        site = await start("", engines=[with_key(engine, api_key=Secret("engine-key"))], is_awaited=False)
        await engine.is_up(site)
        await site.post(CHAT, chat_body(), headers={"Authorization": "Bearer client-key"})
        assert engine.received[0].headers["authorization"] == "Bearer engine-key"
        assert engine.probed["/v1/models"]["authorization"] == "Bearer engine-key"


async def test_the_clients_key_passes_on_to_an_engine_without_one_of_its_own(start):
    async with serving() as engine:
        site = await start("", engines=[with_key(engine)], is_awaited=False)
        await engine.is_up(site)
        await site.post(CHAT, chat_body(), headers={"Authorization": "Bearer client-key"})
        assert engine.received[0].headers["authorization"] == "Bearer client-key"
        assert "authorization" not in engine.probed["/v1/models"]


async def test_an_engines_key_is_not_told_to_another_host_that_keeps_its_metrics(start):
    async with serving() as engine, serving() as exporter:
        metrics_url = f"{exporter.url}/metrics"
        engines = [with_key(engine, api_key=Secret("engine-key"), metrics_url=metrics_url)]
        site = await start("", engines=engines, is_awaited=False)
        await engine.is_up(site)
        await until(lambda: "/metrics" in exporter.probed)
        assert "authorization" not in exporter.probed["/metrics"]


async def test_emulated_engines_with_a_key_are_served_through_the_gateway(start):
    site = await start("pd", fake={"api_key": "k"}, api_key="k")
    assert (await site.ask()).error is None


# ---- models and other routes -----------------------------------------------------------------------------------------


async def test_the_models_of_all_engines_are_listed_and_each_is_served_by_its_own(start):
    async with serving(model="other") as engine:
        site = await start("pd", engines=[engine.settings("b9")])
        await engine.is_up(site)
        _, body, _ = await site.get("/v1/models")
        assert [(row["id"], row["max_model_len"]) for row in body["data"]] == [(MODEL, 32768), ("other", 4096)]
        _, _, response = await site.post(CHAT, chat_body(model="other"))
        assert response.headers["x-sluice-decode"] == "b9"
        _, _, response = await site.post(CHAT, chat_body())
        assert response.headers["x-sluice-decode"] == "d0"


async def test_tokenize_and_detokenize_pass_through_to_one_engine(pair: Site):
    status, body, response = await pair.post("/tokenize", {"model": MODEL, "prompt": "hello there"})
    assert (status, body["count"]) == (200, len(body["tokens"]))
    assert response.headers["x-sluice-prefill"] == response.headers["x-sluice-decode"] == "d0"
    status, body, _ = await pair.post("/detokenize", {"tokens": body["tokens"]})
    assert (status, body) == (200, {"prompt": "hello there"})


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/v1/responses", 501, "does not support Responses API"),
        ("/v1/messages", 501, "does not support Messages API"),
        ("/v1/embeddings", 404, "Not Found"),
        ("/v1/rerank", 404, "Not Found"),
        ("/v1/score", 404, "Not Found"),
    ],
)
async def test_what_an_engine_does_not_serve_is_told_in_its_words(pair, path, status, said):
    answered, body, response = await pair.post(path, {"model": MODEL, "input": "x"})
    assert (answered, response.headers["x-sluice-attempts"]) == (status, "1")
    assert said in body["error"]["message"]


async def test_a_stream_on_a_route_that_passes_through_is_relayed(start):
    parts = [b'event: x\ndata: {"type": "response.created"}\n\n', b'data: {"type": "response.completed"}\n\n']
    async with serving(says(CHUNKED, *map(chunk, parts), b"0\r\n\r\n")) as engine:
        site = await start("", engines=[engine.settings("b0")], is_awaited=False)
        await engine.is_up(site)
        status, body, _ = await site.post("/v1/responses", {"model": MODEL, "input": "x", "stream": True})
    assert (status, body.encode()) == (200, b"".join(parts))


async def test_the_version_is_told(pair):
    assert (await pair.get("/version"))[1].keys() == {"version"}
