"""Which engines there are: the list in the settings, a file that may change, names whose addresses may change.

A `Directory` looks at its sources and says what differs from the look before. A source that fails keeps the engines it
last gave: whether those live is for the watch to find out, and a DNS outage must not empty the gateway.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import structlog
from msgspec.structs import replace

from adapters.kv_events import KvEventSource
from gateway.config import Config, EngineSettings, load_engines
from gateway.core.errors import ConfigError
from gateway.core.events import EngineFound, EngineLost
from gateway.core.types import Engine
from gateway.toml import read_text
from gateway.url import DNS_SCHEME, Address, parse_address

Source: TypeAlias = Callable[[], Awaitable[tuple[EngineSettings, ...]]]
"""Gives the engines it knows now. Raises OSError, ConfigError or TimeoutError when it cannot tell."""
Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""(name, port) -> IP addresses. Raises OSError."""

_log = structlog.get_logger("sluice.discovery")


_DETAILS = ("bootstrap_port", "vocabulary_tokens")
"""Settings of an engine that only its adapter reads."""


def engine_of(settings: EngineSettings) -> Engine:
    """The core's view of a configured engine; what only the engine can tell is not known yet."""
    return Engine(
        id=settings.id,
        url=settings.url,
        role=settings.role,
        adapter=settings.adapter,
        connector=settings.connector,
        transfer_address=settings.transfer_address,
        pool=settings.pool,
        max_in_flight=settings.max_in_flight,
        details={name: value for name in _DETAILS if (value := getattr(settings, name)) is not None},
    )


def static_engines(config: Config) -> tuple[Engine, ...]:
    """The engines of `[[engines]]` that have an address of their own (all but `dns://`)."""
    return tuple(engine_of(settings) for settings in config.engines if not _is_dns(settings))


def difference(old: Iterable[Engine], new: Iterable[Engine]) -> list[EngineFound | EngineLost]:
    """The events that lead from `old` to `new`: first what left, then what came or changed, each in the given order."""
    before = {engine.id: engine for engine in old}
    after = {engine.id: engine for engine in new}
    lost = [EngineLost(engine_id) for engine_id in before if engine_id not in after]
    return [*lost, *(EngineFound(engine) for engine_id, engine in after.items() if before.get(engine_id) != engine)]


def merge(lists: Iterable[Iterable[EngineSettings]]) -> dict[str, EngineSettings]:
    """Engine id -> settings over all lists; of two with the same id or URL the first stays."""
    merged: dict[str, EngineSettings] = {}
    urls: set[str] = set()
    for settings in (settings for one in lists for settings in one):
        if settings.id not in merged and settings.url not in urls:
            merged[settings.id] = settings
            urls.add(settings.url)
    return merged


class Directory:
    """The engines that all sources of the settings name, and their settings."""

    def __init__(self, config: Config, environ: Mapping[str, str], *, resolver: Resolver | None = None) -> None:
        self._sources = dict(_sources_of(config, environ, resolver or resolve_name))
        self._lists: dict[str, tuple[EngineSettings, ...]] = {name: () for name in self._sources}
        self._errors: dict[str, str] = {}
        self._settings: dict[str, EngineSettings] = {}
        self._poll_s = config.discovery.poll_s
        self._timeout_s = config.discovery.timeout_s

    @property
    def settings(self) -> Mapping[str, EngineSettings]:
        """Engine id -> settings, as of the last look."""
        return MappingProxyType(self._settings)

    def api_key(self, engine_id: str) -> str | None:
        """The bearer token for an engine; None when it has none of its own."""
        settings = self._settings.get(engine_id)
        return settings.api_key.reveal() if settings and settings.api_key else None

    def metrics_url(self, engine_id: str) -> str | None:
        """Where an engine's load is read when not at the adapter's own path."""
        settings = self._settings.get(engine_id)
        return settings.metrics_url if settings else None

    def kv_sources(self, engine_id: str) -> tuple[KvEventSource, ...]:
        """Where an engine's configured KV events come from, one per rank; empty where the engine itself is asked."""
        settings = self._settings.get(engine_id)
        if settings is None or settings.kv_events_endpoint is None:
            return ()
        replay = settings.kv_events_replay_endpoint
        return tuple(
            KvEventSource(
                engine_id, rank, _shifted(settings.kv_events_endpoint, rank), replay and _shifted(replay, rank)
            )
            for rank in range(settings.data_parallel_size)
        )

    async def follow(self) -> AsyncIterator[EngineFound | EngineLost]:
        """Every difference from now on, beginning with all engines found; never ends."""
        while True:
            for event in await self.poll():
                yield event
            await asyncio.sleep(self._poll_s)

    async def poll(self) -> list[EngineFound | EngineLost]:
        """Looks at every source once, at most `discovery.timeout_s` long; returns what differs from the last look."""
        await asyncio.gather(*(self._look(name, source) for name, source in self._sources.items()))
        before = self._settings
        self._settings = merge(self._lists.values())
        return difference(map(engine_of, before.values()), map(engine_of, self._settings.values()))

    async def _look(self, name: str, source: Source) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                self._lists[name] = await source()
        except (OSError, ConfigError) as error:  # TimeoutError is an OSError
            reason = str(error) or type(error).__name__
            if self._errors.get(name) != reason:
                self._errors[name] = reason
                _log.warning("engine_source_failed", source=name, reason=reason)
        else:
            self._errors.pop(name, None)


