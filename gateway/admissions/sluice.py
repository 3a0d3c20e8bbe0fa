"""Ours: a joint estimate admits, the queue waits in the gateway, and under overload the prices say who goes first.

A request is sent when a prefill engine is about to be free, its first token is predicted in time, and some decode
engine is predicted to have a place for it when the prefill ends: a step within the bound of everybody there. Else it
waits in the gateway, where every wake-up sees fresh state, until its prefill could no longer start in time; then it is
refused. Predictions count with their margin.

When more is asked than there is, some go after all others: nobody idles for them, and they idle for nobody. While only
prefill is short these are the ones without which most of the rest are in time (triage.py). Where places at decode
engines are short too, they are those whose cost at the prices of both stages exceeds their value (prices.py), and the
cheapest go first. Either way classes and tenants have their turns in the order of the queue: what is chosen is who
takes a tenant's turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np
from numpy.typing import NDArray

from gateway.admissions.costs import Cost, Objective, cost_of
from gateway.admissions.prices import Prices
from gateway.admissions.triage import Job, kept
from gateway.core.cluster import Cluster, EngineState
from gateway.core.estimate import estimate_at
from gateway.core.forecast import Forecast
from gateway.core.interfaces import Arrival, MarginLaw, PairTable, Patience, PrefillEnd, Refusal
from gateway.core.types import RejectReason, Request, Role, WaitReason
from gateway.core.waiting import latest_start_at, rank_of

AGAIN_S = 0.5
"""Somebody waits: look again after so long even if nothing was heard."""
PAUSE_S = 0.095
"""Before a request that found no place is tried again. About as often does one of forty decodes of 4 s end."""
RECENT_HOLDS = 50
"""Hand-offs from which the usual wait between the legs is told: some seconds' worth under load."""
SOON_S = 1e-3
"""What is done within this is done: an alarm rings a rounding before or after the instant it was set for."""


