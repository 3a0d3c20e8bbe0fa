"""A hand-off that fails at any point before the first token is done again; the client gets the answer of one engine."""

from __future__ import annotations

import asyncio

import pytest

from gateway.config import AdmissionSettings, ContinuationSettings, EngineClientSettings
from tests.integration.harness import CHAT, COMPLETIONS, MODEL, Site, Start, a_chat, chat_body, events, words
from tests.polling import until

PROMPT = words(200)
QUICK_CLIENT = EngineClientSettings(connect_timeout_s=0.5, first_event_timeout_s=0.6, idle_timeout_s=0.6)
both_ways = pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])


@pytest.fixture
async def expected(start: Start) -> str:
    """What a single engine, asked directly, answers."""
    single = await start("b")
    result = await single.ask(PROMPT, max_tokens=30)
    assert result.error is None
    return result.text


async def answer(site: Site, is_stream: bool):
    return await site.ask(PROMPT, max_tokens=30, stream=is_stream)


def hand_offs(site: Site) -> int:
    """Transfers that decode engines have made."""
    return sum(fake.engine.counters.transferred_bytes > 0 for fake in site.fakes.values())


@both_ways
async def test_a_hand_off_gives_the_text_of_a_single_engine(mesh, expected, is_stream):
    result = await answer(mesh, is_stream)
    assert (result.error, result.text, result.output_tokens) == (None, expected, 30)
    assert result.headers["x-sluice-prefill"][0] + result.headers["x-sluice-decode"][0] == "pd"
    assert hand_offs(mesh) == 1


# ---- the prefill leg -------------------------------------------------------------------------------------------------


@both_ways
async def test_a_prefill_engine_that_refuses_connections_is_avoided(mesh, expected, is_stream):
    mesh["p0"].refuse_connections()
    results = [await answer(mesh, is_stream) for _ in range(3)]
    assert [result.text for result in results] == [expected] * 3
    assert {result.headers["x-sluice-prefill"] for result in results} == {"p1"}


@both_ways
async def test_a_prefill_that_fails_with_500_is_done_elsewhere(mesh, expected, is_stream):
    mesh["p0"].faults.errors_left = 1
    results = [await answer(mesh, is_stream) for _ in range(2)]
    assert [result.text for result in results] == [expected] * 2
    assert mesh["p0"].faults.errors_left == 0
    assert "2" in [result.headers["x-sluice-attempts"] for result in results]


@both_ways
async def test_a_prefill_engine_that_dies_at_work_is_replaced_at_once(mesh, expected, is_stream):
    mesh["p0"].freeze()
    mesh["p1"].freeze()
    asking = asyncio.create_task(answer(mesh, is_stream))
    await until(lambda: mesh.busy("p0", "p1") == 1)
    victim, other = ("p0", "p1") if mesh.busy("p0") else ("p1", "p0")
    mesh[other].thaw()
    await mesh[victim].die()
    result = await asking
    assert (result.error, result.text) == (None, expected)
    assert result.headers["x-sluice-prefill"] == other


@both_ways
async def test_a_prefill_engine_that_freezes_is_given_up_in_time(start, expected, is_stream):
    site = await start("ppd", engine_client=QUICK_CLIENT)
    site["p0"].freeze()
    results = await asyncio.gather(*(answer(site, is_stream) for _ in range(3)))
    assert [result.text for result in results] == [expected] * 3
    assert {result.headers["x-sluice-prefill"] for result in results} == {"p1"}


@both_ways
async def test_a_prefill_without_parameters_leaves_the_decode_engine_to_prefill(mesh, expected, is_stream):
    mesh["p0"].faults.omits_kv_params = mesh["p1"].faults.omits_kv_params = True
    result = await answer(mesh, is_stream)
    assert (result.error, result.text) == (None, expected)
    assert hand_offs(mesh) == 0


# ---- the decode leg --------------------------------------------------------------------------------------------------


