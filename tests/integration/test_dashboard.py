"""The live page in a real browser, in front of emulated engines under load."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from gateway.app import Gateway, running
from gateway.config import Config, from_flags
from gateway.core.events import EngineFound, EngineHealth
from gateway.core.types import Engine, Health, Role
from gateway.page import Page as LivePage
from gateway.records import Outcome, RequestRecord
from loadtest.client import LoadClient, chat_request
from loadtest.demo import ready
from loadtest.engine_types import EngineSettings
from loadtest.fake_engine import FakeCluster, FakeSettings
from loadtest.processes import free_port
from tests.builders import an_estimate
from tests.record_builders import a_record, an_attempt

CHROMIUM = shutil.which("chromium")
PICTURES = Path(__file__).parents[2] / ".out"
WITHIN_MS = 15_000
PULSES, PER_PULSE, PULSE_S = 120, 25, 0.05
"""Six seconds of 500 requests per second."""
WATCH_PAGE = """
window.seen = { pauseMs: 0, ticks: 0, chars: 0 };
let last = performance.now();
const watch = () => {
  const now = performance.now();
  window.seen.pauseMs = Math.max(window.seen.pauseMs, now - last);
  last = now;
};
setInterval(watch, 20);
new EventSource("/dashboard/events").addEventListener("tick", (event) => {
  window.seen.ticks += 1;
  window.seen.chars = Math.max(window.seen.chars, event.data.length);
});
"""
HOPELESS = (("x-slo-ttft-ms", "1"),)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium (apt-get install chromium)"),
]


def config(urls: list[str], port: int) -> Config:
    return from_flags(prefill_urls=urls[:1], decode_urls=urls[1:], port=port, admission="ttft")


async def send(gateway: Gateway, *, headers: tuple[tuple[str, str], ...] = ()) -> None:
    async with LoadClient(gateway.url) as client:
        await client.send(chat_request("hello " * 200, model="emulated", max_tokens=20, headers=headers))


@contextlib.asynccontextmanager
async def engines() -> AsyncIterator[list[str]]:
    async with FakeCluster(speed=20) as cluster:
        roles = (Role.PREFILL, Role.DECODE)
        yield [(await cluster.start(FakeSettings(engine=EngineSettings(role=role)))).url for role in roles]


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        await chromium.close()


async def opened(chromium: Browser, gateway: Gateway, complaints: list[str]) -> Page:
    page = await chromium.new_page(viewport={"width": 1400, "height": 1200}, color_scheme="light")
    page.set_default_timeout(WITHIN_MS)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "warning" else None)
    await page.goto(f"{gateway.url}/dashboard")
    return page


async def test_it_shows_what_happens_filters_and_opens_a_refusal() -> None:
    complaints: list[str] = []
    async with engines() as urls, running(config(urls, 0)) as gateway, browser() as chromium:
        await ready(gateway, 2)
        await asyncio.gather(*(send(gateway) for _ in range(20)))
        await send(gateway, headers=HOPELESS)
        page = await opened(chromium, gateway, complaints)
        rows = page.locator("#rows tr")
        await expect(rows).to_have_count(21, timeout=WITHIN_MS)
        await send(gateway)
        await expect(rows).to_have_count(22, timeout=WITHIN_MS)
        await page.select_option("select[name=outcome]", "refused")
        await expect(rows).to_have_count(1, timeout=WITHIN_MS)
        await rows.first.click()
        told = page.locator("#detail")
        await expect(told).to_contain_text("ttft slo", timeout=WITHIN_MS)
        await expect(told).to_contain_text("1.00 ms")
        await expect(told).to_contain_text("429")
        await page.keyboard.press("Escape")
        PICTURES.mkdir(exist_ok=True)
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            await page.screenshot(path=PICTURES / f"dashboard-{scheme}.png")
    assert complaints == []


async def test_it_finds_a_gateway_again_that_started_anew() -> None:
    complaints: list[str] = []
    port = free_port()
    async with engines() as urls, browser() as chromium:
        async with running(config(urls, port)) as gateway:
            await ready(gateway, 2)
            await send(gateway)
            page = await opened(chromium, gateway, complaints)
            await expect(page.locator("#rows tr")).to_have_count(1, timeout=WITHIN_MS)
        await expect(page.locator("#link")).to_have_attribute("data-state", "away", timeout=WITHIN_MS)
        async with running(config(urls, port)) as gateway:
            await ready(gateway, 2)
            await expect(page.locator("#link")).to_have_attribute("data-state", "live", timeout=WITHIN_MS)
            await send(gateway)
            await expect(page.locator("#rows tr")).to_have_count(2, timeout=WITHIN_MS)
    assert complaints == []


async def test_every_row_can_be_reached_and_opened_from_the_keyboard() -> None:
    async with engines() as urls, running(config(urls, 0)) as gateway, browser() as chromium:
        await ready(gateway, 2)
        await send(gateway)
        page = await opened(chromium, gateway, [])
        row = page.locator("#rows tr").first
        await expect(row).to_be_visible(timeout=WITHIN_MS)
        await row.focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("#detail")).to_contain_text("served", timeout=WITHIN_MS)


def of_a_busy_pool(number: int) -> RequestRecord:
    """One of five that is refused, spread over 64 engines, with candidates as every decision has them."""
    now = time.monotonic()
    attempt = an_attempt(estimate=an_estimate(f"p{number % 32:02}", f"d{number % 32:02}"))
    outcome = Outcome.REFUSED if number % 5 == 0 else Outcome.SERVED
    names = {"id": f"r{number}", "client_id": f"c{number}", "model": f"model-{number % 7}"}
    return a_record(**names, outcome=outcome, attempts=(attempt,), arrived_at=now - 2.0, ended_at=now)


async def test_it_stays_small_and_alive_with_64_engines_and_500_requests_per_second() -> None:
    complaints: list[str] = []
    async with running(config(["http://127.0.0.1:9", "http://127.0.0.1:10"], 0)) as gateway, browser() as chromium:
        for number in range(32):
            for role in (Role.PREFILL, Role.DECODE):
                name = f"{role[0]}{number:02}"
                gateway.driver.apply(EngineFound(Engine(name, f"http://{name}:1", role)))
                gateway.driver.apply(EngineHealth(name, Health.UP))
        (live,) = (each for each in gateway.driver.recorder.observers if isinstance(each, LivePage))
        page = await opened(chromium, gateway, complaints)
        await page.evaluate(WATCH_PAGE)
        used_s, sent = time.process_time(), 0
        for _ in range(PULSES):
            for _ in range(PER_PULSE):
                live(of_a_busy_pool(sent))
                sent += 1
            await asyncio.sleep(PULSE_S)
        used_s = time.process_time() - used_s
        await expect(page.locator("#rows tr").first).to_be_visible()
        rows, nodes = (
            await page.locator("#rows tr").count(),
            await page.evaluate("document.querySelectorAll('*').length"),
        )
        seen = await page.evaluate("window.seen")
    seconds = PULSES * PULSE_S
    print(
        f"PAGE {sent / seconds:.0f} requests/s, 66 engines | {seen['ticks']} messages of {seen['chars']}"
        f" bytes at most | {rows} rows, {nodes} nodes | longest pause of the page {seen['pauseMs']:.0f} ms"
        f" | the gateway's process with the requests made up: {used_s / seconds:.1%} of a core"
    )
    assert complaints == []
    assert seen["ticks"] >= 3
    assert seen["chars"] < 128 * 1024, "a message is bounded, whatever the load"
    assert 0 < rows <= 500
    assert nodes < 20_000
