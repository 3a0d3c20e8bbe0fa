"""A gateway in front of emulated engines, all in this process on loopback, and what clients of it need."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from gateway.app import Gateway, running
from gateway.config import (
    Config,
    EngineSettings,
    IndexSettings,
    LogSettings,
    PolicySettings,
    ServerSettings,
    TokenSettings,
    WatchSettings,
    resolve,
)
from gateway.core.types import Health, Role
from gateway.toml import Secret
from loadtest.answer import ClientResult
from loadtest.client import LoadClient, chat_request
from loadtest.engine_types import EngineSettings as FakeEngineSettings
from loadtest.fake_engine import FakeCluster, FakeEngine, FakeSettings
from tests.polling import DEADLINE_S, until

SPEED = 20.0
"""Engine seconds per second: a decode step takes about a quarter of a millisecond."""
PATIENT = {"lease_s": 30 * SPEED, "lease_extension_s": 20 * SPEED}
"""Leases that last as long as a real engine's on the wall clock: a machine that stalls for a second loses none."""
MODEL = "emulated"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUICK_WATCH = WatchSettings(
    health_interval_s=0.05, report_interval_s=0.05, timeout_s=1.0, report_stale_s=1.0, failures_to_down=2
)


def words(count: int, seed: int = 0) -> str:
    """So many random words, about a token each."""
    return " ".join(random.Random(seed).choices(("oak", "elm", "ash", "fir", "yew"), k=count))


HANDS_OFF = PolicySettings(settings={"can_skip_hand_off": False})
"""Every request that can be is handed off: what most tests are about, and too short to be worth it."""


@dataclass
class Site:
    """A running gateway and the engines behind it, by id."""

    gateway: Gateway
    cluster: FakeCluster
    fakes: dict[str, FakeEngine]
    client: LoadClient
    session: aiohttp.ClientSession
    stop: Callable[[], Awaitable[None]]
    """Stops the gateway as a signal would; returns when it has ended."""

    @property
    def url(self) -> str:
        return self.gateway.url

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    @property
    def state(self) -> Any:
        """The scheduler's picture of the engines."""
        return self.gateway.driver.scheduler.cluster

    def __getitem__(self, engine_id: str) -> FakeEngine:
        return self.fakes[engine_id]

    async def ask(self, prompt: str = "hello", **extra: Any) -> ClientResult:
        """One chat through the gateway."""
        return await self.client.send(a_chat(prompt, **extra))

    async def post(self, path: str, body: object = None, **options: Any) -> tuple[int, Any, aiohttp.ClientResponse]:
        """Status, parsed body and response of a POST."""
        if body is not None:
            options["json"] = body
        async with self.session.post(self.url + path, **options) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith(("{", "[")) else text, response

    async def get(self, path: str) -> tuple[int, Any, aiohttp.ClientResponse]:
        """Status, parsed body and response of a GET."""
        async with self.session.get(self.url + path) as response:
            return response.status, await response.json(), response

    def is_up(self, engine_id: str) -> bool:
        state = self.state.engines.get(engine_id)
        return state is not None and state.health is Health.UP

    def busy(self, *engine_ids: str) -> int:
        """Requests that these engines (default: all) work on, held KV apart."""
        names = engine_ids or self.fakes
        loads = [self.fakes[name].engine.load() for name in names]
        apart = sum(self.fakes[name].legs.waiting.count for name in names)
        return apart + sum(load.running_count + load.waiting_count + load.deferred_count for load in loads)

    def is_idle(self) -> bool:
        """Whether neither the gateway nor any engine that lives has anything left to do."""
        scheduler = self.gateway.driver.scheduler
        alive = [name for name, fake in self.fakes.items() if not fake.engine.is_crashed]
        is_ledger_empty = not scheduler.cluster.reservations and scheduler.waiting_count == 0
        return is_ledger_empty and self.gateway.dispatcher.running_count == 0 and (not alive or self.busy(*alive) == 0)

    async def assert_clean(self) -> None:
        """Nothing is left of any request, in the ledger, the gateway or an engine, and no hand-off was used twice."""
        for fake in self.fakes.values():
            fake.thaw()
        await until(self.is_idle)
        self.state.check()
        for state in self.state.engines.values():
            assert (state.own_count, state.prefill_us, state.queued_tokens, state.kv_tokens) == (0, 0, 0, 0)
        late = {name: fake.engine.counters.reads_after_release for name, fake in self.fakes.items()}
        assert not any(late.values()), f"transfer parameters were used late or twice: {late}"


def a_chat(prompt: str = "hello", *, stream: bool = True, max_tokens: int = 8, **extra: Any) -> Any:
    """A chat request at temperature 0 whose answer has exactly `max_tokens` tokens."""
    extra = {"temperature": 0, "ignore_eos": True} | extra
    model = extra.pop("model", MODEL)
    return chat_request(prompt, model=model, is_stream=stream, max_tokens=max_tokens, **extra)


