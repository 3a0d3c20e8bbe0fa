"""Keeps the core's picture of the engines true: health, load reports and facts, by polling each engine's own endpoints.

An engine is a candidate only after it answered a health probe and told its models. Consecutive failed probes take it
out, one good probe brings it back; an engine that was found unreachable by a request goes out at once and comes back
the same way. A report that does not come is not an idle engine: the core sees its age grow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace

import aiohttp
import structlog

from adapters.base import Adapter, Facts
from adapters.pools import pool_fault
from gateway.control_http import bearer, read_bounded
from gateway.core.errors import MalformedEngineData
from gateway.core.events import EngineFound, EngineHealth, EngineLost, EngineReport
from gateway.core.types import Engine, Health
from gateway.driver import Driver

MAX_REPORT_BYTES = 8 * 2**20
"""A vLLM /metrics page is about 100 KB; beyond this it is not one."""
FACTS_EVERY_S = 10.0
"""Model lists change when an adapter is loaded; vLLM itself caches its list for longer."""

log = structlog.get_logger("sluice.watch")


class WrongConnector(MalformedEngineData):
    """The engine was not started as its settings say."""


ProbeError = (aiohttp.ClientError, TimeoutError, OSError, MalformedEngineData)


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """How often engines are looked at, and for how long an answer is awaited."""

    health_interval_s: float
    report_interval_s: float
    timeout_s: float
    failures_to_down: int


class Watch:
    """Follows every engine that discovery names, until cancelled."""

    def __init__(
        self,
        driver: Driver,
        adapters: Mapping[str, Adapter],
        limits: WatchLimits,
        *,
        api_key: Callable[[str], str | None],
        metrics_url: Callable[[str], str | None],
        on_down: Callable[[str, str], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._driver = driver
        self._adapters = adapters
        self._limits = limits
        self._api_key = api_key
        self._metrics_url = metrics_url
        self._on_down = on_down
        self._on_lost = on_lost
        self._followers: dict[str, asyncio.Task[None]] = {}

    async def run(self, changes: AsyncIterator[EngineFound | EngineLost]) -> None:
        """Follows the engines as they are found and lost."""
        timeout = aiohttp.ClientTimeout(total=self._limits.timeout_s)
        # Probes are rare and an engine closes idle connections: a fresh one each time cannot meet a closing one.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session,
            asyncio.TaskGroup() as group,
        ):
            async for change in changes:
                match change:
                    case EngineFound(engine):
                        self._stop(engine.id)
                        if (fault := self._pool_fault(engine)) is None:
                            engine = replace(engine, can_serve_alone=self._adapters[engine.adapter].can_prefill(engine))
                        self._driver.apply(EngineFound(engine))
                        if fault is None:
                            self._followers[engine.id] = group.create_task(self._follow(engine, session))
                        else:
                            self._set_down(engine.id, fault)
                    case EngineLost(engine_id):
                        self._stop(engine_id)
                        self._driver.apply(change)
                        self._on_down(engine_id, "the engine left")
                        self._on_lost(engine_id)

    def _pool_fault(self, engine: Engine) -> str | None:
        """Why an engine is not even asked whether it serves: it cannot stand beside those that are followed."""
        known = (self._driver.engine(engine_id) for engine_id in self._followers if engine_id != engine.id)
        return pool_fault(engine, [other for other in known if other is not None], self._adapters)

    def _stop(self, engine_id: str) -> None:
        if follower := self._followers.pop(engine_id, None):
            follower.cancel()

    async def _follow(self, engine: Engine, session: aiohttp.ClientSession) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_health(engine, session))
            group.create_task(self._follow_reports(engine, session))

    async def _follow_health(self, engine: Engine, session: aiohttp.ClientSession) -> None:
        loop = asyncio.get_running_loop()
        adapter = self._adapters[engine.adapter]
        failures, facts_at = 0, -FACTS_EVERY_S
        while True:
            began_at = loop.time()
            try:
                await self._get(engine, engine.url + adapter.health_path, session)
                if began_at - facts_at >= FACTS_EVERY_S or not self._is_up(engine.id):
                    await self._learn_facts(engine, session)
                    facts_at = began_at
                failures = 0
                self._set_up(engine.id)
            except ProbeError as error:
                failures += 1
                self._failed(engine.id, failures, describe(error))
            await asyncio.sleep(max(0.0, began_at + self._limits.health_interval_s - loop.time()))

    async def _follow_reports(self, engine: Engine, session: aiohttp.ClientSession) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began_at = loop.time()
            with contextlib.suppress(*ProbeError):  # seen by the core as a report that grows old
                await self._read_report(engine, session)
            await asyncio.sleep(max(0.0, began_at + self._limits.report_interval_s - loop.time()))

    async def _learn_facts(self, engine: Engine, session: aiohttp.ClientSession) -> None:
        adapter = self._adapters[engine.adapter]
        if adapter.facts_path is not None and not self._is_up(engine.id):  # later a busy scheduler might not tell
            self._take_start(
                engine, adapter.parse_facts(await self._get(engine, engine.url + adapter.facts_path, session))
            )
        body = await self._get(engine, engine.url + adapter.models_path, session)
        self._take_facts(engine.id, adapter.parse_models(body))
        if (url := adapter.transfer_url(engine)) is not None:
            self._take_facts(engine.id, adapter.parse_transfer(await self._get(engine, url, session)))
        if not self._is_up(engine.id):
            try:
                await self._read_report(engine, session)
            except WrongConnector:
                raise
            except ProbeError:
                pass  # nice to have at once; an engine without metrics can serve

    def _take_start(self, engine: Engine, facts: Facts) -> None:
        """Takes in how the engine was started. Raises MalformedEngineData when the settings say otherwise."""
        if facts.role is not None and facts.role is not engine.role:
            raise MalformedEngineData(f"it was started as {facts.role}, and the settings say {engine.role}")
        self._take_facts(engine.id, facts)

    async def _read_report(self, engine: Engine, session: aiohttp.ClientSession) -> None:
        adapter = self._adapters[engine.adapter]
        url = self._metrics_url(engine.id) or engine.url + adapter.report_path
        facts = adapter.parse_report(await self._get(engine, url, session))
        if (fault := adapter.contradiction(engine, facts)) is not None:
            raise WrongConnector(fault)
        self._take_facts(engine.id, facts)
        if facts.report is not None:
            self._driver.apply(EngineReport(engine.id, facts.report))

    def _take_facts(self, engine_id: str, facts: Facts) -> None:
        known = self._driver.engine(engine_id)
        if known is None:
            return
        learnt = replace(
            known,
            models=known.models if facts.models is None else facts.models,
            lora_names=known.lora_names if facts.models is None else facts.lora_names,
            block_tokens=facts.block_tokens or known.block_tokens,
            kv_capacity_tokens=facts.kv_capacity_tokens or known.kv_capacity_tokens,
            max_model_tokens=facts.max_model_tokens or known.max_model_tokens,
            transfer_ids=known.transfer_ids if facts.transfer_ids is None else facts.transfer_ids,
            can_serve_alone=known.can_serve_alone if facts.can_serve_alone is None else facts.can_serve_alone,
            details={**known.details, **facts.details},
        )
        if learnt != known:
            self._driver.apply(EngineFound(learnt))

    async def _get(self, engine: Engine, url: str, session: aiohttp.ClientSession) -> bytes:
        api_key = self._api_key(engine.id) if url.startswith(f"{engine.url}/") else None
        async with session.get(url, headers=bearer(api_key), allow_redirects=False) as response:
            body = await read_bounded(response, MAX_REPORT_BYTES)
            if response.status != 200:
                raise MalformedEngineData(f"{url} answered with status {response.status}")
            return body

    def _is_up(self, engine_id: str) -> bool:
        state = self._driver.scheduler.cluster.engines.get(engine_id)
        return state is not None and state.health is Health.UP

    def _set_up(self, engine_id: str) -> None:
        if not self._is_up(engine_id):
            log.info("engine up", engine=engine_id)
            self._driver.apply(EngineHealth(engine_id, Health.UP))

    def _failed(self, engine_id: str, failures: int, reason: str) -> None:
        state = self._driver.scheduler.cluster.engines.get(engine_id)
        if state is None or failures != self._limits.failures_to_down:
            return
        if state.health is not Health.DOWN:
            self._set_down(engine_id, reason)
        self._on_down(engine_id, reason)

    def _set_down(self, engine_id: str, reason: str) -> None:
        log.warning("engine down", engine=engine_id, reason=reason)
        self._driver.apply(EngineHealth(engine_id, Health.DOWN, reason))


def describe(error: BaseException) -> str:
    """A probe's failure in a few words."""
    if isinstance(error, MalformedEngineData):
        return error.message
    return str(error) or type(error).__name__
