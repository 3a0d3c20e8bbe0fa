"""A gateway over time: those who wait, what the journal holds, what is left after many requests, how it stops."""

from __future__ import annotations

import asyncio
import json
import random

import aiohttp
import pytest

from gateway.app import scheduler_of
from gateway.config import (
    AdmissionSettings,
    Config,
    EngineClientSettings,
    JournalSettings,
    PolicySettings,
    PredictorSettings,
    ServerSettings,
)
from gateway.journal import replay
from tests.integration.harness import CHAT, HANDS_OFF, RawClient, Site, a_post, chat_body, events, words
from tests.integration.scripted_engine import CHUNKED, DONE, chunk, says, serving, text_answer, token, whole
from tests.polling import until

ONE_AT_A_TIME = AdmissionSettings(max_in_flight_per_engine=1, max_waiting=3, max_wait_s=30.0)


def waiting(site: Site) -> int:
    return site.gateway.driver.scheduler.waiting_count


# ---- waiting ---------------------------------------------------------------------------------------------------------


async def test_requests_wait_in_order_for_the_one_place(start):
    site = await start("b", admission=ONE_AT_A_TIME)
    site["b0"].freeze()
    order: list[int] = []

    async def ask(number: int) -> None:
        assert (await site.ask(words(5, number))).error is None
        order.append(number)

    tasks = [asyncio.create_task(ask(0))]
    await until(lambda: site.busy() == 1)
    for number in (1, 2, 3):
        tasks.append(asyncio.create_task(ask(number)))
        await until(lambda number=number: waiting(site) == number)
    site["b0"].thaw()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3]


async def test_a_full_queue_is_429_with_when_to_come_back(start):
    site = await start("b", admission=AdmissionSettings(max_in_flight_per_engine=1, max_waiting=1))
    site["b0"].freeze()
    tasks = [asyncio.create_task(site.ask(words(5, number))) for number in range(2)]
    await until(lambda: waiting(site) == 1)
    status, body, response = await site.post(CHAT, chat_body())
    assert (status, body["error"]["code"], body["error"]["type"]) == (429, "queue_full", "rate_limit_error")
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["x-sluice-reason"] == "queue_full"
    site["b0"].thaw()
    assert [result.error for result in await asyncio.gather(*tasks)] == [None, None]


async def test_a_wait_that_takes_too_long_is_429(start):
    site = await start("b", admission=AdmissionSettings(max_in_flight_per_engine=1, max_wait_s=0.1))
    site["b0"].freeze()
    first = asyncio.create_task(site.ask())
    await until(lambda: site.busy() == 1)
    status, body, response = await site.post(CHAT, chat_body())
    assert (status, body["error"]["code"]) == (429, "waited_too_long")
    assert int(response.headers["retry-after"]) >= 1
    site["b0"].thaw()
    assert (await first).error is None


async def test_a_place_that_appears_with_an_engine_goes_to_who_waits(start):
    site = await start("bb", admission=ONE_AT_A_TIME)
    await site["b1"].die()
    await until(lambda: not site.is_up("b1"))
    site["b0"].freeze()
    first = asyncio.create_task(site.ask())
    await until(lambda: site.busy("b0") == 1)
    second = asyncio.create_task(site.ask())
    await until(lambda: waiting(site) == 1)
    await site["b1"].revive()
    assert (await second).headers["x-sluice-decode"] == "b1"
    site["b0"].thaw()
    assert (await first).error is None


# ---- kept-alive connections ------------------------------------------------------------------------------------------


async def test_engine_connections_are_reused_and_dropped_before_the_engine_drops_them(start):
    client = EngineClientSettings(keepalive_s=0.1)
    async with serving() as engine:
        site = await start("", engines=[engine.settings("b0")], is_awaited=False, engine_client=client)
        await engine.is_up(site)
        for _ in range(5):
            assert (await site.post(CHAT, chat_body()))[0] == 200
        assert engine.connections == 1
        await until(lambda: site.gateway.engines.open_count == 0)
        assert (await site.post(CHAT, chat_body()))[0] == 200
        assert engine.connections == 2


async def test_a_stale_connection_costs_a_client_nothing(start):
    """The engine closes each connection when a second request comes on it, without an answer."""

    async def once(received, writer):
        if id(writer) in seen:
            writer.close()
            return
        seen.add(id(writer))
        kept.append(writer)
        writer.write(whole(text_answer()))

    seen: set[int] = set()
    kept: list[asyncio.StreamWriter] = []
    async with serving(once) as engine:
        site = await start("", engines=[engine.settings("b0")], is_awaited=False)
        await engine.is_up(site)
        for _ in range(4):
            status, _, response = await site.post(CHAT, chat_body())
            assert (status, response.headers["x-sluice-attempts"]) == (200, "1")


async def test_an_engine_that_half_closes_after_its_answer_is_served_on_a_new_connection(start):
    async def half_close(received, writer):
        writer.write(whole(text_answer()))
        writer.write_eof()

    async with serving(half_close) as engine:
        site = await start("", engines=[engine.settings("b0")], is_awaited=False)
        await engine.is_up(site)
        for _ in range(3):
            assert (await site.post(CHAT, chat_body()))[0] == 200
        await until(lambda: site.gateway.engines.open_count == 0)


# ---- plug-ins that fail ----------------------------------------------------------------------------------------------


async def test_a_failure_of_ours_before_the_answer_is_a_500_without_a_word_of_why(start, log_lines):
    policy = PolicySettings(name="tests.integration.broken_plug_ins:Policy")
    site = await start("pd", policy=policy)
    status, body, _ = await site.post(CHAT, chat_body())
    assert (status, body["error"]["type"]) == (500, "internal_error")
    assert "secret" not in json.dumps(body)
    assert "unexpected failure" in [line["event"] for line in log_lines]


