"""Every setting of Sluice: frozen structs, the unit last in the name, what it means under each field.

`load` turns TOML text into a `Config` and `render` turns it back; both are pure. Types and ranges stand in the
annotations and are enforced by `gateway.toml`; what contradicts across keys is refused by `resolve`, which also fills
in the defaults that depend on other settings. Every refusal is a ConfigError whose message starts with the key's path.

In a string `${NAME}` stands for an environment variable; `$${` is a literal `${`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, TypeVar

from msgspec import Meta, Struct
from msgspec.structs import replace

from gateway import toml
from gateway.core.errors import ConfigError
from gateway.core.types import Role
from gateway.store_settings import StoreName, StoreSettings
from gateway.tenants import AuthSettings, ModelSettings, SloSettings, TenantSettings
from gateway.toml import Secret
from gateway.url import DNS_SCHEME, Address, parse_address

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Bytes = Annotated[int, Meta(ge=1_024, le=2**40)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
# A DNS name has at most 253 characters; an id may be `name:port`, a URL puts a scheme before it.
Url = Annotated[str, Meta(min_length=1, max_length=300)]
Label = Annotated[
    str,
    Meta(pattern=r"\A[A-Za-z0-9._:\[\]-]{0,280}\Z", description="at most 280 letters, digits or any of . _ : [ ] -"),
]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_WILDCARD = ("0.0.0.0", "::")


class LogFormat(StrEnum):
    """How a log line looks."""

    CONSOLE = "console"
    JSON = "json"
    AUTO = "auto"


class LogLevel(StrEnum):
    """The least severe line that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class OtlpProtocol(StrEnum):
    """How spans travel to the collector."""

    HTTP = "http"
    GRPC = "grpc"


class Access(StrEnum):
    """Who may look at what the gateway tells about itself."""

    OFF = "off"
    LOOPBACK = "loopback"
    ALL = "all"


class ServerSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where clients connect and what one of them may cost."""

    host: Name = "127.0.0.1"
    """Address or host name to listen on; `0.0.0.0` is every IPv4 interface."""
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8000
    """TCP port, 0 to 65535; 0 takes a free one."""
    workers: Annotated[int, Meta(ge=1, le=256)] = 1
    """Processes that serve the port, a count from 1 to 256; they share one view."""
    max_body_bytes: Bytes = 64 * 2**20
    """Largest request body in bytes; a larger one is answered 413 without being read to its end."""
    max_header_bytes: Annotated[int, Meta(ge=1_024, le=2**20)] = 16_384
    """Largest request line and largest single header field, in bytes."""
    max_connections: Count = 16_384
    """Client connections open at once."""
    backlog: Annotated[int, Meta(ge=1, le=65_535)] = 1_024
    """Connections the kernel holds before they are accepted (`listen(2)`)."""
    keepalive_s: Seconds = 75.0
    """Seconds an idle client connection stays open."""
    header_timeout_s: Seconds = 10.0
    """Seconds from the first byte of a request's head to its end; after that it is answered 408."""
    body_timeout_s: Seconds = 30.0
    """Seconds without a byte after which a request whose body is not complete is answered 408."""
    write_timeout_s: Seconds = 60.0
    """Seconds for which a client may leave its stream unread; then its connection is closed and its engine freed."""
    shutdown_grace_s: Annotated[float, Meta(ge=0, le=86_400)] = 30.0
    """Seconds that running requests are given to end after a stop signal; 0 ends them at once."""


class EngineSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One engine, or with a `dns://name:port` URL every engine that the name resolves to."""

    url: Url
    """`http://host:port`, `https://host:port` (ports 80 and 443 may be left out), or `dns://name:port`, polled."""
    role: Role = Role.BOTH
    """What the engine was started to do: prefill, decode or both."""
    id: Label = ""
    """Its name in headers, metrics and the journal, at most 280 characters; empty: `host:port` of the URL."""
    adapter: Name = "vllm"
    """Which engine it is: a name in the table of adapters, or `module:Class`; at most 256 characters."""
    connector: Name = "nixl"
    """How it hands KV blocks on: nixl, mooncake, store ..., or the engine's own word for it; at most 256 characters."""
    transfer_address: (
        Annotated[str, Meta(pattern=r"\Ahttps?://[^\s/?#@]+\Z", description="an http or https URL without a path")]
        | None
    ) = None
    """Its connector's bootstrap server where it has one (an http URL); not set: the default port there."""
    pool: Name = "default"
    """Engines hand off only within a pool (same model, version and connector); at most 256 characters."""
    api_key: Secret | None = None
    """Bearer token for the engine, 1 to 4096 characters; never printed. Not set: the client's header passes on."""
    kv_events_endpoint: (
        Annotated[
            str,
            Meta(pattern=r"\A(tcp://\S+:\d{1,5}|ipc://\S+)\Z", description="a ZMQ endpoint such as tcp://host:5557"),
        ]
        | None
    ) = None
    """ZMQ endpoint on which the engine publishes KV events (`tcp://host:port`); not set: the engine is asked."""
    kv_events_replay_endpoint: (
        Annotated[
            str,
            Meta(pattern=r"\A(tcp://\S+:\d{1,5}|ipc://\S+)\Z", description="a ZMQ endpoint such as tcp://host:5558"),
        ]
        | None
    ) = None
    """ZMQ endpoint that replays KV events (`tcp://host:port`), beside `kv_events_endpoint`; not set: none."""
    metrics_url: (
        Annotated[str, Meta(pattern=r"\Ahttps?://[^\s/?#@]+(/\S*)?\Z", description="an http or https URL")] | None
    ) = None
    """Where its load is read (an http or https URL); not set: the adapter's path on `url`."""
    max_in_flight: Count | None = None
    """Requests sent to it at once; not set: `admission.max_in_flight_per_engine`."""
    data_parallel_size: Annotated[int, Meta(ge=1, le=1_024)] = 1
    """Data-parallel ranks behind the URL, as a count."""
    vocabulary_tokens: Count | None = None
    """Token ids of the model, as a count: SGLang dies of a client's id beyond them; not set: not checked."""
    bootstrap_port: Annotated[int, Meta(ge=1, le=65_535)] | None = None
    """TCP port (1 to 65535) of an SGLang prefill engine's bootstrap server; not set: the engine tells its port."""


class DiscoverySettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where engines come from besides `[[engines]]`."""

    file: Name | None = None
    """Path of a TOML or JSON file with `engines`, read again when it changes; not set: none."""
    poll_s: Seconds = 5.0
    """Seconds between looks at the file and at `dns://` names."""
    timeout_s: Seconds = 2.0
    """Seconds a look may take; after that the engines last seen stay."""


class EngineClientSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Connections from the gateway to engines."""

    connect_timeout_s: Seconds = 2.0
    """Seconds to make a TCP connection."""
    first_event_timeout_s: Seconds = 60.0
    """Seconds from sending a request to its first data event, after which the attempt is a time-out."""
    answer_timeout_s: Seconds = 600.0
    """Seconds for an answer that is not streamed, of which nothing is seen until all of it is generated."""
    idle_timeout_s: Seconds = 30.0
    """Longest gap in seconds between two pieces of an answer that the client already receives."""
    keepalive_s: Annotated[float, Meta(gt=0, lt=5)] = 2.5
    """Seconds an idle connection is kept for reuse; below 5, when vLLM closes it (VLLM_HTTP_TIMEOUT_KEEP_ALIVE)."""
    max_idle_connections: Count = 256
    """Idle connections kept per engine, as a count."""
    max_response_bytes: Bytes = 64 * 2**20
    """Largest answer in bytes that is held whole in memory (a stream is never held)."""


class WatchSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How engines are observed."""

    health_interval_s: Seconds = 1.0
    """Seconds between two health probes of an engine."""
    report_interval_s: Seconds = 0.5
    """Seconds between two reads of an engine's load."""
    timeout_s: Seconds = 2.0
    """Seconds after which an unanswered probe counts as a failure."""
    report_stale_s: Seconds = 3.0
    """Age in seconds at which `/ready` calls an engine's report stale; above `report_interval_s`."""
    failures_to_down: Annotated[int, Meta(ge=1, le=1_000)] = 3
    """Consecutive failed probes (a count) that make an engine down."""


class AdmissionSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What may run, what may wait, and for how long."""

    max_in_flight_per_engine: Count = 256
    """Requests sent to one engine at once, unless the engine has its own `max_in_flight`."""
    max_waiting: Annotated[int, Meta(ge=0, le=1_000_000)] = 1_024
    """Requests waiting in the gateway at once; 0 refuses instead of waiting."""
    max_wait_s: Seconds = 30.0
    """Seconds a request may wait in the gateway before it is refused."""
    rule: Name = "sluice"
    """Whom to refuse although an engine could serve him: a name in the table of rules, or `module:Class`; at most 256
    characters."""
    rule_settings: Mapping[str, object] = {}
    """Fields of that rule, with its own units and ranges."""
    max_starve_s: Seconds = 10.0
    """Seconds after which a class of requests that waits gets a turn, whatever goes before it."""
    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    """Attempts per request (a count), the first included."""
    lease_s: Seconds = 25.0
    """Seconds from the end of the prefill to decode's first sign; keep below vLLM's kv_lease_duration (30 s)."""


class ContinuationSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Streams whose engine dies after the first token: another engine says the rest, where the request allows it."""

    is_on: bool = True
    """true or false: broken streams are continued; false: each ends with an error event."""
    asks_for_ids: bool = True
    """true or false: token ids are asked of the engines (and hidden from clients), so that the rest is exact."""
    max_stream_bytes: Bytes = 2**20
    """Most bytes kept of one stream's events (some 200 each); a longer stream is no longer continued."""
    max_bytes: Bytes = 256 * 2**20
    """Most bytes kept of all streams together."""


class PolicySettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which feasible pair is chosen."""

    name: Name = "sluice"
    """A name in the table of policies, or `module:Class`; at most 256 characters."""
    settings: Mapping[str, object] = {}
    """Fields of that policy, with its own units and ranges."""


class PredictorSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long the stages of a request are expected to take."""

    name: Name = "online"
    """A name in the table of predictors, or `module:Class`; at most 256 characters."""
    settings: Mapping[str, object] = {}
    """Fields of that predictor, with its own units and ranges."""


class LogSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Log lines on standard error."""

    format: LogFormat = LogFormat.AUTO
    """One of console, json, auto; auto is console on a terminal and json elsewhere."""
    level: LogLevel = LogLevel.INFO
    """The least severe line written: one of debug, info, warning, error."""


class JournalSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One JSON line per event and decision, the input of a replay."""

    path: Name | None = None
    """File that is written; not set: no journal."""
    max_bytes: Bytes = 2**30
    """Most bytes the journal takes on disk."""


class IndexSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The map of which engine holds which KV blocks."""

    max_blocks: Annotated[int, Meta(ge=1, le=1_000_000_000)] = 2_000_000
    """Blocks remembered at once, over all engines."""
    observed_age_s: Seconds = 600.0
    """Seconds for which a block of an engine that publishes no events is believed to be cached without being used."""


class TokenSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How prompts are turned into token ids."""

    tokenizer: Name | None = None
    """Path of a `tokenizer.json` or of its folder; not set: none of our own."""
    ask_engine: bool = True
    """true or false: without a tokenizer of its own the gateway asks an engine's `/tokenize` for token ids."""
    cache_bytes: Bytes = 64 * 2**20
    """Memory in bytes for tokenised parts of prompts, so that a growing conversation is not tokenised anew."""
    characters_per_token: Annotated[float, Meta(gt=0, le=100)] = 4.0
    """First guess for estimating lengths, in characters per token."""


class TelemetrySettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the gateway tells about each request. Decisions and metrics hold names and numbers, never prompt text."""

    endpoint: (
        Annotated[str, Meta(pattern=r"\Ahttps?://[^\s/?#@]+(/\S*)?\Z", description="an http or https URL")] | None
    ) = None
    """URL of the OTLP collector that takes spans, such as `http://127.0.0.1:4318`; not set: no spans are made."""
    protocol: OtlpProtocol = OtlpProtocol.HTTP
    """One of http, grpc; headers, compression and certificates are read from the usual `OTEL_EXPORTER_OTLP_*`."""
    sample_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.1
    """Share of requests whose trace begins here that are recorded, 0 to 1; a caller's trace is recorded as it says."""
    service_name: Name = "sluice"
    """The `service.name` of spans, at most 256 characters."""
    queue_requests: Count = 2_048
    """Requests whose spans wait for the collector, at most; the spans of those beyond are dropped and counted."""
    timeout_s: Seconds = 5.0
    """Seconds an export may take with its repetitions; then its spans are dropped and counted."""
    prompt_text: bool = False
    """true or false: spans hold the prompt's text, cut at 32768 characters. Nothing else ever does."""
    kept_requests: Annotated[int, Meta(ge=1, le=100_000)] = 2_048
    """Finished requests that can be explained, the last so many."""
    max_tenants: Annotated[int, Meta(ge=1, le=10_000)] = 50
    """Tenants (a count) with a metric label of their own; those that come after are counted together as `other`."""
    metrics: Access = Access.ALL
    """Who may read `/metrics`: one of off, loopback, all."""
    decisions: Access = Access.LOOPBACK
    """Who may read `/v1/sluice/decisions`: one of off, loopback (clients on this machine), all."""


class DashboardSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The live page at `/dashboard`."""

    access: Access = Access.LOOPBACK
    """Who may open it: one of off, loopback (clients on this machine), all."""
    max_viewers: Annotated[int, Meta(ge=1, le=10_000)] = 32
    """Pages (a count) that are kept up to date at once; one beyond is told to come back later."""


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All settings; every table may be left out."""

    engines: tuple[EngineSettings, ...] = ()
    """`[[engines]]`: one table per engine, at most 10000."""
    server: ServerSettings = ServerSettings()
    """`[server]`."""
    discovery: DiscoverySettings = DiscoverySettings()
    """`[discovery]`."""
    engine_client: EngineClientSettings = EngineClientSettings()
    """`[engine_client]`."""
    watch: WatchSettings = WatchSettings()
    """`[watch]`."""
    admission: AdmissionSettings = AdmissionSettings()
    """`[admission]`."""
    continuation: ContinuationSettings = ContinuationSettings()
    """`[continuation]`."""
    policy: PolicySettings = PolicySettings()
    """`[policy]`."""
    predictor: PredictorSettings = PredictorSettings()
    """`[predictor]`."""
    log: LogSettings = LogSettings()
    """`[log]`."""
    journal: JournalSettings = JournalSettings()
    """`[journal]`."""
    index: IndexSettings = IndexSettings()
    """`[index]`."""
    tokens: TokenSettings = TokenSettings()
    """`[tokens]`."""
    store: StoreSettings = StoreSettings()
    """`[store]`."""
    telemetry: TelemetrySettings = TelemetrySettings()
    """`[telemetry]`."""
    dashboard: DashboardSettings = DashboardSettings()
    """`[dashboard]`."""
    slo: SloSettings = SloSettings()
    """`[slo]`."""
    auth: AuthSettings = AuthSettings()
    """`[auth]`."""
    models: tuple[ModelSettings, ...] = ()
    """`[[models]]`: one table per model that is promised something of its own, at most 10000."""
    tenants: tuple[TenantSettings, ...] = ()
    """`[[tenants]]`: one table per tenant, at most 10000."""


