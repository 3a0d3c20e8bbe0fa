"""Bounds, classes and tenants over real HTTP: what is asked for is obeyed, what cannot be meant is refused by name."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.auth import hash_key
from gateway.config import AdmissionSettings, JournalSettings, TokenSettings
from gateway.tenants import AuthSettings, SloSettings, TenantSettings
from gateway.toml import Secret
from tests.integration.harness import CHAT, RawClient, Site, a_post, chat_body
from tests.integration.scripted_engine import serving
from tests.polling import until

ONE_AT_A_TIME = AdmissionSettings(max_in_flight_per_engine=1)


def a_tenant(name: str, key: str | None = None, **fields: Any) -> TenantSettings:
    return TenantSettings(name=name, key_hashes=(Secret(hash_key(key).hex()),) if key else (), **fields)


def key(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


async def chat(site: Site, **headers: str) -> tuple[int, Any, Any]:
    return await site.post(CHAT, chat_body(), headers={name.replace("_", "-"): text for name, text in headers.items()})


@asynccontextmanager
async def occupied(site: Site):
    """The only place is taken, and stays so inside this block."""
    site["b0"].freeze()
    running = asyncio.create_task(chat(site))
    await until(lambda: site.busy("b0") == 1)
    yield
    site["b0"].thaw()
    assert (await running)[0] == 200


def waiting(site: Site) -> int:
    return site.gateway.driver.scheduler.waiting_count


# ---- bounds ----------------------------------------------------------------------------------------------------------


async def test_a_request_whose_bound_passes_while_it_waits_is_refused_then_and_told_its_bounds(start):
    site = await start("b", admission=ONE_AT_A_TIME)
    async with occupied(site):
        status, body, response = await chat(site, x_slo_ttft_ms="150", x_slo_tbt_ms="5000")
    assert (status, body["error"]["code"]) == (429, "ttft_slo")
    assert body["error"]["type"] == "rate_limit_error"
    assert body["error"]["numbers"].pop("retry_after_ms") == int(response.headers["retry-after-ms"])
    assert body["error"]["numbers"] == {"slo_ttft_ms": 150.0, "slo_tbt_ms": 5000.0}
    assert response.headers["x-sluice-reason"] == "ttft_slo"
    assert response.headers["x-sluice-slo-ttft-ms"] == "150.0"
    assert int(response.headers["retry-after"]) >= 1
    assert int(response.headers["retry-after-ms"]) >= 1


async def test_a_deadline_that_passes_while_it_waits_is_named(start):
    site = await start("b", admission=ONE_AT_A_TIME)
    async with occupied(site):
        at_ms = int(time.time() * 1e3) + 200
        status, body, _ = await chat(site, x_request_deadline_ms=str(at_ms), x_slo_ttft_ms="60000")
    assert (status, body["error"]["code"]) == (429, "deadline_slo")


async def test_the_bounds_of_the_settings_hold_where_a_request_says_nothing(start):
    site = await start("b", admission=ONE_AT_A_TIME, slo=SloSettings(ttft_s=0.1))
    async with occupied(site):
        site["b0"].freeze()
        refused, _, _ = await chat(site)
        waits = asyncio.create_task(chat(site, x_slo_ttft_ms="none"))
        await until(lambda: waiting(site) == 1)
    assert refused == 429
    assert (await waits)[0] == 200


async def test_best_effort_goes_behind_a_request_with_a_bound(start):
    site = await start("b", admission=ONE_AT_A_TIME)
    order: list[str] = []

    async def ask(name: str, **headers: str) -> None:
        assert (await chat(site, **headers))[0] == 200
        order.append(name)

    async with occupied(site), asyncio.TaskGroup() as group:
        group.create_task(ask("any time"))
        await until(lambda: waiting(site) == 1)
        group.create_task(ask("low", x_slo_ttft_ms="60000", x_priority="0"))
        await until(lambda: waiting(site) == 2)
        group.create_task(ask("soon", x_slo_ttft_ms="50000"))
        await until(lambda: waiting(site) == 3)
        site["b0"].thaw()
    assert order == ["soon", "low", "any time"]


async def test_a_bounded_client_that_leaves_frees_its_place(start):
    site = await start("b", admission=AdmissionSettings(max_in_flight_per_engine=1, max_waiting=1))
    async with occupied(site):
        async with await RawClient.to(site) as client:
            client.send(a_post(chat_body(), headers="x-slo-ttft-ms: 60000\r\n"))
            await until(lambda: waiting(site) == 1)
            assert (await chat(site, x_slo_ttft_ms="60000"))[0] == 429
            client.abort()
            await until(lambda: waiting(site) == 0)
        next_one = asyncio.create_task(chat(site, x_slo_ttft_ms="60000"))
        await until(lambda: waiting(site) == 1)
    assert (await next_one)[0] == 200


async def test_an_answer_says_what_was_predicted_for_both(pair):
    status, _, response = await chat(pair)
    assert status == 200
    assert float(response.headers["x-sluice-predicted-ttft-ms"]) > 0
    assert float(response.headers["x-sluice-predicted-tbt-ms"]) > 0


# ---- what cannot be meant --------------------------------------------------------------------------------------------

HORRORS = [
    ("x-slo-ttft-ms", "-1"),
    ("x-slo-ttft-ms", "0"),
    ("x-slo-ttft-ms", "NaN"),
    ("x-slo-ttft-ms", "inf"),
    ("x-slo-ttft-ms", ""),
    ("x-slo-ttft-ms", "9" * 300),
    ("x-slo-tbt-ms", "1e-400"),
    ("x-slo-tbt-ms", "50,60"),
    ("x-slo-tpot-ms", "0x20"),
    ("x-slo-tpot-ms", "\xb2"),
    ("x-request-deadline-ms", "-5"),
    ("x-request-deadline-ms", "99999999999999999"),
    ("x-priority", "99"),
    ("x-priority", "-1"),
    ("x-priority", "1.0"),
]


@pytest.mark.parametrize(("name", "text"), HORRORS, ids=range(len(HORRORS)))
async def test_a_header_that_cannot_be_meant_is_400_with_its_name_and_no_engine_is_bothered(pair, name, text):
    async with await RawClient.to(pair) as client:
        client.send(a_post(chat_body(), headers="").replace(b"host: g", f"host: g\r\n{name}: {text}".encode("latin-1")))
        status, _, body = await client.read_answer()
    assert status == 400
    assert json.loads(body)["error"]["param"] == name
    assert pair["p0"].engine.counters.prompt_tokens == 0


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tbt-ms", "x-slo-tpot-ms", "x-request-deadline-ms"])
async def test_a_header_given_twice_is_400_with_its_name(pair, name):
    async with await RawClient.to(pair) as client:
        client.send(a_post(chat_body(), headers=f"{name}: 100\r\n{name.upper()}: 100\r\n"))
        status, _, body = await client.read_answer()
    assert status == 400
    assert json.loads(body)["error"]["param"] == name


@pytest.mark.parametrize("text", ["0", "1600000000000"])
async def test_a_deadline_that_has_passed_is_refused_at_once(pair, text):
    status, body, response = await chat(pair, x_request_deadline_ms=text)
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "deadline_past", "x-request-deadline-ms")
    assert response.headers["x-sluice-reason"] == "deadline_past"
    assert "retry-after" not in response.headers


# ---- tenants ---------------------------------------------------------------------------------------------------------


async def test_without_a_known_key_a_request_is_401_where_one_is_required(start):
    site = await start("b", auth=AuthSettings(required=True), tenants=(a_tenant("one", "sk-1"),))
    for headers in ({}, key("sk-2"), {"authorization": "Basic sk-1"}):
        status, body, _ = await site.post(CHAT, chat_body(), headers=headers)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert (await site.post(CHAT, chat_body(), headers=key("sk-1")))[0] == 200
    assert (await site.get("/health"))[0] == 200


async def test_a_key_is_neither_logged_nor_passed_on_and_neither_are_the_bounds(start, log_lines):
    async with serving() as engine:
        site = await start("", engines=[engine.settings("b0")], is_awaited=False, tenants=(a_tenant("one", "sk-1"),))
        await engine.is_up(site)
        for secret in ("sk-1", "theirs"):
            headers = key(secret) | {"x-slo-ttft-ms": "9000", "x-priority": "1", "x-kept": "yes"}
            assert (await site.post(CHAT, chat_body(), headers=headers))[0] == 200
        seen = [received.headers for received in engine.received if received.path == CHAT]
    assert [headers.get("authorization") for headers in seen] == [None, "Bearer theirs"]
    assert not {"x-slo-ttft-ms", "x-priority"} & seen[0].keys()
    assert seen[0]["x-kept"] == "yes"
    assert "sk-1" not in str(log_lines)
    assert {line.get("tenant") for line in log_lines if line["event"] == "request"} == {"one", "default"}


async def test_a_proxy_in_a_trusted_network_names_the_tenant(start):
    settings = {"tenants": (a_tenant("one", max_priority=2, requests_per_s=0.001, burst_s=0.1),)}
    auth = AuthSettings(required=True, tenant_header="x-tenant", trusted_networks=("127.0.0.0/8",))
    site = await start("b", auth=auth, **settings)
    assert (await chat(site, x_tenant="one"))[0] == 200
    status, body, _ = await chat(site, x_tenant="one")
    assert (status, body["error"]["code"]) == (429, "rate_limited")
    status, body, _ = await chat(site, x_tenant="two")
    assert (status, body["error"]["param"]) == (400, "x-tenant")
    elsewhere = AuthSettings(required=True, tenant_header="x-tenant", trusted_networks=("10.0.0.0/8",))
    site = await start("b", auth=elsewhere, **settings)
    assert (await chat(site, x_tenant="one"))[0] == 401


async def test_a_tenant_over_its_tokens_is_told_when_to_come_back(start):
    tenants = (a_tenant("one", "sk-1", tokens_per_s=1.0, burst_s=1.0),)
    site = await start("b", tenants=tenants, tokens=TokenSettings(ask_engine=False))
    assert (await site.post(CHAT, chat_body(), headers=key("sk-1")))[0] == 200
    status, body, response = await site.post(CHAT, chat_body(), headers=key("sk-1"))
    assert (status, body["error"]["code"]) == (429, "rate_limited")
    assert int(response.headers["retry-after"]) > 5  # eight output tokens at least are owed
    assert (await site.post(CHAT, chat_body()))[0] == 200


async def test_a_tenant_has_no_more_in_flight_than_it_may_and_gets_its_places_back(start):
    site = await start("b", tenants=(a_tenant("one", "sk-1", max_in_flight=1),))
    site["b0"].freeze()
    async with await RawClient.to(site) as client:
        client.send(a_post(chat_body(), headers="authorization: Bearer sk-1\r\n"))
        await until(lambda: site.busy("b0") == 1)
        status, body, _ = await site.post(CHAT, chat_body(), headers=key("sk-1"))
        assert (status, body["error"]["code"]) == (429, "too_many_in_flight")
        client.abort()
    site["b0"].thaw()
    await until(site.is_idle)
    assert (await site.post(CHAT, chat_body(), headers=key("sk-1")))[0] == 200


@pytest.mark.slow
async def test_one_tenant_that_floods_leaves_the_other_its_share(start):
    site = await start("b", admission=ONE_AT_A_TIME, tenants=(a_tenant("flood", "sk-f"), a_tenant("modest", "sk-m")))
    order: list[str] = []

    async def ask(name: str, secret: str) -> None:
        assert (await site.post(CHAT, chat_body(), headers=key(secret)))[0] == 200
        order.append(name)

    async with occupied(site), asyncio.TaskGroup() as group:
        for _ in range(60):
            group.create_task(ask("flood", "sk-f"))
        await until(lambda: waiting(site) == 60)
        for _ in range(6):
            group.create_task(ask("modest", "sk-m"))
        await until(lambda: waiting(site) == 66)
        site["b0"].thaw()
    assert max(place for place, name in enumerate(order) if name == "modest") <= 14


async def test_every_refusal_stands_in_the_journal(start, tmp_path):
    path = tmp_path / "journal"
    tenants = (a_tenant("one", "sk-1", requests_per_s=0.001, burst_s=0.1),)
    site = await start("b", tenants=tenants, journal=JournalSettings(path=str(path)))
    await chat(site, x_request_deadline_ms="0")
    for _ in range(2):
        await site.post(CHAT, chat_body(), headers=key("sk-1"))
    await site.stop()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    refused = [(line["tenant"], line["decision"]["reason"]) for line in lines if line["do"] == "refuse"]
    assert refused == [("default", "deadline_past"), ("one", "rate_limited")]
    assert "sk-1" not in path.read_text()
    (decided,) = [line for line in lines if line["do"] == "decide"]
    assert decided["request"]["tenant"] == "one"
