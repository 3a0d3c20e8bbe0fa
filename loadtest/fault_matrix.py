"""The fault matrix: every connector x everything that can go wrong with one hand-off, each in a fresh pool.

A cell sends one streamed request, does its harm when the request is where it should be, and says how it ended: for the
gateway (attempts, streams continued), for the client (the right text, an error, nothing because it left), after how
long, and how many blocks x seconds the prefill engines held. `sluice bench faults` prints the table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from gateway.core.events import AttemptFailed, Event
from gateway.core.types import Health
from gateway.journal import Journal
from loadtest.answer import ClientResult
from loadtest.client import LoadClient, chat_request
from loadtest.fault_pools import HOLD_S, POOLS, Pool

OUTPUT_TOKENS: Final = 30
POLL_S: Final = 0.004
PATIENCE_S: Final = 20.0
MARGIN_S: Final = 0.5
"""What a busy machine may add to a hold before it counts as longer than the connector's."""
PROMPT: Final = " ".join(["the river runs under the old mill and the gate"] * 12)


@dataclass(frozen=True, slots=True)
class Cell:
    """How one fault of one connector ended."""

    connector: str
    fault: str
    ending: str
    """What the gateway did: `served`, `retried`, `continued`, `stopped` (the client left) or `failed`."""
    client: str
    """What the client saw: `right text`, `wrong text`, `left`, or the error."""
    took_s: float
    """From the harm to the client's end; for one that left, until no engine works for it any more."""
    stranded_block_s: float
    """Blocks x seconds held at prefill engines from the harm on."""
    longest_hold_s: float
    """From the client's end until nothing is held any more."""
    is_met: bool = True
    """Whether the request really met the fault: else the cell says nothing."""

    @property
    def hold_limit_s(self) -> float:
        """The connector's own minimum, as these engines were started."""
        return 0.0 if self.connector == "shared store" else HOLD_S


class Failures(Journal):
    """A journal that keeps the attempts that failed: how it is known that a fault was met."""

    def __init__(self) -> None:
        self.seen: list[AttemptFailed] = []

    def event(self, event: Event, now: float) -> None:
        """Keeps it if it is one."""
        if isinstance(event, AttemptFailed):
            self.seen.append(event)


class NotMet(Exception):
    """The request was over before the harm was done."""


@dataclass(slots=True)
class Scene:
    """One cell under way."""

    pool: Pool
    asking: asyncio.Task[ClientResult]
    failures: Failures
    harmed_at: float = 0.0
    has_left: bool = False
    block_s: float = 0.0
    others: list[asyncio.Task[ClientResult]] = field(default_factory=list)
    is_seen: bool = True
    """Whether the harm was seen to do something, where only the engines show that."""

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for it. Raises NotMet when the request is over before."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                if self.asking.done():
                    raise NotMet
                await asyncio.sleep(POLL_S)

    def leave(self) -> None:
        """The client goes away."""
        self.has_left = True
        self.asking.cancel()


Harm = Callable[[Scene], Awaitable[None]]


# ---- what goes wrong -------------------------------------------------------------------------------------------------


async def nothing(scene: Scene) -> None:
    """The undisturbed request."""


async def prefill_dies_mid(scene: Scene) -> None:
    await _mid_stream(scene)
    await scene.pool.engines["p0"].die()


async def prefill_dies_before(scene: Scene) -> None:
    await scene.until(lambda: scene.pool.busy("p0") == 1)
    await scene.pool.engines["p0"].die()


async def prefill_dies_while(scene: Scene) -> None:
    await scene.until(lambda: scene.pool.engines["p0"].engine.load().running_count == 1)
    await scene.pool.engines["p0"].die()


async def prefill_dies_after(scene: Scene) -> None:
    await scene.until(lambda: scene.pool.busy("d0") == 1 and scene.pool.busy("p0") == 0)
    await scene.pool.engines["p0"].die()
    scene.pool.engines["d0"].thaw()


async def decode_dies_before(scene: Scene) -> None:
    await scene.until(lambda: scene.pool.busy("d0") == 1)
    await scene.pool.engines["d0"].die()


async def decode_dies_mid(scene: Scene) -> None:
    await _mid_stream(scene)
    await scene.pool.engines["d0"].die()


async def decode_freezes_mid(scene: Scene) -> None:
    await _mid_stream(scene)
    scene.pool.engines["d0"].freeze()


async def _mid_stream(scene: Scene) -> None:
    counters = scene.pool.engines["d0"].engine.counters
    before = counters.generated_tokens  # the undisturbed answer came from there too
    await scene.until(lambda: counters.generated_tokens >= before + 5)