async def test_a_failure_of_ours_after_the_answer_began_never_looks_like_a_whole_answer(start):
    predictor = PredictorSettings(name="tests.integration.broken_plug_ins:Predictor")
    site = await start("pd", predictor=predictor)
    async with await RawClient.to(site) as client:
        client.send(a_post(chat_body(stream=True)))
        raw = await client.read_all()
    assert raw.count(b"HTTP/1.1") == 1
    assert not raw.endswith(b"0\r\n\r\n")


# ---- the journal -----------------------------------------------------------------------------------------------------


async def test_a_live_gateways_journal_gives_the_same_decisions_again(start, tmp_path):
    path = tmp_path / "journal"
    admission = AdmissionSettings(max_in_flight_per_engine=2, max_waiting=5, max_wait_s=0.5)
    settings = {"admission": admission, "journal": JournalSettings(path=str(path))}
    site = await start("ppdd", **settings)
    site["p0"].faults.errors_left = 3
    await asyncio.gather(*(site.ask(words(50, number), max_tokens=30) for number in range(30)))
    await site["d0"].die()
    await asyncio.gather(*(site.ask(words(50, number), n=1 + number % 2) for number in range(10)))
    await site.assert_clean()
    site.gateway.driver.journal.close()
    lines = path.read_bytes().splitlines()
    done = [json.loads(line)["do"] for line in lines]
    assert done[0] == "start"
    assert {"decide", "apply", "wake"} <= set(done)
    assert replay(lines, scheduler_of(Config(admission=admission, policy=HANDS_OFF), seed=0)) == []


# ---- what is left ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_nothing_is_left_of_five_hundred_requests_of_every_kind(start):
    site = await start("ppdd", engine_client=EngineClientSettings(keepalive_s=0.2))
    tasks_before = len(asyncio.all_tasks())
    rng = random.Random(5)

    async def one(number: int) -> None:
        kind = rng.randrange(10)
        client = asyncio.create_task(
            site.ask(words(rng.randrange(1, 200), number), max_tokens=rng.randrange(1, 40), stream=kind % 2 == 0)
            if kind < 8
            else site.post(CHAT, chat_body(model="nope") if kind == 8 else {}, headers={"connection": "close"})
        )
        if kind < 3:
            await asyncio.wait([client], timeout=rng.random() * 0.05)
            client.cancel()
        await asyncio.wait([client])

    for batch in range(10):
        rng.choice(list(site.fakes.values())).faults.errors_left = 3
        await asyncio.gather(*(one(50 * batch + number) for number in range(50)))
    await site.assert_clean()
    await until(lambda: site.gateway.engines.open_count == 0)
    await site.client.__aexit__(None, None, None)
    await site.client.__aenter__()
    await until(lambda: site.gateway.server.open_count == 0)
    await until(lambda: len(asyncio.all_tasks()) <= tasks_before + 2)  # the watch's probes come and go


# ---- stopping --------------------------------------------------------------------------------------------------------


async def refuses(site: Site) -> bool:
    """Whether a new client gets no connection."""
    try:
        client = await RawClient.to(site)
    except ConnectionError:
        return True
    client.abort()
    return False


async def test_a_stop_lets_a_stream_end_and_takes_nobody_new(start):
    is_told = asyncio.Event()

    async def play(received, writer):
        writer.write(CHUNKED + chunk(token("one")))
        await is_told.wait()
        writer.write(chunk(token("two") + DONE) + b"0\r\n\r\n")

    async with serving(play) as engine:
        server = ServerSettings(port=0, shutdown_grace_s=3.0)
        site = await start("", engines=[engine.settings("b0")], is_awaited=False, server=server)
        await engine.is_up(site)
        async with await RawClient.to(site) as client:
            client.send(a_post(chat_body(stream=True)))
            await client.read_until(b"one")
            stopping = asyncio.create_task(site.stop())
            await until(lambda: refuses(site))
            is_told.set()
            rest = await client.read_all()
            assert rest.endswith(b"0\r\n\r\n")
            assert b"two" in rest
        await stopping


async def test_a_stop_ends_what_takes_longer_than_the_grace_once(start):
    async with serving(says(CHUNKED, chunk(token("one")))) as engine:
        site = await start("", engines=[engine.settings("b0")], is_awaited=False)
        await engine.is_up(site)
        async with await RawClient.to(site) as client:
            client.send(a_post(chat_body(stream=True)))
            await client.read_until(b"one")
            began_at = asyncio.get_running_loop().time()
            await site.stop()
            assert 0.4 < asyncio.get_running_loop().time() - began_at < 0.95
            assert not (await client.read_all()).endswith(b"0\r\n\r\n")
        await until(lambda: engine.closed == 1)


async def test_connections_over_the_limit_are_closed_and_the_others_served(start):
    site = await start("b", server=ServerSettings(port=0, max_connections=3, shutdown_grace_s=0.5))
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector) as session, session.get(f"{site.url}/health") as response:
        assert response.status == 200
        clients = [await RawClient.to(site) for _ in range(2)]
        async with await RawClient.to(site) as late:
            assert await late.read_all() == b""
        async with session.post(site.url + CHAT, json=chat_body(stream=True)) as answer:
            assert events(await answer.text())[-1] == "[DONE]"
        for client in clients:
            client.abort()
    await until(lambda: site.gateway.server.open_count == 0)
