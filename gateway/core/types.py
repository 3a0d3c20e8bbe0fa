"""The nouns of the core: engines, requests, reports, estimates and decisions. Plain values that know nobody.

Everything here is frozen and printable: a decision can be journalled, compared and replayed. Times that end in `_at`
are instants on the caller's monotonic clock, in seconds; durations end in `_s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

BlockHashes: TypeAlias = NDArray[np.uint64]
"""Chained content hashes of a prompt's full KV blocks, shape (blocks,), first block first."""


class Role(StrEnum):
    """What an engine was started to do."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class Health(StrEnum):
    """What is known of an engine's ability to serve. Only UP engines are candidates."""

    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine address and the facts learnt about it. `None` means not known, never zero."""

    id: str
    url: str
    role: Role
    adapter: str = "vllm"
    connector: str = "nixl"
    pool: str = "default"
    """Engines hand off only to engines of the same pool (same model, version and connector)."""
    can_serve_alone: bool = True
    """Whether a plain request works on it (most vLLM decode engines can prefill; an SGLang decode engine cannot)."""
    transfer_address: str | None = None
    """Where decode engines ask for it before a hand-off (a URL); None: its connector's default, or not needed."""
    transfer_ids: tuple[str, ...] = ()
    """What its connector calls it, by data-parallel rank; empty: it has not told, or need not."""
    can_share_prefixes: bool = False
    """Whether, told by the gateway, it can pull the KV of a prefix from an engine of its pool, and give it to one."""
    max_in_flight: int | None = None
    """Requests at once; None: the admission limit of all engines."""
    models: tuple[str, ...] = ()
    """Every name it serves, LoRA adapters included."""
    lora_names: tuple[str, ...] = ()
    """Of these, the LoRA adapters: their KV blocks are not those of the base model."""
    block_tokens: int | None = None
    kv_capacity_tokens: int | None = None
    max_model_tokens: int | None = None
    details: Mapping[str, int | str] = field(default_factory=dict)
    """What its adapter must know of it to speak to it, by name; nobody else reads it."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """What an engine counted of its own work since it started; none of the numbers ever falls while it lives."""

    prefill_count: int = 0
    """Requests whose prompt it computed."""
    prefill_s: float = 0.0
    """Of these together, from leaving its queue to the first token."""
    computed_tokens: int = 0
    """Prompt tokens that it computed itself."""
    gap_count: int = 0
    """Tokens that followed another one of their request."""
    gap_s: float = 0.0
    """Of these together, since the token before."""


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine last said of itself. `None` means it did not say."""

    running_count: int
    waiting_count: int
    kv_usage_ratio: float | None = None
    """0 <= ratio <= 1."""
    prefix_hit_tokens: int | None = None
    """Counter since the engine started."""
    prefix_query_tokens: int | None = None
    """Counter since the engine started."""
    waiting_uncached_tokens: int | None = None
    gen_tokens_per_s: float | None = None
    preemptions: int | None = None
    """Counter since the engine started."""
    times: StageTimes | None = None
    """How long its work took so far: what a gateway that has seen none of it can start from."""


