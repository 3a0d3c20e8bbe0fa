"""A workload is a lazy, time-ordered series of requests: read from a trace, generated, cut, sped up or mixed. Pure.

Everything here takes and gives iterators, so an hour of traffic or an endless generator costs no more memory than the
requests in flight.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice, pairwise

import numpy as np
from numpy.typing import NDArray

from gateway.core.errors import GatewayError

BLOCK_TOKENS = 512
"""Tokens behind one block id. Source: Mooncake trace release, README, field `hash_ids`."""


class WorkloadError(GatewayError):
    """A workload is asked for in a way that makes no sense."""

    kind = "workload_error"


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a workload: when it comes, how large it is, and which of its prompt blocks others share."""

    arrival_s: float
    """From the start of the workload, >= 0, never falling from one request to the next."""
    prompt_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] | None = None
    """One id per started block of BLOCK_TOKENS, equal ids meaning equal prompts up to there; None: not known."""
    session: str | None = None
    turn: int | None = None
    """0 for the first request of its session."""
    tenant: str = "default"


def block_count(prompt_tokens: int) -> int:
    """How many block ids a prompt of that length has: its started blocks."""
    return -(-prompt_tokens // BLOCK_TOKENS)


def scaled(requests: Iterable[TraceRequest], *, speed: float) -> Iterator[TraceRequest]:
    """The same requests `speed` times as fast. Raises WorkloadError unless 0 < speed < inf."""
    if not 0 < speed < math.inf:
        raise WorkloadError(f"speed must be above 0 and finite, got {speed}", param="speed")
    return (replace(request, arrival_s=request.arrival_s / speed) for request in requests)


def sliced(
    requests: Iterable[TraceRequest], *, start_s: float = 0.0, seconds: float | None = None, count: int | None = None
) -> Iterator[TraceRequest]:
    """The requests of `seconds` from `start_s` on, at most `count`, their arrivals counted from `start_s`.

    Reads no further than needed, so it also ends an endless generator. Raises WorkloadError on negative bounds.
    """
    for name, value in (("start_s", start_s), ("seconds", seconds), ("count", count)):
        if value is not None and not value >= 0:
            raise WorkloadError(f"{name} must be >= 0, got {value}", param=name)
    return islice(_window(requests, start_s, math.inf if seconds is None else seconds), count)


def _window(requests: Iterable[TraceRequest], start_s: float, seconds: float) -> Iterator[TraceRequest]:
    for request in requests:
        arrival_s = request.arrival_s - start_s
        if arrival_s >= seconds:
            return
        if arrival_s >= 0:
            yield replace(request, arrival_s=arrival_s)


def unrounded(requests: Iterable[TraceRequest]) -> Iterator[TraceRequest]:
    """The requests with those of one instant spread evenly up to the next instant: traces whose arrival times were
    rounded (Mooncake's to three seconds, ten requests each) had none of these bursts. The last instant stays."""
    ends: list[tuple[float, list[TraceRequest]]] = [(math.inf, [])]
    for (arrival_s, group), following in pairwise(chain(_grouped(requests), ends)):
        gap_s = following[0] - arrival_s
        for position, request in enumerate(group):
            offset_s = gap_s * position / len(group) if math.isfinite(gap_s) else 0.0
            yield replace(request, arrival_s=arrival_s + offset_s)


def _grouped(requests: Iterable[TraceRequest]) -> Iterator[tuple[float, list[TraceRequest]]]:
    for arrival_s, group in groupby(requests, key=lambda request: request.arrival_s):
        yield arrival_s, list(group)


def mixed(*workloads: Iterable[TraceRequest]) -> Iterator[TraceRequest]:
    """All workloads at once, in order of arrival. Block ids and sessions of different workloads are never equal."""
    apart = [_renamed(workload, position, len(workloads)) for position, workload in enumerate(workloads)]
    return heapq.merge(*apart, key=lambda request: request.arrival_s)


def _renamed(requests: Iterable[TraceRequest], position: int, total: int) -> Iterator[TraceRequest]:
    for request in requests:
        ids = request.block_ids
        yield replace(
            request,
            block_ids=None if ids is None else tuple(block_id * total + position for block_id in ids),
            session=None if request.session is None else f"{position}/{request.session}",
        )


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean, median and 90 % quantile of a length, tokens."""

    mean: float
    p50: float
    p90: float


@dataclass(frozen=True, slots=True)
class Traits:
    """What a workload looks like: the figures by which a generator is compared with a trace."""

    requests: int
    rate_per_s: float
    prompt: Lengths
    output: Lengths
    hit_ratio: float | None
    """Blocks found in an unlimited cache over all blocks; None where block ids are not known."""
    dispersion: float
    """Variance over mean of arrivals per window: 1 for a Poisson process, more when they come in bursts."""


def describe(requests: Iterable[TraceRequest], *, window_s: float = 30.0) -> Traits:
    """The traits of a workload. Raises WorkloadError when it covers less than two windows."""
    arrivals, prompts, outputs = [], [], []
    seen: set[int] = set()
    hits = blocks = 0
    for request in requests:
        arrivals.append(request.arrival_s)
        prompts.append(request.prompt_tokens)
        outputs.append(request.output_tokens)
        if request.block_ids is not None:
            blocks += len(request.block_ids)
            hits += sum(block_id in seen for block_id in request.block_ids)
            seen.update(request.block_ids)
    instants = np.array(arrivals)
    return Traits(
        requests=len(arrivals),
        dispersion=_dispersion(instants, window_s),
        rate_per_s=len(arrivals) / float(instants[-1] - instants[0]),
        prompt=_lengths(prompts),
        output=_lengths(outputs),
        hit_ratio=hits / blocks if blocks else None,
    )


def _dispersion(instants: NDArray[np.float64], window_s: float) -> float:
    """Variance over mean of the counts in whole windows."""
    windows = int((instants[-1] - instants[0]) // window_s) if instants.size else 0
    if windows < 2:
        raise WorkloadError(f"too short to describe: fewer than two windows of {window_s:g} s")
    counts = np.bincount(((instants - instants[0]) // window_s).astype(np.int64))[:windows]
    return float(counts.var() / counts.mean())


def _lengths(tokens: list[int]) -> Lengths:
    p50, p90 = (float(quantile) for quantile in np.quantile(tokens, (0.5, 0.9)))
    return Lengths(float(np.mean(tokens)), p50, p90)
