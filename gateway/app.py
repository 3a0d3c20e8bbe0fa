"""The composition root: a Config becomes a running gateway. The only file that names concrete plug-ins together."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import structlog
import uvloop
from aiohttp import web

from adapters import ADAPTERS
from adapters.base import Adapter
from adapters.pools import refuse_mixed_pools
from gateway import logs
from gateway.aborts import Aborts
from gateway.admissions import ADMISSIONS
from gateway.auth import Auth
from gateway.config import Config, for_journal
from gateway.continuation import ContinuationLimits
from gateway.core.admission import AdmissionLimits, refuse_missing_role
from gateway.core.cluster import Cluster
from gateway.core.errors import ConfigError
from gateway.core.interfaces import Policy, Predictor
from gateway.core.scheduler import Scheduler
from gateway.core.stranded import StrandedKv
from gateway.core.types import Request
from gateway.discovery import Directory, engine_of
from gateway.dispatch import Dispatcher
from gateway.driver import Driver
from gateway.engine_call import CallLimits
from gateway.engine_tokenizers import EngineTokenizers
from gateway.engines import Engines
from gateway.gather import Gather
from gateway.handlers import HandlerLimits, Handlers, log_record
from gateway.insight import Insight, InsightAccess
from gateway.journal import FileJournal, Journal
from gateway.kv_events import KvEventLimits
from gateway.kv_feeds import KvFeeds
from gateway.metrics import Metrics
from gateway.model_tokenizer import ModelTokenizer, TokenizerLimits
from gateway.page import Page
from gateway.plugins import plug_in
from gateway.policies import POLICIES
from gateway.records import Recorder
from gateway.relay import RelayTotals
from gateway.seat import Seat, seat_of
from gateway.server import Server
from gateway.sharing import Sharing, SharingLimits
from gateway.slo import Promises
from gateway.store_metrics import StoreMetrics
from gateway.store_settings import KvListeners, StoreName
from gateway.stores import Store
from gateway.stores.redis import RedisSettings, RedisStore
from gateway.stores.socket import SocketStore
from gateway.tasks import beside
from gateway.telemetry import span_export
from gateway.tokens import ANY_MODEL, PromptTokens, TokenLimits
from gateway.trace_context import Ids
from gateway.watch import Watch, WatchLimits
from predictors import PREDICTORS, predictor
from predictors.calibration import Calibration
from predictors.output_length import OutputLengths

YOUNG_OBJECTS = 10_000
"""Objects made, less those gone, before the garbage collector looks at the young ones (Python's default: 700)."""
ENGINE_TOKENIZES_S = 1.0
"""How long an engine's `/tokenize` is awaited: longer than any prompt takes there, unless the engine is in trouble."""

FIRST_LOOK_S = 5.0
"""How long a worker waits for engines before it takes its seat: they may be down, and then somebody has to say so."""
LOOK_S = 0.02
WORKERS_TURN_S = 0.004
"""The longest turn of a worker: a word to a sibling is gathered for `flush_s` and then there within a millisecond."""
LAST_REQUEST_S = 0.25
"""Time for a request to arrive on a connection that was accepted; clients send it at once."""

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
    handlers: Handlers
    metrics: Metrics
    sharing: Sharing | None = None
    """Its part in the view of many gateways; None: it is alone."""


def scheduler_of(config: Config, *, seed: int, wrap: Callable[[Policy], Policy] = lambda policy: policy) -> Scheduler:
    """The scheduler that the settings ask for. Raises ConfigError for unknown plug-ins and settings.

    `wrap` may put something around the policy that looks on.
    """
    return Scheduler(
        policy=wrap(plug_in("policy", POLICIES, config.policy.name, config.policy.settings)),
        predictor=predictor_of(config),
        limits=AdmissionLimits(
            max_in_flight_per_engine=config.admission.max_in_flight_per_engine,
            max_waiting=config.admission.max_waiting,
            max_wait_s=config.admission.max_wait_s,
            max_attempts=config.admission.max_attempts,
            observed_age_s=config.index.observed_age_s,
            max_starve_s=config.admission.max_starve_s,
        ),
        rng=random.Random(seed),
        max_blocks=config.index.max_blocks,
        admission=plug_in("admission", ADMISSIONS, config.admission.rule, config.admission.rule_settings),
        lengths=OutputLengths(),
        margins=Calibration(cold_factor=1.0),  # what is not known yet is let in, and learnt from
        tenant_weights={tenant.name: tenant.weight for tenant in config.tenants},
    )


def predictor_of(config: Config) -> Predictor:
    """The predictor that the settings ask for: one of the table, or `module:Class`. Raises ConfigError."""
    name, settings = config.predictor.name, config.predictor.settings
    return plug_in("predictor", PREDICTORS, name, settings) if ":" in name else predictor(name, **settings)


def adapters_of(config: Config) -> dict[str, Adapter]:
    """Adapter by name: all of the table, and those outside the tree that engines name. Raises ConfigError."""
    settings: dict[str, dict[str, object]] = {
        "vllm": {"lease_s": config.admission.lease_s},
        "sglang": {"decode_within_s": config.admission.lease_s},
    }
    names = [*ADAPTERS, *sorted({engine.adapter for engine in config.engines} - ADAPTERS.keys())]
    adapters = {name: plug_in("adapter", ADAPTERS, name, settings.get(name, {})) for name in names}
    refuse_mixed_pools(map(engine_of, config.engines), adapters)
    return adapters


def tokens_of(config: Config) -> PromptTokens:
    """What tells token ids: the configured tokenizer for every model, or none. Raises ConfigError."""
    own: dict[str, ModelTokenizer] = {}
    if config.tokens.tokenizer is not None:
        limits = TokenizerLimits(cache_bytes=config.tokens.cache_bytes)
        own[ANY_MODEL] = ModelTokenizer.load(Path(config.tokens.tokenizer), limits)
    limits_of_all = TokenLimits(engine_s=ENGINE_TOKENIZES_S)
    return PromptTokens(own, limits_of_all, first_ratio=config.tokens.characters_per_token)


def journal_of(config: Config, seat: Seat | None = None) -> Journal:
    """The journal that the settings ask for, one file per worker. Raises ConfigError when it cannot be written."""
    if config.journal.path is None:
        return Journal()
    path = Path(config.journal.path if seat is None else f"{config.journal.path}.worker{seat.number}")
    try:
        return FileJournal(path, max_bytes=config.journal.max_bytes, settings=for_journal(config))
    except OSError as error:
        raise ConfigError(f"journal.path: cannot write {path}: {error.strerror}") from None


def sharing_of(config: Config, driver: Driver, seat: Seat | None) -> Sharing | None:
    """This gateway's part in the view of many; None: it is alone. Raises ConfigError."""
    store = store_of(config, seat)
    if store is None:
        return None
    settings = config.store
    limits = SharingLimits(
        shard_count=settings.shard_count,
        lease_s=settings.lease_s,
        flush_s=settings.flush_s,
        turn_s=settings.turn_s if seat is None else min(settings.turn_s, WORKERS_TURN_S),
        snapshot_interval_s=settings.snapshot_interval_s,
        is_listening_shared=settings.kv_listeners is KvListeners.ONE,
    )
    gateway_id = settings.gateway_id or f"{socket.gethostname()}-{os.getpid()}"
    if seat is not None:
        gateway_id = f"{gateway_id}-worker{seat.number}"
    return Sharing(driver, store, limits, kind=settings.name, gateway_id=gateway_id)


def store_of(config: Config, seat: Seat | None) -> Store | None:
    """Where this gateway meets others: Redis, or its siblings' hub; None: there are no others. Raises ConfigError."""
    store = config.store
    if store.name is StoreName.MEMORY:
        return None if seat is None else SocketStore(seat.hub)
    assert store.url is not None, "checked with the configuration"
    settings = RedisSettings(
        url=store.url.reveal(),
        namespace=store.namespace,
        shard_count=store.shard_count,
        max_bytes=store.max_stream_bytes,
        timeout_s=store.timeout_s,
        ca_file=store.tls_ca_file,
        cert_file=store.tls_cert_file,
        key_file=store.tls_key_file,
    )
    return RedisStore(settings)


def recorder_of(config: Config) -> Recorder:
    """What follows every request. Without a collector no trace begins here."""
    settings = config.telemetry
    ids = Ids(sample_ratio=settings.sample_ratio, rng=random.Random()) if settings.endpoint is not None else None
    return Recorder(kept_count=settings.kept_requests, ids=ids, keeps_prompts=settings.prompt_text)


def access_of(config: Config) -> InsightAccess:
    """Who may look at what the gateway tells about itself."""
    return InsightAccess(config.telemetry.metrics, config.telemetry.decisions, config.dashboard.access)


def call_limits(config: Config) -> CallLimits:
    """How long a call to an engine may take, and how large its answer may be."""
    client = config.engine_client
    return CallLimits(
        connect_timeout_s=client.connect_timeout_s,
        first_event_timeout_s=client.first_event_timeout_s,
        answer_timeout_s=client.answer_timeout_s,
        max_response_bytes=client.max_response_bytes,
    )


def continuation_limits(config: Config) -> ContinuationLimits:
    """Whether streams that break are continued, and what may be kept for it."""
    continuation = config.continuation
    return ContinuationLimits(
        is_on=continuation.is_on,
        asks_for_ids=continuation.asks_for_ids,
        max_stream_bytes=continuation.max_stream_bytes,
        max_bytes=continuation.max_bytes,
    )


def watch_limits(config: Config) -> WatchLimits:
    """How often engines are looked at."""
    return WatchLimits(
        health_interval_s=config.watch.health_interval_s,
        report_interval_s=config.watch.report_interval_s,
        timeout_s=config.watch.timeout_s,
        failures_to_down=config.watch.failures_to_down,
    )


def handler_limits(config: Config) -> HandlerLimits:
    """How long a client may take, and how large its request may be."""
    return HandlerLimits(
        max_body_bytes=config.server.max_body_bytes,
        body_timeout_s=config.server.body_timeout_s,
        write_timeout_s=config.server.write_timeout_s,
        idle_timeout_s=config.engine_client.idle_timeout_s,
        report_stale_s=config.watch.report_stale_s,
    )


@contextlib.asynccontextmanager
async def running(config: Config, seat: Seat | None = None) -> AsyncIterator[Gateway]:
    """A gateway that serves inside this block, as a worker where it has a seat. Raises ConfigError."""
    adapters = adapters_of(config)
    directory = Directory(config, os.environ)
    journal = journal_of(config, seat)
    client = config.engine_client
    recorder = recorder_of(config)
    driver = Driver(scheduler_of(config, seed=0), journal, recorder=recorder)
    spans = span_export(config.telemetry, version("sluice"), driver.adapter_name)
    relayed, stranded = RelayTotals(), StrandedKv()
    metrics = Metrics(
        driver,
        max_tenants=config.telemetry.max_tenants,
        stranded=stranded,
        relayed=relayed,
        spans=lambda: None if spans is None else spans.counts,
        version=version("sluice"),
    )
    page = Page(driver, max_viewers=config.dashboard.max_viewers, unix_clock=time.time)
    recorder.observers += [log_record, metrics, page, *([spans] if spans else [])]
    sharing = sharing_of(config, driver, seat)
    if sharing is not None:
        metrics.registry.register(StoreMetrics(sharing))
    engines = Engines(keepalive_s=client.keepalive_s, max_idle=client.max_idle_connections, api_key=directory.api_key)
    aborts = Aborts(directory.api_key)
    tokenizers = EngineTokenizers(driver, adapters, directory.api_key, timeout_s=ENGINE_TOKENIZES_S)
    dispatcher = Dispatcher(
        *(driver, adapters, engines, call_limits(config), continuation_limits(config)),
        on_hang_up=aborts.put,
        stranded=stranded,
        text_of=tokenizers.text,
    )
    watch = Watch(
        *(driver, adapters, watch_limits(config)),
        api_key=directory.api_key,
        metrics_url=directory.metrics_url,
        on_down=dispatcher.engine_down,
        on_lost=engines.forget,
    )
    gather = Gather(driver, tokens_of(config), tokenizers if config.tokens.ask_engine else None)
    feeds = KvFeeds(
        driver,
        adapters,
        api_key=directory.api_key,
        configured=directory.kv_sources,
        limits=KvEventLimits(max_blocks=config.index.max_blocks),
        listens=(lambda engine_id: True) if sharing is None else sharing.listens,
    )
    if sharing is not None:
        sharing.shareable, sharing.is_subscribed = feeds.shareable, feeds.is_subscribed
    handlers = Handlers(
        driver,
        dispatcher,
        gather,
        handler_limits(config),
        started_at=time.time(),
        store_status=(lambda: {"name": config.store.name}) if sharing is None else sharing.status,
        worker=None if seat is None else seat.number,
        relayed=relayed,
        auth=Auth(config.auth, config.tenants),
        promises=Promises(config.slo, config.models),
    )
    handlers.insight = Insight(recorder, metrics, access_of(config), page.views)
    server = Server(
        handlers,
        max_connections=config.server.max_connections,
        max_header_bytes=config.server.max_header_bytes,
        keepalive_s=config.server.keepalive_s,
        header_timeout_s=config.server.header_timeout_s,
        write_timeout_s=config.server.write_timeout_s,
    )
    runner = web.ServerRunner(server, shutdown_timeout=config.server.shutdown_grace_s)
    try:
        url = "" if seat else await listen(runner, config)
        metrics.watch_loop()
        page.start()
        async with contextlib.AsyncExitStack() as stack:
            shared = [] if sharing is None else [sharing.run()]
            for work in (watch.run(directory.follow()), feeds.run(), aborts.run(), *shared):
                await stack.enter_async_context(beside(work))
            try:
                if seat is not None:
                    await until_some_pair_serves(driver)
                    url = await listen(runner, config, seat)
                yield Gateway(url, driver, directory, dispatcher, engines, server, handlers, metrics, sharing)
            finally:
                page.close()
                if seat is not None:
                    await stop_accepting(runner)
                await runner.cleanup()
    finally:
        page.close()
        await runner.cleanup()
        metrics.close()
        if spans is not None:
            await asyncio.to_thread(spans.close)
        await gather.close()
        await tokenizers.close()
        engines.close()
        driver.close()
        journal.close()


async def stop_accepting(runner: web.ServerRunner) -> None:
    """Leaves the listening sockets to the next worker of the seat, and hears out whom it accepted last: aiohttp closes
    a connection whose first request it has not read yet."""
    for site in list(runner.sites):
        await site.stop()
    await asyncio.sleep(LAST_REQUEST_S)


async def until_some_pair_serves(driver: Driver) -> None:
    """Returns when a request could be served, or after `FIRST_LOOK_S`: a worker that takes a seat while its siblings
    serve must not refuse what they would not."""
    cluster, until_at = driver.scheduler.cluster, driver.now() + FIRST_LOOK_S
    while not can_serve(cluster) and driver.now() < until_at:  # noqa: ASYNC110 - nobody tells when an engine is up
        await asyncio.sleep(LOOK_S)


def can_serve(cluster: Cluster) -> bool:
    """Whether some pair of engines is up."""
    probe = Request(id="ready", model="", arrived_at=0.0, prompt_tokens=1)
    return refuse_missing_role(probe, [state.engine for state in cluster.engines.values()], cluster) is None


async def listen(runner: web.ServerRunner, config: Config, seat: Seat | None = None) -> str:
    """Starts listening; returns the address as a URL. Raises ConfigError when that is not possible."""
    await runner.setup()
    server = config.server
    sites: list[web.BaseSite] = [web.TCPSite(runner, server.host, server.port, backlog=server.backlog)]
    if seat is not None:
        sites = [web.SockSite(runner, one, backlog=server.backlog) for one in seat.sockets()]
    try:
        for site in sites:
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
    seat = seat_of(os.environ)
    async with running(config, seat) as gateway, contextlib.AsyncExitStack() as stack:
        log.info("listening", url=gateway.url, engines=len(config.engines))
        spare_collector()
        if seat is not None:
            await stack.enter_async_context(beside(stop_with_supervisor(stopped)))
            sys.stdout.write("ready\n")
            sys.stdout.flush()
        if config.log.format is not config.log.format.JSON and sys.stderr.isatty():
            print(f"Sluice is listening on {gateway.url}", file=sys.stderr)  # noqa: T201 - a person started this
        await stopped.wait()
        log.info("stopping", grace_s=config.server.shutdown_grace_s)


def spare_collector() -> None:
    """Takes what was made at the start (modules, a tokenizer's vocabulary) out of the garbage collector's sight: it
    lives as long as the process, and looking through it again and again shows in the slowest decisions. The young
    generation is larger, for a request makes some hundred objects and nearly all of them go by themselves."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 20)


async def stop_with_supervisor(stopped: asyncio.Event) -> None:
    """Stops a worker when its supervisor is gone: the pipe on its standard input then ends."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()
    stopped.set()
    await asyncio.Event().wait()  # until the gateway has stopped


def serve(config: Config) -> int:
    """Runs the gateway until it is stopped; returns the exit code. Raises ConfigError."""
    logs.configure(config.log)
    if (seat := seat_of(os.environ)) is not None:
        structlog.contextvars.bind_contextvars(worker=seat.number)
    uvloop.run(serve_until_stopped(config))
    return 0
