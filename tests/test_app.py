from __future__ import annotations

import asyncio
import socket

import pytest

from gateway.app import adapters_of, journal_of, predictor_of, running, scheduler_of
from gateway.config import (
    AdmissionSettings,
    Config,
    EngineSettings,
    IndexSettings,
    JournalSettings,
    PolicySettings,
    PredictorSettings,
    ServerSettings,
)
from gateway.core.errors import ConfigError
from gateway.journal import FileJournal, Journal
from predictors.online import Online
from tests.polling import until

SMALL = IndexSettings(max_blocks=100)


def a_config(**fields: object) -> Config:
    return Config(**({"server": ServerSettings(port=0, shutdown_grace_s=0.1), "index": SMALL} | fields))


async def test_a_gateway_listens_inside_the_block_and_not_after_it():
    async with running(a_config()) as gateway:
        port = int(gateway.url.rpartition(":")[2])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_nothing_runs_on_after_the_block():
    before = asyncio.all_tasks()
    engines = (EngineSettings(url="http://127.0.0.1:9", id="e1"),)
    async with running(a_config(engines=engines)) as gateway:
        await until(lambda: "e1" in gateway.driver.scheduler.cluster.engines)
    await until(lambda: asyncio.all_tasks() == before)


async def test_a_failure_in_the_block_is_raised_and_everything_closed():
    before = asyncio.all_tasks()
    with pytest.raises(KeyError):
        async with running(a_config()):
            raise KeyError
    await until(lambda: asyncio.all_tasks() == before)


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid"])
async def test_an_address_that_cannot_be_listened_on_is_a_config_error(host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"server\.port: cannot listen on {host}:{port}: "):
            async with running(a_config(server=ServerSettings(host=host, port=port))):
                pass


async def test_an_ipv6_address_stands_in_brackets():
    async with running(a_config(server=ServerSettings(host="::1", port=0))) as gateway:
        assert gateway.url.startswith("http://[::1]:")


def test_the_limits_reach_the_scheduler():
    admission = AdmissionSettings(max_in_flight_per_engine=3, max_waiting=4, max_wait_s=5.0, max_attempts=6)
    limits = scheduler_of(a_config(admission=admission), seed=0).limits
    assert (limits.max_in_flight_per_engine, limits.max_waiting, limits.max_wait_s, limits.max_attempts) == (3, 4, 5, 6)


def test_the_lease_reaches_the_adapter():
    assert adapters_of(a_config(admission=AdmissionSettings(lease_s=7.0)))["vllm"].lease_s == 7.0


def test_an_unknown_adapter_is_refused():
    with pytest.raises(ConfigError, match="unknown 'x'"):
        adapters_of(a_config(engines=(EngineSettings(url="http://e:1", adapter="x"),)))


def test_a_predictor_comes_from_the_table_or_from_a_module():
    assert predictor_of(a_config()) == Online()
    outside = PredictorSettings(name="predictors.online:Online")
    assert predictor_of(a_config(predictor=outside)) == Online()


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": PolicySettings(name="best")},
        {"policy": PolicySettings(settings={"speed": 1})},
        {"predictor": PredictorSettings(name="oracle")},
        {"predictor": PredictorSettings(settings={"speed": 1})},
    ],
)
def test_unknown_plug_ins_and_settings_are_refused(fields):
    with pytest.raises(ConfigError, match="known"):
        scheduler_of(a_config(**fields), seed=0)


def test_a_journal_is_written_where_the_settings_say(tmp_path):
    assert type(journal_of(a_config())) is Journal
    journal = journal_of(a_config(journal=JournalSettings(path=str(tmp_path / "j"))))
    assert isinstance(journal, FileJournal)
    journal.close()


def test_a_journal_that_cannot_be_written_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"journal\.path: cannot write .*: Is a directory"):
        journal_of(a_config(journal=JournalSettings(path=str(tmp_path))))
