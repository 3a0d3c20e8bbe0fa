"""The Redis store (Redis >= 6.2, Valkey): one stream per shard, leases and counters by script, a snapshot in a list.

    key                                     what
    {NAME:events:0}                         stream of shard 0; each entry has one field `m`, a message
    {NAME:lease:listen/ENGINE}              its holder; expires with the lease
    {NAME:lease:listen/ENGINE}:token        the last fencing token given for it
    {NAME:snapshot}                         which list is the snapshot now
    {NAME:snapshot}:ID                      its parts
    {NAME:generation}                       made once: another value means that Redis lost what it held
    {NAME:budget:WINDOW}                    hash: budget -> consumed

The braces are hash tags: keys that are used together share one, so every command stays in one slot of a Redis Cluster,
and shards spread over its nodes. Streams are trimmed by count, to about the bytes that they may take.

URLs: redis:// and rediss:// (TLS) with user and password, `redis+cluster://` for a Redis Cluster, and
`redis+sentinel://host:port,host:port/SERVICE[/DB]` to ask Sentinels for the present primary; with `rediss+` for TLS.
An ACL user needs the keys `~{NAME:*` and the commands `+@read +@write +@connection +eval` (with a cluster `+cluster`).

Whatever Redis or the network does (gone, silent, read-only, full, loading, failing over) is StoreUnavailable.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from gateway.core.errors import ConfigError
from gateway.stores import START, Entry, StoreUnavailable

FIELD = b"m"
READ_COUNT = 128
"""Entries read at once: at 25 events each some 10 ms of following."""
FIRST_ENTRY_BYTES = 4096
"""Taken for the mean size of an entry before any is known."""
LEAST_ENTRIES = 64
SNAPSHOT_TTL_S = 3600
"""A snapshot of gateways that are gone for so long says nothing of what engines hold."""

ACQUIRE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return false end
if holder then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return redis.call('GET', KEYS[2])
end
redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2])
return redis.call('INCR', KEYS[2])
"""
RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
SPEND = """
local totals = {}
for row = 2, #ARGV, 2 do
  totals[#totals + 1] = redis.call('HINCRBY', KEYS[1], ARGV[row], ARGV[row + 1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return totals
"""


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """Where Redis is and what it may cost."""

    url: str
    namespace: str = "sluice"
    shard_count: int = 1
    max_bytes: int = 64 * 2**20
    """Of all streams together."""
    timeout_s: float = 1.0
    """For one command; beyond it Redis counts as away."""
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


