from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from adapters.base import Answered, Broken, Call, Cause, HeadEvent, Leg
from gateway.core.types import Engine, Role
from gateway.engine_call import MAX_HEAD_START_BYTES, CallLimits, EngineCall, StaleConnection
from gateway.upstream import Address, ConnectionPool
from tests.integration.scripted_engine import (
    CHUNKED,
    DONE,
    Script,
    ScriptedEngine,
    chunk,
    says,
    serving,
    silence,
    token,
    whole,
)
from tests.polling import until

LIMITS = CallLimits(
    connect_timeout_s=1.0, first_event_timeout_s=0.3, answer_timeout_s=0.6, max_response_bytes=2 * MAX_HEAD_START_BYTES
)
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: e\r\ncontent-length: 2\r\n\r\n"


@dataclass
class Sink:
    """What a committed stream gave."""

    data_: bytes = b""
    ending: str = ""

    def data(self, data: bytes) -> None:
        self.data_ += data

    def flush(self) -> None:
        pass

    def chunk(self, framed: bytes, start: int) -> None:
        self.data_ += framed[start:-2]

    def end(self) -> None:
        self.ending = "end"

    def broken(self, cause: Cause, detail: str) -> None:
        self.ending = cause


@dataclass
class Bench:
    """Calls to one scripted engine and what they report."""

    engine: ScriptedEngine
    pool: ConnectionPool
    happenings: asyncio.Queue[object] = field(default_factory=asyncio.Queue)

    def call(
        self, *, is_answer: bool = True, is_whole: bool = False, limits: CallLimits = LIMITS, **fields: object
    ) -> EngineCall:
        engine = Engine("e", self.engine.url, Role.BOTH)
        call = Call(Leg.DECODE, engine, "/v1/chat/completions", b"{}", is_answer=is_answer, **fields)
        return EngineCall(call, self.pool, limits, self.happenings.put_nowait, is_whole=is_whole)

    async def sent(self, script: Script, **fields: object) -> EngineCall:
        self.engine.script = script
        call = self.call(**fields)
        await call.send(HEAD)
        return call

    async def next(self) -> object:
        async with asyncio.timeout(3):
            return await self.happenings.get()


@pytest.fixture
async def bench():
    async with serving() as engine:
        pool = ConnectionPool(Address.of(engine.url), keepalive_s=2.0, max_idle=4)
        yield Bench(engine, pool)
        pool.close()
        await until(lambda: pool.open_count == 0)


async def test_a_whole_answer_is_reported_whole(bench):
    await bench.sent(says(whole(b'{"a": 1}', status=418)), is_answer=False)
    assert await bench.next() == Answered(Leg.DECODE, 418, b'{"a": 1}', "application/json")


async def test_the_events_of_a_stream_are_reported_one_by_one_until_it_is_relayed(bench):
    call = await bench.sent(says(CHUNKED, chunk(b": hi\n\n" + token("a") + token("b")[:5]), chunk(token("b")[5:])))
    assert await bench.next() == HeadEvent(Leg.DECODE, token("a")[6:-2])
    assert await bench.next() == HeadEvent(Leg.DECODE, token("b")[6:-2])
    sink = Sink()
    call.relay_to(sink)
    assert sink.data_ == b": hi\n\n" + token("a") + token("b")
    call.close()


async def test_a_stream_that_is_over_before_it_is_relayed_is_relayed_whole(bench):
    call = await bench.sent(says(CHUNKED, chunk(token("a") + DONE), b"0\r\n\r\n"))
    await bench.next()
    await asyncio.sleep(0.02)
    sink = Sink()
    call.relay_to(sink)
    assert (sink.data_, sink.ending) == (token("a") + DONE, "end")
    assert bench.pool.idle() is not None


async def test_a_stream_that_broke_before_it_is_relayed_tells_so_after_its_bytes(bench):
    call = await bench.sent(says(CHUNKED, chunk(token("a")), closes=True))
    await bench.next()
    await asyncio.sleep(0.02)
    sink = Sink()
    call.relay_to(sink)
    assert (sink.data_, sink.ending) == (token("a"), Cause.LOST)


async def test_an_event_stream_on_a_leg_that_is_not_the_answer_is_a_whole_answer(bench):
    await bench.sent(says(CHUNKED, chunk(token("a")), b"0\r\n\r\n"), is_answer=False)
    assert await bench.next() == Answered(Leg.DECODE, 200, token("a"), "text/event-stream; charset=utf-8")


