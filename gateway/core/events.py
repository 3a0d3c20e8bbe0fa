"""What the world tells the core. Each event is a value; `Scheduler.apply(event, now=...)` is the only way in.

A request lives so: decide -> Dispatch -> (PrefillDone) -> FirstToken -> Progress* -> Finished, or AttemptFailed
at any point after the Dispatch, or Left while it waits. Events for requests that are already over are ignored: the
shell may be told of an end twice (client gone and engine done in the same turn of the loop).

What other gateways do comes as `Peer...` events. A reservation of theirs is a lease: `owner` is the gateway, `epoch`
its fencing token (a gateway that may have lost its leases goes on under a higher one; what comes under a lower one is
void), `number` the reservation within the epoch. It ends when the owner says so, or at the end of its time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gateway.core.types import Engine, Estimate, Health, Report, Request


@dataclass(frozen=True, slots=True)
class EngineFound:
    """An engine exists, or new facts about it are known. Replaces what was known under the same id."""

    engine: Engine


@dataclass(frozen=True, slots=True)
class EngineLost:
    """An engine left the configuration for good: everything known of it goes."""

    engine_id: str


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """An engine's health was probed or inferred from a failed call."""

    engine_id: str
    health: Health
    reason: str = ""


@dataclass(frozen=True, slots=True)
class EngineReport:
    """An engine reported its load."""

    engine_id: str
    report: Report


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The prefill leg ended well: the prefill engine computed the prompt and holds its KV for the decode engine."""

    request_id: str
    prompt_tokens: int | None = None
    """The engine's own count; None when it did not say."""
    cached_tokens: int | None = None
    """Prompt tokens that the prefill engine found in its cache; None when it did not say."""
    awaits_decode: bool = False
    """The shell waits for a HandOff (or a Reject) before it sends the decode; else that is on its way already."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first output token left for the client."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How many output tokens the request has so far; sent now and then, not per token."""

    request_id: str
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The request was answered to its end. Counts are the engine's own where it told, else None."""

    request_id: str
    output_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    tbt_s: float | None = None
    """Mean of the slowest 10 % of token gaps."""


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """The dispatched attempt is over without an answer: its reservations go. The shell may decide again."""

    request_id: str
    engine_id: str | None
    """The engine at fault; None when nobody was (the client left)."""
    reason: str


@dataclass(frozen=True, slots=True)
class Left:
    """The client left while the request waited or ran."""

    request_id: str


class Tier(StrEnum):
    """Where an engine keeps a KV block; the nearer, the cheaper to use."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True, eq=False)
class BlocksStored:
    """An engine now holds these blocks. `hashes` are ours (core/blocks.py), shape (blocks,), never the engine's own."""

    engine_id: str
    block_tokens: int
    hashes: NDArray[np.uint64]
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True, eq=False)
class BlocksRemoved:
    """An engine dropped these blocks from that tier."""

    engine_id: str
    block_tokens: int
    hashes: NDArray[np.uint64]
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class BlocksCleared:
    """An engine dropped every block (cache reset or restart)."""

    engine_id: str


class FeedState(StrEnum):
    """Whether an engine's stream of block events can be relied on."""

    NONE = "none"
    """The engine publishes no events."""
    CONNECTING = "connecting"
    """It should, and never did so far."""
    LIVE = "live"
    """Connected, nothing known to be missing."""
    REPAIRING = "repairing"
    """Connected; missed messages are being replayed."""
    LOST = "lost"
    """It was connected and is not any more."""


@dataclass(frozen=True, slots=True)
class KvFeed:
    """An engine's stream of block events came, went, or is being repaired."""

    engine_id: str
    state: FeedState
    rows: tuple[str, ...]
    """The ids under which its block events come: its own, and one more for each further data-parallel rank."""


@dataclass(frozen=True, slots=True)
class Joined:
    """This gateway goes by that name among others, and its turns are so long (core/turns.py)."""

    owner: str
    turn_s: float


@dataclass(frozen=True, slots=True)
class PeerSent:
    """Another gateway dispatched a request. `request.id` is not its name here: other ids are none of our business."""

    owner: str
    epoch: int
    number: int
    request: Request
    """Sizes, and the block hashes from `first_block` on at the prefill engine's block size; none: they are known."""
    estimate: Estimate
    first_block: int
    age_s: float
    """How long ago it was sent when its owner said so."""
    lease_s: float
    """How long the owner's reservations stand without a sign of it."""


class PeerStage(StrEnum):
    """How far another gateway's request has come."""

    PREFILLED = "prefilled"
    PRODUCING = "producing"
    FINISHED = "finished"
    GIVEN_UP = "given_up"


@dataclass(frozen=True, slots=True)
class PeerMoved:
    """Another gateway's request came to the next stage of its life, or has that many output tokens now."""

    owner: str
    epoch: int
    number: int
    stage: PeerStage
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PeerHolds:
    """Another gateway lives, and these are all its reservations: others that we know of are over."""

    owner: str
    epoch: int
    numbers: tuple[int, ...]
    lease_s: float


@dataclass(frozen=True, slots=True)
class PeerGone:
    """Another gateway said goodbye: nothing of its is in flight any more."""

    owner: str
    epoch: int


PeerEvent: TypeAlias = PeerSent | PeerMoved | PeerHolds | PeerGone


Event: TypeAlias = (
    EngineFound
    | EngineLost
    | EngineHealth
    | EngineReport
    | PrefillDone
    | FirstToken
    | Progress
    | Finished
    | AttemptFailed
    | Left
    | BlocksStored
    | BlocksRemoved
    | BlocksCleared
    | KvFeed
    | Joined
    | PeerEvent
)