@both_ways
async def test_a_decode_engine_that_refuses_connections_is_avoided_and_the_prompt_prefilled_anew(
    mesh, expected, is_stream
):
    mesh["d0"].refuse_connections()
    results = [await answer(mesh, is_stream) for _ in range(3)]
    assert [result.text for result in results] == [expected] * 3
    assert {result.headers["x-sluice-decode"] for result in results} == {"d1"}


@both_ways
async def test_a_decode_that_fails_with_500_is_done_elsewhere_with_new_parameters(mesh, expected, is_stream):
    mesh["d0"].faults.errors_left = mesh["d1"].faults.errors_left = 1
    result = await answer(mesh, is_stream)
    assert (result.error, result.text) == (None, expected)
    assert result.headers["x-sluice-attempts"] == "3"


@both_ways
async def test_a_decode_engine_that_dies_before_its_first_token_is_replaced_at_once(mesh, expected, is_stream):
    mesh["d0"].freeze()
    mesh["d1"].freeze()
    asking = asyncio.create_task(answer(mesh, is_stream))
    await until(lambda: mesh.busy("d0", "d1") == 1)
    victim, other = ("d0", "d1") if mesh.busy("d0") else ("d1", "d0")
    mesh[other].thaw()
    await mesh[victim].die()
    result = await asking
    assert (result.error, result.text) == (None, expected)
    assert result.headers["x-sluice-decode"] == other


async def test_a_decode_engine_that_freezes_before_its_first_token_is_given_up_in_time(start, expected):
    site = await start("pdd", engine_client=QUICK_CLIENT)
    site["d0"].freeze()
    results = await asyncio.gather(*(answer(site, True) for _ in range(3)))
    assert [result.text for result in results] == [expected] * 3
    assert {result.headers["x-sluice-decode"] for result in results} == {"d1"}


@both_ways
async def test_kv_that_is_gone_when_decode_reads_it_is_computed_again(mesh, expected, is_stream):
    """The prefill engine restarts between the legs: its parameters name nothing any more."""
    for name in ("d0", "d1"):
        mesh[name].freeze()
    asking = asyncio.create_task(answer(mesh, is_stream))
    await until(lambda: mesh.busy("d0", "d1") == 1)
    for name in ("p0", "p1"):
        await mesh[name].die()
        await mesh[name].revive()
    for name in ("d0", "d1"):
        mesh[name].thaw()
    result = await asking
    assert (result.error, result.text) == (None, expected)
    assert int(result.headers["x-sluice-attempts"]) >= 2


async def test_every_engine_failing_is_one_honest_502(mesh):
    for name in ("p0", "p1"):
        mesh[name].faults.errors_left = 10
    status, body, response = await mesh.post(CHAT, chat_body(PROMPT))
    assert status == 502
    assert "prefill_status_500" in body["error"]["message"]
    assert response.headers["x-sluice-reason"] == "too_many_attempts"


async def test_attempts_are_bounded(start):
    site = await start("ppppdd", admission=AdmissionSettings(max_attempts=2))
    for name in ("p0", "p1", "p2", "p3"):
        site[name].faults.errors_left = 10
    assert (await site.post(CHAT, chat_body(PROMPT)))[0] == 502
    assert sum(10 - site[name].faults.errors_left for name in ("p0", "p1", "p2", "p3")) == 2


# ---- after the first token -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drop_after_tokens", "error_after_tokens"])
async def test_a_decode_that_fails_half_way_ends_in_one_error_event_after_whole_ones(start, fault):
    site = await start("ppdd", continuation=ContinuationSettings(is_on=False))
    for name in ("d0", "d1"):
        setattr(site[name].faults, fault, 5)
    status, body, _ = await site.post(CHAT, chat_body(PROMPT, stream=True, max_tokens=30))
    assert status == 200
    data = events(body)
    assert ['"error"' in event for event in data if event != "[DONE]"].count(True) == 1
    assert '"error"' in data[-1] or data[-1] == "[DONE]"
    assert len([event for event in data if '"content":"' in event]) <= 6


