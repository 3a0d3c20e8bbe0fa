"""Seeded workloads shaped like published traces, for where the files are not at hand and an hour is too short.

Arrivals come first: a Poisson process whose rate drifts, gathered on ticks where the trace's own clock ticks. Each
arrival then continues the conversation that has waited longest for its next turn, if one is due, and else begins a
new one. So the rate is exact whatever the sessions do, and prefixes are shared as in the traces: a system prompt by
everybody of a kind, and all full blocks of the previous turn by the next one.

Lengths and think times are drawn from quantile tables of the real files (counted on them with numpy.quantile), not
from fitted curves: the tails decide what a scheduler has to bear, and no usual curve has these.

Figures of the real files (rate per s; mean, median, 90 % of prompt and of output tokens; block hits of an unlimited
cache; variance over mean of arrivals in 30 s), to which tests/loadtest/test_generators.py holds the generators:

    conversation        3.40   12035   6909  27367   343  350  597   0.366   2.48
    azure-conversation  5.53    1155   1020   2735   211  129  424   -       8.87
    toolagent           6.56    8596      -      -   182    -    -   0.59    -
    synthetic           1.11   15325      -      -   149    -    -   0.64    -

Source: conversation_trace.jsonl of the Mooncake FAST'25 release; AzureLLMInferenceTrace_conv.csv (2023) of the Azure
Public Dataset; for toolagent table 2 of the FAST'25 paper (23,608 requests in one hour). No toolagent file was counted:
its tables are chosen to meet the paper's means around what published samples show (12 shared blocks, short answers),
with conversation's chats as the other part. Nor a synthetic one: the paper names its sources (questions about long
documents, and short chats) and its means; the rate is its 3,993 requests spread over an hour, as a Poisson process.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count, islice

from loadtest.workload import BLOCK_TOKENS, TraceRequest, WorkloadError, block_count


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution given by points (probability, value), both rising, from probability 0 to 1."""

    points: tuple[tuple[float, float], ...]

    def draw(self, rng: random.Random) -> float:
        """A value: the inverse of the distribution function, straight between points on a log scale of values."""
        u = rng.random()
        right = bisect_right(self.points, u, key=lambda point: point[0])
        (low_u, low), (high_u, high) = self.points[right - 1], self.points[right]
        return math.exp(math.log(low) + (math.log(high) - math.log(low)) * (u - low_u) / (high_u - low_u))


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests come: a Poisson process with a drifting rate."""

    rate_per_s: float
    drift_ratio: float
    """Standard deviation of the logarithm of the rate."""
    drift_s: float
    """Time over which the drift forgets itself."""
    tick_s: float = 0.0
    """Requests of one tick arrive together at its beginning; 0: each at its own instant."""


@dataclass(frozen=True, slots=True)
class Turns:
    """How a session goes on after a request."""

    continue_ratio: float
    """Probability that a turn is followed by another."""
    message_tokens: Quantiles
    """What a next turn adds to the previous prompt and its answer."""
    think_s: Quantiles
    """From the arrival of one turn to the next."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of session in a workload."""

    first_tokens: Quantiles
    """Prompt of a first turn, beyond the shared prompt."""
    output_tokens: Quantiles
    turns: Turns | None = None
    """None: every request is its own session."""
    shared_blocks: tuple[int, ...] | None = None
    """Length of each shared prompt in blocks, the most used first (the n-th is used 1/n as often); None: block ids are
    not known."""
    weight: float = 1.0
    """Its share among new sessions, against the other kinds' weights."""


@dataclass(frozen=True, slots=True)
class Shape:
    """All that makes a generated workload what it is."""

    arrivals: Arrivals
    kinds: tuple[Kind, ...]
    max_prompt_tokens: int = 131_072
    """A session ends before its prompt would be longer."""


_PROBABILITIES = (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)


def _table(*values: float) -> Quantiles:
    """A distribution from its values at _PROBABILITIES."""
    return Quantiles(tuple(zip(_PROBABILITIES, values, strict=True)))