@dataclass(frozen=True, slots=True)
class Sluice:
    """Settings of our rule."""

    objective: Objective = Objective.REQUESTS
    quantile: float = 0.9
    """Of the first token's time at which a request is admitted."""
    tbt_quantile: float = 0.99
    """Of the step: one that is too long is too long for everybody in the batch."""
    engine_queue_s: float = 0.15
    """Seconds of prefill work that may lie ahead of a request in its engine; the rest of the queue is the gateway's.
    Default: engines compute short prompts together. Best of 0 to .2 on generated Azure conversations with an 8B model;
    on the conversation trace with a 70B model .1 to .5 differ by .002. Where places at decode engines are short it is
    0: whoever waits in an engine begins to decode later than was foreseen (.754 against .732 at 4x, 8 + 2 engines)."""
    starve_s: float = 60.0
    """A class of lengths (by powers of two) of which a request waits and none was sent for so long goes first once."""
    hold_s: float = 8.0
    """The longest wait between the legs. Default: about a quarter of vLLM's lease of 30 s."""
    window_s: float = 120.0
    """Over which prices are formed."""
    usable_ratio: float = 0.85
    """Of each stage's seconds, what is given away at prices: the rest takes bursts. Default: best of .85 to 1 on the
    first 3000 requests of the conversation trace at 3x, 8 + 2 engines; .90 differs by .003."""
    max_tries: int = 6
    """Requests that may find no place in one wake-up before it ends."""
    unbound_s: float = 60.0
    """When nobody named a bound for so long, nobody is held back: there is nothing to keep."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", Objective(self.objective))
        if not (0.0 < self.quantile < 1.0 and 0.0 < self.tbt_quantile < 1.0 and 0.0 < self.usable_ratio <= 1.0):
            raise ValueError("quantiles and usable_ratio must be between 0 and 1")
        if not all(0.0 <= value < inf for value in (self.engine_queue_s, self.starve_s, self.hold_s, self.unbound_s)):
            raise ValueError("engine_queue_s, starve_s, hold_s and unbound_s must be 0 or more, and finite")
        if not 0.0 < self.window_s < inf or self.max_tries < 1:
            raise ValueError("window_s must be above 0 and finite, max_tries at least 1")

    def start(self) -> SluiceGate:
        """A gate that has seen nobody."""
        return SluiceGate(self)


@dataclass(slots=True)
class _Waiting:
    """What is known of a request that waits."""

    cost: Cost
    pause_until_at: float = -inf
    latest_at: float = inf
    """The last instant at which its prefill could start in time."""
    is_place_wanted: bool = False
    """Whether it waits for a place at a decode engine: one that is longer finds none either."""


class SluiceGate:
    """A started `Sluice`."""

    def __init__(self, settings: Sluice) -> None:
        self._settings = settings
        self._prices = Prices(window_s=settings.window_s, max_requests=2048, usable_ratio=settings.usable_ratio)
        self._waiting: dict[str, _Waiting] = {}
        self._served_at: dict[int, float] = {}
        """When a request of that class of lengths was last sent, or first waited."""
        self._place_wanted_at = -inf
        """When somebody last found no place at a decode engine."""
        self._bound_at = -inf
        """When somebody last named a bound."""
        self._held_s: deque[float] = deque(maxlen=RECENT_HOLDS)
        """How long the latest hand-offs waited for a place."""

    # ---- one request ------------------------------------------------------------------------------------------------

    def arrive(self, arrival: Arrival, *, now: float) -> NDArray[np.bool_] | Refusal | Patience | None:
        """The pairs that keep every bound and can begin now, a wait, or a refusal when no wait would help."""
        request, forecast = arrival.request, arrival.forecast
        assert forecast is not None, "the scheduler makes one for every decision"
        if request.slo.has_bounds:
            self._bound_at = now
        elif now - self._bound_at > self._settings.unbound_s:
            return None
        odds = _Odds(arrival, forecast, self._settings, self._hold_s(), now)
        known = self._waiting.get(request.id) or self._meet(arrival, forecast, now)
        if (refusal := odds.hopeless()) is not None:
            self._waiting.pop(request.id, None)
            return refusal
        good = odds.in_time & odds.is_open
        pause_s = PAUSE_S
        if good.any():
            queue_s = self._queue_s(arrival.cluster, now)
            others_s = _others_turns_s(arrival, queue_s, now)
            free_in_s = np.maximum(0.0, arrival.pairs.wait_s - queue_s) + others_s
            is_now = free_in_s <= SOON_S
            best = int(np.argmin(np.where(good, arrival.costs + others_s, inf)))
            if not is_now[best] and self._is_queue(request.id) and (good & is_now).any():
                # The prediction knows of the prefill engines' own queues only; those who wait here go before it.
                good &= is_now
                best = int(np.argmin(np.where(good, arrival.costs, inf)))
            if is_now[best]:
                self._waiting.pop(request.id, None)
                self._served_at[_length_class(request)] = now
                return good & (others_s <= SOON_S)
            patience = odds.until_free(best)
            if arrival.cluster.turns.round_s:  # its turn is short, and no other gateway's wait ends with it
                pause_s = min(PAUSE_S, float(free_in_s[best]) - SOON_S)
        else:
            patience = odds.until_open()
        known.pause_until_at = now + pause_s
        known.latest_at = patience.latest_at
        known.is_place_wanted = patience.reason is WaitReason.DECODE_FULL
        if known.is_place_wanted:
            self._place_wanted_at = now
        self._waiting[request.id] = known
        return patience

    def end_prefill(self, prefill: PrefillEnd, *, now: float) -> Refusal | Patience | None:
        """A wait while no decode engine has a place: as long as the first token can be in time, and `hold_s` at most.

        A request without a bound goes on then: what it would cost the others is less than a prefill thrown away.
        """
        request, estimate = prefill.request, prefill.estimate
        step_s = _factor(prefill.margins, Role.DECODE, request, self._settings.tbt_quantile) * estimate.tbt_s
        if step_s <= prefill.bound_s and prefill.has_room:
            self._held_s.append(now - prefill.ended_at)
            return None
        latest_at = prefill.ended_at + self._settings.hold_s
        if request.slo.ttft_s is not None:
            in_time_at = request.arrived_at + request.slo.ttft_s - estimate.hand_off_s - estimate.tbt_s
            latest_at = min(latest_at, in_time_at)
        elif not request.slo.has_bounds and now >= latest_at:
            return None
        return Patience(WaitReason.DECODE_FULL, latest_at, _slow(step_s, prefill.bound_s))

    def _is_queue(self, request_id: str) -> bool:
        """Whether anybody else waits."""
        return len(self._waiting) > (request_id in self._waiting)

    def _hold_s(self) -> float:
        """The wait between the legs that most hand-offs stay within: kept free in the time to the first token."""
        return float(np.quantile(self._held_s, self._settings.quantile)) if self._held_s else 0.0

    def _meet(self, arrival: Arrival, forecast: Forecast, now: float) -> _Waiting:
        """A request is seen for the first time."""
        cost = cost_of(arrival, forecast, self._settings.objective)
        if arrival.request.slo.has_bounds and arrival.request.attempt == 1:
            # Other gateways get about as many requests as this one, and have the same engines.
            self._prices.arrived(cost, share=1.0 / arrival.cluster.turns.member_count, now=now)
        return _Waiting(cost)

    # ---- those who wait ---------------------------------------------------------------------------------------------

    def line_up(self, waiting: Iterable[Request], cluster: Cluster, *, now: float) -> Iterator[Request]:
        """Whom to try while a prefill engine is about free: what starves, what is worth its cost, then the dear."""
        tries, too_long = 0, inf
        for request in self._order(list(waiting), cluster, now):
            if tries >= self._settings.max_tries or not self._has_free(cluster, now):
                return
            known = self._waiting.get(request.id)
            if known is not None and (now < known.pause_until_at or request.prompt_tokens >= too_long):
                continue
            yield request
            if request.id in self._waiting:
                tries += 1
                if self._waiting[request.id].is_place_wanted:
                    too_long = min(too_long, request.prompt_tokens)

    def again_at(self, cluster: Cluster, *, now: float) -> float:
        """When the next prefill engine is predicted to be about free, within half a second."""
        queue_s = self._queue_s(cluster, now)
        ahead_s = (state.turn_in_s(queue_s, now) for state in _prefills(cluster))
        return now + min([AGAIN_S, *(s for s in ahead_s if s > SOON_S)])

    def left(self, request_id: str) -> None:
        """It waits no longer."""
        self._waiting.pop(request_id, None)

    def _has_free(self, cluster: Cluster, now: float) -> bool:
        queue_s = self._queue_s(cluster, now)
        return any(state.turn_in_s(queue_s, now) <= SOON_S for state in _prefills(cluster))

    def _is_decode_short(self, now: float) -> bool:
        """Whether places at decode engines have a price, or somebody found none not long ago."""
        return self._prices.decode > 0.0 or now - self._place_wanted_at < self._settings.window_s

    def _queue_s(self, cluster: Cluster, now: float) -> float:
        """Seconds of prefill work that may lie ahead of a request in its engine now.

        Where several gateways send to it no more than two turns' worth: each of them would have a place in its queue.
        """
        if self._is_decode_short(now):
            return 0.0
        turns = cluster.turns
        return (
            min(self._settings.engine_queue_s, 2.0 * turns.turn_s) if turns.round_s else self._settings.engine_queue_s
        )

    def _order(self, waiting: Sequence[Request], cluster: Cluster, now: float) -> Iterator[Request]:
        """The queue's order of classes and tenants, each turn of which goes to the best of those whose turn it is."""
        if self._settings.objective is Objective.FAIR:
            yield from waiting
            return
        bound = [request for request in waiting if request.slo.has_bounds]
        ranks = self._by_price(bound) if self._is_decode_short(now) else self._by_triage(bound, cluster, now)
        starving: set[str] = set()
        for request, (is_last, _) in zip(bound, ranks, strict=True):
            if is_last and now - self._served_at.setdefault(_length_class(request), now) > self._settings.starve_s:
                starving.add(request.id)
                yield request
        turns: dict[tuple[bool, int, str], list[tuple[bool, float, int]]] = {}
        for number, (request, rank) in enumerate(zip(bound, ranks, strict=True)):
            turns.setdefault(_turn_of(request), []).append((*rank, number))
        best = {key: iter(sorted(entries)) for key, entries in turns.items()}
        for request in bound:
            chosen = bound[next(best[_turn_of(request)])[2]]
            if chosen.id not in starving:
                yield chosen
        yield from (request for request in waiting if not request.slo.has_bounds)

    def _by_price(self, waiting: Sequence[Request]) -> list[tuple[bool, float]]:
        """Of each whether it goes after all others, and what it costs at the prices: who is expected goes first, then
        the cheapest."""
        known = [self._waiting.get(request.id) for request in waiting]
        excess = [0.0 if each is None else self._excess(each.cost) for each in known]
        return [
            (each > 1.0 and not request.is_expected, -1.0 if request.is_expected else each)
            for request, each in zip(waiting, excess, strict=True)
        ]

    def _by_triage(self, waiting: Sequence[Request], cluster: Cluster, now: float) -> list[tuple[bool, float]]:
        """Of each whether it goes after all others, then the smallest first; who is kept stays in the queue's order."""
        work_s = [state.prefill_work_s(now) for state in _prefills(cluster)]
        # The engines are other gateways' as well, who have about as many waiting.
        jobs = [self._job(request, cluster.turns.member_count, now) for request in waiting]
        keep = kept(jobs, busy_s=sum(work_s) / max(1, len(work_s)))
        return [(not is_kept, job.due_s if is_kept else job.size) for is_kept, job in zip(keep, jobs, strict=True)]

    def _job(self, request: Request, gateways: int, now: float) -> Job:
        known = self._waiting.get(request.id)
        if known is None:
            return Job(latest_start_at(request) - now, 0.0, 0.0, request.priority, request.is_expected)
        work_s = gateways * known.cost.prefill_s
        size = work_s / known.cost.value
        return Job(known.latest_at - now + work_s, work_s, size, request.priority, request.is_expected)

    def _excess(self, cost: Cost) -> float:
        """Cost at the prices over value: above 1 an optimal choice would leave it out."""
        return self._prices.of(cost) / cost.value


