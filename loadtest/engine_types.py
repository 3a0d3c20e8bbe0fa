"""What goes into an emulated engine and what comes out: settings, requests, outcomes, counters. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gateway.core.errors import ConfigError
from gateway.core.types import Role


class LoadFailure(StrEnum):
    """What a decode engine does when the KV it was promised cannot be read."""

    FAIL = "fail"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How an engine was started. Defaults are vLLM 0.32.0's where it has one."""

    role: Role = Role.BOTH
    """Documents the engine's place; the requests decide what it does, as in vLLM."""
    block_tokens: int = 16
    kv_blocks: int = 8192
    step_tokens: int = 8192
    """Tokens computed in one step at most: the size of a prefill chunk."""
    batch_limit: int = 256
    """Requests running at once at most."""
    max_model_tokens: int = 32768
    """Prompt plus output of one request at most."""
    kv_token_bytes: int = 131072
    lease_s: float = 30.0
    """How long blocks of a finished prefill are held for their reader. Source: nixl/base_scheduler.py:82."""
    lease_extension_s: float = 20.0
    """What a heartbeat extends the lease to, from its arrival. Source: nixl/base_worker.py:532."""
    heartbeat_s: float = 5.0
    """Source: nixl/base_scheduler.py, lease // 6."""
    load_failure: LoadFailure = LoadFailure.FAIL
    mean_output_tokens: int = 128
    """Mean length of a text before its end of sequence, where the tokens are known."""
    vocabulary: tuple[int, ...] = ()
    """Output tokens the model can say; needed only for requests that carry token ids."""
    has_kv_events: bool = False
    max_run_steps: int | None = None
    """Decode steps advanced at once while the batch does not change; 1 to see every token as it comes."""

    def __post_init__(self) -> None:
        if self.kv_blocks * self.block_tokens < self.max_model_tokens:
            raise ConfigError("engine.kv_blocks: the KV of one longest request does not fit")
        if min(self.block_tokens, self.step_tokens, self.batch_limit, self.max_model_tokens) < 1:
            raise ConfigError("engine: block_tokens, step_tokens, batch_limit and max_model_tokens must be >= 1")
        if self.step_tokens < self.batch_limit:
            raise ConfigError("engine.step_tokens: must be >= batch_limit, or decoding requests starve")


@dataclass(frozen=True, slots=True)
class RemoteKv:
    """Where a prompt's KV lies: the engine that computed it, the blocks it holds. `None`: the field was absent."""

    block_ids: tuple[int, ...]
    engine_id: str | None
    request_id: str | None
    host: str | None
    port: int | None
    is_waited_for: bool = False
    """A reader that cannot read it waits on instead of failing."""
    is_heartbeat_possible: bool = True
    """vLLM heart-beats only when `tp_size` came too."""

    @property
    def is_complete(self) -> bool:
        """Whether the blocks can be asked for at all."""
        return None not in (self.engine_id, self.request_id, self.host, self.port)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate. With `token_ids` the engine knows the text; without, only sizes."""

    id: str
    prompt_tokens: int
    """>= 1."""
    max_tokens: int
    """>= 1. Without token ids the output has exactly this many tokens."""
    block_keys: tuple[int, ...] = ()
    """Chained keys of the prompt's full blocks; computed from `token_ids` when those are given."""
    token_ids: tuple[int, ...] = ()
    lora: str = ""
    salt: str = ""
    is_eos_ignored: bool = False
    min_tokens: int = 0
    variant: int = 0
    """Which of several texts for the same prompt (n > 1, a sampling seed); 0 is the greedy one."""
    is_kv_held: bool = False
    """Hold the KV for a reader after the end (`do_remote_decode`)."""
    remote: RemoteKv | None = None
    """Read the prompt's KV from there instead of computing it (`do_remote_prefill`)."""
    is_prefix_pending: bool = False
    """A prefix is on its way from elsewhere: wait for it, first come first served (`Engine.prefix_arrived`)."""


# ---- outcomes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Each of these requests produced a token at each of these instants (one step per instant)."""

    request_ids: tuple[str, ...]
    token_at: NDArray[np.float64]
    """Shape (steps,), ascending."""
    token_ids: tuple[tuple[int, ...], ...] = ()
    """Per request its `steps` tokens; () where the request came without token ids."""


@dataclass(frozen=True, slots=True)
class PrefillFinished:
    """The whole prompt has KV here; the first token comes with it."""

    request_id: str
    at: float
    cached_tokens: int
    """Prompt tokens found in the local prefix cache."""
    scheduled_at: float
    """When the request left the waiting queue."""


@dataclass(frozen=True, slots=True)
class TransferFinished:
    """The prompt's KV arrived from another engine."""

    request_id: str
    at: float
    started_at: float
    tokens: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """The promised KV cannot be read; what follows is the engine's load-failure policy."""

    request_id: str
    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class Preempted:
    """Memory ran out: the request lost its KV and will be computed again."""

    request_id: str
    at: float


class FinishReason(StrEnum):
    """Why a sequence ended. The strings are vLLM's."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class HeldKv:
    """The blocks an engine keeps for the reader of a finished prefill."""

    request_id: str
    block_ids: tuple[int, ...]
    tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence ended."""

    request_id: str
    at: float
    reason: FinishReason
    output_tokens: int
    cached_tokens: int
    arrived_at: float
    scheduled_at: float | None
    first_token_at: float | None
    preemptions: int = 0
    held: HeldKv | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What one step of the engine gave one sequence; `end` with its last."""

    choice: int
    token_ids: tuple[int, ...]
    end: Finished | None


@dataclass(frozen=True, slots=True)
class LeaseExpired:
    """Nobody read the held blocks in time: they are free again."""

    request_id: str
    at: float


@dataclass(frozen=True, slots=True)
class Crashed:
    """The scheduler met parameters that kill a vLLM engine core. The engine does nothing any more."""

    at: float
    reason: str


Outcome: TypeAlias = (
    Tokens | PrefillFinished | TransferFinished | TransferFailed | Preempted | Finished | LeaseExpired | Crashed
)


@dataclass(slots=True)
class Counters:
    """What an engine has counted since it started; never falls."""

    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    external_query_tokens: int = 0
    external_hit_tokens: int = 0
    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    fetched_prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    busy_s: float = 0.0
    transferred_bytes: int = 0
    failed_transfers: int = 0
    expired_leases: int = 0
    reads_after_release: int = 0
    """Notifications for blocks that were not held any more: possible reads of recycled memory."""
    finished: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(FinishReason, 0))


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine is busy with at this instant."""

    running_count: int
    waiting_count: int
    """Waiting for memory or a place in the batch."""
    deferred_count: int
    """Waiting for KV from another engine."""
    fetching_count: int
    """Of these, transfers under way."""
    fetched_count: int
    """Of these, transfer over but not running yet."""
    kv_usage_ratio: float
    held_count: int