_CHAT = Kind(
    first_tokens=_table(
        379, 383, 385, 393, 431, 580, 824, 1245, 3401, 4752, 6906, 10259, 15359, 25047, 37982, 89356, 125683
    ),
    output_tokens=_table(1, 3, 10, 24, 46, 100, 156, 213, 291, 350, 399, 447, 504, 597, 698, 1118, 2000),
    turns=Turns(
        continue_ratio=0.39,
        message_tokens=_table(1, 1, 1, 4, 7, 8, 10, 12, 17, 28, 58, 202, 789, 4294, 7055, 16979, 91467),
        think_s=_table(6, 18, 30, 42, 51, 60, 66, 75, 96, 123, 165, 228, 321, 477, 606, 1466, 3030),
    ),
    shared_blocks=(1,),
)

_TOOL_CALL = Kind(
    first_tokens=_table(60, 90, 130, 180, 230, 270, 300, 330, 400, 500, 600, 750, 1000, 1800, 3000, 9000, 40000),
    output_tokens=_table(1, 3, 3, 4, 8, 14, 18, 20, 25, 35, 50, 70, 95, 170, 300, 600, 2000),
    turns=Turns(
        continue_ratio=0.40,
        message_tokens=_table(10, 20, 30, 50, 70, 90, 110, 130, 180, 250, 330, 450, 700, 1500, 3000, 8000, 20000),
        think_s=_table(3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30, 45, 80, 150, 400, 900),
    ),
    shared_blocks=(12, 5, 9, 14, 7, 11, 6, 10),
)

_DOCUMENT = Kind(
    first_tokens=_table(
        *(1500, 2500, 4000, 6000, 8000, 9800, 11500, 13000, 16000, 18500, 22000, 26000, 31000, 40000, 55000, 90000),
        125000,
    ),
    output_tokens=_table(2, 4, 6, 8, 10, 12, 15, 18, 25, 35, 50, 70, 100, 170, 260, 500, 1000),
    turns=Turns(
        continue_ratio=0.69,
        message_tokens=_table(8, 9, 10, 11, 12, 13, 14, 15, 18, 20, 24, 28, 34, 45, 60, 120, 300),
        think_s=_table(5, 8, 12, 18, 25, 32, 40, 48, 60, 80, 110, 150, 200, 320, 450, 900, 1500),
    ),
    shared_blocks=(1,),
)
_SHORT_CHAT = Kind(
    first_tokens=_table(5, 8, 12, 18, 25, 34, 45, 60, 95, 140, 220, 340, 520, 900, 1600, 4000, 12000),
    output_tokens=_table(5, 12, 22, 45, 68, 90, 113, 135, 172, 210, 255, 308, 360, 450, 570, 825, 1500),
    turns=Turns(
        continue_ratio=0.6,
        message_tokens=_table(2, 4, 6, 9, 12, 16, 20, 25, 38, 55, 85, 130, 210, 400, 800, 2000, 6000),
        think_s=_table(5, 8, 12, 18, 25, 32, 40, 48, 60, 80, 110, 150, 200, 320, 450, 900, 1500),
    ),
    shared_blocks=(1,),
)

SHAPES = {
    "conversation": Shape(Arrivals(rate_per_s=3.40, drift_ratio=0.13, drift_s=60.0, tick_s=3.0), (_CHAT,)),
    "azure-conversation": Shape(
        Arrivals(rate_per_s=5.53, drift_ratio=0.22, drift_s=600.0),
        (
            Kind(
                first_tokens=_table(
                    2, 91, 181, 207, 372, 387, 396, 403, 703, 1020, 1071, 1130, 1315, 2734, 4083, 4142, 14050
                ),
                output_tokens=_table(7, 24, 41, 54, 67, 77, 85, 91, 103, 129, 177, 384, 400, 424, 451, 601, 1000),
            ),
        ),
    ),
    "toolagent": Shape(
        Arrivals(rate_per_s=6.56, drift_ratio=0.13, drift_s=60.0, tick_s=3.0),
        (replace(_CHAT, weight=0.39), replace(_TOOL_CALL, weight=0.61)),
    ),
    "synthetic": Shape(
        Arrivals(rate_per_s=1.11, drift_ratio=0.0, drift_s=60.0),
        (replace(_DOCUMENT, weight=0.55), replace(_SHORT_CHAT, weight=0.45)),
    ),
}


def generate(name: str, *, seed: int) -> Iterator[TraceRequest]:
    """The endless workload of that name; the same seed gives the same requests. Raises WorkloadError."""
    if name not in SHAPES:
        raise WorkloadError(f"unknown workload {name!r}; known: {', '.join(SHAPES)}", param="workload")
    return _Generator(SHAPES[name], random.Random(seed)).requests()


