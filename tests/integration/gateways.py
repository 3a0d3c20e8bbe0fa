"""Several gateways, each a process of its own, in front of one set of emulated engines and one real Redis."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp

from gateway.core.types import Role
from loadtest.engine_types import EngineSettings as FakeEngineSettings
from loadtest.fake_engine import FakeCluster, FakeEngine, FakeSettings
from tests.integration.harness import PATIENT, SPEED
from tests.polling import until
from tests.redis_server import RedisServer, free_port, redis_server

ROOT = Path(__file__).parents[2]
START_S = 30.0
LEASE_S = 2.0


@dataclass
class GatewayProcess:
    """`sluice serve` as a process."""

    name: str
    config: Path
    port: int
    process: asyncio.subprocess.Process | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    _reading: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self) -> Self:
        """Returns when it listens."""
        command = (sys.executable, "-m", "gateway", "serve", "--config", str(self.config), "--log-format", "json")
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(*command, stderr=pipe, cwd=ROOT, limit=2**20)
        self._reading = asyncio.create_task(self._read(self.process))
        await until(lambda: self.said("listening") + self.said("supervising") > 0, timeout_s=START_S)
        return self

    def said(self, event: str) -> int:
        """How often it logged that."""
        return sum(line.get("event") == event for line in self.lines)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    async def kill(self) -> None:
        """`kill -9`, and it is gone."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
        await self._over()

    async def stop(self) -> None:
        """As an operator stops it; its exit code must be 0."""
        assert self.process is not None
        self.process.terminate()
        await self._over()
        assert self.process.returncode == 0, self.lines[-3:]

    async def _over(self) -> None:
        if self.process is not None:
            await self.process.wait()
        if self._reading is not None:
            await self._reading

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while line := await process.stderr.readline():
            self.lines.append(json.loads(line) if line.startswith(b"{") else {"event": line.decode()})


@dataclass
class Town:
    """Engines, a Redis, and gateways that come and go."""

    stack: AsyncExitStack
    folder: Path
    session: aiohttp.ClientSession
    cluster: FakeCluster
    redis: RedisServer
    fakes: dict[str, FakeEngine]
    settings: str
    last_told: object = None
    """What the gateways and the engines counted, when they were last compared."""
    gateways: dict[str, GatewayProcess] = field(default_factory=dict)

    @classmethod
    async def build(
        cls,
        stack: AsyncExitStack,
        folder: Path,
        roles: str = "ppdd",
        *,
        engine: dict[str, Any] | None = None,
        fake: dict[str, Any] | None = None,
        speed: float = SPEED,
        settings: str = "",
    ) -> Town:
        cluster = await stack.enter_async_context(FakeCluster(speed=speed))
        fakes: dict[str, FakeEngine] = {}
        for letter in roles:
            name = f"{letter}{sum(known.startswith(letter) for known in fakes)}"
            role = {"p": Role.PREFILL, "d": Role.DECODE, "b": Role.BOTH}[letter]
            own = FakeEngineSettings(role=role, **(PATIENT | (engine or {})))
            fakes[name] = await cluster.start(FakeSettings(engine=own, **(fake or {})))
        redis = await stack.enter_async_context(redis_server())
        session = await stack.enter_async_context(aiohttp.ClientSession())
        town = cls(stack, folder, session, cluster, redis, fakes, settings)
        stack.push_async_callback(town._close)
        return town

    async def add(self, name: str, *, gateway_id: str | None = None, settings: str = "") -> GatewayProcess:
        """One more gateway, which knows all engines and says that it is ready."""
        port = free_port()
        engines = "".join(
            f'[[engines]]\nid = "{engine_id}"\nurl = "{fake.url}"\nrole = "{fake.settings.engine.role}"\n'
            for engine_id, fake in self.fakes.items()
        )
        text = f"""
[server]
port = {port}
shutdown_grace_s = 2.0
[watch]
health_interval_s = 0.1
report_interval_s = 0.1
[tokens]
ask_engine = {"true" if "ask_engine" in settings + self.settings else "false"}
[index]
max_blocks = 200000
[policy.settings]
can_skip_hand_off = false
[store]
name = "redis"
url = "{self.redis.url}"
gateway_id = "{gateway_id or name}"
lease_s = {LEASE_S}
timeout_s = 2.0
snapshot_interval_s = 0.5
{settings}
{engines}"""
        config = self.folder / f"{name}-{port}.toml"
        config.write_text(text)
        gateway = self.gateways[name] = await GatewayProcess(name, config, port).start()

        async def is_ready() -> bool:
            status, body = await self.ready(name)
            return status == 200 and all(engine["health"] == "up" for engine in body["engines"])

        await until(is_ready, timeout_s=START_S)
        return gateway

    async def ready(self, name: str) -> tuple[int, dict[str, Any]]:
        """What `/ready` of that gateway says."""
        async with self.session.get(self.gateways[name].url + "/ready") as response:
            return response.status, await response.json()

    async def store(self, name: str) -> dict[str, Any]:
        """What `/ready` of that gateway says of the store."""
        return (await self.ready(name))[1]["store"]

    async def in_flight(self, name: str) -> dict[str, int]:
        """Engine -> requests in flight there, by that gateway's ledger: its own and those of others it was told of."""
        return {engine["id"]: engine["shared_in_flight"] for engine in (await self.ready(name))[1]["engines"]}

    def engines_own(self) -> dict[str, int]:
        """Engine -> requests it works on, by its own count; KV that waits to be fetched is no request."""
        loads = {name: fake.engine.load() for name, fake in self.fakes.items()}
        return {name: load.running_count + load.waiting_count + load.deferred_count for name, load in loads.items()}

    async def agree(self, *names: str) -> bool:
        """Whether each of these gateways (default: all) counts what the engines count."""
        told = [await self.in_flight(name) for name in names or self.gateways]
        self.last_told = told, self.engines_own()
        return all(counts == self.engines_own() for counts in told)

    async def _close(self) -> None:
        for gateway in self.gateways.values():
            if gateway.process is not None and gateway.process.returncode is None:
                gateway.signal(signal.SIGCONT)
            await gateway.kill()