async def is_at(scene: Scene, name: str) -> None:
    await scene.until(lambda: scene.pool.busy(name) == 1)


async def prefill_freezes(scene: Scene) -> None:
    await is_at(scene, "p0")


async def decode_freezes(scene: Scene) -> None:
    await is_at(scene, "d0")


async def hand_off_stalls(scene: Scene) -> None:
    """The network between the engines stands still until the request is somewhere else."""
    fabric = scene.pool.cluster.fabric
    decode = scene.pool.engines["d0"].engine
    await _until(lambda: decode.load().fetching_count == 1 or scene.asking.done())
    scene.is_seen = decode.load().fetching_count == 1
    await _until(lambda: bool(scene.failures.seen) or scene.asking.done())
    fabric.bytes_per_s = 25e9


async def leaves_waiting(scene: Scene) -> None:
    scheduler = scene.pool.gateway.driver.scheduler
    await scene.until(lambda: scheduler.waiting_count == 1)
    scene.leave()
    for name in ("p0", "p1"):
        scene.pool.engines[name].thaw()


async def leaves_in_prefill_queue(scene: Scene) -> None:
    await is_at(scene, "p0")
    scene.leave()


async def leaves_in_prefill(scene: Scene) -> None:
    await scene.until(lambda: scene.pool.engines["p0"].engine.load().running_count == 1)
    scene.leave()


async def leaves_before_first_token(scene: Scene) -> None:
    await is_at(scene, "d0")
    scene.leave()


async def leaves_mid_stream(scene: Scene) -> None:
    await _mid_stream(scene)
    scene.leave()


# ---- how the pool is before the request ------------------------------------------------------------------------------


def _do(action: str, *names: str, **arguments: float) -> Callable[[Pool], None]:
    def arrange(pool: Pool) -> None:
        for name in names:
            getattr(pool.engines[name], action)(**arguments)

    return arrange


def _refuse(name: str) -> Callable[[Pool], None]:
    def arrange(pool: Pool) -> None:
        pool.engines[name].refuse_connections()
        pool.engines[name].drop_connections()  # one that was kept from the request before would be used

    return arrange


def _silence(name: str) -> Callable[[Pool], None]:
    def arrange(pool: Pool) -> None:
        pool.engines[name].faults.is_silent_to_posts = True

    return arrange


def _stall_network(pool: Pool) -> None:
    pool.cluster.fabric.bytes_per_s = 1.0


def _as_it_is(pool: Pool) -> None:
    """Nothing is prepared."""


SLOW: Final = 2000.0
"""A prefill of milliseconds then takes a wall second or two: long enough to be caught."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the matrix."""

    arrange: Callable[[Pool], None]
    """Done before the request."""
    harm: Harm
    """Done when the request is where it should be; it fails when the request is over before."""
    blames: tuple[str, ...] = ()
    """An attempt must have failed at one of these engines, or the request has not met the fault."""


_BUSY_DECODE: Final = _do("slow_down", "d0", factor=40.0)
FAULTS: Final[Mapping[str, Fault]] = MappingProxyType(
    {
        "none": Fault(_as_it_is, nothing),
        "prefill refuses": Fault(_refuse("p0"), nothing, ("p0",)),
        "prefill dies before it begins": Fault(_do("freeze", "p0"), prefill_dies_before, ("p0",)),
        "prefill dies at work": Fault(_do("slow_down", "p0", factor=SLOW), prefill_dies_while, ("p0",)),
        "prefill dies after": Fault(_do("freeze", "d0"), prefill_dies_after),
        "prefill freezes": Fault(_do("freeze", "p0"), prefill_freezes, ("p0",)),
        "decode refuses": Fault(_refuse("d0"), nothing, ("d0",)),
        "decode dies before its first token": Fault(_do("freeze", "d0"), decode_dies_before, ("d0",)),
        "decode dies mid-stream": Fault(_BUSY_DECODE, decode_dies_mid),
        "decode freezes": Fault(_do("freeze", "d0"), decode_freezes, ("d0",)),
        "decode freezes mid-stream": Fault(_BUSY_DECODE, decode_freezes_mid),
        "client leaves while it waits": Fault(_do("freeze", "p0", "p1"), leaves_waiting),
        "client leaves before the prefill": Fault(_do("freeze", "p0"), leaves_in_prefill_queue),
        "client leaves in the prefill": Fault(_do("slow_down", "p0", factor=SLOW), leaves_in_prefill),
        "client leaves before the first token": Fault(_do("freeze", "d0"), leaves_before_first_token),
        "client leaves mid-stream": Fault(_BUSY_DECODE, leaves_mid_stream),
        "hand-off times out": Fault(_stall_network, hand_off_stalls, ("p0", "d0")),
        "lease ends": Fault(_silence("d0"), nothing, ("p0", "d0")),
    }
)
OTHERWISE: Final[Mapping[tuple[str, str], Fault | None]] = MappingProxyType(
    {
        ("shared store", "hand-off times out"): None,  # nothing is moved from engine to engine
        ("sglang", "prefill dies after"): Fault(_BUSY_DECODE, prefill_dies_mid),  # it is busy until its KV is fetched
        # Both legs are silent then: which of the two is at fault nobody can tell.
        ("sglang", "decode freezes"): Fault(_do("freeze", "d0"), decode_freezes, ("p0", "d0")),
    }
)
"""(connector, fault) that is played otherwise, or does not exist."""
TRIES: Final = 3
"""A cell whose fault was not met is played again: a health probe may have been quicker than the request."""


