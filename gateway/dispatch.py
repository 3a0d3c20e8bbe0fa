"""Carries out decided requests: runs an adapter's Exchange over connections, and retries with a fresh decision.

A request is over in exactly one of three ways: refused (a value of the core), answered whole, or streamed. Until the
Exchange commits nothing has reached the client, so every failure before that is decided again, the engine at fault
avoided, within the scheduler's bound on attempts. However it ends, or if the client leaves, every leg is hung up and
the ledger is told: nothing stays reserved.
"""

from __future__ import annotations

import asyncio
import functools
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
    Expect,
    Hangup,
    Happening,
    Leg,
    Payload,
    Prefilled,
    Retry,
)
from adapters.continuation import Said, asking_for_ids, can_continue
from gateway.continuation import Continuation, ContinuationLimits, ContinuationMemory, client_asked_for_ids
from gateway.core.events import AttemptFailed, EngineHealth, Finished, FirstToken, Left, PrefillDone
from gateway.core.stranded import StrandedKv
from gateway.core.types import Dispatch, Engine, Health, Reject, RejectReason, Request
from gateway.driver import Decided, Driver
from gateway.engine_call import CallLimits, EngineCall, StaleConnection
from gateway.engines import Engines
from gateway.records import Trail
from gateway.trace_context import with_parent

DEFAULT_BLOCK_TOKENS = 16
"""vLLM's KV block where an engine did not tell its own."""


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


StreamAnswer = Callable[[EngineCall, Decided, Dispatch, Continuation | None], Awaitable[StreamEnd]]
"""Relays a committed call to the client and returns when it is over; with a continuation it may outlive the call."""


class Attempt:
    """One Exchange under way. `close` hangs up whatever is still open; it may be called at any time, and again."""

    def __init__(
        self,
        exchange: Exchange,
        engines: Engines,
        limits: CallLimits,
        on_prefilled: Callable[[Prefilled], None],
        down_reason: Callable[[str], str | None],
        *,
        is_stream: bool,
        trail: Trail | None = None,
        on_hang_up: Callable[[Call], None] = lambda call: None,
    ) -> None:
        """`down_reason` tells why no answer of an engine is to be waited for, None where one is.

        With a `trail` each engine is told the span of its leg as its caller.
        """
        self._trail = trail
        self._on_hang_up = on_hang_up
        self._exchange = exchange
        self._engines = engines
        self._limits = limits
        self._on_prefilled = on_prefilled
        self._down_reason = down_reason
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
            if engine_id in (call.call.engine.id, call.call.waits_for):
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
                case Expect(leg, within_s):
                    self._calls[leg].expect(within_s)
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
        if self._trail is not None and self._trail.trace is not None:
            headers = with_parent(call.headers, self._trail.trace, self._trail.leg_span_id(call.leg))
            call = replace(call, headers=headers)
        pool = self._engines.pool(call.engine)
        is_whole = call.is_answer and not self._is_stream
        engine_call = EngineCall(
            call, pool, self._limits, self._happenings.put_nowait, is_whole=is_whole, on_hang_up=self._on_hang_up
        )
        self._calls[call.leg] = engine_call
        # It may have gone down since the decision: nothing would end the call before its lease.
        if (reason := self._down_reason(call.engine.id)) is not None:
            engine_call.give_up(reason)
            return
        await engine_call.send(self._engines.request_head(call))


def named_for(payload: Payload, attempt: int) -> Payload:
    """The payload under an id of its own for each attempt: some engines find one another by it, and what an attempt
    left behind must not take what is meant for the next."""
    return payload if attempt == 1 else replace(payload, request_id=f"{payload.request_id}.{attempt}")


@dataclass(slots=True)
class Serving:
    """One request while it is served: what is asked for now, and the attempt under way."""

    request: Request
    payload: Payload
    trail: Trail | None = None
    failure: Retry | None = None
    attempt: Attempt | None = None
    prompt_tokens: int | None = None
    """Of the client's prompt, as the first engine that told counted them."""
    prefilled: Engine | None = None
    """The engine whose prefill for this attempt is over."""
    culprits: tuple[str, ...] = ()
    suspects: tuple[str, ...] = ()
    """Engines at fault, and those that may have been just as well; each once, in order."""

    def failed(self, failure: Retry) -> None:
        """The next decision is another attempt, without the engine at fault."""
        self.close()
        self.failure = failure
        self.culprits = tuple(dict.fromkeys((*self.culprits, failure.engine_id)))
        self.suspects = tuple(dict.fromkeys((*self.suspects, *failure.suspects)))
        avoid = tuple(dict.fromkeys((*self.culprits, *self.suspects)))
        self.request = replace(self.request, attempt=self.request.attempt + 1, avoid=avoid)

    def close(self) -> None:
        """Hangs up whatever is open."""
        if self.attempt is not None:
            self.attempt.close()


