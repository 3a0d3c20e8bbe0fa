"""Emulated engines, a gateway in front of them, and the proof after each test that nothing of it is left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
import structlog
import uvloop

from tests.integration.harness import Site, Start


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], uvloop.Loop]]:
    """The loop that the gateway runs on in earnest."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def log_lines() -> list[dict[str, object]]:
    """What the gateway logged."""
    with structlog.testing.capture_logs() as lines:
        yield lines


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts sites: `await start("ppdd")`."""
    async with Start(AsyncExitStack()) as starter:
        yield starter


@pytest.fixture
async def pair(start: Start) -> Site:
    """One prefill and one decode engine."""
    return await start("pd")


@pytest.fixture
async def mesh(start: Start) -> Site:
    """Two of each."""
    return await start("ppdd")