async def test_a_decode_engine_that_dies_half_way_breaks_only_its_own_streams(start):
    mesh = await start("ppdd", continuation=ContinuationSettings(is_on=False))
    mesh["d0"].slow_down(100)
    streams = [asyncio.create_task(mesh.ask(words(50, seed), max_tokens=200)) for seed in range(6)]
    await until(lambda: mesh["d0"].engine.counters.generated_tokens >= 6)
    await mesh["d0"].die()
    results = await asyncio.gather(*streams)
    by_engine = {name: [r for r in results if r.headers["x-sluice-decode"] == name] for name in ("d0", "d1")}
    assert {(result.error, result.output_tokens) for result in by_engine["d1"]} == {(None, 200)}
    assert {result.error for result in by_engine["d0"]} == {"stream_error"}


# ---- the lease -------------------------------------------------------------------------------------------------------


async def test_a_decode_engine_that_shows_no_head_within_the_lease_is_given_up_for_a_new_prefill(start, expected):
    site = await start("pdd", admission=AdmissionSettings(lease_s=0.2))
    site["d0"].faults.is_silent = site["d1"].faults.is_silent = True
    asking = asyncio.create_task(answer(site, True))
    await until(lambda: site["p0"].engine.load().held_count == 1)
    await until(lambda: bool(site.state.reservations))
    site["d1"].faults.is_silent = False
    result = await asking
    assert (result.error, result.text) == (None, expected)


async def test_blocks_nobody_reads_are_freed_by_their_lease(start):
    site = await start("pd", engine={"lease_s": 2.0}, admission=AdmissionSettings(max_attempts=1))
    site["d0"].faults.errors_left = 1
    assert (await site.post(CHAT, chat_body(PROMPT)))[0] == 502
    await until(lambda: site["p0"].engine.load().held_count == 0)
    assert site["p0"].engine.counters.expired_leases == 1


# ---- what is served without a hand-off -------------------------------------------------------------------------------


@both_ways
async def test_several_choices_come_from_one_engine(mesh, is_stream):
    status, body, response = await mesh.post(CHAT, chat_body(PROMPT, n=3, temperature=1, stream=is_stream))
    assert status == 200
    assert response.headers["x-sluice-prefill"] == response.headers["x-sluice-decode"]
    if is_stream:
        assert {f'"index":{n}' in body for n in range(3)} == {True}
        assert events(body)[-1] == "[DONE]"
    else:
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert hand_offs(mesh) == 0


@both_ways
async def test_several_prompts_come_from_one_engine_as_each_alone(mesh, is_stream):
    prompts = [words(20, seed) for seed in range(3)]
    fields = {"model": MODEL, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    alone = [(await mesh.post(COMPLETIONS, fields | {"prompt": prompt}))[1]["choices"][0]["text"] for prompt in prompts]
    moved = hand_offs(mesh)
    status, body, response = await mesh.post(COMPLETIONS, fields | {"prompt": prompts, "stream": is_stream})
    assert status == 200
    assert response.headers["x-sluice-prefill"] == response.headers["x-sluice-decode"]
    assert hand_offs(mesh) == moved
    if not is_stream:
        assert [choice["text"] for choice in body["choices"]] == alone


async def test_many_requests_with_failures_among_them_all_get_the_right_text(mesh, expected):
    for fake in mesh.fakes.values():
        fake.faults.errors_left = 2
    results = await asyncio.gather(*(answer(mesh, number % 2 == 0) for number in range(24)))
    wrong = [result for result in results if result.text != expected]
    assert len(wrong) <= 4
    assert {result.status for result in wrong} <= {502}
    assert (await mesh.client.send(a_chat(PROMPT, max_tokens=30))).text == expected