class _Odds:
    """What a request can expect of every pair, with margins: arrays of shape (pairs,)."""

    def __init__(self, arrival: Arrival, forecast: Forecast, settings: Sluice, hold_s: float, now: float) -> None:
        request, pairs = arrival.request, arrival.pairs
        self._request, self._pairs, self._forecast = request, pairs, forecast
        margin = _factor(arrival.margins, Role.PREFILL, request, settings.quantile)
        self._own_s = margin * (pairs.ttft_s - pairs.wait_s) + np.where(pairs.is_local, 0.0, hold_s)
        self._ttft_s = now - request.arrived_at + pairs.wait_s + self._own_s
        self._step_s = _factor(arrival.margins, Role.DECODE, request, settings.tbt_quantile) * pairs.tbt_s
        self._ttft_bound_s = _first_bound_s(arrival, pairs)
        own_bound_s = inf if request.slo.step_s is None else request.slo.step_s
        self._step_bound_s = np.minimum(forecast.tightest_s, own_bound_s)[pairs.decode_row]
        self.in_time: NDArray[np.bool_] = self._ttft_s <= self._ttft_bound_s
        joined_s = self._step_s + np.where(pairs.is_local, 0.0, pairs.stall_s)
        self.is_open: NDArray[np.bool_] = (joined_s <= self._step_bound_s) & pairs.has_room

    def hopeless(self) -> Refusal | None:
        """A refusal when no wait would help: late already, or too slow even alone on its engine."""
        if not self.in_time.any():
            best = int(np.argmin(self._ttft_s - self._ttft_bound_s))
            refusal = _late(float(self._ttft_s[best]), float(self._ttft_bound_s[best]))
            return replace(refusal, is_lasting=bool((self._own_s > self._ttft_bound_s).all()))
        bound_s = self._request.slo.step_s
        if bound_s is None or self.is_open.any():
            return None
        engines = len(self._forecast.numbers)
        alone_s = self._forecast.step_s(np.ones(engines), np.full(engines, float(self._request.prompt_tokens)))
        is_lasting = float(alone_s.min()) > bound_s
        return replace(_slow(float(alone_s.min()), bound_s), is_lasting=True) if is_lasting else None

    def until_open(self) -> Patience:
        """A wait for a place at a decode engine."""
        best = int(np.argmin(np.where(self.in_time, self._step_s, inf)))
        refusal = _slow(float(self._step_s[best]), float(self._step_bound_s[best]))
        return Patience(WaitReason.DECODE_FULL, self._latest_at(), refusal, estimate_at(self._pairs, best))

    def until_free(self, best: int) -> Patience:
        """A wait for that pair's prefill engine."""
        refusal = _late(float(self._ttft_s[best]), float(self._ttft_bound_s[best]))
        return Patience(WaitReason.PREFILL_BUSY, self._latest_at(), refusal, estimate_at(self._pairs, best))

    def _latest_at(self) -> float:
        """The last instant at which some prefill could start in time."""
        return self._request.arrived_at + float((self._ttft_bound_s - self._own_s).max())


