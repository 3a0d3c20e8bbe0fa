"""Keeps a subscription to the KV events of every engine that publishes them, and tells the core how each one stands.

Where an engine publishes is configured, or asked of the engine itself. It is asked again until it tells, and whenever
the engine came back, for its ports may be others then. An engine that says it publishes nothing is observed instead.

Of several gateways one may follow a stream for all (`listens`). One that takes over from another knows the engine's
blocks already; what the replay tells it is held back until it is complete, and then takes the place of what was known
at once: in between nothing is forgotten. Only streams that can be replayed are shared so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

import aiohttp
import structlog

from adapters.base import Adapter
from adapters.kv_events import KvEventSource
from adapters.kv_translate import BlockEvent
from gateway.control_http import bearer, read_bounded
from gateway.core.errors import MalformedEngineData
from gateway.core.events import BlocksCleared, FeedState, KvFeed
from gateway.core.types import Engine, Health
from gateway.driver import Driver
from gateway.kv_events import KvEventLimits, KvEventSubscriber, SourceState, holder_id

LOOK_EVERY_S = 0.2
"""How soon an engine that came up is asked."""
ASK_EVERY_S = 5.0
TIMEOUT_S = 2.0
TAKE_OVER_S = 5.0
"""How long what another gateway told is believed while its stream is taken over: as long as one replay may take."""
MAX_ANSWER_BYTES = 2**20
OFFLOAD_FACTOR = 4
"""Host memory of a GPU server is a few times its device memory; blocks beyond are forgotten and counted."""
LEAST_BLOCKS = 4096
SEVERITY = (FeedState.LOST, FeedState.CONNECTING, FeedState.REPAIRING, FeedState.LIVE)
"""Worst first: an engine of several ranks is as well known as its worst."""

log = structlog.get_logger("sluice.kv_events")


@dataclass(slots=True)
class _TakeOver:
    """An engine whose events another gateway followed until now."""

    until_at: float
    """When the replay has failed to come."""
    told: list[BlockEvent] = field(default_factory=list)
    """What it told so far."""


class KvFeeds:
    """Follows the KV events of all engines until cancelled."""

    def __init__(
        self,
        driver: Driver,
        adapters: Mapping[str, Adapter],
        *,
        api_key: Callable[[str], str | None],
        configured: Callable[[str], Sequence[KvEventSource]],
        limits: KvEventLimits,
        listens: Callable[[str], bool] = lambda engine_id: True,
    ) -> None:
        """`listens` says whether this gateway follows an engine itself; otherwise others tell it."""
        self._listens = listens
        self._sources: dict[str, tuple[KvEventSource, ...]] = {}
        self._taken: dict[str, _TakeOver] = {}
        self._driver = driver
        self._adapters = adapters
        self._api_key = api_key
        self._configured = configured
        self._limits = limits
        self._feeds: dict[str, tuple[tuple[KvEventSource, ...], asyncio.Task[None]]] = {}
        self._states: dict[str, dict[str, FeedState]] = {}
        self._ask_at: dict[str, float] = {}

    async def run(self) -> None:
        """Looks at the engines again and again: subscribes to new ones, drops those that left or moved."""
        loop = asyncio.get_running_loop()
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        connector = aiohttp.TCPConnector(force_close=True)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            while True:
                self._drop_lost()
                for engine_id in [name for name, taken in self._taken.items() if taken.until_at <= loop.time()]:
                    self._tell(engine_id)
                due = self._due(loop.time())
                found = await asyncio.gather(*(self._ask_sources(engine, session) for engine in due))
                for engine, sources in zip(due, found, strict=True):
                    if sources is not None:
                        self._sources[engine.id] = sources
                for engine_id, sources in self._sources.items():
                    self._follow_or_leave(engine_id, sources, group)
                await asyncio.sleep(LOOK_EVERY_S)

    def _due(self, now: float) -> list[Engine]:
        """The engines that are up and have to be asked: new ones, those that came back, and all now and then."""
        states = self._driver.scheduler.cluster.engines
        for engine_id in [name for name in self._ask_at if name not in states or states[name].health is not Health.UP]:
            del self._ask_at[engine_id]
        due = [
            state.engine
            for state in states.values()
            if state.health is Health.UP and self._ask_at.get(state.engine.id, now) <= now
        ]
        self._ask_at.update((engine.id, now + ASK_EVERY_S) for engine in due)
        return due

    async def _ask_sources(self, engine: Engine, session: aiohttp.ClientSession) -> tuple[KvEventSource, ...] | None:
        """Where the engine publishes; None when it did not tell this time."""
        if configured := self._configured(engine.id):
            return tuple(configured)
        adapter = self._adapters[engine.adapter]
        url = engine.url + adapter.kv_sources_path
        try:
            async with session.get(url, headers=bearer(self._api_key(engine.id)), allow_redirects=False) as response:
                if response.status != 200:
                    return () if response.status == 404 else None
                body = await read_bounded(response, MAX_ANSWER_BYTES)
            return adapter.parse_kv_sources(body, engine_id=engine.id, host=urlsplit(engine.url).hostname or "")
        except (aiohttp.ClientError, TimeoutError, OSError, MalformedEngineData):
            return None

    def shareable(self) -> list[str]:
        """The engines whose events one gateway can follow for all: those that publish, and can replay."""
        return [
            engine_id
            for engine_id, sources in self._sources.items()
            if sources and all(source.replay_endpoint is not None for source in sources)
        ]

    def is_subscribed(self, engine_id: str) -> bool:
        """Whether this gateway follows that engine itself, and knows what it holds."""
        return engine_id in self._feeds and engine_id not in self._taken

    def _follow_or_leave(self, engine_id: str, sources: tuple[KvEventSource, ...], group: asyncio.TaskGroup) -> None:
        can_replay = bool(sources) and all(source.replay_endpoint is not None for source in sources)
        if not can_replay or self._listens(engine_id):
            self._follow(engine_id, sources, group)
        elif (feed := self._feeds.pop(engine_id, None)) is not None:
            feed[1].cancel()
            self._taken.pop(engine_id, None)
            del self._states[engine_id]

    def _follow(self, engine_id: str, sources: tuple[KvEventSource, ...], group: asyncio.TaskGroup) -> None:
        present = self._feeds.get(engine_id)
        if present is not None and present[0] == sources:
            return
        if present is not None:
            present[1].cancel()
        rows = tuple(holder_id(source) for source in sources)
        if present is None and rows and self._driver.scheduler.prefixes.rows(engine_id) == rows:
            self._taken[engine_id] = _TakeOver(asyncio.get_running_loop().time() + TAKE_OVER_S)
        self._states[engine_id] = dict.fromkeys(rows, FeedState.CONNECTING)
        task = group.create_task(self._subscribe(engine_id, sources))
        self._feeds[engine_id] = sources, task
        self._tell(engine_id)
        if sources:
            log.info("kv_events_followed", engine=engine_id, endpoints=[source.endpoint for source in sources])

    async def _subscribe(self, engine_id: str, sources: Sequence[KvEventSource]) -> None:
        limits = replace(self._limits, max_blocks=self._followed_blocks(engine_id))
        async with asyncio.TaskGroup() as group:
            for source in sources:
                subscriber = KvEventSubscriber(
                    source, self._on_events(engine_id), self._on_state(engine_id, source), limits
                )
                group.create_task(subscriber.run())

    def _followed_blocks(self, engine_id: str) -> int:
        """Blocks followed per rank and tier: in proportion to the engine's own cache, for each takes memory here."""
        engine = self._driver.engine(engine_id)
        if engine is None or not engine.block_tokens or not engine.kv_capacity_tokens:
            return self._limits.max_blocks
        own_blocks = engine.kv_capacity_tokens // engine.block_tokens
        return min(self._limits.max_blocks, max(LEAST_BLOCKS, OFFLOAD_FACTOR * own_blocks))

    def _on_events(self, engine_id: str) -> Callable[[Sequence[BlockEvent]], None]:
        def changed(events: Sequence[BlockEvent]) -> None:
            if engine_id in self._taken:
                self._taken[engine_id].told += events
                return
            for event in events:
                self._driver.apply(event)

        return changed

    def _on_state(self, engine_id: str, source: KvEventSource) -> Callable[[SourceState], None]:
        def changed(state: SourceState) -> None:
            self._states[engine_id][holder_id(source)] = FeedState(state)
            self._tell(engine_id)

        return changed

    def _tell(self, engine_id: str) -> None:
        states = self._states[engine_id]
        worst = next((state for state in SEVERITY if state in states.values()), FeedState.NONE)
        taken = self._taken.pop(engine_id, None)
        is_coming = worst in (FeedState.CONNECTING, FeedState.REPAIRING)
        if taken is not None and is_coming and asyncio.get_running_loop().time() < taken.until_at:
            self._taken[engine_id] = taken
            return  # what the one before told still stands
        if taken is not None:
            for event in (*map(BlocksCleared, states), *taken.told):
                self._driver.apply(event)
        self._driver.apply(KvFeed(engine_id, worst, tuple(states)))
        log.log(30 if worst is FeedState.LOST else 20, "kv_events_state", engine=engine_id, state=worst)

    def _drop_lost(self) -> None:
        known = self._driver.scheduler.cluster.engines
        for engine_id in [name for name in self._feeds if name not in known]:
            self._feeds.pop(engine_id)[1].cancel()
            self._taken.pop(engine_id, None)
            del self._states[engine_id]
        for engine_id in [name for name in self._sources if name not in known]:
            del self._sources[engine_id]
