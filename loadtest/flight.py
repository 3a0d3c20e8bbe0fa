"""One request of a simulation on its way: where it is, what was predicted for it, when its tokens came."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gateway.core.types import Dispatch, Request
from loadtest.engine_types import RemoteKv
from loadtest.report import Outcome, Status
from loadtest.sim_engines import SimEngine
from loadtest.sim_returns import Visit
from loadtest.workload import TraceRequest


@dataclass(slots=True, eq=False)
class Flight:
    """A request from its arrival to its end. Engines know it by `leg_id`, another one for each attempt."""

    visit: Visit
    request: Request
    gateway: int
    """Which gateway it came to."""
    keys: tuple[int, ...]
    dispatch: Dispatch | None = None
    prefill: SimEngine | None = None
    decode: SimEngine | None = None
    held: RemoteKv | None = None
    """Where its prompt's KV waits to be read, from the end of its prefill on."""
    predicted_tbt_s: float | None = None
    """What was predicted when its decode engine was chosen."""
    sent_at: float | None = None
    """When it was dispatched, the last time."""
    predicted_ttft_s: float | None = None
    """What was promised when it was sent, its wait in the gateway included."""
    prefilled_tokens: int = 0
    """Prompt tokens computed for it, over all attempts."""
    cached_tokens: int = 0
    """Of its last prefill, prompt tokens that needed no computing."""
    first_token_at: float | None = None
    instants: list[NDArray[np.float64]] = field(default_factory=list)
    output_tokens: int = 0
    told_tokens: int = 0
    """Output tokens that the scheduler was told of."""
    outcome: Outcome | None = None
    is_refused_after_prefill: bool = False

    @property
    def trace(self) -> TraceRequest:
        """What is asked for."""
        return self.visit.trace

    @property
    def leg_id(self) -> str:
        """Its id at the engines."""
        attempt = self.request.attempt
        return self.request.id if attempt == 1 else f"{self.request.id}.{attempt}"

    @property
    def is_hand_off(self) -> bool:
        return self.prefill is not self.decode

    def take_tokens(self, token_at: NDArray[np.float64]) -> None:
        """Tokens came at these instants, shape (steps,)."""
        self.instants.append(token_at)
        self.output_tokens += len(token_at)

    def start_over(self) -> None:
        """The attempt is over: what it had shown counts no more."""
        self.prefill = self.decode = self.dispatch = self.held = self.predicted_tbt_s = None
        self.instants.clear()
        self.output_tokens = self.told_tokens = 0

    def end(self, status: Status, at: float, reason: str = "") -> Outcome:
        """Sets what it came to; TTFT, TBT and TPOT where tokens came."""
        arrived_at = self.request.arrived_at
        gaps = np.diff(np.concatenate(self.instants)) if self.instants else np.zeros(0)
        self.outcome = Outcome(
            arrived_at=arrived_at,
            status=status,
            prompt_tokens=self.trace.prompt_tokens,
            output_tokens=self.output_tokens,
            ttft_s=None if self.first_token_at is None else self.first_token_at - arrived_at,
            tbt_s=slow_mean_s(gaps),
            tpot_s=float(gaps.mean()) if len(gaps) else None,
            e2e_s=at - arrived_at,
            reason=reason,
        )
        self.instants.clear()
        return self.outcome


def slow_mean_s(gaps: NDArray[np.float64]) -> float | None:
    """Mean of the longest tenth of the gaps, rounded up to whole gaps; None without gaps. Shape of `gaps`: (n,).

    Source: Mooncake, FAST'25, section 5.1.
    """
    if not len(gaps):
        return None
    count = -(-len(gaps) // 10)
    return float(np.partition(gaps, len(gaps) - count)[len(gaps) - count :].mean())
