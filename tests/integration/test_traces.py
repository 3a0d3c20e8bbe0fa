"""Span trees at a real OTLP receiver, for every way in which a request can end; and collectors that fail."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator

import pytest

from gateway.config import AdmissionSettings, OtlpProtocol, TelemetrySettings
from tests.integration.harness import CHAT, RawClient, Site, a_post, chat_body, words
from tests.integration.scripted_engine import says, serving, text_answer, whole
from tests.otlp_receiver import Got, Receiver, grpc_receiver, http_receiver
from tests.polling import until

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
WITHIN_S = 15.0
SECRET = "xylophone"


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with http_receiver() as receiver:
        yield receiver


def telling(receiver: Receiver, **settings) -> TelemetrySettings:
    return TelemetrySettings(**({"endpoint": receiver.url, "sample_ratio": 1.0, "timeout_s": 0.5} | settings))


async def tree(receiver: Receiver, outcome: str) -> tuple[Got, list[Got]]:
    """The first request's span with that outcome, and its children; all in one trace, none outside its parent."""
    await until(lambda: receiver.root(outcome) is not None, WITHIN_S)
    root = receiver.root(outcome)
    children = receiver.children(root)
    for child in children:
        assert child.span.trace_id == root.span.trace_id
        assert root.span.start_time_unix_nano <= child.span.start_time_unix_nano
        assert child.span.start_time_unix_nano <= child.span.end_time_unix_nano <= root.span.end_time_unix_nano
    return root, children


def names(spans: list[Got]) -> list[str]:
    return [got.name for got in spans]


def waiting(site: Site) -> int:
    return site.gateway.driver.scheduler.waiting_count


# ---- one tree for each end -------------------------------------------------------------------------------------------


async def test_a_served_request_is_a_tree_of_six_with_predictions_beside_what_came(start, receiver):
    site = await start("ppdd", telemetry=telling(receiver))
    answer = await site.ask(words(50))
    root, children = await tree(receiver, "served")
    assert names(children) == ["gather", "decide", "prefill", "hand_off", "decode"]
    assert root.name == "chat emulated"
    assert root.resource["service.name"] == "sluice"
    told = root.attributes
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.provider.name"] == "vllm"
    assert told["gen_ai.usage.output_tokens"] == 8
    assert told["gen_ai.usage.input_tokens"] > 0
    assert told["http.response.status_code"] == 200
    assert (await site.get(f"/v1/sluice/decisions/{told['sluice.request_id']}"))[0] == 200
    assert told["gen_ai.response.time_to_first_chunk"] > 0
    assert told["sluice.predicted_ttft_s"] > 0
    assert told["sluice.predicted_tbt_s"] > 0
    assert told["sluice.tbt_s"] >= 0
    decide, prefill, decode = (next(got for got in children if got.name == name) for name in SHOWN)
    assert decide.attributes["sluice.candidates.count"] == 4
    assert len(decide.attributes["sluice.candidates.ttft_s"]) == len(decide.attributes["sluice.candidates.tbt_s"]) == 3
    assert prefill.attributes["sluice.engine"] == answer.headers["x-sluice-prefill"]
    assert decode.attributes["sluice.engine"] == answer.headers["x-sluice-decode"]


SHOWN = ("decide", "prefill", "decode")


async def test_a_request_that_waited_has_its_wait(start, receiver):
    admission = AdmissionSettings(max_in_flight_per_engine=1, max_waiting=3)
    site = await start("b", admission=admission, telemetry=telling(receiver))
    site["b0"].freeze()
    first = asyncio.create_task(site.ask())
    await until(lambda: site.busy() == 1)
    second = asyncio.create_task(site.ask(words(3)))
    await until(lambda: waiting(site) == 1)
    site["b0"].thaw()
    await asyncio.gather(first, second)
    await until(lambda: "wait" in names(receiver.spans), WITHIN_S)
    (wait,) = [got for got in receiver.spans if got.name == "wait"]
    (root,) = [got for got in receiver.spans if got.span.span_id == wait.span.parent_span_id]
    assert names(receiver.children(root)) == ["gather", "decide", "wait", "decode"]
    waited_s = (wait.span.end_time_unix_nano - wait.span.start_time_unix_nano) / 1e9
    assert root.attributes["sluice.wait_s"] == pytest.approx(waited_s, abs=1e-6)


