"""Prompt -> token ids, off the event loop: the model's own tokenizer, else an engine's, else an estimate.

Each source is asked only when the one before it cannot tell, and the answer says which one it was and, when it is not
exact, why. Tokenising runs in a few threads with a bounded queue in front. Nothing here ever fails a request: whatever
goes wrong ends in an estimate with a named obstacle.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from adapters.base import Payload
from adapters.token_ids import parse_tokenize, tokenize_body
from gateway.chat_messages import NotRenderable, Obstacle
from gateway.core.errors import GatewayError
from gateway.model_tokenizer import ModelTokenizer
from gateway.token_estimate import TokenRatios

Ids: TypeAlias = NDArray[np.int32]

AskEngine: TypeAlias = Callable[[dict[str, object]], Awaitable[bytes]]
"""Posts a body to an engine's `/tokenize` and gives the answer's body; raises GatewayError or OSError."""

ANY_MODEL = "*"
"""The key of a tokenizer that serves every model without one of its own."""


INLINE_BYTES = 2048
"""A request of at most so many bytes is tokenised on the event loop: 0.1 to 0.5 ms (measured with a 32,000-word BPE),
where the way to a thread and back takes as much processor time again, and on a busy machine 1 ms."""
INLINE_S = 0.01
"""Work on the loop that takes longer is given up, at its next look at the clock, and begun again in a thread."""
SLOW = (Obstacle.TIMEOUT, Obstacle.TEMPLATE_LIMIT)
"""How work says that it was given up."""


class TokenSource(StrEnum):
    """Who told the token count. The string is the metric label and the journal word."""

    EXACT = "exact"
    ENGINE = "engine"
    ESTIMATE = "estimate"


@dataclass(frozen=True, slots=True, eq=False)
class Tokenised:
    """A prompt's tokens, as far as they are known."""

    ids: Ids | None
    """int32, shape (count,); None for an estimate."""
    count: int
    """>= 1 for an estimate, else the length of `ids`."""
    source: TokenSource
    elapsed_s: float
    obstacle: Obstacle | None = None
    """Why the source is not EXACT."""


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """Bounds of tokenising."""

    threads: int = max(1, min(4, (os.cpu_count() or 1) - 1))
    """Fewer than the cores, so that the event loop always has one."""
    waiting_count: int = 256
    """Most prompts waiting or being tokenised; one more gets an estimate."""
    exact_s: float = 2.0
    engine_s: float = 1.0
    inline_s: float = INLINE_S


class _Job:
    """Whether anybody still waits for a piece of work, and whether its time is over."""

    __slots__ = ("ends_at", "is_left")

    def __init__(self, ends_at: float = math.inf) -> None:
        self.ends_at = ends_at
        self.is_left = False

    @property
    def is_abandoned(self) -> bool:
        return self.is_left or time.perf_counter() > self.ends_at


