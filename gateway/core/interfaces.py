"""What the core asks of its plug-ins: frozen dataclasses of settings, whose `start` gives the working object.

Settings and state are apart so that one config can start many schedulers (simulator seeds, tests) without sharing.
A stateless plug-in returns itself from `start`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gateway.core.types import Dispatch, Engine, Estimate, RejectReason, Report, Request, Role, WaitReason

if TYPE_CHECKING:
    from gateway.core.cluster import Cluster
    from gateway.core.forecast import Forecast


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One engine as a policy or predictor sees it at the instant of a decision. Counts include what we sent since."""

    engine: Engine
    report: Report | None
    report_age_s: float | None
    """None: it never reported."""
    in_flight_count: int
    """Requests there: ours, plus others' that its last report showed."""
    queued_count: int
    """Of these, requests whose prefill has not ended (prefill or both), or that have not joined the batch (decode)."""
    decoding_count: int
    """Of these, requests that are producing tokens."""
    prefill_work_s: float
    """Predicted seconds of prefill work still ahead of a new arrival."""
    queued_tokens: int
    """Uncached prompt tokens of the queued requests."""
    kv_tokens: int
    """KV tokens held by requests in flight there (prompt plus output so far)."""
    own_count: int
    """Of `in_flight_count`, the requests that this gateway sent: all that a router which reads no reports knows."""


@dataclass(frozen=True, slots=True)
class PairTable:
    """Every feasible pair, sorted by (prefill id, decode id). All arrays have shape (pairs,).

    A pair whose prefill engine could first fetch a longer prefix from another engine stands in the table twice: after
    all the rows that fetch nothing follow, in the same order, those that fetch. So the choice of a row says both.
    """

    prefills: tuple[EngineLoad, ...]
    decodes: tuple[EngineLoad, ...]
    prefill_row: NDArray[np.intp]
    """Index into `prefills`."""
    decode_row: NDArray[np.intp]
    """Index into `decodes`."""
    fetch_row: NDArray[np.intp]
    """Index into `prefills` of the engine from which the prefix is fetched; -1: nothing is fetched."""
    cached_tokens: NDArray[np.int64]
    """Prompt tokens that need no computing: held by the prefill engine, or fetched."""
    fetched_tokens: NDArray[np.int64]
    """Of `cached_tokens`, those to be fetched."""
    wait_s: NDArray[np.float64]
    fetch_s: NDArray[np.float64]
    prefill_s: NDArray[np.float64]
    hand_off_s: NDArray[np.float64]
    join_s: NDArray[np.float64]
    tbt_s: NDArray[np.float64]
    has_room: NDArray[np.bool_]
    """Whether the decode engine will have memory for it when its prefill ends."""
    is_local: NDArray[np.bool_]
    """Whether a decode engine computes the prompt itself, mixed into the steps of its batch."""
    stall_s: NDArray[np.float64]
    """What prefills on the decode engine add to a step there. Of a local pair everybody in the batch has such a step;
    of a hand-off, this request alone, should a prefill go on there when it joins."""

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """Predicted time to the first token of each pair, seconds, shape (pairs,)."""
        return self.wait_s + self.fetch_s + self.prefill_s + self.hand_off_s + self.join_s

    @property
    def held_tokens(self) -> NDArray[np.int64]:
        """Prompt tokens that each pair's prefill engine holds itself, shape (pairs,)."""
        return self.cached_tokens - self.fetched_tokens

    def __len__(self) -> int:
        return int(self.prefill_row.shape[0])


class Chooser(Protocol):
    """A started policy."""

    def costs(self, request: Request, pairs: PairTable, *, now: float) -> NDArray[np.float64]:
        """A cost for each pair, shape (pairs,), finite or +inf; the lowest wins, ties go to the first row."""
        ...

    def dispatched(self, request: Request, dispatch: Dispatch, *, now: float) -> None:
        """The scheduler sent the request to that pair. Stateless choosers do nothing."""
        ...