async def test_a_refusal_tells_its_reason_and_numbers(start, receiver):
    admission = AdmissionSettings(max_in_flight_per_engine=1, max_waiting=0)
    site = await start("b", admission=admission, telemetry=telling(receiver))
    site["b0"].freeze()
    first = asyncio.create_task(site.ask())
    await until(lambda: site.busy() == 1)
    assert (await site.post(CHAT, chat_body()))[0] == 429
    root, children = await tree(receiver, "refused")
    assert names(children) == ["gather", "decide"]
    assert root.attributes["sluice.reason"] == root.attributes["error.type"] == "queue_full"
    assert root.attributes["sluice.refusal.retry_after_s"] > 0
    assert "wait already" in root.attributes["sluice.refusal.message"]
    site["b0"].thaw()
    await first


async def test_a_model_of_the_clients_invention_is_in_no_span_name(start, receiver):
    site = await start("b", telemetry=telling(receiver))
    assert (await site.post(CHAT, chat_body(model="no-such-model")))[0] == 404
    root, _ = await tree(receiver, "refused")
    assert root.name == "chat"


async def test_a_retried_request_has_a_decision_and_a_leg_per_attempt_and_each_engine_heard_of_its_own(start, receiver):
    async with serving(says(whole(b"{}", 500))) as bad, serving(says(whole(text_answer()))) as good:
        engines = [bad.settings("a"), good.settings("b")]
        site = await start("", engines=engines, is_awaited=False, telemetry=telling(receiver))
        await bad.is_up(site)
        await good.is_up(site)
        headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1"}
        assert (await site.post(CHAT, chat_body(), headers=headers))[0] == 200
        root, children = await tree(receiver, "served")
        assert (root.span.trace_id.hex(), root.span.parent_span_id.hex()) == (TRACE, CALLER)
        assert names(children) == ["gather", "decide", "decode", "decide", "decode"]
        failed, served = [got for got in children if got.name == "decode"]
        assert failed.attributes["error.type"].startswith("decode_status_500")
        assert failed.span.status.code == 2
        assert served.span.status.code == 0
        for engine, leg in ((bad, failed), (good, served)):
            (received,) = engine.received
            assert received.headers["traceparent"] == f"00-{TRACE}-{leg.span.span_id.hex()}-01"
            assert received.headers["tracestate"] == "vendor=1"


async def test_a_client_that_leaves_ends_its_tree(start, receiver):
    site = await start("pd", telemetry=telling(receiver))
    site["d0"].freeze()
    async with await RawClient.to(site) as client:
        client.send(a_post(chat_body(words(50), max_tokens=2000) | {"stream": True}))
        await until(lambda: site.busy("d0") == 1)
        client.abort()
        await site.assert_clean()
    root, children = await tree(receiver, "client_left")
    assert names(children) == ["gather", "decide", "prefill", "decode"]
    assert root.attributes["error.type"] == "client_left"


async def test_grpc_carries_the_same_tree(start):
    with grpc_receiver() as receiver:
        site = await start("pd", telemetry=telling(receiver, protocol=OtlpProtocol.GRPC, timeout_s=10.0))
        await site.ask(words(20))
        _, children = await tree(receiver, "served")
        assert names(children) == ["gather", "decide", "prefill", "hand_off", "decode"]
        await site.stop()


# ---- what is told, and what is not -----------------------------------------------------------------------------------


async def test_prompt_text_is_nowhere_unless_it_is_switched_on(start, receiver, log_lines):
    site = await start("pd", telemetry=telling(receiver))
    headers = {"authorization": "Bearer sk-secret"}
    await site.post(CHAT, chat_body(SECRET), headers=headers)
    await tree(receiver, "served")
    _, listed, _ = await site.get("/v1/sluice/decisions")
    _, told, _ = await site.get(f"/v1/sluice/decisions/{listed['decisions'][0]['id']}")
    for text in (b"".join(receiver.raw).decode("latin-1"), json.dumps(told), json.dumps(log_lines, default=str)):
        assert SECRET not in text
        assert "sk-secret" not in text


