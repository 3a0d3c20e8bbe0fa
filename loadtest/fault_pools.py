"""A gateway in front of two prefill and two decode engines, for one cell of the fault matrix; one row per connector.

To add a kind of engine: a function that starts such a pool, and a row in `POOLS`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final, Protocol

from gateway.app import Gateway, running
from gateway.config import (
    AdmissionSettings,
    Config,
    EngineClientSettings,
    EngineSettings,
    PolicySettings,
    ServerSettings,
    TokenSettings,
    WatchSettings,
    resolve,
)
from gateway.core.types import Role
from loadtest import engine_types
from loadtest.engine import Engine
from loadtest.engine_faults import Faults
from loadtest.fake_engine import FakeCluster, FakeSettings
from loadtest.sglang_legs import Legs

SPEED: Final = 20.0
"""Engine seconds per second: a decode step takes about a quarter of a millisecond."""
HOLD_S: Final = 2.0
"""Wall seconds for which the emulated prefill engines keep what nobody fetches; real ones 30 s to minutes."""
CONNECT_S: Final = 0.5
FIRST_EVENT_S: Final = 1.0
IDLE_S: Final = 0.6
LEASE_S: Final = 0.5
LIMIT_S: Final = max(CONNECT_S, FIRST_EVENT_S, IDLE_S, LEASE_S)
"""The longest of the gateway's limits here: no cell may take more than 5 s beyond it."""
NAMES: Final = (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE))


class FaultyEngine(Protocol):
    """What a cell does to an engine."""

    faults: Faults
    engine: Engine

    @property
    def legs(self) -> Legs: ...

    def refuse_connections(self) -> None: ...

    def drop_connections(self) -> None: ...

    async def die(self) -> None: ...

    def freeze(self) -> None: ...

    def thaw(self) -> None: ...

    def slow_down(self, factor: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Pool:
    """The engines by name (p0, p1, d0, d1) and the gateway in front of them; an idle gateway prefers p0 and d0."""

    gateway: Gateway
    engines: Mapping[str, FaultyEngine]
    model: str
    cluster: FakeCluster

    def held_blocks(self) -> int:
        """KV blocks that the prefill engines which live hold for readers."""
        prefills = (self.engines[name].engine for name in ("p0", "p1"))
        return sum(engine.held_block_count for engine in prefills if not engine.is_crashed)

    def busy(self, name: str) -> int:
        """Requests in an engine, held KV apart."""
        load = self.engines[name].engine.load()
        apart = self.engines[name].legs.waiting.count
        return apart + load.running_count + load.waiting_count + load.deferred_count


@asynccontextmanager
async def emulated(
    connector: str, *, speaks: str = "vllm", first_event_s: float = FIRST_EVENT_S, max_in_flight: int = 64
) -> AsyncIterator[Pool]:
    """Emulated engines with that connector, all up. Every request is handed off: this is about hand-offs."""
    async with FakeCluster(speed=SPEED) as cluster:
        fakes = {}
        for name, role in NAMES:
            settings = engine_types.EngineSettings(
                role=role, lease_s=HOLD_S * SPEED, lease_extension_s=HOLD_S * SPEED, heartbeat_s=SPEED / 4
            )
            fakes[name] = await cluster.start(FakeSettings(engine=settings, connector=connector, speaks=speaks))
        config = Config(
            engines=tuple(
                EngineSettings(
                    url=fake.url,
                    id=name,
                    role=fake.settings.engine.role,
                    adapter=speaks,
                    connector=connector,
                    transfer_address=fake.url if connector == "mooncake" else None,
                    max_in_flight=max_in_flight,
                )
                for name, fake in fakes.items()
            ),
            server=ServerSettings(port=0, shutdown_grace_s=0.2),
            watch=WatchSettings(
                health_interval_s=0.05, report_interval_s=0.05, timeout_s=0.5, report_stale_s=1.0, failures_to_down=2
            ),
            engine_client=EngineClientSettings(
                connect_timeout_s=CONNECT_S,
                first_event_timeout_s=first_event_s,
                answer_timeout_s=2 * first_event_s,
                idle_timeout_s=IDLE_S,
            ),
            admission=AdmissionSettings(lease_s=LEASE_S),
            policy=PolicySettings(settings={"can_skip_hand_off": False}),
            tokens=TokenSettings(ask_engine=False),
        )
        async with running(resolve(config)) as gateway:
            yield Pool(gateway, fakes, "emulated", cluster)


POOLS: Final[Mapping[str, Callable[..., AbstractAsyncContextManager[Pool]]]] = MappingProxyType(
    {
        "nixl pull": partial(emulated, "nixl"),
        "nixl push": partial(emulated, "nixl_push"),
        "mooncake": partial(emulated, "mooncake"),
        "shared store": partial(emulated, "store"),
        "sglang": partial(emulated, "nixl", speaks="sglang"),
    }
)
