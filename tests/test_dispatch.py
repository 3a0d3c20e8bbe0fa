from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from adapters.base import (
    Answer,
    Answered,
    Broken,
    Call,
    Cause,
    Command,
    Commit,
    Hangup,
    Happening,
    HeadEvent,
    Leg,
    Payload,
    Prefilled,
    Retry,
)
from adapters.openai import CHAT
from gateway.core.events import EngineFound, EngineHealth, EngineLost
from gateway.core.types import Engine, Health, Role
from gateway.dispatch import Dispatcher, Refused, Streamed, StreamEnd, Whole
from gateway.driver import Driver
from gateway.engine_call import CallLimits
from gateway.engines import Engines
from gateway.journal import Journal
from tests.builders import a_request, a_scheduler, an_engine
from tests.integration.scripted_engine import CHUNKED, ScriptedEngine, chunk, says, serving, silence, token, whole
from tests.polling import until

LIMITS = CallLimits(connect_timeout_s=0.5, first_event_timeout_s=2.0, answer_timeout_s=2.0, max_response_bytes=10**6)


@dataclass
class Script:
    """An exchange that does, happening by happening, what a test wrote down."""

    steps: list[Sequence[Command]]
    happened: list[Happening] = field(default_factory=list)

    def start(self) -> list[Command]:
        return list(self.steps.pop(0))

    def receive(self, happening: Happening) -> list[Command]:
        self.happened.append(happening)
        return list(self.steps.pop(0)) if self.steps else []


@dataclass
class ScriptAdapter:
    """Gives one script after another."""

    scripts: list[Script]
    can_continue: bool = False
    health_path: str = "/health"
    report_path: str = "/metrics"
    models_path: str = "/v1/models"

    def open(self, payload: Payload, prefill: Engine, decode: Engine) -> Script:
        return self.scripts.pop(0)

    def parse_report(self, body: bytes):
        raise NotImplementedError

    def parse_models(self, body: bytes):
        raise NotImplementedError


@dataclass
class Bench:
    """A dispatcher in front of two scripted engines, and what it streams."""

    left: ScriptedEngine
    right: ScriptedEngine
    driver: Driver
    engines: Engines
    adapter: ScriptAdapter = field(default_factory=lambda: ScriptAdapter([]))
    keys: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dispatcher = Dispatcher(self.driver, {"vllm": self.adapter}, self.engines, LIMITS)

    def call(self, engine_id: str, leg: Leg = Leg.DECODE, **fields: object) -> Call:
        engine = self.driver.engine(engine_id)
        return Call(leg, engine, CHAT, b"{}", **({"is_answer": leg is Leg.DECODE} | fields))

    async def serve(self, *scripts: Script, request_id: str = "r1", is_stream: bool = False):
        self.adapter.scripts[:] = scripts
        request = a_request(request_id, arrived_at=self.driver.now())
        payload = Payload(request_id=request_id, path=CHAT, body={}, is_stream=is_stream)

        async def stream(call, decided, dispatch, continuation) -> StreamEnd:
            call.close()
            return StreamEnd(output_tokens=3, prompt_tokens=5, cached_tokens=None, tbt_s=0.1)

        return await self.dispatcher.serve(request, payload, stream)

    def assert_clean(self) -> None:
        self.driver.scheduler.cluster.check()
        assert not self.driver.scheduler.cluster.reservations
        assert self.dispatcher.running_count == 0


@pytest.fixture
async def bench():
    async with serving() as left, serving() as right:
        driver = Driver(a_scheduler(max_attempts=3), Journal())
        for name, engine in (("e1", left), ("e2", right)):
            driver.apply(EngineFound(an_engine(name, Role.BOTH, url=engine.url)))
            driver.apply(EngineHealth(name, Health.UP))
        keys: dict[str, str] = {}
        engines = Engines(keepalive_s=2.0, max_idle=4, api_key=keys.get)
        bench = Bench(left, right, driver, engines, keys=keys)
        yield bench
        bench.assert_clean()
        engines.close()
        await until(lambda: engines.open_count == 0)


DONE = [Answer(200, b"{}")]


async def test_an_answer_comes_back_whole_with_what_it_counted(bench):
    body = b'{"usage": {"prompt_tokens": 7, "completion_tokens": 2}}'
    ending = await bench.serve(Script([[bench.call("e1")], [Answer(200, body)]]))
    assert isinstance(ending, Whole)
    assert ending.answer.body == body
    assert (ending.usage.prompt_tokens, ending.usage.output_tokens) == (7, 2)


async def test_legs_follow_one_another_and_the_end_of_the_prefill_is_told(bench):
    script = Script([[bench.call("e1", Leg.PREFILL)], [Prefilled(), bench.call("e2")], DONE])
    ending = await bench.serve(script)
    assert isinstance(ending, Whole)
    assert [(type(happening), happening.leg) for happening in script.happened] == [
        (Answered, Leg.PREFILL),
        (Answered, Leg.DECODE),
    ]
    assert (len(bench.left.received), len(bench.right.received)) == (1, 1)