def chat_body(prompt: str = "hello", **extra: Any) -> dict[str, Any]:
    """The same as a body."""
    fields = {"model": MODEL, "temperature": 0, "ignore_eos": True, "max_tokens": 8}
    return fields | {"messages": [{"role": "user", "content": prompt}]} | extra


@dataclass
class Start:
    """Starts sites and closes them in the end."""

    stack: AsyncExitStack
    sites: list[Site] = field(default_factory=list)

    async def __call__(
        self,
        roles: str = "pd",
        *,
        speed: float = SPEED,
        engine: dict[str, Any] | None = None,
        fake: dict[str, Any] | None = None,
        engines: Sequence[EngineSettings] = (),
        is_awaited: bool = True,
        api_key: str | None = None,
        **settings: Any,
    ) -> Site:
        """A gateway in front of one emulated engine per letter of `roles` (prefill, decode, both), e.g. p0 and d0.

        `engine` and `fake` change the settings of all of them, `engines` are further ones, `settings` the gateway's.
        """
        cluster = await self.stack.enter_async_context(FakeCluster(speed=speed))
        fakes: dict[str, FakeEngine] = {}
        for letter in roles:
            name = f"{letter}{sum(known.startswith(letter) for known in fakes)}"
            role = {"p": Role.PREFILL, "d": Role.DECODE, "b": Role.BOTH}[letter]
            own = FakeEngineSettings(role=role, **(PATIENT | (engine or {})))
            fakes[name] = await cluster.start(FakeSettings(engine=own, **(fake or {})))
        key = Secret(api_key) if api_key else None
        found = [
            EngineSettings(
                url=each.url,
                role=each.settings.engine.role,
                id=name,
                api_key=key,
                adapter=each.settings.speaks,
                connector=each.settings.connector,
                transfer_address=each.url if each.settings.connector == "mooncake" else None,
            )
            for name, each in fakes.items()
        ]
        fields = {
            "engines": (*found, *engines),
            "server": ServerSettings(port=0, shutdown_grace_s=0.5),
            "watch": QUICK_WATCH,
            "index": IndexSettings(max_blocks=1000),
            "log": LogSettings(),
            "tokens": TokenSettings(ask_engine=False),
            "policy": HANDS_OFF,
        }
        gateway, stop = await self._gateway(resolve(Config(**(fields | settings))))
        client = await self.stack.enter_async_context(LoadClient(gateway.url))
        session = await self.stack.enter_async_context(aiohttp.ClientSession())
        site = Site(gateway, cluster, fakes, client, session, stop)
        self.sites.append(site)
        if is_awaited:
            await until(lambda: all(map(site.is_up, fakes)))
        return site

    async def _gateway(self, config: Config) -> tuple[Gateway, Callable[[], Awaitable[None]]]:
        """A gateway in a task of its own, and how to stop it."""
        started: asyncio.Future[Gateway] = asyncio.get_running_loop().create_future()
        is_stopped = asyncio.Event()

        async def run() -> None:
            async with running(config) as gateway:
                started.set_result(gateway)
                await is_stopped.wait()

        async def stop() -> None:
            is_stopped.set()
            await task

        task = asyncio.create_task(run())
        self.stack.push_async_callback(stop)
        return await started, stop

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        try:
            for site in self.sites:
                await site.assert_clean()
        finally:
            await self.stack.aclose()


# ---- clients below the level of HTTP libraries -----------------------------------------------------------------------


@dataclass
class RawClient:
    """One TCP connection to the gateway."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def to(cls, site: Site, *, limit: int = 2**16) -> RawClient:
        return cls(*await asyncio.open_connection(*site.address, limit=limit))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def read_until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.readuntil(mark)

    async def read_answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one answer that has a length."""
        head = await self.read_until(b"\r\n\r\n")
        status, headers, _ = head_and_body(head)
        async with asyncio.timeout(DEADLINE_S):
            return status, headers, await self.reader.readexactly(int(headers["content-length"]))

    async def read_all(self) -> bytes:
        """Everything until the gateway closes the connection."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.read()

    def abort(self) -> None:
        self.writer.transport.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        self.writer.transport.abort()


def a_post(body: object, *, path: str = CHAT, version: str = "1.1", headers: str = "") -> bytes:
    """The bytes of a POST with that JSON body."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nhost: g\r\ncontent-length: {len(raw)}\r\n{headers}\r\n"
    return head.encode() + raw


def head_and_body(raw: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and the rest of one response."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status.split()[1]), headers, body


def events(stream: bytes | str) -> list[str]:
    """The data of every event of a stream; each has to be whole."""
    text = stream if isinstance(stream, str) else stream.decode()
    assert not text or text.endswith("\n\n"), f"half an event at the end: {text[-100:]!r}"
    return [part.removeprefix("data: ") for part in text.split("\n\n") if part]
