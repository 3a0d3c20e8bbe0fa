"""The settings of the store, where gateways share what they know: a table of gateway/config.py."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from gateway.toml import Secret

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class StoreName(StrEnum):
    """Where gateways meet."""

    MEMORY = "memory"
    REDIS = "redis"


class KvListeners(StrEnum):
    """Who follows an engine's KV events, where gateways share a store."""

    ONE = "one"
    ALL = "all"


class StoreSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where gateways share what they know; `memory` needs nothing and is for a single gateway."""

    name: StoreName = StoreName.MEMORY
    """One of memory, redis."""
    url: Secret | None = None
    """`redis://USER:PASSWORD@host:port/DB`, rediss:// for TLS, redis+cluster://, redis+sentinel://h:p,h:p/SERVICE."""
    namespace: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._-]{1,64}\Z", description="1 to 64 of A-Z a-z 0-9 . _ -")] = (
        "sluice"
    )
    """Begins every key, 1 to 64 characters of A-Z a-z 0-9 . _ -; gateways of one namespace serve the same engines."""
    gateway_id: Annotated[
        str, Meta(pattern=r"\A[A-Za-z0-9._:-]{0,128}\Z", description="at most 128 letters, digits")
    ] = ""
    """Its name among the others, at most 128 characters of A-Z a-z 0-9 . _ : -; empty: host name and process id."""
    shard_count: Annotated[int, Meta(ge=1, le=64)] = 1
    """Streams, a count, the same for all gateways; in a Redis Cluster they spread over its nodes."""
    lease_s: Annotated[float, Meta(ge=0.5, le=3_600)] = 5.0
    """Seconds without a sign of a gateway after which its reservations end with the others, 0.5 to 3600."""
    flush_s: Annotated[float, Meta(ge=0.0005, le=1)] = 0.002
    """Seconds for which what happens is gathered before it is told, 0.0005 to 1."""
    turn_s: Annotated[float, Meta(ge=0, le=1)] = 0.02
    """Seconds for which a free prefill engine is offered to one gateway before the next, 0 to 1; longer than `flush_s`
    and the way through the store take. Not so for workers of one machine: 0.004 at most."""
    timeout_s: Annotated[float, Meta(ge=0.05, le=60)] = 1.0
    """Seconds after which a store that does not answer counts as away, 0.05 to 60."""
    snapshot_interval_s: Seconds = 10.0
    """Seconds between two snapshots of the index, from which a gateway that starts is warm at once."""
    max_stream_bytes: Annotated[int, Meta(ge=2**20, le=2**40)] = 64 * 2**20
    """Memory in bytes that all streams together take in the store."""
    kv_listeners: KvListeners = KvListeners.ONE
    """One of one, all: whether one gateway follows an engine's KV events for all, or each does."""
    tls_ca_file: Name | None = None
    """Path of the certificates to trust, for TLS; not set: the system's."""
    tls_cert_file: Name | None = None
    """Path of a client certificate, for TLS; not set: none."""
    tls_key_file: Name | None = None
    """Path of the client certificate's key; not set: none."""
