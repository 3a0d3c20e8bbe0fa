"""`sluice serve --workers N`: several processes on one port, one view, and no request lost when one of them goes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aiohttp
import pytest

from gateway.core.types import Role
from loadtest.engine_types import EngineSettings as FakeEngineSettings
from loadtest.fake_engine import FakeCluster, FakeEngine, FakeSettings
from tests.integration.gateways import GatewayProcess
from tests.integration.harness import CHAT, PATIENT, SPEED, chat_body
from tests.polling import until
from tests.redis_server import free_port

pytestmark = pytest.mark.slow
WORKERS = 3
PATIENCE_S = 30.0


class House:
    """One supervisor with its workers, in front of a pair of engines."""

    def __init__(self, gateway: GatewayProcess, fakes: list[FakeEngine]) -> None:
        self.gateway = gateway
        self.fakes = fakes

    async def ask(self, path: str = "/ready", body: object = None) -> tuple[int, dict, str]:
        """Status, answer, and which worker gave it; over a new connection, so that the kernel deals it out anew."""
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            method = "GET" if body is None else "POST"
            async with session.request(method, self.gateway.url + path, json=body) as response:
                return response.status, await response.json(), response.headers["x-sluice-worker"]

    async def of_each(self) -> dict[str, dict]:
        """What `/ready` of every worker says."""
        told: dict[str, dict] = {}
        for _ in range(200):
            _, body, worker = await self.ask()
            told[worker] = body
            if len(told) == WORKERS:
                return told
        raise AssertionError(f"only {sorted(told)} ever answered")

    async def is_whole(self) -> bool:
        """Whether every worker is ready and knows all its siblings."""
        try:
            told = await self.of_each()
        except (aiohttp.ClientError, AssertionError):
            return False
        return all(body["ready"] and body["store"].get("peers") == WORKERS - 1 for body in told.values())

    async def load(self, count: int) -> Counter[str]:
        """So many chats, eight at a time: which worker served how many, and what went wrong."""
        outcome: Counter[str] = Counter()
        numbers = iter(range(count))

        async def lane() -> None:
            for number in numbers:
                try:
                    status, _, worker = await self.ask(CHAT, chat_body(f"question {number}"))
                    outcome[worker if status == 200 else f"status {status}"] += 1
                except aiohttp.ClientError as error:
                    outcome[f"{type(error).__name__}: {error}"] += 1

        await asyncio.gather(*(lane() for _ in range(8)))
        return outcome

    def pids(self) -> dict[int, int]:
        """Worker -> its process, as the supervisor last said."""
        return {line["worker"]: line["pid"] for line in self.gateway.lines if line.get("event") == "worker_started"}


@pytest.fixture
async def house(tmp_path) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(FakeCluster(speed=SPEED))
        fakes = [
            await cluster.start(FakeSettings(engine=FakeEngineSettings(role=role, **PATIENT)))
            for role in (Role.PREFILL, Role.DECODE)
        ]
        port = free_port()
        engines = "".join(f'[[engines]]\nurl = "{f.url}"\nrole = "{f.settings.engine.role}"\n' for f in fakes)
        config = tmp_path / "sluice.toml"
        config.write_text(
            f"[server]\nport = {port}\nworkers = {WORKERS}\nshutdown_grace_s = 5.0\n"
            "[watch]\nhealth_interval_s = 0.1\nreport_interval_s = 0.1\n"
            f"[tokens]\nask_engine = false\n[index]\nmax_blocks = 10000\n[store]\nlease_s = 1.0\n{engines}"
        )
        gateway = GatewayProcess("house", config, port)
        stack.push_async_callback(gateway.kill)
        await gateway.start()
        built = House(gateway, fakes)
        await until(built.is_whole, timeout_s=PATIENCE_S)
        yield built


async def test_all_workers_serve_one_port_and_each_says_which_it_was(house):
    outcome = await house.load(120)
    assert set(outcome) == {"1", "2", "3"}
    assert outcome.total() == 120
    assert {line["worker"] for line in house.gateway.lines if line.get("event") == "request"} == {1, 2, 3}


async def test_each_worker_counts_what_its_siblings_have_in_flight(house):
    house.fakes[1].slow_down(50.0)
    asking = [asyncio.create_task(house.ask(CHAT, chat_body("long", max_tokens=5000))) for _ in range(12)]

    async def all_count_all() -> bool:
        told = await house.of_each()
        counts = [engine["shared_in_flight"] for body in told.values() for engine in body["engines"]]
        return sorted(counts) == [0, 0, 0, 12, 12, 12]

    await until(all_count_all, timeout_s=PATIENCE_S)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_a_worker_that_is_killed_is_replaced_and_its_siblings_forget_what_it_held(house):
    before = house.pids()
    os.kill(before[2], signal.SIGKILL)
    await until(lambda: house.gateway.said("worker_died") == 1 and house.pids()[2] != before[2], timeout_s=PATIENCE_S)
    await until(house.is_whole, timeout_s=PATIENCE_S)
    assert {number: pid for number, pid in house.pids().items() if number != 2} == {1: before[1], 3: before[3]}
    outcome = await house.load(60)
    assert set(outcome) <= {"1", "2", "3"}


async def test_a_hang_up_replaces_every_worker_and_not_one_request_fails(house):
    before = house.pids()
    load = asyncio.create_task(house.load(600))
    house.gateway.signal(signal.SIGHUP)
    await until(lambda: house.gateway.said("worker_replaced") == WORKERS, timeout_s=PATIENCE_S)
    outcome = await load
    assert set(outcome) <= {"1", "2", "3"}
    assert outcome.total() == 600
    assert not set(before.values()) & set(house.pids().values())
    await until(house.is_whole, timeout_s=PATIENCE_S)


async def test_a_stop_ends_every_worker_and_exits_with_0(house):
    workers = house.pids()
    await house.gateway.stop()
    assert not [pid for pid in workers.values() if is_running(pid)]


async def test_workers_whose_supervisor_is_killed_stop(house):
    workers = house.pids()
    house.gateway.signal(signal.SIGKILL)
    await until(lambda: not any(map(is_running, workers.values())), timeout_s=PATIENCE_S)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_a_port_that_is_taken_is_one_clear_line(house):
    command = (sys.executable, "-m", "gateway", "serve", "--config", str(house.gateway.config))
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, said = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode == 2
    assert said.decode().splitlines()[-1] == (
        f"sluice: server.port: cannot listen on 127.0.0.1:{house.gateway.port}: Address already in use"
    )