@dataclass(frozen=True, slots=True, order=True)
class _Due:
    """A session whose next turn comes at `at`; `number` makes the order of equal instants certain."""

    at: float
    number: int
    kind: Kind = field(compare=False)
    turn: int = field(compare=False)
    prompt_tokens: int = field(compare=False)
    block_ids: tuple[int, ...] | None = field(compare=False)
    """Of the previous turn's full blocks, or the shared prompt."""


class _Generator:
    """The state behind one generated workload: sessions that will go on, and the next unused block id."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        self._shape = shape
        self._rng = rng
        self._new_ids = count()
        self._sessions = count()
        self._due: list[_Due] = []
        self._shared = [self._shared_prompts(kind) for kind in shape.kinds]

    def requests(self) -> Iterator[TraceRequest]:
        """The workload, without end."""
        for at in _arrivals(self._shape.arrivals, self._rng):
            is_due = bool(self._due) and self._due[0].at <= at
            yield self._request(at, heapq.heappop(self._due) if is_due else self._new_session(at))

    def _shared_prompts(self, kind: Kind) -> list[tuple[int, ...]]:
        return [tuple(islice(self._new_ids, blocks)) for blocks in kind.shared_blocks or ()]

    def _new_session(self, at: float) -> _Due:
        kinds = self._shape.kinds
        (row,) = self._rng.choices(range(len(kinds)), [kind.weight for kind in kinds])
        kind, prompts = kinds[row], self._shared[row]
        ids: tuple[int, ...] | None = None
        if prompts:
            (ids,) = self._rng.choices(prompts, [1 / rank for rank in range(1, len(prompts) + 1)])
        tokens = BLOCK_TOKENS * len(ids or ()) + round(kind.first_tokens.draw(self._rng))
        return _Due(at, next(self._sessions), kind, 0, min(tokens, self._shape.max_prompt_tokens), ids)

    def _request(self, at: float, due: _Due) -> TraceRequest:
        output_tokens = round(due.kind.output_tokens.draw(self._rng))
        ids = due.block_ids
        if ids is not None:
            ids += tuple(islice(self._new_ids, block_count(due.prompt_tokens) - len(ids)))
        self._plan_next_turn(at, due, output_tokens, ids)
        return TraceRequest(at, due.prompt_tokens, output_tokens, ids, session=str(due.number), turn=due.turn)

    def _plan_next_turn(self, at: float, due: _Due, output_tokens: int, ids: tuple[int, ...] | None) -> None:
        turns = due.kind.turns
        if turns is None or self._rng.random() >= turns.continue_ratio:
            return
        tokens = due.prompt_tokens + output_tokens + round(turns.message_tokens.draw(self._rng))
        if tokens <= self._shape.max_prompt_tokens:
            full = None if ids is None else ids[: due.prompt_tokens // BLOCK_TOKENS]
            next_at = at + turns.think_s.draw(self._rng)
            heapq.heappush(self._due, _Due(next_at, due.number, due.kind, due.turn + 1, tokens, full))


_DRIFT_STEP_S = 1.0


def _arrivals(arrivals: Arrivals, rng: random.Random) -> Iterator[float]:
    """Instants of arrival, without end. The rate is constant within a step; its logarithm is an AR(1) process.

    Each gap is an exponential amount of expected arrivals, used up at the current rate: so no arrival is lost between
    steps, and there is no step whose rate is too high to sample.
    """
    memory = math.exp(-_DRIFT_STEP_S / arrivals.drift_s)
    drift, still_due = rng.gauss(0.0, arrivals.drift_ratio), rng.expovariate(1.0)
    for step in count():
        rate = arrivals.rate_per_s * math.exp(drift - arrivals.drift_ratio**2 / 2)
        used = 0.0
        while used + still_due < rate * _DRIFT_STEP_S:
            used += still_due
            still_due = rng.expovariate(1.0)
            at = step * _DRIFT_STEP_S + used / rate
            yield at if arrivals.tick_s == 0 else at // arrivals.tick_s * arrivals.tick_s
        still_due -= rate * _DRIFT_STEP_S - used
        drift = memory * drift + math.sqrt(1 - memory**2) * rng.gauss(0.0, arrivals.drift_ratio)