@dataclass(frozen=True, slots=True)
class Slo:
    """The bounds a request asked for; any subset. `None` means no such bound."""

    ttft_s: float | None = None
    tbt_s: float | None = None
    """Bound on the mean of the slowest 10 % of token gaps."""
    deadline_s: float | None = None
    """End to end, counted from arrival."""
    tpot_s: float | None = None
    """Bound on the mean token gap."""

    @property
    def has_bounds(self) -> bool:
        """Whether the request asked for anything; one that did not is served best-effort."""
        return not (self.ttft_s is self.tbt_s is self.deadline_s is self.tpot_s is None)

    @property
    def step_s(self) -> float | None:
        """The bound that a predicted step time has to keep, the tighter of TBT and TPOT; None: no such bound."""
        return min((bound_s for bound_s in (self.tbt_s, self.tpot_s) if bound_s is not None), default=None)


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the core sees it: sizes and bounds, no text."""

    id: str
    model: str
    arrived_at: float
    prompt_tokens: int
    """>= 1; an estimate unless `is_prompt_exact`."""
    max_output_tokens: int | None = None
    is_prompt_exact: bool = False
    can_hand_off: bool = True
    """False for requests whose KV cannot be moved (n > 1, several prompts): they need one engine for both stages."""
    block_hashes: Mapping[int, BlockHashes] = field(default_factory=dict, compare=False)
    """Block size in tokens -> the prompt's chained block hashes at that size."""
    slo: Slo = Slo()
    priority: int = 0
    tenant: str = "default"
    attempt: int = 1
    """1 for the first decision; each retry is a new decision with the next number."""
    client: int | None = None
    """Who asks, as a number that tells clients apart and nothing else of them; None: nobody knows."""
    is_expected: bool = False
    """Whether it was refused before and comes back when it was told to; the scheduler says so."""
    avoid: tuple[str, ...] = ()
    """Engines that failed this request, then those that may have: each is chosen again only when no other can serve."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is predicted for one pair. All times in seconds, >= 0; `prefill == decode` means one engine does both."""

    prefill: str
    decode: str
    wait_s: float
    fetch_s: float
    prefill_s: float
    hand_off_s: float
    join_s: float
    tbt_s: float
    cached_tokens: int = 0
    """Prompt tokens that need no computing: held by the prefill engine, or fetched."""
    fetch_from: str | None = None
    """The engine from which the prefill engine first pulls the prefix it lacks; None: it pulls nothing."""
    fetched_tokens: int = 0
    """Of `cached_tokens`, those to be fetched."""
    stall_s: float = 0.0
    """What prefills on the decode engine add to a step there: to one of everybody's when this prefill is there too."""

    @property
    def ttft_s(self) -> float:
        """Predicted time to the first token: the sum of the five stages."""
        return self.wait_s + self.fetch_s + self.prefill_s + self.hand_off_s + self.join_s

    @property
    def held_tokens(self) -> int:
        """Prompt tokens that the prefill engine holds before any fetch."""
        return self.cached_tokens - self.fetched_tokens

    @property
    def is_hand_off(self) -> bool:
        """Whether the KV moves from one engine to another."""
        return self.prefill != self.decode


class WaitReason(StrEnum):
    """Why a request waits in the gateway instead of being sent."""

    ENGINES_FULL = "engines_full"
    PREFILL_BUSY = "prefill_busy"
    """No prefill engine is about to be free: the pair is chosen when one is."""
    DECODE_FULL = "decode_full"
    """No decode engine would have a place for it when its prefill ended."""
    TOO_DEAR = "too_dear"
    """Those that cost less go first."""


class RejectReason(StrEnum):
    """Why a request is refused. The string is the metric label, the header value and the journal word."""

    NO_PREFILL = "no_prefill"
    NO_DECODE = "no_decode"
    UNKNOWN_MODEL = "unknown_model"
    PROMPT_TOO_LONG = "prompt_too_long"
    QUEUE_FULL = "queue_full"
    WAITED_TOO_LONG = "waited_too_long"
    TOO_MANY_ATTEMPTS = "too_many_attempts"
    TTFT_SLO = "ttft_slo"
    TBT_SLO = "tbt_slo"
    DEADLINE_SLO = "deadline_slo"
    DEADLINE_PAST = "deadline_past"
    RATE_LIMITED = "rate_limited"
    TOO_MANY_IN_FLIGHT = "too_many_in_flight"


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send the request to this pair now."""

    request_id: str
    attempt: int
    estimate: Estimate
    runners_up: tuple[Estimate, ...] = ()
    """The next best pairs, best first, at most three: they explain the choice."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Keep the request in the gateway: `Scheduler.wake` will name it again."""

    request_id: str
    reason: WaitReason
    until_at: float
    """The instant after which the wait ends in a refusal."""


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse the request now."""

    request_id: str
    reason: RejectReason
    message: str
    retry_after_s: float | None = None
    """When this very request is expected to be admitted; None when waiting would not help."""
    best: Estimate | None = None
    """The best pair's prediction, when there was a pair."""
    predicted_s: float | None = None
    """What was predicted for the bound that would break, its margin included."""
    bound_s: float | None = None
    """What the request asked for."""


@dataclass(frozen=True, slots=True)
class HandOff:
    """The prefill is done: let that engine decode, which may be another than the dispatch named."""

    request_id: str
    decode: str
    tbt_s: float
    """Predicted seconds of its steps, this request included."""


Decision: TypeAlias = Dispatch | Wait | Reject | HandOff
