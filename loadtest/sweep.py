"""Measures a live engine: prefills over lengths and cached lengths, decode steps over batches and KV sizes, hand-offs.

Bounded and polite: one prefill at a time, few decodes at once, within the time given; an engine that serves others is
left alone. Prompts are random token ids, so they share nothing with each other or with anybody's; a cached prefix is
one that the sweep sent itself, and how much of it was found is what the engine's own counter says. Points are measured
in random order, round after round, so that a machine that slows down for a while blurs all of them instead of bending
one end of a curve.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import TypeVar

from gateway.core.errors import ConfigError
from loadtest.probe import EngineBusy, Probe
from predictors.measurements import DecodeStep, HandOff, Measurements, Prefill

Prompt = tuple[int, ...]
Measure = Callable[[], Awaitable[None]]
_Point = TypeVar("_Point")

TOKEN_IDS = range(100, 250)
"""Ids that every vocabulary of 256 tokens or more has, and that are nowhere special tokens."""
SHORTEST_TOKENS = 64
LONGEST_TOKENS = 32_768
STEPS = 24
"""Output tokens per decoding stream."""
MIN_GAPS = 8
MAX_ROUNDS = 20
CLIMB_RATIO = 0.06
"""A prompt that takes more than this of its stage's time is the longest that is measured."""
PRIMING_RATIO = 0.25
"""Of the decode stage, what computing its prompts for the first time may take."""
CACHED_RATIOS = (0.25, 0.5, 0.75, 0.95)
KV_RATIOS = (0.0, 0.4, 1.0)
"""KV per decoding stream, between the shortest prompt and the longest."""
KV_SHARE = 0.5
"""Of the engine's KV capacity, what the sweep fills at most."""
IDLE_POLLS, IDLE_POLL_S = 100, 0.02


