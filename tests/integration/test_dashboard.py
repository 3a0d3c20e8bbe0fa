"""The live page in a real browser, in front of emulated engines under load."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from gateway.app import Gateway, running
from gateway.config import Config, from_flags
from gateway.core.types import Role
from loadtest.client import LoadClient, chat_request
from loadtest.demo import ready
from loadtest.engine_types import EngineSettings
from loadtest.fake_engine import FakeCluster, FakeSettings
from loadtest.processes import free_port

CHROMIUM = shutil.which("chromium")
PICTURES = Path(__file__).parents[2] / ".out"
WITHIN_MS = 15_000
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