async def test_a_stream_that_ends_before_its_first_event_is_lost(bench):
    await bench.sent(says(CHUNKED, b"0\r\n\r\n"))
    assert (await bench.next()).cause is Cause.LOST


@pytest.mark.parametrize(("is_whole", "limit"), [(False, "0.3 s"), (True, "0.6 s")])
async def test_silence_is_a_time_out_after_the_limit_of_its_kind(bench, is_whole, limit):
    await bench.sent(silence, is_whole=is_whole)
    assert await bench.next() == Broken(Leg.DECODE, Cause.HEAD_TIMEOUT, f"no answer in {limit}")
    await until(lambda: bench.pool.open_count == 0)


async def test_a_head_must_come_within_its_own_limit_when_the_call_sets_one(bench):
    await bench.sent(silence, head_within_s=0.05)
    assert await bench.next() == Broken(Leg.DECODE, Cause.LEASE, "no answer in 0.05 s")


async def test_a_head_in_time_leaves_the_rest_to_the_other_limit(bench):
    await bench.sent(says(CHUNKED), head_within_s=0.1)
    assert await bench.next() == Broken(Leg.DECODE, Cause.HEAD_TIMEOUT, "no answer in 0.3 s")


async def test_a_refused_connection_is_told_as_such(bench):
    bench.engine.server.close()
    await bench.call().send(HEAD)
    assert (await bench.next()).cause is Cause.CONNECT


async def test_an_answer_over_the_limit_is_dropped(bench):
    await bench.sent(says(whole(b"x" * (LIMITS.max_response_bytes + 1))), is_whole=True)
    assert (await bench.next()).cause is Cause.TOO_LARGE


async def test_a_stream_without_events_is_dropped_long_before_a_whole_answer_would_be(bench):
    flood = says(CHUNKED, *[chunk(b": nothing\n" * 10_000)] * (MAX_HEAD_START_BYTES // 100_000 + 5))
    await bench.sent(flood, limits=replace(LIMITS, first_event_timeout_s=10.0))
    assert (await bench.next()).cause is Cause.TOO_LARGE


async def test_a_call_that_is_dropped_just_before_its_relay_tells_the_relay(bench):
    call = await bench.sent(says(CHUNKED, chunk(token("a"))))
    await bench.next()
    call.give_up("the engine is down")
    sink = Sink()
    call.relay_to(sink)
    assert (sink.data_, sink.ending) == (token("a"), Cause.LOST)


async def test_a_closed_call_reports_nothing_more(bench):
    call = await bench.sent(silence)
    call.close()
    call.close()
    await until(lambda: bench.pool.open_count == 0)
    assert bench.happenings.empty()


async def test_a_call_given_up_is_lost_once(bench):
    call = await bench.sent(silence)
    call.give_up("the engine is down")
    call.give_up("again")
    assert await bench.next() == Broken(Leg.DECODE, Cause.LOST, "the engine is down")
    assert bench.happenings.empty()


async def test_a_call_that_has_shown_something_is_not_given_up(bench):
    call = await bench.sent(says(CHUNKED, chunk(token("a"))))
    await bench.next()
    sink = Sink()
    call.relay_to(sink)
    call.give_up("the engine is down")
    assert bench.happenings.empty()
    assert bench.pool.open_count == 1
    call.close()


# ---- kept-alive connections ------------------------------------------------------------------------------------------


async def close_when_asked(received, writer):
    writer.close()


async def a_stale_call(bench: Bench, *, is_replayable: bool) -> EngineCall:
    """A call on a kept-alive connection that the engine closes as soon as it is used."""
    await bench.sent(says(whole(b"{}")), is_answer=False)
    await bench.next()
    return await bench.sent(close_when_asked, is_answer=False, is_replayable=is_replayable)


async def test_a_stale_connection_is_told_when_the_call_may_be_sent_again(bench):
    call = await a_stale_call(bench, is_replayable=True)
    assert await bench.next() == StaleConnection(call)
    bench.engine.script = says(whole(b'{"b": 2}'))
    await call.send(HEAD, is_fresh=True)
    assert (await bench.next()).body == b'{"b": 2}'


async def test_a_stale_connection_loses_a_call_that_may_be_sent_only_once(bench):
    await a_stale_call(bench, is_replayable=False)
    assert (await bench.next()).cause is Cause.LOST
    assert len(bench.engine.received) == 2


async def test_a_new_connection_that_closes_is_no_stale_one(bench):
    await bench.sent(close_when_asked)
    assert (await bench.next()).cause is Cause.LOST
