"""The composition root: a Config becomes a running gateway. The only file that names concrete plug-ins together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import structlog
import uvloop
from aiohttp import web

from adapters import ADAPTERS
from adapters.base import Adapter
from gateway import logs
from gateway.config import Config
from gateway.core.admission import AdmissionLimits
from gateway.core.errors import ConfigError
from gateway.core.interfaces import Predictor
from gateway.core.scheduler import Scheduler
from gateway.discovery import Directory
from gateway.dispatch import Dispatcher
from gateway.driver import Driver
from gateway.engine_call import CallLimits
from gateway.engine_tokenizers import EngineTokenizers
from gateway.engines import Engines
from gateway.gather import Gather
from gateway.handlers import HandlerLimits, Handlers
from gateway.journal import FileJournal, Journal
from gateway.kv_events import KvEventLimits
from gateway.kv_feeds import KvFeeds
from gateway.model_tokenizer import ModelTokenizer, TokenizerLimits
from gateway.plugins import plug_in
from gateway.policies import POLICIES
from gateway.server import Server
from gateway.tasks import beside
from gateway.tokens import ANY_MODEL, PromptTokens, TokenLimits
from gateway.watch import Watch, WatchLimits
from predictors import PREDICTORS, predictor

ENGINE_TOKENIZES_S = 1.0
"""How long an engine's `/tokenize` is awaited: longer than any prompt takes there, unless the engine is in trouble."""