def fault_of(connector: str, fault: str) -> Fault | None:
    """The row as it is played with that connector; None: there is no such thing."""
    return OTHERWISE.get((connector, fault), FAULTS[fault])


# ---- running ---------------------------------------------------------------------------------------------------------


async def run_cell(connector: str, fault: str) -> Cell | None:
    """Plays one cell, each time in a pool of its own, until its fault was met; None where there is no such fault."""
    played = fault_of(connector, fault)
    if played is None:
        return None
    for _ in range(TRIES):
        cell = await _play(connector, fault, played)
        if cell.is_met:
            break
    return cell


async def _play(connector: str, fault: str, played: Fault) -> Cell:
    harm = played.harm
    limits = {"max_in_flight": 1} if harm is leaves_waiting else {}
    async with POOLS[connector](**limits) as pool, LoadClient(pool.gateway.url) as client:
        request = chat_request(PROMPT, model=pool.model, max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
        await _until(lambda: _is_up(pool))
        expected = (await client.send(request)).text
        failures = pool.gateway.driver.journal = Failures()
        played.arrange(pool)
        others = [asyncio.create_task(client.send(request)) for _ in range(2 if harm is leaves_waiting else 0)]
        await asyncio.sleep(10 * POLL_S if others else 0)
        now = asyncio.get_running_loop().time()
        scene = Scene(pool, asyncio.create_task(client.send(request)), failures, harmed_at=now, others=others)
        counting = asyncio.create_task(_count_held(scene))
        try:
            try:
                await harm(scene)
            except NotMet:
                scene.is_seen = False
            if harm is not nothing:
                scene.harmed_at = asyncio.get_running_loop().time()
            cell = await _ending(scene, connector, fault, expected)
            blamed = {failure.engine_id for failure in failures.seen}
            is_met = scene.is_seen and (not played.blames or not blamed.isdisjoint(played.blames))
            return replace(cell, is_met=is_met)
        finally:
            counting.cancel()
            await asyncio.wait([counting])


async def _ending(scene: Scene, connector: str, fault: str, expected: str) -> Cell:
    loop = asyncio.get_running_loop()
    result: ClientResult | None = None
    with suppress(asyncio.CancelledError):
        result = await scene.asking
    if scene.has_left:
        await _until(lambda: scene.pool.gateway.dispatcher.running_count == 0 or bool(scene.others))
    took_s = loop.time() - scene.harmed_at
    await asyncio.gather(*scene.others)
    ended_at = loop.time()
    await _until(lambda: scene.pool.held_blocks() == 0)
    return Cell(
        connector,
        fault,
        _said(result, has_failed=bool(scene.failures.seen)),
        _seen(result, expected),
        took_s,
        scene.block_s,
        loop.time() - ended_at,
    )


def _said(result: ClientResult | None, *, has_failed: bool) -> str:
    if result is None:
        return "stopped"
    if result.error is not None:
        return "failed"
    if result.headers.get("x-sluice-attempts", "1") != "1":
        return "retried"
    return "continued" if has_failed else "served"


def _seen(result: ClientResult | None, expected: str) -> str:
    if result is None:
        return "left"
    if result.error is not None:
        return f"{result.error} {result.detail}".strip()
    return "right text" if result.text == expected else "wrong text"


async def _count_held(scene: Scene) -> None:
    """Adds up blocks x seconds, until cancelled."""
    loop = asyncio.get_running_loop()
    at = loop.time()
    while True:
        await asyncio.sleep(POLL_S)
        now = loop.time()
        scene.block_s += scene.pool.held_blocks() * (now - at)
        at = now


def _is_up(pool: Pool) -> bool:
    states = pool.gateway.driver.scheduler.cluster.engines.values()
    return len(states) == len(pool.engines) and all(state.health is Health.UP for state in states)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - the engines' state has no event
            await asyncio.sleep(POLL_S)
