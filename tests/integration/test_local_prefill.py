"""Short prompts behind a busy prefill engine: computed by the decode engine itself, where its kind can."""

from __future__ import annotations

import asyncio

import pytest

from gateway.config import PolicySettings
from tests.integration.harness import Site, Start, words
from tests.polling import until

WEIGHS = PolicySettings()
SHORT, LONG = words(20), words(6000)


async def busy_prefill(site: Site) -> asyncio.Task[object]:
    """A long prompt that the only prefill engine is at for some seconds."""
    site["p0"].slow_down(400.0)
    task: asyncio.Task[object] = asyncio.create_task(site.ask(LONG, max_tokens=2))
    await until(lambda: site.busy("p0") == 1)
    return task


async def test_a_short_prompt_does_not_wait_for_a_busy_prefill_engine(start: Start) -> None:
    single, site = await start("b"), await start("pd", policy=WEIGHS)
    expected = await single.ask(SHORT, max_tokens=20)
    long = await busy_prefill(site)
    result = await site.ask(SHORT, max_tokens=20)
    assert not long.done()
    assert (result.error, result.text) == (None, expected.text)
    assert (result.headers["x-sluice-prefill"], result.headers["x-sluice-decode"]) == ("d0", "d0")
    assert site["d0"].engine.counters.transferred_bytes == 0
    site["p0"].slow_down(1.0)
    await long
    await site.assert_clean()


async def test_it_is_handed_off_where_that_is_switched_off(start: Start) -> None:
    site = await start("pd")
    long = await busy_prefill(site)
    short = asyncio.create_task(site.ask(SHORT, max_tokens=4))
    await until(lambda: site.busy("p0") == 2)
    site["p0"].slow_down(1.0)
    assert (await short).headers["x-sluice-prefill"] == "p0"
    await long


@pytest.mark.parametrize("fake", [{"speaks": "sglang"}, {"connector": "moriio"}], ids=["sglang", "moriio"])
async def test_a_decode_engine_that_cannot_is_never_asked_to(start: Start, fake: dict[str, str]) -> None:
    site = await start("pd", fake=fake, policy=WEIGHS)
    assert not site.state.engines["d0"].engine.can_serve_alone
    assert site.state.engines["p0"].engine.can_serve_alone == ("connector" in fake)


async def test_a_decode_engine_that_dies_at_such_a_prefill_costs_nobody_his_answer(start: Start) -> None:
    site = await start("pdd", policy=WEIGHS)
    expected = (await site.ask(SHORT, max_tokens=20)).text
    long = await busy_prefill(site)
    for name in ("d0", "d1"):
        site[name].freeze()
    asking = asyncio.create_task(site.ask(SHORT, max_tokens=20))
    await until(lambda: site.busy("d0", "d1") == 1)
    victim = "d0" if site.busy("d0") else "d1"
    await site[victim].die()
    site["d1" if victim == "d0" else "d0"].thaw()
    result = await asking
    assert (result.error, result.text) == (None, expected)
    site["p0"].slow_down(1.0)
    await long