class Policy(Protocol):
    """Settings of a policy: which feasible pair."""

    def start(self, rng: random.Random) -> Chooser: ...


@runtime_checkable
class WeighsHandOff(Protocol):
    """A policy that weighs a hand-off against a prefill on the decode engine; others are not offered the latter."""

    @property
    def can_skip_hand_off(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """A prefill that ended: what was asked and what it took."""

    engine: Engine
    prompt_tokens: int
    cached_tokens: int
    queued_ahead_s: float
    """Predicted work ahead of it when it was sent."""
    elapsed_s: float
    """From dispatch to the end of the prefill."""
    predicted_s: float
    """What had been predicted for `elapsed_s`."""
    busy_s: float | None = None
    """From its dispatch, or from the end of the prefill before it there if that was later, to its end."""


@dataclass(frozen=True, slots=True)
class DecodeOutcome:
    """A decode that ended."""

    engine: Engine
    batch: int
    """Requests decoding there when it joined, itself included."""
    kv_tokens: int
    output_tokens: int
    tbt_s: float
    predicted_tbt_s: float


@dataclass(frozen=True, slots=True)
class HandOffOutcome:
    """A hand-off that ended."""

    prefill: Engine
    decode: Engine
    prompt_tokens: int
    elapsed_s: float
    """From the end of the prefill to the KV being at the decode engine."""


class Estimator(Protocol):
    """A started predictor: pure in its arguments but for what it learnt from `observe_*`."""

    def prefill_s(self, engine: Engine, *, prompt_tokens: int, cached_tokens: int) -> float:
        """Seconds the prefill takes on an idle engine, > 0; monotone in prompt_tokens, never more with more cached."""
        ...

    def decode_step_s(self, engine: Engine, *, batch: int, kv_tokens: int) -> float:
        """Seconds of one decode step with that batch and that many KV tokens in it, > 0; monotone in both."""
        ...

    def hand_off_s(
        self, prefills: Sequence[Engine], decodes: Sequence[Engine], *, prompt_tokens: int
    ) -> NDArray[np.float64]:
        """Seconds to move the prompt's KV, shape (prefills, decodes), >= 0."""
        ...

    def observe_prefill(self, outcome: PrefillOutcome) -> None: ...

    def observe_decode(self, outcome: DecodeOutcome) -> None: ...

    def observe_hand_off(self, outcome: HandOffOutcome) -> None: ...

    def observe_report(self, engine: Engine, report: Report) -> None:
        """The engine told of itself; what it counted of its own work is a start where nothing else is known."""
        ...


class Predictor(Protocol):
    """Settings of a predictor: how long will it take."""

    def start(self) -> Estimator: ...


class LengthLaw(Protocol):
    """What is believed about output lengths: `predictors/output_length.py`, started.

    A group is a tuple of words, the widest first: (model, tenant). An unknown one is answered by a wider one.
    """

    def observe(self, group: tuple[str, ...], output_tokens: int) -> None:
        """A request of the group ended after that many tokens."""
        ...

    def remaining_tokens(self, group: tuple[str, ...], generated: ArrayLike) -> NDArray[np.float64]:
        """Expected tokens still to come, shape (requests,), >= 0."""
        ...

    def survival(self, group: tuple[str, ...], generated: ArrayLike, ahead: ArrayLike) -> NDArray[np.float64]:
        """P(still running after `ahead` more tokens), shape (requests, horizons).

        `generated` has shape (requests,); `ahead` has shape (horizons,) or (requests, horizons), >= 0.
        """
        ...


class Lengths(Protocol):
    """Settings of a belief about output lengths."""

    def start(self) -> LengthLaw: ...


class MarginLaw(Protocol):
    """Factors that turn predictions into quantiles: `predictors/calibration.py`, started.

    The scheduler tells it of each first token (role prefill: seconds from the dispatch, hand-off and join included) and
    of each end (role decode: the slow mean gap, against the step predicted for the fullest batch that the request met).
    """

    def observe(
        self, role: Role, tokens: int, *, predicted_s: float, actual_s: float, promised_s: float | None = None
    ) -> None:
        """A request of that many prompt tokens took `actual_s` where the bare prediction was `predicted_s`.

        `promised_s` is the quantile as it was stated for it. Outcomes come late: judged by what would be stated now,
        coverage of p90 fell to .78 on the Azure trace.
        """
        ...

    def factor(self, role: Role, tokens: int, quantile: float | None = None) -> float:
        """What a prediction is multiplied by so that the stated share of requests stays within it, > 0."""
        ...


class Margins(Protocol):
    """Settings of the margins."""

    def start(self) -> MarginLaw: ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """What an admission rule answers to a request that it does not let in."""

    reason: RejectReason
    message: str
    retry_after_s: float | None = None
    """When the rule expects to let this very request in; None: it cannot tell, the scheduler's own guess stands."""
    predicted_s: float | None = None
    """What was predicted for the bound that would break, its margin included."""
    bound_s: float | None = None
    is_lasting: bool = False
    """Whether engines that have nothing else to do would be too slow as well: it is told no time to come back."""


@dataclass(frozen=True, slots=True)
class Patience:
    """What an admission rule answers to a request that is to wait in the gateway."""

    reason: WaitReason
    latest_at: float
    """The last instant at which the wait can end well; then comes the refusal."""
    refusal: Refusal
    """That refusal."""
    best: Estimate | None = None
    """What was predicted for the best pair."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """All that is known when an admission rule is asked about a request."""

    request: Request
    pairs: PairTable
    costs: NDArray[np.float64]
    """What the policy thinks of each pair, shape (pairs,): the lowest would be chosen."""
    cluster: Cluster
    """The ledger, to be read only."""
    estimator: Estimator
    forecast: Forecast | None = None
    """What the decode engines will hold; None: everybody sent there counts."""
    law: LengthLaw | None = None
    margins: MarginLaw | None = None

    @property
    def chosen_row(self) -> int:
        """The row of the pair that the policy prefers."""
        return int(np.argmin(self.costs))


@dataclass(frozen=True, slots=True)
class PrefillEnd:
    """All that is known when a hand-off's prefill has ended and its decode would begin."""

    request: Request
    estimate: Estimate
    cluster: Cluster
    """The ledger, to be read only. It counts this request among those of the decode engine."""
    estimator: Estimator
    ended_at: float = 0.0
    """When its prefill ended."""
    bound_s: float = float("inf")
    """The lowest TBT bound of those it would join, its own included."""
    has_room: bool = True
    """Whether its KV fits."""
    margins: MarginLaw | None = None


class Gate(Protocol):
    """A started admission rule."""

    def arrive(self, arrival: Arrival, *, now: float) -> NDArray[np.bool_] | Refusal | Patience | None:
        """None: any pair will do. Else the pairs that will, shape (pairs,), at least one; a wait; or a refusal."""
        ...

    def end_prefill(self, prefill: PrefillEnd, *, now: float) -> Refusal | Patience | None:
        """A refusal of a request whose prefill is done already, or a wait; None lets its decode begin."""
        ...


@runtime_checkable
class LineUp(Protocol):
    """A gate that says who of those who wait is tried, and in which order. Others try all in the queue's order."""

    def line_up(self, waiting: Iterable[Request], cluster: Cluster, *, now: float) -> Iterator[Request]:
        """Whom to try next. The ledger may have changed when the next one is asked for."""
        ...

    def again_at(self, cluster: Cluster, *, now: float) -> float:
        """When to try again although nothing happened until then."""
        ...

    def left(self, request_id: str) -> None:
        """The request waits no longer."""
        ...


class Admission(Protocol):
    """Settings of an admission rule: whom to refuse although a pair could serve him."""

    def start(self) -> Gate: ...