@dataclass(frozen=True, slots=True)
class Begun:
    """The first token is here: `call` is to be relayed."""

    call: EngineCall
    decided: Decided
    dispatch: Dispatch


async def _nobody_tells(model: str, ids: tuple[int, ...]) -> None:
    """No text."""


class Dispatcher:
    """Serves requests: decide, act, decide again when an attempt fails before the first byte, and go on elsewhere when
    a stream breaks after it."""

    def __init__(
        self,
        driver: Driver,
        adapters: Mapping[str, Adapter],
        engines: Engines,
        limits: CallLimits,
        continuation: ContinuationLimits | None = None,
        *,
        on_hang_up: Callable[[Call], None] = lambda call: None,
        stranded: StrandedKv | None = None,
        text_of: Callable[[str, tuple[int, ...]], Awaitable[str | None]] = _nobody_tells,
    ) -> None:
        """Without limits of their own, streams that break are not continued. `on_hang_up` hears of every call that is
        closed before its end; `text_of` tells a model's text of token ids, None where nobody does."""
        self._text_of = text_of
        self._on_hang_up = on_hang_up
        self._driver = driver
        self._adapters = adapters
        self._engines = engines
        self._limits = limits
        self._continuation = continuation or ContinuationLimits(is_on=False)
        self._memory = ContinuationMemory(self._continuation.max_bytes)
        self._attempts: set[Attempt] = set()
        self.stranded = stranded or StrandedKv()
        """What prefill engines hold for hand-offs that failed."""

    @property
    def running_count(self) -> int:
        """Attempts under way."""
        return len(self._attempts)

    @property
    def kept_bytes(self) -> int:
        """Bytes kept of streams under way, for the case that one breaks."""
        return self._memory.used_bytes

    async def serve(
        self, request: Request, payload: Payload, stream: StreamAnswer, trail: Trail | None = None
    ) -> Refused | Whole | Streamed:
        """Serves one request to its end. Cancelling it hangs up and releases everything.

        With a `trail` its engines are told our spans as their callers.
        """
        serving = Serving(request, payload, trail)
        try:
            begun = await self._begin(serving)
            if not isinstance(begun, Begun):
                return begun
            return await self._stream(serving, begun, payload, stream)
        except BaseException:
            self._driver.apply(Left(request.id))
            raise
        finally:
            self._close(serving)

    async def _begin(self, serving: Serving) -> Refused | Whole | Begun:
        """Attempts until one gives its first token or its whole answer, or no further one may be made."""
        while True:
            decided = await self._driver.decide(serving.request)
            if isinstance(decided.decision, Reject):
                return Refused(decided, decided.decision, serving.failure)
            result = await self._attempt(decided.decision, serving)
            match result:
                case Retry():
                    self._count_stranded(serving, result)
                    self._report_failure(serving.request, result)
                    self._close(serving)
                    serving.failed(result)
                    if (late := self._late(serving)) is not None:
                        return Refused(replace(decided, decision=late), late, result)
                case Answer():
                    return self._finish_whole(serving.request, decided, decided.decision, result)
                case EngineCall():
                    self._driver.apply(FirstToken(serving.request.id))
                    return Begun(result, decided, decided.decision)

    def _count_stranded(self, serving: Serving, failure: Retry) -> None:
        prefill = serving.prefilled
        if prefill is None or not failure.strands:
            return
        blocks = -(-serving.request.prompt_tokens // (prefill.block_tokens or DEFAULT_BLOCK_TOKENS))
        speaks = self._adapters[prefill.adapter]
        self.stranded.add(
            speaks.connector_name(prefill),
            prefill.id,
            blocks=blocks,
            hold_s=speaks.hold_s(prefill),
            now=self._driver.now(),
        )

    def _late(self, serving: Serving) -> Reject | None:
        """The end of a request for which another attempt would come after its deadline."""
        request = serving.request
        deadline_s = request.slo.deadline_s
        if deadline_s is None or self._driver.now() < request.arrived_at + deadline_s:
            return None
        message = f"its deadline of {deadline_s:g} s passed after {request.attempt - 1} attempts"
        return Reject(request.id, RejectReason.TOO_MANY_ATTEMPTS, message)

    async def _attempt(self, dispatch: Dispatch, serving: Serving) -> Retry | Answer | EngineCall:
        request, estimate = serving.request, dispatch.estimate
        prefill, decode = (self._driver.engine(name) for name in (estimate.prefill, estimate.decode))
        if prefill is None or decode is None:  # it left between the decision and this turn of the loop
            return Retry(estimate.prefill if prefill is None else estimate.decode, "engine_left")
        payload = named_for(serving.payload, request.attempt)
        if self._asks_for_ids(payload, decode):
            payload = asking_for_ids(payload)
        exchange = self._adapters[decode.adapter].open(payload, prefill, decode)
        serving.prefilled = None

        def prefilled(told: Prefilled) -> None:
            serving.prompt_tokens = serving.prompt_tokens or told.prompt_tokens
            serving.prefilled = prefill
            self._driver.apply(PrefillDone(request.id, told.prompt_tokens, told.cached_tokens))

        attempt = Attempt(
            exchange,
            self._engines,
            self._limits,
            prefilled,
            self._driver.down_reason,
            is_stream=payload.is_stream,
            trail=serving.trail,
            on_hang_up=self._on_hang_up,
        )
        serving.attempt = attempt
        self._attempts.add(attempt)
        return await attempt.result()

    async def _stream(self, serving: Serving, begun: Begun, payload: Payload, stream: StreamAnswer) -> Streamed:
        """Has the answer relayed, over as many engines as it takes."""
        continuation = self._continuation_of(serving, begun, payload)
        try:
            end = await stream(begun.call, begun.decided, begun.dispatch, continuation)
        finally:
            if continuation is not None:
                continuation.close()
        self._finish_stream(serving.request, end)
        return Streamed(begun.decided, begun.dispatch, end)

    def _can_continue(self, payload: Payload, decode: Engine | None) -> bool:
        speaks = None if decode is None else self._adapters.get(decode.adapter)
        return self._continuation.is_on and speaks is not None and speaks.can_continue and can_continue(payload)

    def _asks_for_ids(self, payload: Payload, decode: Engine) -> bool:
        return self._continuation.asks_for_ids and self._can_continue(payload, decode)

    def _continuation_of(self, serving: Serving, begun: Begun, payload: Payload) -> Continuation | None:
        if not self._can_continue(payload, self._driver.engine(begun.dispatch.estimate.decode)):
            return None
        decode_id = begun.dispatch.estimate.decode

        async def resume(rest: Payload, said: Said, failure: str) -> EngineCall | None:
            nonlocal decode_id
            failed = Retry(decode_id, f"stream_broke: {failure}")
            self._report_failure(serving.request, failed)
            self._close(serving)
            serving.failed(failed)
            prompt_tokens = rest.prompt_tokens or serving.request.prompt_tokens + said.tokens
            serving.request = replace(
                serving.request, prompt_tokens=prompt_tokens, max_output_tokens=rest.max_output_tokens
            )
            serving.payload = rest
            if self._late(serving) is not None:
                return None
            again = await self._begin(serving)
            if not isinstance(again, Begun):
                return None
            decode_id = again.dispatch.estimate.decode
            return again.call

        continuation = Continuation(
            payload,
            self._memory,
            self._continuation.max_stream_bytes,
            resume,
            text_of=functools.partial(self._text_of, payload.model or ""),
            shows_ids=client_asked_for_ids(payload) or not self._continuation.asks_for_ids,
        )
        continuation.prompt_tokens = serving.prompt_tokens
        return continuation

    def _close(self, serving: Serving) -> None:
        serving.close()
        if serving.attempt is not None:
            self._attempts.discard(serving.attempt)

    def engine_down(self, engine_id: str, detail: str) -> None:
        """Fails the calls to that engine that have shown nothing yet, so that they are tried elsewhere now."""
        self.stranded.engine_down(engine_id, now=self._driver.now())
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
            self.stranded.engine_down(failure.engine_id, now=self._driver.now())
            self._driver.apply(EngineHealth(failure.engine_id, Health.DOWN, failure.reason))
        self._driver.apply(AttemptFailed(request.id, failure.engine_id, failure.reason))