async def test_prompt_text_is_on_the_span_and_only_there_when_it_is_switched_on(start, receiver, log_lines):
    site = await start("pd", telemetry=telling(receiver, prompt_text=True))
    await site.post(CHAT, chat_body(SECRET))
    root, children = await tree(receiver, "served")
    assert json.loads(root.attributes["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": SECRET}]}
    ]
    assert all(SECRET not in str(child.attributes) for child in children)
    _, listed, _ = await site.get("/v1/sluice/decisions")
    assert SECRET not in json.dumps(listed) + json.dumps(log_lines, default=str)


async def test_a_caller_that_does_not_record_is_followed_and_the_engine_is_told(start, receiver):
    async with serving(says(whole(text_answer()))) as engine:
        site = await start("", engines=[engine.settings("a")], is_awaited=False, telemetry=telling(receiver))
        await engine.is_up(site)
        await site.post(CHAT, chat_body(), headers={"traceparent": f"00-{TRACE}-{CALLER}-00"})
        await site.post(CHAT, chat_body())
        await tree(receiver, "served")
        assert all(got.span.trace_id.hex() != TRACE for got in receiver.spans)
        first = engine.received[0].headers["traceparent"]
        assert re.fullmatch(rf"00-{TRACE}-[0-9a-f]{{16}}-00", first)
        assert CALLER not in first


async def test_without_a_collector_the_clients_own_context_passes_through_and_joins_the_log(start, log_lines):
    async with serving(says(whole(text_answer()))) as engine:
        site = await start("", engines=[engine.settings("a")], is_awaited=False)
        await engine.is_up(site)
        parent = f"00-{TRACE}-{CALLER}-01"
        await site.post(CHAT, chat_body(), headers={"traceparent": parent})
        assert engine.received[0].headers["traceparent"] == parent
    (line,) = [line for line in log_lines if line["event"] == "request"]
    assert line["trace_id"] == TRACE


# ---- collectors that fail --------------------------------------------------------------------------------------------


async def served_without(site: Site, count: int = 12) -> None:
    """So many requests are served, though no span was taken yet."""
    answers = await asyncio.gather(*(site.ask(words(5, number)) for number in range(count)))
    assert [answer.error for answer in answers] == [None] * count


def counts(site: Site) -> dict[str, float]:
    read = site.gateway.metrics.registry.get_sample_value
    return {name: read("sluice_spans_total", {"result": name}) for name in ("exported", "refused", "queue_full")}


async def test_a_collector_that_is_away_costs_spans_and_nothing_else(start, log_lines):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    site = await start("pd", telemetry=telling(Receiver(url)))
    await served_without(site)
    await until(lambda: counts(site)["refused"] >= 12 * 6, WITHIN_S)
    assert counts(site)["exported"] == 0
    assert [line["event"] for line in log_lines].count("spans_are_not_taken") == 1
    await served_without(site)


async def test_a_collector_that_never_answers_holds_up_nobody_and_what_it_cannot_take_is_dropped(start, receiver):
    receiver.is_silent = True
    site = await start("pd", telemetry=telling(receiver, queue_requests=4))
    await served_without(site, 30)
    assert counts(site)["queue_full"] >= 20 * 6
    await until(lambda: counts(site)["refused"] > 0, WITHIN_S)


async def test_a_collector_that_refuses_and_then_does_not_is_used_again(start, receiver, log_lines):
    receiver.status = 400
    site = await start("pd", telemetry=telling(receiver))
    await served_without(site)
    await until(lambda: counts(site)["refused"] >= 12 * 6, WITHIN_S)
    receiver.status = 200
    await served_without(site)
    await until(lambda: counts(site)["exported"] >= 12 * 6, WITHIN_S)
    said = [line["event"] for line in log_lines if str(line["event"]).startswith("spans_are")]
    assert said == ["spans_are_not_taken", "spans_are_taken_again"]


async def test_a_silent_collector_does_not_hold_up_the_end(start, receiver):
    receiver.is_silent = True
    site = await start("pd", telemetry=telling(receiver, timeout_s=600.0))
    await site.ask()
    async with asyncio.timeout(10.0):
        await site.stop()
