from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from adapters.vllm import Vllm
from gateway.core.errors import MalformedEngineData
from gateway.core.events import EngineFound, EngineLost
from gateway.core.types import Engine, Health, Role
from gateway.driver import Driver
from gateway.journal import Journal
from gateway.tasks import beside
from gateway.watch import Watch, WatchLimits, describe
from tests.builders import a_scheduler
from tests.integration.scripted_engine import METRICS, ScriptedEngine, serving
from tests.polling import until

LIMITS = WatchLimits(health_interval_s=0.02, report_interval_s=0.02, timeout_s=0.2, failures_to_down=2)


@dataclass
class Bench:
    """A watch, what it was told and what it told."""

    driver: Driver
    changes: asyncio.Queue[EngineFound | EngineLost] = field(default_factory=asyncio.Queue)
    down: list[tuple[str, str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    async def follow(self) -> AsyncIterator[EngineFound | EngineLost]:
        while True:
            yield await self.changes.get()

    def find(self, engine: ScriptedEngine, **fields: object) -> None:
        found = Engine(**({"id": "e1", "url": engine.url, "role": Role.BOTH} | fields))
        self.changes.put_nowait(EngineFound(found))

    @property
    def state(self):
        return self.driver.scheduler.cluster.engines.get("e1")

    async def is_(self, health: Health) -> None:
        await until(lambda: self.state is not None and self.state.health is health)


@asynccontextmanager
async def watching() -> AsyncIterator[Bench]:
    bench = Bench(Driver(a_scheduler(), Journal()))
    watch = Watch(
        bench.driver,
        {"vllm": Vllm()},
        LIMITS,
        api_key=lambda _: None,
        metrics_url=lambda _: None,
        on_down=lambda engine_id, reason: bench.down.append((engine_id, reason)),
        on_lost=bench.lost.append,
    )
    async with beside(watch.run(bench.follow())):
        yield bench


async def test_an_engine_is_up_with_its_facts_and_its_load():
    async with serving() as engine, watching() as bench:
        bench.find(engine)
        await bench.is_(Health.UP)
        assert bench.state.engine.models == ("emulated",)
        assert bench.state.engine.max_model_tokens == 4096
        assert bench.state.report.running_count == 0


async def test_one_failed_probe_is_not_the_end_and_two_in_a_row_are():
    async with serving() as engine, watching() as bench:
        bench.find(engine)
        await bench.is_(Health.UP)
        engine.server.close()
        await bench.is_(Health.DOWN)
        assert [engine_id for engine_id, _ in bench.down] == ["e1"]
        assert bench.state.health_reason


async def test_each_silence_that_lasts_is_told_once():
    async with serving() as engine, watching() as bench:
        bench.find(engine)
        await bench.is_(Health.UP)
        engine.probes["/health"] = None
        await bench.is_(Health.DOWN)
        await asyncio.sleep(2 * LIMITS.timeout_s)
        assert len(bench.down) == 1
        engine.probes["/health"] = b""
        await bench.is_(Health.UP)


async def test_an_engine_that_left_is_followed_no_more_and_its_connections_go():
    async with serving() as engine, watching() as bench:
        bench.find(engine)
        await bench.is_(Health.UP)
        bench.changes.put_nowait(EngineLost("e1"))
        await until(lambda: bench.lost == ["e1"])
        assert bench.state is None
        assert bench.down == [("e1", "the engine left")]
        engine.probed.clear()
        await asyncio.sleep(3 * LIMITS.health_interval_s)
        assert engine.probed == {}


async def test_an_engine_that_moved_is_followed_at_its_new_address():
    async with serving() as before, serving(model="newer") as after, watching() as bench:
        bench.find(before)
        await bench.is_(Health.UP)
        bench.find(after)
        await until(lambda: bench.state.engine.models == ("newer",))


async def test_facts_that_an_engine_stops_telling_stay():
    async with serving() as engine, watching() as bench:
        bench.find(engine, block_tokens=16)
        await bench.is_(Health.UP)
        await asyncio.sleep(3 * LIMITS.report_interval_s)
        assert bench.state.engine.block_tokens == 16


@pytest.mark.parametrize(
    ("error", "said"),
    [(MalformedEngineData("not metrics"), "not metrics"), (TimeoutError(), "TimeoutError"), (OSError("gone"), "gone")],
)
def test_a_failure_is_described_in_a_few_words(error, said):
    assert describe(error) == said


async def test_an_engine_that_was_started_with_another_connector_is_kept_out_and_says_why():
    async with serving() as engine, watching() as bench:
        engine.probes["/metrics"] = METRICS + b'vllm:nixl_num_failed_transfers_total{engine="0"} 0.0\n'
        bench.find(engine, role=Role.PREFILL, connector="store")
        await bench.is_(Health.DOWN)
        assert "connector store, its metrics are those of nixl" in bench.state.health_reason


async def test_an_engine_that_does_not_fit_its_pool_is_not_even_asked():
    async with serving() as engine, watching() as bench:
        bench.find(engine, id="p1", role=Role.PREFILL)
        bench.find(engine, role=Role.DECODE, connector="mooncake")
        await bench.is_(Health.DOWN)
        assert "p1 of the same pool" in bench.state.health_reason


async def test_a_mooncake_prefill_engine_is_a_candidate_once_its_bootstrap_server_knows_it():
    async with serving() as engine, watching() as bench:
        engine.probes["/query"] = b"{}"
        bench.find(engine, role=Role.PREFILL, connector="mooncake", transfer_address=engine.url)
        await bench.is_(Health.DOWN)
        assert "ranks" in bench.state.health_reason
        engine.probes["/query"] = b'{"0": {"engine_id": "abc"}}'
        await bench.is_(Health.UP)
        assert bench.state.engine.transfer_ids == ("abc",)
