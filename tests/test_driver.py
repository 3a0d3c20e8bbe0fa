from __future__ import annotations

import asyncio

import pytest

from gateway.core.events import EngineReport, Finished, Left, PrefillDone
from gateway.core.types import Dispatch, Reject, RejectReason, Report
from gateway.driver import Driver
from gateway.journal import Journal
from tests.builders import a_request, a_scheduler, an_engine
from tests.polling import until


class Diary(Journal):
    """Keeps in memory what it is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, object]] = []

    def event(self, event, now) -> None:
        self.lines.append(("apply", event))

    def decided(self, request, decision, now) -> None:
        self.lines.append(("decide", type(decision).__name__))

    def woke(self, decisions, now) -> None:
        self.lines.append(("wake", [type(decision).__name__ for decision in decisions]))


def a_driver(**limits: object) -> Driver:
    return Driver(a_scheduler(an_engine("b1"), max_in_flight_per_engine=1, **limits), Diary())


async def test_a_decision_comes_at_once_when_there_is_room():
    decided = await a_driver().decide(a_request())
    assert isinstance(decided.decision, Dispatch)
    assert decided.decision_s > 0


async def test_a_request_that_waits_is_dispatched_when_another_ends():
    driver = a_driver()
    await driver.decide(a_request("r1", arrived_at=driver.now()))
    waiting = asyncio.create_task(driver.decide(a_request("r2", arrived_at=driver.now())))
    await until(lambda: driver.scheduler.waiting_count == 1)
    driver.apply(Finished("r1"))
    assert isinstance((await waiting).decision, Dispatch)


async def test_a_wait_that_is_over_ends_in_a_refusal():
    driver = a_driver(max_wait_s=0.02)
    await driver.decide(a_request("r1", arrived_at=driver.now()))
    decided = await driver.decide(a_request("r2", arrived_at=driver.now()))
    assert isinstance(decided.decision, Reject)
    assert decided.decision.reason is RejectReason.WAITED_TOO_LONG


async def test_requests_that_wait_are_served_in_the_order_they_came():
    driver = a_driver()
    served: list[str] = []

    async def serve(name: str, arrived_at: float) -> None:
        await driver.decide(a_request(name, arrived_at=arrived_at))
        served.append(name)
        driver.apply(Finished(name))

    driver.apply(Left("nobody"))
    await driver.decide(a_request("r0", arrived_at=driver.now()))
    began_at = driver.now()
    tasks = [asyncio.create_task(serve(f"r{n}", began_at + n * 1e-6)) for n in (3, 1, 2)]
    await until(lambda: driver.scheduler.waiting_count == 3)
    driver.apply(Finished("r0"))
    await asyncio.wait(tasks)
    assert served == ["r1", "r2", "r3"]


async def test_a_cancelled_wait_gives_up_its_place():
    driver = a_driver()
    await driver.decide(a_request("r1", arrived_at=driver.now()))
    waiting = asyncio.create_task(driver.decide(a_request("r2", arrived_at=driver.now())))
    await until(lambda: driver.scheduler.waiting_count == 1)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert driver.scheduler.waiting_count == 0
    assert driver.scheduler.next_wakeup() is None


async def test_a_wait_that_is_cancelled_in_the_turn_it_was_served_releases_what_was_booked():
    driver = a_driver()
    await driver.decide(a_request("r1", arrived_at=driver.now()))
    waiting = asyncio.create_task(driver.decide(a_request("r2", arrived_at=driver.now())))
    await until(lambda: driver.scheduler.waiting_count == 1)
    driver.apply(Finished("r1"))
    await until(lambda: "r2" in driver.scheduler.cluster.reservations)
    waiting.cancel()
    await asyncio.wait([waiting])
    if waiting.cancelled():
        assert not driver.scheduler.cluster.reservations
    else:
        assert isinstance(waiting.result().decision, Dispatch)


async def test_a_steady_stream_of_events_does_not_keep_those_who_wait_from_being_served():
    """Each event asks for a wake-up now; putting the timer off each time would put it off for ever."""
    driver = a_driver()
    loop = asyncio.get_running_loop()
    await driver.decide(a_request("r1", arrived_at=driver.now()))
    waiting = asyncio.create_task(driver.decide(a_request("r2", arrived_at=driver.now())))
    await until(lambda: driver.scheduler.waiting_count == 1)
    driver.apply(Finished("r1"))

    def report(left: int) -> None:
        driver.apply(EngineReport("b1", Report(0, 0)))
        if left and not waiting.done():
            loop.call_soon(report, left - 1)

    report(1000)
    turns = 0
    while not waiting.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns < 100


async def test_everything_goes_to_the_journal_in_the_order_the_scheduler_saw_it():
    driver = a_driver()
    await driver.decide(a_request("r1", arrived_at=driver.now()))
    waiting = asyncio.create_task(driver.decide(a_request("r2", arrived_at=driver.now())))
    await until(lambda: driver.scheduler.waiting_count == 1)
    driver.apply(PrefillDone("r1"))
    driver.apply(Finished("r1"))
    await waiting
    kinds = [(kind, what if kind != "apply" else type(what).__name__) for kind, what in driver.journal.lines]
    kept = [line for line in kinds if line != ("wake", [])]
    assert kept == [
        ("decide", "Dispatch"),
        ("decide", "Wait"),
        ("apply", "PrefillDone"),
        ("apply", "Finished"),
        ("wake", ["Dispatch"]),
    ]


async def test_a_closed_driver_has_no_timer_left():
    driver = a_driver(max_wait_s=0.02)
    await driver.decide(a_request("r1", arrived_at=driver.now()))
    waiting = asyncio.create_task(driver.decide(a_request("r2", arrived_at=driver.now())))
    await until(lambda: driver.scheduler.waiting_count == 1)
    driver.close()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(waiting, 0.05)


async def test_an_engine_that_left_is_not_known():
    driver = a_driver()
    assert driver.engine("b1").id == "b1"
    assert driver.engine("b2") is None