@dataclass(frozen=True, slots=True)
class SweepLimits:
    """How far a sweep goes."""

    seconds: float = 120.0
    max_batch: int = 8
    max_prompt_tokens: int | None = None
    """None: up to the model's longest context, at most LONGEST_TOKENS."""
    is_busy_allowed: bool = False


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep measured, and what it learnt of the engine on the way."""

    model: str
    measurements: Measurements
    kv_capacity_tokens: int | None
    block_tokens: int | None


class Sweep:
    """One sweep over one engine, or over a prefill engine and the decode engine it hands off to."""

    def __init__(
        self,
        prefill: Probe,
        decode: Probe | None,
        limits: SweepLimits,
        rng: random.Random,
        tell: Callable[[float, str], None],
    ) -> None:
        """`tell` hears the share of the time that is over, 0 to 1, and what is measured now."""
        self._prefill = prefill
        self._decode = decode or prefill
        self._has_hand_off = decode is not None
        self._limits = limits
        self._rng = rng
        self._tell = tell
        self._model = ""
        self._capacity_tokens: int | None = None
        self._block_tokens = 1
        self._longest_tokens = LONGEST_TOKENS
        self._rungs: list[int] = []
        self._longest_s = 0.0
        self._began_at = 0.0
        self._kept: dict[tuple[int, int], Prompt] = {}
        """Prompts of the decode stage by length and place in the batch: sent again, their prefill is a cache hit."""
        self._prefills: list[Prefill] = []
        self._steps: list[DecodeStep] = []
        self._hand_offs: list[HandOff] = []

    async def run(self, model: str | None = None) -> Swept:
        """Everything measured when the time is over. Raises ProbeFailed, EngineBusy, ConfigError."""
        await self._get_ready(model)
        self._began_at = asyncio.get_running_loop().time()
        seconds = self._limits.seconds
        try:
            async with asyncio.timeout(seconds):
                await self._stage(self._climb(), until_s=0.45 * seconds)
                await self._stage(self._decode_points(), until_s=(0.85 if self._has_hand_off else 1.0) * seconds)
                if self._has_hand_off:
                    await self._stage(self._hand_off_points(), until_s=seconds)
        except TimeoutError:
            pass  # what was measured until now is what there is
        self._tell(1.0, "done")
        measured = Measurements(tuple(self._prefills), tuple(self._steps), tuple(self._hand_offs))
        return Swept(self._model, measured, self._capacity_tokens, self._block_tokens)

    # ---- before ------------------------------------------------------------------------------------------------------

    async def _get_ready(self, model: str | None) -> None:
        """Learns the model and the sizes; one request that nobody times opens connections and wakes what sleeps."""
        self._model, context_tokens = await self._prefill.model(model)
        if self._has_hand_off:
            await self._decode.model(self._model)
        for probe in {self._prefill, self._decode}:
            await self._wait_idle(probe)
        facts = await self._decode.facts()
        self._capacity_tokens = facts.kv_capacity_tokens
        self._block_tokens = (await self._prefill.facts()).block_tokens or 1
        bounds = [LONGEST_TOKENS, self._limits.max_prompt_tokens, context_tokens and context_tokens - STEPS - 1]
        self._longest_tokens = min(bound for bound in bounds if bound is not None)
        if self._longest_tokens < 4 * SHORTEST_TOKENS:
            raise ConfigError(f"fit: prompts of up to {self._longest_tokens} tokens are too short to measure")
        await self._prefill.prefill_s(self._model, self._fresh(SHORTEST_TOKENS))
        await self._decode.token_instants(self._model, self._fresh(SHORTEST_TOKENS), 2)

    async def _wait_idle(self, probe: Probe) -> None:
        """Returns when the engine serves nobody. Raises EngineBusy when it goes on serving others."""
        if self._limits.is_busy_allowed:
            return
        for _ in range(IDLE_POLLS):  # a request that just ended stands in the metrics for a moment
            report = await probe.report()
            if not report.running_count + report.waiting_count:
                return
            await asyncio.sleep(IDLE_POLL_S)
        raise EngineBusy(
            f"{probe.engine.id} {probe.engine.url} is serving {report.running_count} requests, "
            f"{report.waiting_count} more wait: its times would not be its own (--even-if-busy measures anyway)"
        )

    # ---- stages ------------------------------------------------------------------------------------------------------

    async def _stage(self, probes: Iterator[tuple[str, Measure]], *, until_s: float) -> None:
        """Measures one point after another until they end or the stage's time is over."""
        for name, measure in probes:
            spent_s = asyncio.get_running_loop().time() - self._began_at
            if spent_s >= until_s:
                return
            self._tell(spent_s / self._limits.seconds, name)
            await measure()

    def _climb(self) -> Iterator[tuple[str, Measure]]:
        """Lengths, doubling until one takes too long; then all of them again, fresh and partly cached."""
        length = SHORTEST_TOKENS
        while length <= self._longest_tokens and self._longest_s <= CLIMB_RATIO * 0.45 * self._limits.seconds:
            self._rungs.append(length)
            yield f"prefill {length} tokens", partial(self._measure_prefill, length, None)
            length = min(2 * length, self._longest_tokens) if length < self._longest_tokens else length + 1
        for _ in range(MAX_ROUNDS):
            for rung in self._shuffled(self._rungs):
                for cached_ratio in (None, self._rng.choice(CACHED_RATIOS)):
                    yield f"prefill {rung} tokens", partial(self._measure_prefill, rung, cached_ratio)

    def _decode_points(self) -> Iterator[tuple[str, Measure]]:
        """Batches x KV per stream, again and again."""
        batches = [1 << power for power in range(self._limits.max_batch.bit_length())]
        points = [(batch, tokens) for batch in batches for tokens in self._kv_lengths(batches[-1])]
        for _ in range(MAX_ROUNDS):
            for batch, tokens in self._shuffled(points):
                yield f"decode {batch} x {tokens} tokens", partial(self._measure_steps, batch, tokens)

    def _kv_lengths(self, max_batch: int) -> list[int]:
        """Prompt lengths of the decode stage, ascending: what fits into half of the KV and is computed soon enough."""
        room = KV_SHARE * (self._capacity_tokens or max_batch * LONGEST_TOKENS) / max_batch - STEPS
        by_time = [
            prefill.prompt_tokens
            for prefill in self._prefills
            if len(KV_RATIOS) * max_batch * prefill.elapsed_s <= 2 * PRIMING_RATIO * 0.4 * self._limits.seconds
        ]
        longest = min(max(by_time, default=SHORTEST_TOKENS), int(room))
        shortest = min(SHORTEST_TOKENS, longest)
        return sorted({int(shortest + ratio * (longest - shortest)) for ratio in KV_RATIOS})

    def _hand_off_points(self) -> Iterator[tuple[str, Measure]]:
        for _ in range(MAX_ROUNDS):
            for rung in self._shuffled(self._rungs):
                yield f"hand-off of {rung} tokens", partial(self._measure_hand_off, rung)

    # ---- points ------------------------------------------------------------------------------------------------------

    async def _measure_prefill(self, tokens: int, cached_ratio: float | None) -> None:
        """One prefill; with a ratio, one whose first part was sent just before."""
        prompt = self._fresh(tokens)
        if cached_ratio is not None:
            prefix_tokens = int(cached_ratio * tokens) // self._block_tokens * self._block_tokens
            if not prefix_tokens:
                return
            await self._prefill.prefill_s(self._model, prompt[:prefix_tokens])
        await self._wait_idle(self._prefill)
        hits_before = (await self._prefill.report()).prefix_hit_tokens or 0
        elapsed_s = await self._prefill.prefill_s(self._model, prompt)
        hits = ((await self._prefill.report()).prefix_hit_tokens or 0) - hits_before
        if 0 <= hits < tokens:  # more means that somebody else was there
            self._prefills.append(Prefill(tokens, hits, elapsed_s))
            self._longest_s = max(self._longest_s, elapsed_s)

    async def _measure_steps(self, batch: int, tokens: int) -> None:
        """The mean gap while `batch` streams decode together; nothing when they hardly overlapped."""
        prompts = [await self._primed(tokens, place) for place in range(batch)]
        await self._wait_idle(self._decode)
        gaps_s = overlapping_gaps_s(await self._stream_all(prompts))
        if len(gaps_s) >= MIN_GAPS:
            # The mean: on a busy machine tokens come two at once, and gaps of nothing would pull a median down.
            self._steps.append(DecodeStep(batch, batch * (tokens + STEPS // 2), fmean(gaps_s)))

    async def _stream_all(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """The instants of each stream's events, all streams side by side; when one fails the others are hung up."""
        try:
            async with asyncio.TaskGroup() as group:
                streams = [
                    group.create_task(self._decode.token_instants(self._model, prompt, STEPS)) for prompt in prompts
                ]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [stream.result() for stream in streams]

    async def _primed(self, tokens: int, place: int) -> Prompt:
        """A prompt whose KV is in the decode engine's prefix cache."""
        prompt = self._kept.get((tokens, place))
        if prompt is None:
            prompt = self._kept[tokens, place] = self._fresh(tokens)
            await self._decode.prefill_s(self._model, prompt)
        return prompt

    async def _measure_hand_off(self, tokens: int) -> None:
        await self._wait_idle(self._decode)
        elapsed_s = await self._prefill.hand_off_s(self._decode, self._model, self._fresh(tokens))
        self._hand_offs.append(HandOff(tokens, elapsed_s))

    def _fresh(self, tokens: int) -> Prompt:
        return tuple(self._rng.choices(TOKEN_IDS, k=tokens))

    def _shuffled(self, points: Sequence[_Point]) -> list[_Point]:
        return self._rng.sample(points, len(points))


def overlapping_gaps_s(streams: Sequence[Sequence[float]]) -> list[float]:
    """The gaps between instants of the same stream while all of them were under way, seconds."""
    if not all(streams):
        return []
    begin_at, end_at = max(stream[0] for stream in streams), min(stream[-1] for stream in streams)
    return [
        later - earlier
        for stream in streams
        for earlier, later in pairwise(stream)
        if begin_at <= earlier and later <= end_at
    ]
