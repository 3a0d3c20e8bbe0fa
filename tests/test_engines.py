from __future__ import annotations

import pytest

from adapters.base import Call, Leg
from adapters.openai import CHAT
from gateway.core.types import Role
from gateway.engines import Engines
from tests.builders import an_engine
from tests.integration.scripted_engine import serving
from tests.polling import until


def a_call(*headers: tuple[str, str]) -> Call:
    return Call(Leg.DECODE, an_engine("e1", url="http://127.0.0.1:8100"), CHAT, b"{}", headers)


@pytest.fixture
async def engines():
    engines = Engines(keepalive_s=2.0, max_idle=4, api_key={"e2": "engine-key"}.get)
    yield engines
    engines.close()


async def test_a_request_head_has_the_length_and_the_clients_headers(engines):
    head = engines.request_head(a_call(("Authorization", "Bearer client"), ("X-A", "\u00e9\u20ac")))
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:8100\r\n")
    assert b"\r\ncontent-length: 2\r\n" in head
    assert b"\r\nAuthorization: Bearer client\r\n" in head
    assert head.endswith(b"\r\nX-A: \xe9?\r\n\r\n")


async def test_an_engines_own_key_takes_the_place_of_the_clients(engines):
    call = Call(Leg.DECODE, an_engine("e2"), CHAT, b"{}", (("authorization", "Bearer client"),))
    head = engines.request_head(call)
    assert b"authorization: Bearer engine-key\r\n" in head
    assert b"client" not in head


async def test_an_engine_that_moved_or_left_keeps_no_connection(engines):
    async with serving() as before, serving() as after:
        for forget in (lambda: engines.pool(an_engine("e1", Role.BOTH, url=after.url)), lambda: engines.forget("e1")):
            pool = engines.pool(an_engine("e1", Role.BOTH, url=before.url))
            assert engines.pool(an_engine("e1", Role.BOTH, url=before.url)) is pool
            await pool.connect()
            assert engines.open_count == 1
            forget()
            assert engines.pool(an_engine("e1", Role.BOTH, url=after.url)) is not pool
            pool.close()
            await until(lambda pool=pool: pool.open_count == 0)
            engines.forget("e1")