def _first_bound_s(arrival: Arrival, pairs: PairTable) -> NDArray[np.float64]:
    """What is left for the first token by the bound on it and by the deadline, shape (pairs,), +inf for neither."""
    request, slo = arrival.request, arrival.request.slo
    bound_s = np.full(len(pairs), inf if slo.ttft_s is None else slo.ttft_s)
    if slo.deadline_s is None:
        return bound_s
    output_tokens = 0.0
    if arrival.law is not None:
        output_tokens = float(arrival.law.remaining_tokens((request.model, request.tenant), [0.0])[0])
    if request.max_output_tokens is not None:
        output_tokens = min(output_tokens, request.max_output_tokens)
    left_s: NDArray[np.float64] = np.minimum(bound_s, slo.deadline_s - output_tokens * pairs.tbt_s)
    return left_s


def _prefills(cluster: Cluster) -> Iterator[EngineState]:
    return (state for state in cluster.engines.values() if state.engine.role is not Role.DECODE)


def _others_turns_s(arrival: Arrival, queue_s: float, now: float) -> NDArray[np.float64]:
    """How much longer than for its engine to be free each pair is other gateways', seconds, shape (pairs,)."""
    pairs, engines = arrival.pairs, arrival.cluster.engines
    if not arrival.cluster.turns.round_s:
        return np.zeros(len(pairs))
    states = [engines[load.engine.id] for load in pairs.prefills]
    others_s = [state.turn_in_s(queue_s, now) - max(0.0, state.opens_s(queue_s, now)) for state in states]
    return np.array(others_s)[pairs.prefill_row]


def _turn_of(request: Request) -> tuple[bool, int, str]:
    """Whose turn it takes in the queue's order: of its class and tenant."""
    return (*rank_of(request), request.tenant)


def _length_class(request: Request) -> int:
    return request.prompt_tokens.bit_length()


def _factor(margins: MarginLaw | None, role: Role, request: Request, quantile: float) -> float:
    return 1.0 if margins is None else margins.factor(role, request.prompt_tokens, quantile)


def _late(ttft_s: float, bound_s: float) -> Refusal:
    message = f"the first token is predicted after {ttft_s:.3g} s; at most {bound_s:.3g} s were asked for"
    return Refusal(RejectReason.TTFT_SLO, message, predicted_s=ttft_s, bound_s=bound_s)


def _slow(tbt_s: float, bound_s: float) -> Refusal:
    message = f"tokens are predicted {tbt_s:.3g} s apart; at most {bound_s:.3g} s are promised there"
    return Refusal(RejectReason.TBT_SLO, message, predicted_s=tbt_s, bound_s=bound_s)
