"""Real engines for the tests: two prefill and two decode vLLM processes, started once and repaired between tests."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from gateway.core.types import Role
from loadtest.vllm_process import PYTHON_VARIABLE, EngineSpec, VllmFleet, find_engine_python, free_ports
from tests.engines.prompts import Answer, ask, make_prompts

ROOT = Path(__file__).parents[2]
REQUIRED_VARIABLE = "SLUICE_REQUIRE_ENGINES"
PROMPTS = make_prompts(seed=3)
"""The forty prompts for whole pairs behind one address. One of this seed's answers ends with its very first token."""
PAIR_PROMPTS = make_prompts(seed=7, lengths_tokens=(1, 128, 700, 5000))
"""Other prompts for engines addressed directly, so that neither set is in the other's prefix caches."""
FRESH_PROMPTS = make_prompts(seed=5, lengths_tokens=(1000, 2000, 4000, 5980))
"""For one test that needs engines busy with prompts which none of them has cached."""
SPECS = [
    EngineSpec("p0", Role.PREFILL, publishes_kv_events=True),
    EngineSpec("p1", Role.PREFILL, publishes_kv_events=True),
    EngineSpec("d0", Role.DECODE, kv_load_failure_policy="fail"),
    EngineSpec("d1", Role.DECODE, kv_load_failure_policy="recompute"),
]
GATEWAY_READY_S = 20.0
HANDS_OFF = "[policy.settings]\ncan_skip_hand_off = false\n"
"""Every request that can be is handed off: these prompts are too short to be worth it otherwise."""
POLL_S = 0.02


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float) -> bool:
    """Whether the condition came true within the time."""
    ends_at = time.monotonic() + timeout_s
    while not await condition():
        if time.monotonic() > ends_at:
            return False
        await asyncio.sleep(POLL_S)
    return True


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """The interpreter that has vLLM. Without one the tests are skipped, or fail where engines are required."""
    python = find_engine_python(os.environ, ROOT)
    if python is None:
        reason = f"no interpreter with vLLM: run `make engines` or set {PYTHON_VARIABLE}"
        if os.environ.get(REQUIRED_VARIABLE):
            pytest.fail(reason)
        pytest.skip(reason)
    return python


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client without a limit on connections, which uses each connection once."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as client:
        yield client


@pytest.fixture(scope="session")
def engine_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where model and logs go."""
    return tmp_path_factory.mktemp("engines")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def reference_answers(
    engine_python: Path, engine_directory: Path, session: aiohttp.ClientSession
) -> dict[str, dict[str, Answer]]:
    """What a single engine without KV connector answers, by prompt set (`forty`, `pair`, `fresh`) and prompt name.

    The engine is gone before the fleet starts: five at once would be too many for two cores.
    """
    async with VllmFleet(engine_python, [EngineSpec("single")], engine_directory) as fleet:
        url = fleet["single"].url
        sets = {"forty": PROMPTS, "pair": PAIR_PROMPTS, "fresh": FRESH_PROMPTS}
        return {
            name: {prompt.name: await ask(session, url, prompt) for prompt in prompts} for name, prompts in sets.items()
        }


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def started_fleet(
    engine_python: Path, engine_directory: Path, reference_answers: dict[str, dict[str, Answer]]
) -> AsyncIterator[VllmFleet]:
    """The engines of SPECS."""
    async with VllmFleet(engine_python, SPECS, engine_directory) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="session")
async def fleet(started_fleet: VllmFleet) -> VllmFleet:
    """The engines of SPECS, each of them up: those that a test before this one killed are started again."""
    await started_fleet.start_missing()
    return started_fleet


@asynccontextmanager
async def serving_gateway(
    fleet: VllmFleet | None, log_path: Path, config_path: Path | None = None
) -> AsyncIterator[str]:
    """The base URL of a gateway in front of the fleet, ready to serve; it has to end cleanly when asked to.

    Its engines are those of the configuration file where one is given, else the whole fleet by flags.
    """
    (port,) = free_ports(1)
    config = config_path or log_path.with_suffix(".toml")
    if config_path is None:
        config.write_text(HANDS_OFF)
    command = [sys.executable, "-m", "gateway", "serve", "--port", str(port), "--config", str(config)]
    if config_path is None and fleet is not None:
        command += [word for url in fleet.urls(Role.PREFILL) for word in ("--prefill", url)]
        command += [word for url in fleet.urls(Role.DECODE) for word in ("--decode", url)]
    with log_path.open("ab") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, cwd=ROOT)
    try:
        url = f"http://127.0.0.1:{port}"
        assert await until(lambda: is_ready(url), GATEWAY_READY_S), end_of(log_path)
        yield url
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 20) == 0, end_of(log_path)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def end_of(log_path: Path) -> str:
    """The last lines of a log."""
    return log_path.read_text()[-3000:]


async def is_ready(url: str) -> bool:
    """Whether the gateway at the base URL says that some pair can serve."""
    try:
        async with aiohttp.ClientSession() as client, client.get(f"{url}/ready") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


@pytest_asyncio.fixture(loop_scope="session")
async def gateway(fleet: VllmFleet, tmp_path: Path) -> AsyncIterator[str]:
    """The base URL of a fresh gateway in front of the whole fleet."""
    async with serving_gateway(fleet, tmp_path / "gateway.log") as url:
        yield url