def _sources_of(config: Config, environ: Mapping[str, str], resolver: Resolver) -> Iterable[tuple[str, Source]]:
    fixed = tuple(settings for settings in config.engines if not _is_dns(settings))

    async def static() -> tuple[EngineSettings, ...]:
        return fixed

    yield "[[engines]]", static
    if config.discovery.file is not None:
        yield (
            config.discovery.file,
            FileSource(config.discovery.file, environ, max_in_flight=config.admission.max_in_flight_per_engine),
        )
    for settings in config.engines:
        if _is_dns(settings):
            yield settings.url, DnsSource(settings, resolver)


def _shifted(endpoint: str, rank: int) -> str:
    """The endpoint of a data-parallel rank: engines count the port up. Source: vllm/distributed/kv_events.py 0.32.0."""
    base, colon, port = endpoint.rpartition(":")
    return f"{base}{colon}{int(port) + rank}" if port.isdigit() else endpoint


def _is_dns(settings: EngineSettings) -> bool:
    return settings.url.startswith(f"{DNS_SCHEME}:")


class FileSource:
    """The engines of a file, read again only when the file changed. `.json` files are JSON, all others TOML."""

    def __init__(self, path: str, environ: Mapping[str, str], *, max_in_flight: int) -> None:
        self._path = path
        self._environ = environ
        self._max_in_flight = max_in_flight
        self._stamp: tuple[int, int, int] | None = None
        self._engines: tuple[EngineSettings, ...] = ()

    async def __call__(self) -> tuple[EngineSettings, ...]:
        """The engines in the file now. Raises OSError or ConfigError."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> tuple[EngineSettings, ...]:
        # The stamp is taken before the text: a write in between is then seen at the next look, never missed.
        stat = os.stat(self._path)
        stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if stamp != self._stamp:
            self._engines = self._parse(read_text(self._path))
            self._stamp = stamp
        return self._engines

    def _parse(self, text: str) -> tuple[EngineSettings, ...]:
        is_json = self._path.endswith(".json")
        engines = load_engines(text, self._environ, max_in_flight=self._max_in_flight, is_json=is_json)
        for row, settings in enumerate(engines):
            if _is_dns(settings):
                raise ConfigError(f"engines[{row}].url: {DNS_SCHEME}:// URLs stand in the settings, not in this file")
        return engines


class DnsSource:
    """One engine for each address that a name resolves to, all with the settings of the `dns://` entry."""

    def __init__(self, settings: EngineSettings, resolver: Resolver) -> None:
        self._settings = settings
        self._resolver = resolver
        self._address = parse_address(settings.url, "url")

    async def __call__(self) -> tuple[EngineSettings, ...]:
        """The engines behind the name now, sorted by address. Raises OSError."""
        hosts = await self._resolver(self._address.host, self._address.port)
        addresses = (Address("http", host, self._address.port) for host in sorted(set(hosts)))
        return tuple(replace(self._settings, url=address.url, id=address.netloc) for address in addresses)


async def resolve_name(name: str, port: int) -> list[str]:
    """The IPv4 addresses of `name`, or where it has none its IPv6 addresses. Raises OSError when it has neither.

    Not both: an engine with two addresses would be taken for two engines.
    """
    infos = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    by_family = {family: [str(info[4][0]) for info in infos if info[0] == family] for family in _FAMILIES}
    return next(filter(None, by_family.values()), [])


_FAMILIES = (socket.AF_INET, socket.AF_INET6)