class PromptTokens:
    """Tokenises prompts. Make it inside a running loop's program, `aclose` it at the end."""

    def __init__(
        self, own: Mapping[str, ModelTokenizer], limits: TokenLimits = TokenLimits(), *, first_ratio: float = 4.0
    ) -> None:
        """`own`: model name (or ANY_MODEL) -> its tokenizer. `first_ratio`: characters per token, see TokenRatios."""
        self._own = dict(own)
        self._limits = limits
        self._ratios = TokenRatios(first_ratio)
        self._waiting_count = 0
        self._jobs: dict[_Job, Future[Ids]] = {}
        # One piece of work more than threads, so that no thread idles; the rest wait in the loop, where waiting costs
        # next to nothing and a caller that leaves is gone at once.
        self._room = asyncio.Semaphore(limits.threads + 1)
        self._threads = ThreadPoolExecutor(max_workers=limits.threads, thread_name_prefix="tokens")

    async def tokenise(self, payload: Payload, *, ask_engine: AskEngine | None = None) -> Tokenised:
        """The tokens of a chat or completion request. Raises nothing but CancelledError."""
        started = time.perf_counter()
        try:
            ids = await self._exact(payload)
            return Tokenised(ids, ids.size, TokenSource.EXACT, time.perf_counter() - started)
        except NotRenderable as error:
            obstacle = error.obstacle
        told = await self._told_by_engine(payload.body, ask_engine)
        if told is not None:
            return Tokenised(told, told.size, TokenSource.ENGINE, time.perf_counter() - started, obstacle)
        count = payload.prompt_tokens or self._ratios.count(payload.model or "", payload.prompt_chars)
        return Tokenised(None, count, TokenSource.ESTIMATE, time.perf_counter() - started, obstacle)

    def learn(self, payload: Payload, tokenised: Tokenised, prompt_tokens: int) -> None:
        """An engine reported how many tokens that prompt had: the next estimate for the model is better."""
        if tokenised.obstacle is not Obstacle.MEDIA:  # images have tokens, but no characters
            self._ratios.learn(payload.model or "", chars=payload.prompt_chars, prompt_tokens=prompt_tokens)

    async def aclose(self) -> None:
        """Ends the threads; prompts that are being tokenised get an estimate within one part of their text."""
        # Cancelling the queued work would look to its callers as if they themselves had been cancelled.
        self._threads.shutdown(wait=False)
        jobs = list(self._jobs.items())
        for job, _ in jobs:
            job.is_left = True
        running = [asyncio.wrap_future(future) for _, future in jobs if not future.cancelled()]
        await asyncio.gather(*running, return_exceptions=True)
        self._threads.shutdown(wait=True)

    async def _exact(self, payload: Payload) -> Ids:
        body = payload.body
        prompt = _single(body.get("prompt"))
        if "messages" not in body and isinstance(prompt, list):
            return await self._soon(payload, lambda job: _given_ids(prompt))
        own = self._own.get(payload.model or "") or self._own.get(ANY_MODEL)
        if own is None:
            raise NotRenderable(Obstacle.NO_TOKENIZER)
        if "messages" in body:
            return await self._soon(payload, lambda job: own.chat_ids(body, lambda: job.is_abandoned))
        if isinstance(prompt, str):
            return await self._soon(payload, lambda job: own.text_ids(prompt, body, lambda: job.is_abandoned))
        raise NotRenderable(Obstacle.NOT_A_PROMPT)

    async def _told_by_engine(self, body: Mapping[str, object], ask: AskEngine | None) -> Ids | None:
        question = tokenize_body(body) if ask is not None else None
        if ask is None or question is None:
            return None
        try:
            async with asyncio.timeout(self._limits.engine_s):
                answer = await ask(question)
            return await self._in_thread(lambda job: parse_tokenize(answer))
        except (GatewayError, NotRenderable, OSError, TimeoutError):
            return None

    async def _soon(self, payload: Payload, work: Callable[[_Job], Ids]) -> Ids:
        """What `work` gives: here and now for a short request, else in a thread."""
        if 0 < payload.body_bytes <= INLINE_BYTES:
            try:
                return work(_Job(time.perf_counter() + self._limits.inline_s))
            except NotRenderable as error:
                if error.obstacle not in SLOW:
                    raise
        return await self._in_thread(work)

    async def _in_thread(self, work: Callable[[_Job], Ids]) -> Ids:
        """What `work` gives, run in a thread; raises NotRenderable when there is no room or no time."""
        if self._waiting_count >= self._limits.waiting_count:
            raise NotRenderable(Obstacle.BUSY)
        self._waiting_count += 1
        try:
            async with asyncio.timeout(self._limits.exact_s), self._room:
                return await self._run(work)
        except TimeoutError as error:
            raise NotRenderable(Obstacle.TIMEOUT) from error
        finally:
            self._waiting_count -= 1

    async def _run(self, work: Callable[[_Job], Ids]) -> Ids:
        job = _Job()
        try:
            future = self._threads.submit(_unless_abandoned, work, job)
        except RuntimeError as error:  # the threads are shut down
            raise NotRenderable(Obstacle.BUSY, "closed") from error
        self._jobs[job] = future
        future.add_done_callback(lambda _: self._jobs.pop(job, None))
        try:
            return await asyncio.wrap_future(future)
        finally:
            job.is_left = True


def _unless_abandoned(work: Callable[[_Job], Ids], job: _Job) -> Ids:
    if job.is_abandoned:
        raise NotRenderable(Obstacle.TIMEOUT, "nobody waits any more")
    return work(job)


def _single(prompt: object) -> object:
    """The one prompt of a list of one, else the prompt as it is. Raises NotRenderable for several."""
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
        return prompt
    if len(prompt) > 1:
        raise NotRenderable(Obstacle.SEVERAL_PROMPTS)
    single: object = prompt[0]
    return single


def _given_ids(prompt: list[object]) -> Ids:
    """A prompt that the client gave as ids already."""
    if not prompt or not all(type(token) is int and token >= 0 for token in prompt):
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "the prompt is not a list of token ids")
    try:
        return np.array(prompt, dtype=np.int32)
    except OverflowError as error:
        raise NotRenderable(Obstacle.NOT_A_PROMPT, "a token id over 31 bits") from error
