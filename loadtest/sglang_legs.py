"""What an emulated SGLang engine does with one request: its outputs in order, or the error it ends with.

A closed connection is noticed late, as by the real one: until then the request takes its place and its memory. An abort
by id ends it at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import TYPE_CHECKING, Final, TypeVar

from gateway.core.errors import BadRequest
from gateway.core.types import Role
from loadtest.engine_types import EngineRequest, Finished, FinishReason, HeldKv, Output
from loadtest.sglang_requests import Room, SglangError, SglangGeneration
from loadtest.sglang_rooms import (
    ABORTED,
    HANDSHAKE_S,
    LOST_DECODE_S,
    LOST_PREFILL_S,
    TIMEOUT_S,
    Meeting,
    failed,
)
from loadtest.sglang_shapes import Waiting

if TYPE_CHECKING:
    from loadtest.fake_engine import FakeEngine

NOTICE_S: Final = 4.0
"""How often an engine looks whether the client of a request that waits is still there."""
_T = TypeVar("_T")


class EngineGone(Exception):
    """The engine died: the connection drops."""


class Legs:
    """The requests of one engine."""

    def __init__(self, fake: FakeEngine) -> None:
        self._fake = fake
        self._aborts: dict[str, asyncio.Event] = {}
        self._waiting: dict[str, int] = {}
        self._meetings: dict[str, Meeting] = {}
        self._left: dict[str, tuple[SglangGeneration, asyncio.TimerHandle]] = {}
        """Requests whose client is gone, and when that is noticed."""

    @property
    def waiting(self) -> Waiting:
        """Requests that wait for the other engine, and the tokens of their prompts in whole pages."""
        page = self._fake.engine.settings.block_tokens
        return Waiting(len(self._waiting), sum(-(-tokens // page) * page for tokens in self._waiting.values()))

    def abort(self, rid: str) -> None:
        """Ends every request whose id begins with this one at once; the empty id is ignored."""
        for own in [own for own in self._aborts if rid and own.startswith(rid)]:
            self._aborts[own].set()
            if own in self._left:
                self._forget(self._left[own][0])

    async def outputs(self, generation: SglangGeneration) -> AsyncGenerator[Output, None]:
        """The outputs of the request's sequence. Raises SglangError or EngineGone."""
        if generation.rid in self._aborts:
            raise SglangError(f"Duplicate request ID detected: {generation.rid}")
        self._aborts[generation.rid] = asyncio.Event()
        is_over = False
        try:
            async for output in self._leg(generation):
                is_over = output.end is not None
                yield output
        except SglangError:
            is_over = True
            raise
        finally:
            if is_over:
                self._forget(generation)
            else:  # the client left, or has heard enough
                loop, notice_s = asyncio.get_running_loop(), NOTICE_S / self._fake.cluster.speed
                self._left[generation.rid] = generation, loop.call_later(notice_s, self._forget, generation)

    def _leg(self, generation: SglangGeneration) -> AsyncGenerator[Output, None]:
        match self._fake.settings.engine.role:
            case Role.PREFILL:
                return self._prefill(generation)
            case Role.DECODE:
                return self._decode(generation)
        return self._run(generation, generation.sequence())

    def _forget(self, generation: SglangGeneration) -> None:
        rid, room = generation.rid, generation.room
        self._aborts.pop(rid, None)
        if left := self._left.pop(rid, None):
            left[1].cancel()
        self._waiting.pop(rid, None)
        self._fake.abort([rid])
        meeting = self._meetings.pop(rid, None)
        if meeting is None or room is None:
            return
        rooms = self._fake.cluster.rooms.get(room.port)
        is_prefill = self._fake.settings.engine.role is Role.PREFILL
        if is_prefill and meeting.kv.done() and not meeting.taken.done():
            meeting.taken.add_done_callback(lambda _: self._drop_hold(rid))  # not under the reader's hands
        elif is_prefill:
            self._drop_hold(rid)
        else:
            meeting.take("Failed due to an unknown reason from another rank")
        if rooms is not None and (not is_prefill or not meeting.decode_came.done()):
            rooms.leave(room.number)

    def _drop_hold(self, rid: str) -> None:
        self._fake.engine.drop_hold(rid, now=self._fake.cluster.now())
        self._fake.cluster.rearm()

    # ---- one engine --------------------------------------------------------------------------------------------------

    async def _run(self, generation: SglangGeneration, request: EngineRequest) -> AsyncGenerator[Output, None]:
        try:
            stream = self._fake.submit([request])
        except BadRequest as error:
            raise SglangError(error.message) from error
        while True:
            output = await self._or_abort(generation.rid, stream.outputs.get())
            if output is None:
                if self._fake.engine.is_crashed:
                    raise EngineGone
                output = _aborted(generation.rid, self._fake.cluster.now())
            yield output
            if output.end is not None:
                return

    async def _or_abort(self, rid: str, awaited: Awaitable[_T]) -> _T | None:
        """What is awaited; None when the request is aborted before."""
        task, abort = asyncio.ensure_future(awaited), asyncio.ensure_future(self._aborts[rid].wait())
        try:
            await asyncio.wait([task, abort], return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            abort.cancel()
            if not task.done() and not isinstance(awaited, asyncio.Future):
                task.cancel()

    async def _wait(self, generation: SglangGeneration, awaited: asyncio.Future[_T], what: str) -> _T:
        """What the other engine does. Raises SglangError when it does not in time, or the request is aborted."""
        assert generation.room is not None, "only hand-offs wait for another engine"
        self._waiting[generation.rid] = len(generation.prompt)
        try:
            async with asyncio.timeout(TIMEOUT_S / self._fake.cluster.speed):
                result = await self._or_abort(generation.rid, awaited)
        except TimeoutError:
            raise failed(what, generation.rid, generation.room, "timed out") from None
        if self._fake.engine.is_crashed:
            raise EngineGone
        if self._aborts[generation.rid].is_set():
            raise failed(what, generation.rid, generation.room, ABORTED)
        self._waiting.pop(generation.rid, None)
        return result  # type: ignore[return-value]  # None only where it is what was awaited

    # ---- hand-offs ---------------------------------------------------------------------------------------------------

    async def _prefill(self, generation: SglangGeneration) -> AsyncGenerator[Output, None]:
        assert self._fake.rooms is not None, "a prefill engine has a bootstrap server"
        meeting = self._meetings[generation.rid] = self._fake.rooms.meeting(_room(generation).number)
        await self._wait(generation, meeting.decode_came, "Prefill bootstrap")
        last: Output | None = None
        async for output in self._run(generation, generation.sequence(is_kv_held=True)):
            last = output
        assert last is not None, "a run ends with an output"
        if last.end is not None and last.end.held is not None:
            await self._hand_over(generation, meeting, last.end.held)
        yield last

    async def _hand_over(self, generation: SglangGeneration, meeting: Meeting, held: HeldKv) -> None:
        settings = self._fake.settings
        meeting.offer(held, self._fake.engine.id, settings.side_channel_host, settings.side_channel_port)
        failure = await self._wait(generation, meeting.taken, "Prefill transfer")
        if failure is not None:
            raise failed("Prefill transfer", generation.rid, _room(generation), failure)

    async def _decode(self, generation: SglangGeneration) -> AsyncGenerator[Output, None]:
        room, cluster = _room(generation), self._fake.cluster
        rooms = cluster.rooms.get(room.port)
        if rooms is None:
            await self._or_abort(generation.rid, asyncio.sleep(HANDSHAKE_S / cluster.speed))
            raise failed("Decode handshake", generation.rid, room, ABORTED)
        meeting = self._meetings[generation.rid] = rooms.meeting(room.number)
        meeting.come()
        try:
            remote = await self._wait(generation, meeting.kv, "Decode transfer")
        except ConnectionError as error:
            await self._or_abort(generation.rid, asyncio.sleep(LOST_PREFILL_S / cluster.speed))
            raise failed("Decode transfer", generation.rid, room, str(error)) from None
        async for output in self._run(generation, generation.sequence(remote=remote)):
            if output.end is not None and output.end.reason is FinishReason.ERROR:
                lost = f"Lost connection with prefill instance (bootstrap_addr: {room.host}:{room.port})"
                raise failed("Decode transfer", generation.rid, room, lost)
            meeting.take()
            yield output

    def die(self) -> None:
        """The engine is gone: those that wait for it hear of it, or do not, as for a real one."""
        if self._fake.settings.engine.role is Role.DECODE:
            loop, delay_s = asyncio.get_running_loop(), LOST_DECODE_S / self._fake.cluster.speed
            for meeting in self._meetings.values():
                loop.call_later(delay_s, meeting.take, "Failed to send kv chunk")
        for abort in self._aborts.values():
            abort.set()
        self._waiting.clear()
        self._meetings.clear()


def _aborted(rid: str, at: float) -> Output:
    end = Finished(rid, at, FinishReason.ABORT, 0, 0, at, None, None)
    return Output(0, (), end)


def _room(generation: SglangGeneration) -> Room:
    assert generation.room is not None, "parse refuses hand-offs without one"
    return generation.room
