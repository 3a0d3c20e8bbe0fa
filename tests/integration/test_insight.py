"""What the gateway tells about itself over HTTP, and to whom."""

from __future__ import annotations

import pytest

from gateway.config import Access, AdmissionSettings, TelemetrySettings
from gateway.insight import is_loopback
from tests.integration.harness import CHAT, Site, chat_body, words
from tests.polling import until

DECISIONS = "/v1/sluice/decisions"


async def over(site: Site) -> None:
    """Returns when no request is open: a client has its last byte a moment before the record is made."""
    await until(lambda: site.gateway.driver.recorder.open_count == 0)


async def test_one_decision_is_found_by_the_clients_id_with_all_its_candidates(start):
    site = await start("ppdd")
    await site.post(CHAT, chat_body(words(40), stream=True), headers={"x-request-id": "mine-1"})
    await over(site)
    status, told, _ = await site.get(f"{DECISIONS}/mine-1")
    assert (status, told["outcome"], told["client_id"], told["model"]) == (200, "served", "mine-1", "emulated")
    (attempt,) = told["tries"]
    assert (attempt["pair_count"], len(attempt["candidates"])) == (4, 4)
    assert attempt["chosen"]["prefill"] == told["prefill"] == attempt["candidates"][0]["prefill"]
    assert told["ttft_s"] > 0
    assert told["predicted_ttft_s"] > 0
    again = (await site.get(f"{DECISIONS}/{told['id']}"))[1]
    assert again == told


async def test_a_refusal_is_listed_with_its_reason_and_when_to_come_back(start):
    site = await start("b", admission=AdmissionSettings(max_in_flight_per_engine=1, max_waiting=0))
    await site.ask()
    async with site.session.post(site.url + CHAT, json=chat_body(max_tokens=2000, stream=True)) as running:
        await running.content.readany()
        assert (await site.post(CHAT, chat_body()))[0] == 429
    await over(site)
    _, told, _ = await site.get(f"{DECISIONS}?outcome=refused")
    (refusal,) = told["decisions"]
    assert (refusal["reason"], refusal["status"]) == ("queue_full", 429)
    assert refusal["retry_after_s"] > 0
    assert (await site.get(f"{DECISIONS}?outcome=queue_full"))[1] == told
    assert (await site.get(f"{DECISIONS}?tenant=nobody"))[1] == {"decisions": []}


async def test_a_request_that_was_not_sound_is_listed_too(pair):
    await pair.post(CHAT, {"model": 3})
    await over(pair)
    _, told, _ = await pair.get(f"{DECISIONS}?limit=1")
    assert (told["decisions"][0]["outcome"], told["decisions"][0]["status"]) == ("bad_request", 400)


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1001", "99999999999", ""])
async def test_an_impossible_limit_is_refused(pair, limit):
    status, body, _ = await pair.get(f"{DECISIONS}?limit={limit}")
    assert (status, body["error"]["param"]) == (400, "limit")


async def test_an_unknown_id_is_404(pair):
    assert (await pair.get(f"{DECISIONS}/nobody"))[0] == 404


async def test_metrics_are_live_and_say_their_format(pair):
    await pair.ask(words(20))
    await over(pair)
    async with pair.session.get(pair.url + "/metrics") as response:
        text = await response.text()
        assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'sluice_requests_total{outcome="served",reason="none"} 1.0' in text
    sent = next(line for line in text.splitlines() if line.startswith("sluice_relay_bytes_total"))
    assert float(sent.split()[1]) > 100


async def test_what_is_switched_off_is_not_there(start):
    off = TelemetrySettings(metrics=Access.OFF, decisions=Access.OFF)
    site = await start("pd", telemetry=off)
    for path in ("/metrics", DECISIONS, f"{DECISIONS}/x"):
        assert (await site.get(path))[0] == 404


@pytest.mark.parametrize(
    "headers", [{"x-forwarded-for": "10.0.0.9"}, {"forwarded": "for=10.0.0.9"}, {"host": "evil.example:8000"}]
)
async def test_decisions_are_for_this_machine_only_unless_they_are_opened(start, headers):
    near, wide = await start("pd"), await start("pd", telemetry=TelemetrySettings(decisions=Access.ALL))
    for site, status in ((near, 403), (wide, 200)):
        async with site.session.get(site.url + DECISIONS, headers=headers) as response:
            assert response.status == status


async def test_methods_other_than_get_are_refused(pair):
    assert (await pair.post("/metrics", {}))[0] == 405


@pytest.mark.parametrize(
    ("host", "is_near"),
    [
        ("localhost", True),
        ("localhost:8000", True),
        ("127.0.0.1:1", True),
        ("127.9.9.9", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("10.0.0.1:8000", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_a_name_is_of_this_machine(host, is_near):
    assert is_loopback(host) is is_near


async def test_a_request_is_one_line_of_the_log_with_its_numbers(pair, log_lines):
    await pair.ask(words(30))
    await pair.get(DECISIONS)
    await over(pair)
    (line,) = [line for line in log_lines if line["event"] == "request"]
    assert line["log_level"] == "info"
    assert line["outcome"] == "served"
    wanted = {"request_id", "prefill", "decode", "predicted_ttft_s", "ttft_s", "tbt_s", "decision_us", "duration_s"}
    assert wanted <= line.keys()
