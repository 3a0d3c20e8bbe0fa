"""Carries out decided requests: runs an adapter's Exchange over connections, and retries with a fresh decision.

A request is over in exactly one of three ways: refused (a value of the core), answered whole, or streamed. Until the
Exchange commits nothing has reached the client, so every failure before that is decided again, the engine at fault
avoided, within the scheduler's bound on attempts. However it ends, or if the client leaves, every leg is hung up and
the ledger is told: nothing stays reserved.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

from adapters.answers import Usage, usage
from adapters.base import (
    Adapter,
    Answer,
    Call,
    Command,
    Commit,
    Exchange,
    Hangup,
    Happening,
    Leg,
    Payload,
    Prefilled,
    Retry,
)
from gateway.core.events import AttemptFailed, EngineHealth, Finished, FirstToken, Left, PrefillDone
from gateway.core.types import Dispatch, Health, Reject, Request
from gateway.driver import Decided, Driver
from gateway.engine_call import CallLimits, EngineCall, StaleConnection
from gateway.engines import Engines


@dataclass(frozen=True, slots=True)
class Refused:
    """The core refused; `failure` is what went wrong in the attempt before, if there was one."""

    decided: Decided
    reject: Reject
    failure: Retry | None


@dataclass(frozen=True, slots=True)
class Whole:
    """The client's answer in one piece."""

    decided: Decided
    dispatch: Dispatch
    answer: Answer
    usage: Usage


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """How a relayed stream ended."""

    output_tokens: int
    prompt_tokens: int | None
    cached_tokens: int | None
    tbt_s: float | None
    failure: str | None = None
    """None: complete. Otherwise the client got one error event that says this."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """The answer was relayed."""

    decided: Decided
    dispatch: Dispatch
    end: StreamEnd


StreamAnswer = Callable[[EngineCall, Decided, Dispatch], Awaitable[StreamEnd]]
"""Relays a committed call to the client and returns when it is over."""


class Attempt:
    """One Exchange under way. `close` hangs up whatever is still open; it may be called at any time, and again."""

    def __init__(
        self,
        exchange: Exchange,
        engines: Engines,
        limits: CallLimits,
        on_prefilled: Callable[[Prefilled], None],
        *,
        is_stream: bool,
    ) -> None:
        self._exchange = exchange
        self._engines = engines
        self._limits = limits
        self._on_prefilled = on_prefilled
        self._is_stream = is_stream
        self._calls: dict[Leg, EngineCall] = {}
        self._happenings: asyncio.Queue[Happening | StaleConnection] = asyncio.Queue()

    async def result(self) -> Retry | Answer | EngineCall:
        """Runs to the first result: a failure before the commit, a whole answer, or the committed call."""
        commands = deque(self._exchange.start())
        while True:
            result = await self._carry_out(commands)
            if result is not None:
                return result
            happening = await self._happenings.get()
            while isinstance(happening, StaleConnection):
                call = happening.call
                await call.send(self._engines.request_head(call.call), is_fresh=True)
                happening = await self._happenings.get()
            commands.extend(self._exchange.receive(happening))

    def engine_down(self, engine_id: str, detail: str) -> None:
        """Gives up calls to that engine that have shown nothing yet."""
        for call in self._calls.values():
            if call.call.engine.id == engine_id:
                call.give_up(detail)

    def close(self) -> None:
        """Hangs up every leg."""
        for call in self._calls.values():
            call.close()

    async def _carry_out(self, commands: deque[Command]) -> Retry | Answer | EngineCall | None:
        to_send: list[Call] = []
        result: Retry | Answer | EngineCall | None = None
        while commands and result is None:
            match commands.popleft():
                case Call() as call:
                    to_send.append(call)
                case Hangup(leg):
                    self._calls[leg].close()
                case Prefilled() as prefilled:
                    self._on_prefilled(prefilled)
                case Commit():
                    result = next(call for call in self._calls.values() if call.call.is_answer)
                case Retry() | Answer() as ending:
                    result = ending
        if len(to_send) == 1:
            await self._send(to_send[0])
        elif to_send:
            async with asyncio.TaskGroup() as group:
                for call in to_send:
                    group.create_task(self._send(call))
        return result

    async def _send(self, call: Call) -> None:
        pool = self._engines.pool(call.engine)
        is_whole = call.is_answer and not self._is_stream
        engine_call = EngineCall(call, pool, self._limits, self._happenings.put_nowait, is_whole=is_whole)
        self._calls[call.leg] = engine_call
        await engine_call.send(self._engines.request_head(call))


class Dispatcher:
    """Serves requests: decide, act, and decide again when an attempt fails before the first byte."""

    def __init__(self, driver: Driver, adapters: Mapping[str, Adapter], engines: Engines, limits: CallLimits) -> None:
        self._driver = driver
        self._adapters = adapters
        self._engines = engines
        self._limits = limits
        self._attempts: set[Attempt] = set()

    @property
    def running_count(self) -> int:
        """Attempts under way."""
        return len(self._attempts)

    async def serve(self, request: Request, payload: Payload, stream: StreamAnswer) -> Refused | Whole | Streamed:
        """Serves one request to its end. Cancelling it hangs up and releases everything."""
        failure: Retry | None = None
        try:
            while True:
                decided = await self._driver.decide(request)
                if isinstance(decided.decision, Reject):
                    return Refused(decided, decided.decision, failure)
                ending = await self._attempt(decided, decided.decision, request, payload, stream)
                if not isinstance(ending, Retry):
                    return ending
                failure = ending
                self._report_failure(request, ending)
                avoid = tuple(dict.fromkeys((*request.avoid, ending.engine_id)))
                request = replace(request, attempt=request.attempt + 1, avoid=avoid)
        except BaseException:
            self._driver.apply(Left(request.id))
            raise

    async def _attempt(
        self, decided: Decided, dispatch: Dispatch, request: Request, payload: Payload, stream: StreamAnswer
    ) -> Retry | Whole | Streamed:
        prefill, decode = (self._driver.engine(name) for name in (dispatch.estimate.prefill, dispatch.estimate.decode))
        if prefill is None or decode is None:  # it left between the decision and this turn of the loop
            return Retry(dispatch.estimate.prefill if prefill is None else dispatch.estimate.decode, "engine_left")
        exchange = self._adapters[decode.adapter].open(payload, prefill, decode)

        def prefilled(told: Prefilled) -> None:
            self._driver.apply(PrefillDone(request.id, told.prompt_tokens, told.cached_tokens))

        attempt = Attempt(exchange, self._engines, self._limits, prefilled, is_stream=payload.is_stream)
        self._attempts.add(attempt)
        try:
            result = await attempt.result()
            match result:
                case Retry():
                    return result
                case Answer():
                    return self._finish_whole(request, decided, dispatch, result)
                case EngineCall():
                    self._driver.apply(FirstToken(request.id))
                    end = await stream(result, decided, dispatch)
                    self._finish_stream(request, end)
                    return Streamed(decided, dispatch, end)
        finally:
            self._attempts.discard(attempt)
            attempt.close()

    def engine_down(self, engine_id: str, detail: str) -> None:
        """Fails the calls to that engine that have shown nothing yet, so that they are tried elsewhere now."""
        for attempt in list(self._attempts):
            attempt.engine_down(engine_id, detail)

    def _finish_whole(self, request: Request, decided: Decided, dispatch: Dispatch, answer: Answer) -> Whole:
        told = usage(answer.body) or Usage()
        self._driver.apply(
            Finished(
                request.id,
                output_tokens=told.output_tokens,
                prompt_tokens=told.prompt_tokens,
                cached_tokens=told.cached_tokens,
            )
        )
        return Whole(decided, dispatch, answer, told)

    def _finish_stream(self, request: Request, end: StreamEnd) -> None:
        finished = Finished(
            request.id,
            output_tokens=end.output_tokens,
            prompt_tokens=end.prompt_tokens,
            cached_tokens=end.cached_tokens,
            tbt_s=end.tbt_s,
        )
        self._driver.apply(finished)

    def _report_failure(self, request: Request, failure: Retry) -> None:
        if failure.is_engine_down:
            self._driver.apply(EngineHealth(failure.engine_id, Health.DOWN, failure.reason))
        self._driver.apply(AttemptFailed(request.id, failure.engine_id, failure.reason))