class EngineList(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a discovery file holds."""

    engines: tuple[EngineSettings, ...]
    """`[[engines]]`: one table per engine, at most 10000."""


_Table = TypeVar("_Table", bound=Struct)


def load(text: str, environ: Mapping[str, str]) -> Config:
    """The resolved settings that TOML `text` asks for. Raises ConfigError, and nothing else, whatever the text is."""
    return resolve(toml.read(Config, toml.parse(text), environ))


def load_engines(
    text: str, environ: Mapping[str, str], *, max_in_flight: int, is_json: bool = False
) -> tuple[EngineSettings, ...]:
    """The engines of a discovery file (TOML, or JSON of the same shape), resolved. Raises ConfigError."""
    table = toml.parse_json(text) if is_json else toml.parse(text)
    return resolve_engines(toml.read(EngineList, table, environ).engines, max_in_flight=max_in_flight)


def render(config: Config) -> str:
    """The settings as TOML with every value, secrets as `***`; `load` gives the same settings back, secrets apart."""
    return toml.render(config)


def for_journal(config: Config) -> str:
    """The settings as TOML from which a journal of this run can be fed back: without what could be a secret."""
    tenants = tuple(replace(tenant, key_hashes=()) for tenant in config.tenants)
    engines = tuple(replace(engine, api_key=None) for engine in config.engines)
    return render(replace(config, tenants=tenants, engines=engines))


def resolve(config: Config) -> Config:
    """The same settings with dependent defaults filled in. Raises ConfigError where two settings contradict."""
    engines = resolve_engines(config.engines, max_in_flight=config.admission.max_in_flight_per_engine)
    _refuse_own_address(config.server, engines)
    if config.discovery.file is None:
        _refuse_lonely_roles(engines)
    _refuse_time_order(config)
    if config.store.name is StoreName.REDIS and config.store.url is None:
        raise ConfigError("store.url: missing; store.name is redis")
    _refuse_unclear_tenants(config)
    return replace(config, engines=engines)


def resolve_engines(engines: Sequence[EngineSettings], *, max_in_flight: int) -> tuple[EngineSettings, ...]:
    """The engines with URLs in normal form, ids and limits filled in. Raises ConfigError when two share URL or id."""
    resolved = tuple(_resolve_engine(engine, max_in_flight, f"engines[{row}]") for row, engine in enumerate(engines))
    _refuse_twins("url", (engine.url for engine in resolved))
    _refuse_twins("id", (engine.id for engine in resolved))
    return resolved


def from_flags(
    *,
    prefill_urls: Sequence[str] = (),
    decode_urls: Sequence[str] = (),
    engine_urls: Sequence[str] = (),
    host: str | None = None,
    port: int | None = None,
    workers: int | None = None,
    log_format: str | None = None,
    journal: str | None = None,
    slo_ttft_ms: float | None = None,
    slo_tbt_ms: float | None = None,
    policy: str | None = None,
    admission: str | None = None,
    base: Config | None = None,
) -> Config:
    """`base` (default: all defaults) with what was given on the command line; any engine URL replaces all its engines.

    Raises ConfigError; the message starts with the flag, or with the key's path for contradictions.
    """
    config = base or Config()
    flags = (
        ("--prefill", Role.PREFILL, prefill_urls),
        ("--decode", Role.DECODE, decode_urls),
        ("--engine", Role.BOTH, engine_urls),
    )
    engines = tuple(
        EngineSettings(url=parse_address(url, flag).url, role=role) for flag, role, urls in flags for url in urls
    )
    return resolve(
        replace(
            config,
            engines=engines or config.engines,
            server=_override(
                _override(_override(config.server, "host", host, "--host"), "port", port, "--port"),
                "workers",
                workers,
                "--workers",
            ),
            log=_override(config.log, "format", log_format, "--log-format"),
            journal=_override(config.journal, "path", journal, "--journal"),
            policy=_override(config.policy, "name", policy, "--policy"),
            admission=_override(config.admission, "rule", admission, "--admission"),
            slo=_override(
                _override(config.slo, "ttft_s", _seconds(slo_ttft_ms), "--slo-ttft-ms"),
                "tbt_s",
                _seconds(slo_tbt_ms),
                "--slo-tbt-ms",
            ),
        )
    )


def _seconds(value_ms: float | None) -> float | None:
    return None if value_ms is None else value_ms / 1e3


def _override(table: _Table, key: str, value: object, flag: str) -> _Table:
    return table if value is None else replace(table, **{key: toml.read_field(type(table), key, value, flag)})


def _resolve_engine(engine: EngineSettings, max_in_flight: int, path: str) -> EngineSettings:
    address = parse_address(engine.url, f"{path}.url")
    if address.scheme == DNS_SCHEME and engine.id not in ("", address.netloc):
        raise ConfigError(f"{path}.id: a {DNS_SCHEME}:// URL stands for many engines, whose ids are their addresses")
    if address.scheme == DNS_SCHEME and (engine.metrics_url or engine.kv_events_endpoint or engine.transfer_address):
        raise ConfigError(f"{path}: a {DNS_SCHEME}:// URL stands for many engines, which cannot share one endpoint")
    limit = max_in_flight if engine.max_in_flight is None else engine.max_in_flight
    return replace(engine, url=address.url, id=engine.id or address.netloc, max_in_flight=limit)


def _refuse_twins(key: str, values: Iterable[str]) -> None:
    rows: dict[str, int] = {}
    for row, value in enumerate(values):
        first = rows.setdefault(value, row)
        if first != row:
            raise ConfigError(f"engines[{row}].{key}: {value} is engines[{first}].{key} already")


def _refuse_own_address(server: ServerSettings, engines: Sequence[EngineSettings]) -> None:
    """An engine at the gateway's own address would make each request a loop."""
    for row, engine in enumerate(engines):
        address = parse_address(engine.url, f"engines[{row}].url")
        if address.port == server.port and _is_same_host(server.host, address):
            raise ConfigError(
                f"engines[{row}].url: {engine.url} is where the gateway itself listens (server.port {server.port})"
            )


def _is_same_host(host: str, address: Address) -> bool:
    if host in (*_LOOPBACK, *_WILDCARD):
        return address.host in (*_LOOPBACK, *_WILDCARD)
    return address.host == host.lower()


def _refuse_lonely_roles(engines: Sequence[EngineSettings]) -> None:
    for pool in sorted({engine.pool for engine in engines}):
        roles = {engine.role for engine in engines if engine.pool == pool}
        if len(roles) == 1 and Role.BOTH not in roles:
            (given,) = roles
            missing = Role.DECODE if given is Role.PREFILL else Role.PREFILL
            raise ConfigError(
                f"engines: pool {toml.show(pool)} has {given} engines only; "
                f"add one of role {missing} or {Role.BOTH} to that pool"
            )


def _refuse_time_order(config: Config) -> None:
    client, watch = config.engine_client, config.watch
    if client.connect_timeout_s > client.first_event_timeout_s:
        raise ConfigError(
            f"engine_client.connect_timeout_s: {client.connect_timeout_s} is over first_event_timeout_s "
            f"({client.first_event_timeout_s}), which includes it"
        )
    if watch.report_stale_s <= watch.report_interval_s:
        raise ConfigError(
            f"watch.report_stale_s: {watch.report_stale_s} must be over report_interval_s "
            f"({watch.report_interval_s}), or every report is stale before the next"
        )


def _refuse_unclear_tenants(config: Config) -> None:
    """A request must be of one tenant, and each tenant's classes among those there are."""
    for kind, names in (
        ("models[{}].name", [model.name for model in config.models]),
        ("tenants[{}].name", [tenant.name for tenant in config.tenants]),
    ):
        for row, name in enumerate(names):
            if names.index(name) != row:
                raise ConfigError(f"{kind.format(row)}: {toml.show(name)} is {kind.format(names.index(name))} already")
    owners: dict[Secret, int] = {}
    for row, tenant in enumerate(config.tenants):
        for key_hash in tenant.key_hashes:
            if not re.fullmatch(r"[0-9a-f]{64}", key_hash.reveal()):  # not shown: it may be the key itself
                raise ConfigError(f"tenants[{row}].key_hashes: expected the 64 digits that `sluice hash-key` prints")
            if owners.setdefault(key_hash, row) != row:
                raise ConfigError(f"tenants[{row}].key_hashes: a key of tenants[{owners[key_hash]}] is here again")
        if tenant.max_priority is not None and tenant.max_priority > config.slo.max_priority:
            raise ConfigError(f"tenants[{row}].max_priority: is over slo.max_priority ({config.slo.max_priority})")
    if config.slo.default_priority > config.slo.max_priority:
        raise ConfigError(f"slo.default_priority: is over slo.max_priority ({config.slo.max_priority})")
    if config.auth.tenant_header is not None and not config.auth.trusted_networks:
        raise ConfigError("auth.trusted_networks: missing; auth.tenant_header is believed only from these")
