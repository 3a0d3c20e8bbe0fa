"""The Redis store and a real Redis in every kind of trouble: unavailable, in time, and over when the trouble is."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator

import pytest

from gateway.core.errors import ConfigError
from gateway.stores import START, StoreUnavailable
from gateway.stores.redis import RedisSettings, RedisStore
from loadtest.redis_process import executable
from tests.polling import until
from tests.redis_server import RedisServer, free_port, redis_server

pytestmark = pytest.mark.slow
TIMEOUT_S = 0.3


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    async with redis_server() as running:
        yield running


@pytest.fixture
async def store(server) -> AsyncIterator[RedisStore]:
    opened = RedisStore(RedisSettings(server.url, timeout_s=TIMEOUT_S))
    await opened.open()
    yield opened
    await opened.close()


async def works(store: RedisStore) -> bool:
    """Whether the store can be joined and written."""
    try:
        await store.open()
        await store.append(0, b"again")
    except StoreUnavailable:
        return False
    return True


async def test_a_redis_that_answers_nothing_is_away_in_time_and_back_when_it_answers(server, store):
    server.suspend()
    began_at = asyncio.get_running_loop().time()
    with pytest.raises(StoreUnavailable, match="no answer within"):
        await store.append(0, b"x")
    assert asyncio.get_running_loop().time() - began_at < 10 * TIMEOUT_S
    server.resume()
    await until(lambda: works(store))


async def test_a_redis_that_is_gone_is_away_and_a_new_one_has_another_generation(server, store):
    before = await store.open()
    server.kill()
    with pytest.raises(StoreUnavailable):
        await store.append(0, b"x")
    with pytest.raises(StoreUnavailable):
        await store.open()
    await server.start()
    assert await store.open() != before


async def test_a_redis_that_is_read_only_is_away(server, store):
    await server.command("REPLICAOF", "127.0.0.1", free_port())
    with pytest.raises(StoreUnavailable, match=r"(?i)read only|readonly"):
        await store.append(0, b"x")
    await server.command("REPLICAOF", "NO", "ONE")
    await until(lambda: works(store))


async def test_a_redis_that_is_full_is_away(server, store):
    await server.command("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(StoreUnavailable, match=r"(?i)memory"):
        await store.append(0, b"x")
    await server.command("CONFIG", "SET", "maxmemory", "0")
    await until(lambda: works(store))


async def test_somebody_elses_data_under_our_key_is_unavailable_and_not_a_crash(server, store):
    await server.command("SET", "{sluice:events:0}", "not a stream")
    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        await store.append(0, b"x")


async def test_an_entry_of_somebody_else_is_read_as_no_message(server, store):
    await server.command("XADD", "{sluice:events:0}", "*", "other", "field")
    assert [entry.data for entry in await store.read(0, START, wait_s=0.1)] == [b""]


async def test_a_server_clock_that_ran_ahead_or_behind_keeps_the_order(server, store):
    await server.command("XADD", "{sluice:events:0}", "9999999999999-0", "m", "from the future")
    position = await store.end(0)
    await store.append(0, b"after")
    assert [entry.data for entry in await store.read(0, position, wait_s=0.1)] == [b"after"]
    await server.command("DEL", "{sluice:events:0}")
    await store.append(0, b"numbered by the clock again")
    assert not await store.covers(0, position)  # so a gateway starts from the new end instead of waiting for ever


async def test_a_user_with_the_documented_rights_is_enough(server):
    rules = ("~{sluice:*", "+@read", "+@write", "+@connection", "+eval")
    assert await server.command("ACL", "SETUSER", "gateway", "on", ">se:cret", *rules) == b"+OK"
    url = server.url.replace("redis://", "redis://gateway:se%3Acret@")
    store = RedisStore(RedisSettings(url, timeout_s=TIMEOUT_S))
    await store.open()
    await store.append(0, b"x")
    assert len(await store.read(0, START, wait_s=0.1)) == 1
    assert await store.acquire("listen/p0", "a", ttl_s=1.0) == 1
    await store.release("listen/p0", "a")
    await store.save_snapshot([b"a", b"b"])
    assert await store.load_snapshot() == [b"a", b"b"]
    assert await store.spend({"t": 3}, window=1, window_s=1.0) == {"t": 3}
    await store.close()
    wrong = RedisStore(RedisSettings(url.replace("se%3Acret", "guessed"), timeout_s=TIMEOUT_S))
    with pytest.raises(StoreUnavailable, match=r"(?i)wrongpass|invalid"):
        await wrong.open()
    await wrong.close()


async def test_a_sentinel_tells_the_primary_and_a_failover_is_followed(tmp_path):
    async with redis_server() as primary, redis_server("--replicaof", "127.0.0.1", str(primary.port)) as replica:
        file = tmp_path / "sentinel.conf"
        file.write_text(
            f"sentinel monitor gateways 127.0.0.1 {primary.port} 1\n"
            "sentinel down-after-milliseconds gateways 500\nsentinel failover-timeout gateways 2000\n"
        )
        sentinel = RedisServer(before=(str(file), "--sentinel"))
        await sentinel.start()
        try:
            url = f"redis+sentinel://127.0.0.1:{sentinel.port}/gateways"
            store = RedisStore(RedisSettings(url, timeout_s=TIMEOUT_S))
            await until(lambda: works(store), timeout_s=20.0)
            await until(lambda: is_replica_seen(sentinel), timeout_s=20.0)
            primary.kill()
            with pytest.raises(StoreUnavailable):
                await store.append(0, b"x")
            await until(lambda: works(store), timeout_s=30.0)
            assert b"role:master" in await replica.command("INFO", "replication")
            await store.close()
        finally:
            sentinel.close()


async def is_replica_seen(sentinel: RedisServer) -> bool:
    return b"slaves=1" in await sentinel.command("INFO", "sentinel")


def has_tls() -> bool:
    """Whether this redis-server was built with TLS; one that was not does not know the setting."""
    command = [executable(), "--port", "0", "--tls-port", "1", "--tls-cert-file", "/nowhere"]
    told = subprocess.run(command, capture_output=True, timeout=10, check=False)
    return b"Bad directive" not in told.stdout + told.stderr


@pytest.mark.skipif(not has_tls(), reason="this redis-server is built without TLS")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate")
async def test_tls_is_spoken_and_a_certificate_that_is_not_trusted_refused(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    words = [*command.split(), "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, words, check=True, capture_output=True)
    port = free_port()
    tls = ("--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key))
    async with redis_server(*tls, "--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no"):
        url = f"rediss://127.0.0.1:{port}"
        store = RedisStore(RedisSettings(url, timeout_s=1.0, ca_file=str(certificate)))
        await store.open()
        await store.append(0, b"x")
        await store.close()
        other = RedisStore(RedisSettings(url, timeout_s=1.0))
        with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
            await other.open()
        await other.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://host:1",
        "redis://",
        "redis://host:port",
        "redis+sentinel://host:1",
        "redis+cluster://host/1",
        "redis://h/x",
    ],
)
def test_a_url_that_makes_no_sense_is_refused_with_its_setting(url):
    with pytest.raises(ConfigError, match=r"store\.url: expected redis://"):
        RedisStore(RedisSettings(url))