async def test_two_legs_at_once_run_at_once(bench):
    bench.left.script = silence
    script = Script([[bench.call("e1", Leg.PREFILL), bench.call("e2")], [Hangup(Leg.PREFILL), *DONE]])
    assert isinstance(await bench.serve(script), Whole)
    await until(lambda: bench.left.closed == 1)


async def test_a_commit_hands_the_answering_call_over(bench):
    bench.right.script = says(CHUNKED, chunk(token("a")))
    script = Script([[bench.call("e2")], [Commit()]])
    ending = await bench.serve(script, is_stream=True)
    assert isinstance(ending, Streamed)
    assert ending.end.output_tokens == 3
    assert isinstance(script.happened[0], HeadEvent)


async def test_a_failed_attempt_is_decided_again_without_the_engine_at_fault(bench):
    scripts = [Script([[Retry("e1", "x_status_500")]]), Script([[bench.call("e2")], DONE])]
    ending = await bench.serve(*scripts)
    assert isinstance(ending, Whole)
    assert (ending.dispatch.attempt, ending.dispatch.estimate.decode) == (2, "e2")
    assert bench.driver.scheduler.cluster.engines["e1"].health is Health.UP


async def test_an_unreachable_engine_is_down_for_everybody_at_once(bench):
    scripts = [Script([[Retry("e1", "decode_connect", is_engine_down=True)]]), Script([[bench.call("e2")], DONE])]
    assert isinstance(await bench.serve(*scripts), Whole)
    assert bench.driver.scheduler.cluster.engines["e1"].health is Health.DOWN


async def test_attempts_end_with_the_refusal_and_the_last_failure(bench):
    ending = await bench.serve(*(Script([[Retry("e1", f"failure_{n}")]]) for n in range(3)))
    assert isinstance(ending, Refused)
    assert (ending.reject.reason, ending.failure.reason) == ("too_many_attempts", "failure_2")


async def test_a_cancelled_request_hangs_up_every_leg(bench):
    bench.left.script = bench.right.script = silence
    script = Script([[bench.call("e1", Leg.PREFILL), bench.call("e2")]])
    serving_it = asyncio.create_task(bench.serve(script))
    await until(lambda: len(bench.left.received) == len(bench.right.received) == 1)
    serving_it.cancel()
    await asyncio.wait([serving_it])
    await until(lambda: bench.left.closed == bench.right.closed == 1)


async def test_a_stream_that_fails_releases_everything(bench):
    bench.right.script = says(CHUNKED, chunk(token("a")))
    bench.adapter.scripts[:] = [Script([[bench.call("e2")], [Commit()]])]

    async def leave(call, decided, dispatch, continuation) -> StreamEnd:
        raise ConnectionResetError

    payload = Payload(request_id="r1", path=CHAT, body={}, is_stream=True)
    with pytest.raises(ConnectionResetError):
        await bench.dispatcher.serve(a_request("r1", arrived_at=bench.driver.now()), payload, leave)
    await until(lambda: bench.right.closed == 1)


async def test_a_stale_connection_is_replaced_without_a_new_attempt(bench):
    """The engine closes a kept-alive connection as soon as it is used again."""

    async def close(received, writer):
        bench.left.script = says(whole(b"{}"))
        writer.close()

    await bench.serve(Script([[bench.call("e1")], DONE]), request_id="r0")
    bench.left.script = close
    script = Script([[bench.call("e1")], DONE])
    ending = await bench.serve(script)
    assert (ending.dispatch.attempt, [type(each) for each in script.happened]) == (1, [Answered])


async def test_an_engine_that_goes_down_fails_the_calls_that_wait_on_it(bench):
    bench.left.script = silence
    script = Script([[bench.call("e1")], DONE])
    serving_it = asyncio.create_task(bench.serve(script))
    await until(lambda: bool(bench.left.received))
    bench.dispatcher.engine_down("e2", "another one")
    bench.dispatcher.engine_down("e1", "gone")
    await serving_it
    assert script.happened == [Broken(Leg.DECODE, Cause.LOST, "gone")]


async def test_an_engine_that_left_between_decision_and_turn_is_a_failed_attempt(bench):
    bench.driver.apply(EngineFound(an_engine("e0", Role.BOTH, url=bench.left.url)))
    bench.driver.apply(EngineHealth("e0", Health.UP))
    ending = asyncio.create_task(bench.serve(Script([[bench.call("e2")], DONE])))
    await asyncio.sleep(0)
    bench.driver.apply(EngineLost("e0"))
    assert isinstance(await ending, Whole)