class RedisStore:
    """Gateways share what they know through Redis."""

    def __init__(self, settings: RedisSettings) -> None:
        """Connects to nothing yet. Raises ConfigError when the URL makes no sense."""
        self._settings = settings
        self._client: Any = None
        self._sentinel: Sentinel | None = None
        self._entry_bytes = float(FIRST_ENTRY_BYTES)
        _parts_of(settings.url)

    async def open(self) -> str:
        await self.close()
        async with self._asking(self._settings.timeout_s * 2):
            self._client = self._connect()
            key = self._key("generation")
            await self._client.set(key, token_hex(8), nx=True)
            generation: bytes | None = await self._client.get(key)
        return (generation or b"").decode()

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(RedisError, OSError):
                await client.aclose()
        sentinel, self._sentinel = self._sentinel, None
        if sentinel is not None:
            for watcher in sentinel.sentinels:
                with contextlib.suppress(RedisError, OSError):
                    await watcher.aclose()

    async def append(self, shard: int, data: bytes) -> None:
        most = self._settings.max_bytes / self._settings.shard_count / self._entry_bytes
        limit = max(LEAST_ENTRIES, int(most))
        async with self._asking():
            await self._client.xadd(self._stream(shard), {FIELD: data}, maxlen=limit, approximate=True)
        self._saw(data)

    async def end(self, shard: int) -> str:
        async with self._asking():
            last = await self._client.xrevrange(self._stream(shard), count=1)
        return last[0][0].decode() if last else START

    async def covers(self, shard: int, position: str) -> bool:
        if position == START:
            return True
        async with self._asking():
            first = await self._client.xrange(self._stream(shard), count=1)
            last = await self._client.xrevrange(self._stream(shard), count=1)
        if not first or not last:
            return False
        return _order(first[0][0]) <= _order(position.encode()) <= _order(last[0][0])

    async def read(self, shard: int, after: str, *, wait_s: float) -> Sequence[Entry]:
        key = self._stream(shard)
        async with self._asking(wait_s + self._settings.timeout_s):
            answer = await self._client.xread({key: after}, count=READ_COUNT, block=max(1, round(wait_s * 1e3)))
        streams = list(answer.values()) if isinstance(answer, dict) else [rows for _, rows in answer or []]
        rows = streams[0] if streams else []
        if rows and isinstance(rows[0], list):
            rows = rows[0]  # the third version of the protocol nests them once more
        entries = [Entry(position.decode(), (fields or {}).get(FIELD, b"")) for position, fields in rows]
        for entry in entries:
            self._saw(entry.data)
        return entries

    async def acquire(self, name: str, owner: str, *, ttl_s: float) -> int | None:
        key = self._key(f"lease:{name}")
        async with self._asking():
            token = await self._client.eval(ACQUIRE, 2, key, f"{key}:token", owner, max(1, round(ttl_s * 1e3)))
        return None if token is None else int(token)

    async def release(self, name: str, owner: str) -> None:
        async with self._asking():
            await self._client.eval(RELEASE, 1, self._key(f"lease:{name}"), owner)

    async def save_snapshot(self, parts: Sequence[bytes]) -> None:
        head = self._key("snapshot")
        fresh = f"{head}:{token_hex(8)}"
        async with self._asking():
            await self._client.rpush(fresh, *parts[:1])
            await self._client.expire(fresh, SNAPSHOT_TTL_S)
        for part in parts[1:]:
            async with self._asking():
                await self._client.rpush(fresh, part)
        async with self._asking():
            before = await self._client.set(head, fresh, ex=SNAPSHOT_TTL_S, get=True)
            if before is not None:
                await self._client.unlink(before)

    async def load_snapshot(self) -> Sequence[bytes] | None:
        async with self._asking():
            head = await self._client.get(self._key("snapshot"))
            count = 0 if head is None else await self._client.llen(head)
        parts: list[bytes] = []
        for row in range(count):
            async with self._asking():
                part = await self._client.lindex(head, row)
            if part is None:
                return None  # another one took its place meanwhile
            parts.append(part)
        return parts or None

    async def spend(self, amounts: Mapping[str, int], *, window: int, window_s: float) -> Mapping[str, int]:
        words = [word for name, amount in amounts.items() for word in (name, amount)]
        async with self._asking():
            totals = await self._client.eval(
                SPEND, 1, self._key(f"budget:{window}"), max(1, round(2e3 * window_s)), *words
            )
        return dict(zip(amounts, map(int, totals), strict=True))

    # ---- inside -----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _asking(self, timeout_s: float | None = None) -> AsyncIterator[None]:
        """A time limit around commands, and one kind of failure for all that can go wrong with them."""
        limit_s = self._settings.timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            raise StoreUnavailable(f"no answer within {limit_s:g} s") from None
        except (RedisError, OSError) as error:
            raise StoreUnavailable(str(error) or type(error).__name__) from None
        except AttributeError:
            if self._client is not None:
                raise
            raise StoreUnavailable("not connected") from None

    def _connect(self) -> Any:
        scheme, places, user, password, path = _parts_of(self._settings.url)
        options: dict[str, Any] = {
            "username": user,
            "password": password,
            "socket_connect_timeout": self._settings.timeout_s,
            # Ours is around each command. Its own would be an `asyncio.wait_for`, which on Python 3.11 swallows a
            # cancellation that comes with the answer: a gateway that was suspended then never joined again.
            "socket_timeout": None,
            "protocol": 2,
        }
        if scheme.startswith("rediss"):
            options |= {
                "ssl": True,
                "ssl_ca_certs": self._settings.ca_file,
                "ssl_certfile": self._settings.cert_file,
                "ssl_keyfile": self._settings.key_file,
            }
        once = Retry(NoBackoff(), 0)  # what failed is told at once; the gateway joins anew
        host, port = places[0]
        if scheme.endswith("+cluster"):
            return RedisCluster(host=host, port=port, retry=once, **options)
        if scheme.endswith("+sentinel"):
            service, _, number = path.partition("/")
            tls = {name: value for name, value in options.items() if name.startswith("ssl")}
            watching = {"socket_connect_timeout": self._settings.timeout_s, **tls}
            self._sentinel = Sentinel(places, sentinel_kwargs=watching, **options)  # type: ignore[no-untyped-call]
            return self._sentinel.master_for(service, db=int(number or 0), retry=once)
        return Redis(host=host, port=port, db=int(path or 0), retry=once, **options)

    def _key(self, name: str) -> str:
        return f"{{{self._settings.namespace}:{name}}}"

    def _stream(self, shard: int) -> str:
        return self._key(f"events:{shard}")

    def _saw(self, data: bytes) -> None:
        self._entry_bytes += (max(64, len(data)) - self._entry_bytes) / 64


def _parts_of(url: str) -> tuple[str, list[tuple[str, int]], str | None, str | None, str]:
    """Scheme, hosts with ports, user, password, path without its first slash. Raises ConfigError."""
    shapes = "redis://, rediss://, redis+cluster://, redis+sentinel://host:port,host:port/SERVICE, or rediss+..."
    try:
        scheme, _, rest = url.partition("://")
        authority, _, path = rest.partition("/")
        credentials, _, hosts = authority.rpartition("@")
        user, _, password = credentials.partition(":")
        places = [_place(place, 26379 if scheme.endswith("+sentinel") else 6379) for place in hosts.split(",")]
        kind = scheme.removeprefix("rediss").removeprefix("redis")
        is_known = scheme.startswith("redis") and kind in ("", "+cluster", "+sentinel")
        number = path.partition("/")[2] if kind == "+sentinel" else path
        is_sound = is_known and (kind != "+sentinel" or path) and (kind != "+cluster" or not path)
        if not is_sound or (number and not number.isdecimal()):
            raise ValueError
    except ValueError:
        raise ConfigError(f"store.url: expected {shapes}") from None
    return scheme, places, unquote(user) or None, unquote(password) or None, path


def _place(place: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{place}")
    if not parts.hostname:
        raise ValueError(place)
    return parts.hostname, parts.port or default_port


def _order(position: bytes) -> tuple[int, int]:
    """The position as numbers: as text "9-0" comes after "10-0"."""
    milliseconds, _, number = position.partition(b"-")
    return int(milliseconds), int(number or 0)
