"""The shape of an adapter: an Exchange is a small state machine that turns one decided request into calls to engines.

The shell (gateway/dispatch.py) carries out commands and reports what happened; the Exchange never waits, never looks at
a clock and never sees a socket. Everything before `Commit` can be retried, for nothing has reached the client. After
`Commit` the bytes of the answering call flow through the relay without passing here; only its end comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from adapters.kv_events import KvEventSource
from gateway.core.types import Engine, Report, Role


class Leg(StrEnum):
    """Which part of the exchange a call is."""

    PREFILL = "prefill"
    DECODE = "decode"


class Cause(StrEnum):
    """How a call ended without a usable answer."""

    CONNECT = "connect"
    """The connection was refused or could not be made in time: the engine never saw the request."""
    HEAD_TIMEOUT = "head_timeout"
    """Connected and sent; no head or no first data within its limit."""
    LEASE = "lease_timeout"
    """The engine did not show that it has the request within `Call.head_within_s`: a lease is about to end."""
    IDLE_TIMEOUT = "idle_timeout"
    """Data stopped for longer than the limit."""
    LOST = "lost"
    """The connection broke after the request was sent."""
    GARBAGE = "garbage"
    """The bytes were not HTTP, or not what the protocol says."""
    TOO_LARGE = "too_large"
    """A buffered answer went over the limit."""


# ---- commands: what the Exchange wants done -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """Send one HTTP request to an engine. `is_answer`: its response is for the client, a stream's head is reported."""

    leg: Leg
    engine: Engine
    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    is_answer: bool = False
    is_replayable: bool = True
    """Whether the shell may send it again by itself on a fresh connection when a kept-alive one turned out closed."""
    head_within_s: float | None = None
    """The response head must come within this many seconds, else `Broken(LEASE)`: a lease runs meanwhile. Only
    set where the engine sends its head at once (streams); None leaves the shell's own limits."""
    first_event_within_s: float | None = None
    """The same for the first data event: it is the other engine that is waited for."""
    waits_for: str | None = None
    """The engine without which this call will not be answered: when that one is found down, the call is given up."""
    abort: tuple[str, bytes] | None = None
    """Path and body of a POST that ends the request, sent when this call is hung up before its end; None: closing the
    connection does it soon enough."""


@dataclass(frozen=True, slots=True)
class Hangup:
    """Close the call of that leg now: closing the connection is the engines' abort."""

    leg: Leg


@dataclass(frozen=True, slots=True)
class Expect:
    """From now on that leg has this long to show its first event (or its whole answer), else `Broken(LEASE)`.

    For legs that were called long before what they wait for was there. A leg that is over already is left alone.
    """

    leg: Leg
    within_s: float


@dataclass(frozen=True, slots=True)
class Commit:
    """Start relaying the answering call to the client, held-back bytes first."""


@dataclass(frozen=True, slots=True)
class Retry:
    """This attempt is over; decide again, avoiding the engine at fault."""

    engine_id: str
    reason: str
    is_engine_down: bool = False
    """The failure says the engine itself is unreachable, not only this request unlucky."""
    strands: bool = False
    """Nobody tells the prefill engine: what it holds for this hand-off only its connector's lease will free."""
    suspects: tuple[str, ...] = ()
    """Other engines that may be at fault just as well: avoided too, as long as there is another choice."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Give the client this answer (an engine's own 4xx, passed on)."""

    status: int
    body: bytes
    content_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prefill leg is done; the core wants to hear. Counts are the engine's own, None where it did not say."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """Prompt tokens that the prefill engine found in its cache."""


Command: TypeAlias = Call | Hangup | Expect | Commit | Retry | Answer | Prefilled

# ---- events: what happened ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answered:
    """A whole response arrived: of a call that is not the answer, or an answering call that was not a 200 stream."""

    leg: Leg
    status: int
    body: bytes
    content_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class HeadEvent:
    """An SSE event with data of a 200 stream on the answering call, before Commit; `data` is the text after `data:`.

    The first one is always reported. While `receive` returns no command, hold the bytes back and report the next.
    """

    leg: Leg
    data: bytes


@dataclass(frozen=True, slots=True)
class Broken:
    """A call ended without a usable answer, before Commit."""

    leg: Leg
    cause: Cause
    detail: str = ""


Happening: TypeAlias = Answered | HeadEvent | Broken


class Exchange(Protocol):
    """One attempt at one request on one pair."""

    def start(self) -> list[Command]:
        """The first calls."""
        ...

    def receive(self, happening: Happening) -> list[Command]:
        """What to do now; an empty list means go on. Happenings on legs already hung up are ignored."""
        ...


