"""Cached prefixes over real sockets: KV events over ZMQ, token ids from engines, and what the answers say of both."""

from __future__ import annotations

import random

import pytest

from gateway.config import TokenSettings
from gateway.core.events import FeedState
from gateway.core.prefixes import PrefixSource
from loadtest.kv_publisher import KvEventSettings
from tests.integration.harness import CHAT, Site, chat_body, until

BLOCK = 16
WORDS = ("river", "stone", "cloud", "engine", "token", "paper", "light", "north")
ANNOUNCING = {
    "fake": {"kv_events": KvEventSettings(), "has_prompt_tokens_details": True},
    "engine": {"block_tokens": BLOCK},
    "tokens": TokenSettings(ask_engine=True),
}


def a_text(seed: int, words: int = 300) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def source(site: Site, engine_id: str) -> PrefixSource:
    return site.gateway.driver.scheduler.prefixes.source(engine_id)


async def told_and_believed(site: Site, prompt: str) -> tuple[int, int]:
    """Cached tokens by the engine's count and by ours, of one chat."""
    status, body, response = await site.post(CHAT, chat_body(prompt))
    assert status == 200
    return body["usage"]["prompt_tokens_details"]["cached_tokens"], int(response.headers["x-sluice-cached-tokens"])


@pytest.fixture
async def announcing(start):
    site = await start("pd", **ANNOUNCING)
    await until(lambda: source(site, "p0") is PrefixSource.EVENTS)
    return site


async def test_what_is_believed_to_be_cached_is_what_the_engine_had(announcing):
    pairs = [await told_and_believed(announcing, a_text(seed)) for seed in (1, 2, 1, 2, 3)]
    assert [told for told, _ in pairs][:2] == [0, 0]
    assert pairs[2][0] > 200
    assert all(told == believed for told, believed in pairs)
    agreement = announcing.gateway.driver.scheduler.prefixes.agreement("p0")
    assert (agreement.checked_count, agreement.agreed_count) == (5, 5)


async def test_a_growing_conversation_finds_its_earlier_turns(announcing):
    text = a_text(7)
    for turn in range(4):
        told, believed = await told_and_believed(announcing, text)
        assert told == believed
        assert (told > 0) == (turn > 0)
        text += " " + a_text(100 + turn, words=80)


async def test_after_a_restart_nothing_is_believed_and_then_what_is_true(announcing):
    await told_and_believed(announcing, a_text(1))
    await announcing["p0"].die()
    await until(lambda: source(announcing, "p0") is not PrefixSource.EVENTS)
    await announcing["p0"].revive()
    await until(lambda: announcing.is_up("p0") and source(announcing, "p0") is PrefixSource.EVENTS)
    assert await told_and_believed(announcing, a_text(1)) == (0, 0)
    told, believed = await told_and_believed(announcing, a_text(1))
    assert told == believed > 200


async def test_a_stream_that_is_cut_is_said_and_requests_go_on(announcing):
    fake = announcing["p0"]
    assert fake.publisher is not None
    await fake.publisher.close()
    fake.publisher = None
    await until(lambda: source(announcing, "p0") is PrefixSource.OBSERVED)
    _, ready, _ = await announcing.get("/ready")
    assert {engine["id"]: engine["prefixes"] for engine in ready["engines"]}["p0"] == "observed"
    await told_and_believed(announcing, a_text(1))
    _, believed = await told_and_believed(announcing, a_text(1))
    assert believed > 200


async def test_an_engine_without_events_is_observed(start):
    site = await start(
        "pd", engine={"block_tokens": BLOCK}, fake={"has_prompt_tokens_details": True}, tokens=ANNOUNCING["tokens"]
    )
    await until(lambda: source(site, "p0") is PrefixSource.OBSERVED)
    assert await told_and_believed(site, a_text(1)) == (0, 0)
    told, believed = await told_and_believed(site, a_text(1))
    assert told == believed > 200


async def test_requests_follow_their_prefix(start):
    site = await start("ppdd", **ANNOUNCING)
    await until(lambda: all(source(site, name) is PrefixSource.EVENTS for name in ("p0", "p1")))
    _, _, first = await site.post(CHAT, chat_body(a_text(1, words=2000)))
    await site.post(CHAT, chat_body(a_text(2, words=2000)))
    _, _, again = await site.post(CHAT, chat_body(a_text(1, words=2000)))
    assert again.headers["x-sluice-prefill"] == first.headers["x-sluice-prefill"]
    assert int(again.headers["x-sluice-cached-tokens"]) > 1000


def test_every_state_of_a_subscription_is_a_state_the_core_knows():
    from gateway.kv_events import SourceState

    assert {state.value for state in SourceState} <= {state.value for state in FeedState}