log = structlog.get_logger("sluice")


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway."""

    url: str
    driver: Driver
    directory: Directory
    dispatcher: Dispatcher
    engines: Engines
    server: Server


def scheduler_of(config: Config, *, seed: int) -> Scheduler:
    """The scheduler that the settings ask for. Raises ConfigError for unknown plug-ins and settings."""
    return Scheduler(
        policy=plug_in("policy", POLICIES, config.policy.name, config.policy.settings),
        predictor=predictor_of(config),
        limits=AdmissionLimits(
            max_in_flight_per_engine=config.admission.max_in_flight_per_engine,
            max_waiting=config.admission.max_waiting,
            max_wait_s=config.admission.max_wait_s,
            max_attempts=config.admission.max_attempts,
            observed_age_s=config.index.observed_age_s,
        ),
        rng=random.Random(seed),
        max_blocks=config.index.max_blocks,
    )


def predictor_of(config: Config) -> Predictor:
    """The predictor that the settings ask for: one of the table, or `module:Class`. Raises ConfigError."""
    name, settings = config.predictor.name, config.predictor.settings
    return plug_in("predictor", PREDICTORS, name, settings) if ":" in name else predictor(name, **settings)


def adapters_of(config: Config) -> dict[str, Adapter]:
    """Adapter by name: all of the table, and those outside the tree that engines name. Raises ConfigError."""
    settings = {"vllm": {"lease_s": config.admission.lease_s}}
    names = [*ADAPTERS, *sorted({engine.adapter for engine in config.engines} - ADAPTERS.keys())]
    return {name: plug_in("adapter", ADAPTERS, name, settings.get(name, {})) for name in names}


def tokens_of(config: Config) -> PromptTokens:
    """What tells token ids: the configured tokenizer for every model, or none. Raises ConfigError."""
    own: dict[str, ModelTokenizer] = {}
    if config.tokens.tokenizer is not None:
        limits = TokenizerLimits(cache_bytes=config.tokens.cache_bytes)
        own[ANY_MODEL] = ModelTokenizer.load(Path(config.tokens.tokenizer), limits)
    limits_of_all = TokenLimits(engine_s=ENGINE_TOKENIZES_S)
    return PromptTokens(own, limits_of_all, first_ratio=config.tokens.characters_per_token)


def journal_of(config: Config) -> Journal:
    """The journal that the settings ask for. Raises ConfigError when its file cannot be written."""
    if config.journal.path is None:
        return Journal()
    try:
        return FileJournal(Path(config.journal.path), max_bytes=config.journal.max_bytes)
    except OSError as error:
        raise ConfigError(f"journal.path: cannot write {config.journal.path}: {error.strerror}") from None


@contextlib.asynccontextmanager
async def running(config: Config) -> AsyncIterator[Gateway]:
    """A gateway that serves inside this block. Raises ConfigError when the port is taken."""
    adapters = adapters_of(config)
    directory = Directory(config, os.environ)
    journal = journal_of(config)
    client = config.engine_client
    driver = Driver(scheduler_of(config, seed=0), journal)
    engines = Engines(keepalive_s=client.keepalive_s, max_idle=client.max_idle_connections, api_key=directory.api_key)
    limits = CallLimits(
        connect_timeout_s=client.connect_timeout_s,
        first_event_timeout_s=client.first_event_timeout_s,
        answer_timeout_s=client.answer_timeout_s,
        max_response_bytes=client.max_response_bytes,
    )
    dispatcher = Dispatcher(driver, adapters, engines, limits)
    watch = Watch(
        driver,
        adapters,
        WatchLimits(
            health_interval_s=config.watch.health_interval_s,
            report_interval_s=config.watch.report_interval_s,
            timeout_s=config.watch.timeout_s,
            failures_to_down=config.watch.failures_to_down,
        ),
        api_key=directory.api_key,
        metrics_url=directory.metrics_url,
        on_down=dispatcher.engine_down,
        on_lost=engines.forget,
    )
    tokenizers = EngineTokenizers(driver, adapters, directory.api_key, timeout_s=ENGINE_TOKENIZES_S)
    gather = Gather(driver, tokens_of(config), tokenizers if config.tokens.ask_engine else None)
    feeds = KvFeeds(
        driver,
        adapters,
        api_key=directory.api_key,
        configured=directory.kv_sources,
        limits=KvEventLimits(max_blocks=config.index.max_blocks),
    )
    handlers = Handlers(
        driver,
        dispatcher,
        gather,
        HandlerLimits(
            max_body_bytes=config.server.max_body_bytes,
            body_timeout_s=config.server.body_timeout_s,
            write_timeout_s=config.server.write_timeout_s,
            idle_timeout_s=client.idle_timeout_s,
            report_stale_s=config.watch.report_stale_s,
        ),
        started_at=time.time(),
    )
    server = Server(
        handlers,
        max_connections=config.server.max_connections,
        max_header_bytes=config.server.max_header_bytes,
        keepalive_s=config.server.keepalive_s,
    )
    runner = web.ServerRunner(server, shutdown_timeout=config.server.shutdown_grace_s)
    try:
        url = await listen(runner, config)
        async with beside(watch.run(directory.follow())), beside(feeds.run()):
            try:
                yield Gateway(url, driver, directory, dispatcher, engines, server)
            finally:
                await runner.cleanup()
    finally:
        await runner.cleanup()
        await gather.close()
        await tokenizers.close()
        engines.close()
        driver.close()
        journal.close()


async def listen(runner: web.ServerRunner, config: Config) -> str:
    """Starts listening; returns the address as a URL. Raises ConfigError when that is not possible."""
    await runner.setup()
    server = config.server
    site = web.TCPSite(runner, server.host, server.port, backlog=server.backlog)
    try:
        await site.start()
    except OSError as error:
        number = error.errno or 0  # below 0: the resolver's; above, asyncio's own text repeats the address
        reason = os.strerror(number) if number > 0 else error.strerror or str(error)
        raise ConfigError(f"server.port: cannot listen on {server.host}:{server.port}: {reason}") from None
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve_until_stopped(config: Config) -> None:
    """Serves until SIGINT or SIGTERM; running requests get `server.shutdown_grace_s` to end."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with running(config) as gateway:
        log.info("listening", url=gateway.url, engines=len(config.engines))
        if config.log.format is not config.log.format.JSON and sys.stderr.isatty():
            print(f"Sluice is listening on {gateway.url}", file=sys.stderr)  # noqa: T201 - a person started this
        await stopped.wait()
        log.info("stopping", grace_s=config.server.shutdown_grace_s)


def serve(config: Config) -> int:
    """Runs the gateway until it is stopped; returns the exit code. Raises ConfigError."""
    logs.configure(config.log)
    uvloop.run(serve_until_stopped(config))
    return 0
