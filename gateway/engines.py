"""How each engine is reached: its connections, its credentials, and the head of a request to it."""

from __future__ import annotations

from collections.abc import Callable

from adapters.base import Call
from gateway.core.types import Engine
from gateway.upstream import Address, ConnectionPool


class Engines:
    """Connections and credentials per engine."""

    def __init__(self, *, keepalive_s: float, max_idle: int, api_key: Callable[[str], str | None]) -> None:
        self._keepalive_s = keepalive_s
        self._max_idle = max_idle
        self._api_key = api_key
        self._pools: dict[str, ConnectionPool] = {}

    def pool(self, engine: Engine) -> ConnectionPool:
        """The engine's connections; made on first use, and anew when its address changed."""
        pool = self._pools.get(engine.id)
        address = Address.of(engine.url)
        if pool is None or pool.address != address:
            if pool is not None:
                pool.retire()
            pool = ConnectionPool(address, keepalive_s=self._keepalive_s, max_idle=self._max_idle)
            self._pools[engine.id] = pool
        return pool

    def request_head(self, call: Call) -> bytes:
        """Request line and headers of the call, up to and including the empty line."""
        lines = [
            f"POST {call.path} HTTP/1.1",
            f"host: {Address.of(call.engine.url).host_header}",
            f"content-length: {len(call.body)}",
        ]
        api_key = self._api_key(call.engine.id)
        if api_key is not None:
            lines.append(f"authorization: Bearer {api_key}")
        lines += [
            f"{name}: {value}" for name, value in call.headers if api_key is None or name.lower() != "authorization"
        ]
        return "\r\n".join((*lines, "", "")).encode("latin-1", "replace")

    def forget(self, engine_id: str) -> None:
        """Drops the connections to an engine that left; answers under way may end."""
        if pool := self._pools.pop(engine_id, None):
            pool.retire()

    @property
    def open_count(self) -> int:
        """Connections open now."""
        return sum(pool.open_count for pool in self._pools.values())

    def close(self) -> None:
        """Closes every connection."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