@dataclass(frozen=True, slots=True)
class Payload:
    """The client's request, parsed once and stripped of routing-internal fields."""

    request_id: str
    """Ours: sent to every engine of the exchange."""
    path: str
    body: dict[str, object]
    is_stream: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    """End-to-end headers to pass on (authorization, trace context)."""
    model: str | None = None
    """None only on routes whose engines fill it in themselves."""
    body_bytes: int = 0
    """Length of the body as the client sent it."""
    prompt_chars: int = 0
    """Characters of the prompt's text, an upper bound on routes that are passed through; 0 for token ids."""
    prompt_tokens: int | None = None
    """Exact count when the client sent token ids, else None."""
    max_output_tokens: int | None = None
    token_ids: NDArray[np.int32] | None = field(default=None, compare=False)
    """The prompt's ids, shape (prompt tokens,), once they are known for certain: engines are spared the work."""
    can_hand_off: bool = False
    """Whether one prefill's KV can serve the whole request: one prompt, one choice, no logprobs of the prompt."""
    encoded: dict[str, tuple[object, msgspec.Raw]] = field(default_factory=dict, compare=False, repr=False)
    """A memo, not a fact: long values of `body` and their JSON, by name, for the legs that follow the first."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine says of itself; `None` means it did not say."""

    report: Report | None = None
    models: tuple[str, ...] | None = None
    lora_names: tuple[str, ...] = ()
    block_tokens: int | None = None
    kv_capacity_tokens: int | None = None
    max_model_tokens: int | None = None
    transfer_ids: tuple[str, ...] | None = None
    """What its connector calls it, by data-parallel rank."""
    connector_families: tuple[str, ...] = ()
    """The connectors that its report shows it was started with, in the adapter's words."""
    role: Role | None = None
    """What it was started to do."""
    can_serve_alone: bool | None = None
    details: Mapping[str, int | str] = field(default_factory=dict)
    """For `Engine.details`."""


class Adapter(Protocol):
    """What one kind of engine speaks."""

    @property
    def can_continue(self) -> bool:
        """Whether an engine can go on with a text that another began (`adapters/continuation.py` asks in its words)."""
        ...

    @property
    def health_path(self) -> str:
        """GET it: 200 means the engine serves."""
        ...

    @property
    def report_path(self) -> str:
        """GET it: the body is for `parse_report`."""
        ...

    @property
    def models_path(self) -> str:
        """GET it: the body is for `parse_models`."""
        ...

    @property
    def facts_path(self) -> str | None:
        """GET it when the engine came up: the body is for `parse_facts`. None: there is no such page."""
        ...

    @property
    def kv_sources_path(self) -> str:
        """GET it: the body is for `parse_kv_sources`."""
        ...

    @property
    def tokenize_path(self) -> str:
        """POST a body of adapters/token_ids.py there: the answer holds token ids."""
        ...

    def open(self, payload: Payload, prefill: Engine, decode: Engine) -> Exchange:
        """The exchange for one attempt on this pair; one engine twice means a single leg."""
        ...

    def connector_name(self, engine: Engine) -> str:
        """Our name of the engine's connector: two engines hand KV on when theirs are the same. Raises ConfigError."""
        ...

    def can_prefill(self, engine: Engine) -> bool:
        """Whether it computes a prompt that nobody handed on to it: a decode engine may not. Raises ConfigError."""
        ...

    def hold_s(self, engine: Engine) -> float:
        """Seconds for which a prefill engine keeps blocks that nobody fetches, at the engine's defaults."""
        ...

    def transfer_url(self, engine: Engine) -> str | None:
        """GET it before the engine can be a candidate: the body is for `parse_transfer`. None: nothing is asked."""
        ...

    def parse_transfer(self, body: bytes) -> Facts:
        """What a hand-off must know of a prefill engine. Raises MalformedEngineData."""
        ...

    def contradiction(self, engine: Engine, facts: Facts) -> str | None:
        """Why what the engine tells shows that its settings are wrong; None when nothing does."""
        ...

    def parse_report(self, body: bytes) -> Facts:
        """Load and cache facts from the report body. Raises MalformedEngineData."""
        ...

    def parse_facts(self, body: bytes) -> Facts:
        """How the engine was started, from `facts_path`. Raises MalformedEngineData."""
        ...

    def parse_kv_sources(self, body: bytes, *, engine_id: str, host: str) -> tuple[KvEventSource, ...]:
        """Where the engine publishes its KV events, by rank, from `kv_sources_path`; `host` replaces wildcards.

        Raises MalformedEngineData.
        """
        ...

    def parse_models(self, body: bytes) -> Facts:
        """Model names and limits from the model list. Raises MalformedEngineData."""
        ...
