"""How many tokens of a prompt each engine has cached, and how well that is known.

There are two ways to know, and a third for when there is none:

    EVENTS     the engine announces its blocks, and nothing is missing in the stream
    OBSERVED   it announces nothing (or its stream is dead): a model of its cache, fed with what we send it
    UNKNOWN    nothing is known of its block size or capacity, or both of the above turned out wrong

Each way has rows of its own in the index, so that a stream that comes back finds its rows as it left them, and guesses
never mix with announcements. For every request the engine's own count of cached tokens is compared with what its row
said; when most comparisons fail, the engine falls back by one step, until it restarts or its stream is connected anew.
Every change of an engine's source is kept for the shell to announce: nothing degrades in silence.

A prompt on its way to an engine is about to be cached there, for its prefill runs before that of any request sent
later: its blocks are written down when it is sent, not when they are announced, and taken out again when the attempt
fails before its prefill is done. So a crowd with one new system prompt follows it to one engine. (An announcement that
came before such a failure goes with it: less is better than wrong.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from gateway.core.agreement import Agreement
from gateway.core.events import BlocksCleared, BlocksRemoved, BlocksStored, FeedState, KvFeed, Tier
from gateway.core.index import PrefixIndex
from gateway.core.observed import ObservedCache
from gateway.core.types import BlockHashes, Engine, Request


class PrefixSource(StrEnum):
    """How an engine's cached prefixes are known."""

    EVENTS = "events"
    OBSERVED = "observed"
    UNKNOWN = "unknown"


_OBSERVED = "/observed"
"""Ends the name of the index row of an engine's model."""
SOURCES = tuple(PrefixSource)
"""Best first."""


@dataclass(frozen=True, slots=True)
class SourceChange:
    """An engine's source changed, and why."""

    engine_id: str
    source: PrefixSource
    reason: str
    is_worse: bool
    """Whether less is known than before."""


@dataclass(slots=True)
class _Sent:
    """A prompt sent to an engine."""

    engine_id: str
    said_tokens: int
    """How much of it was believed to be cached."""
    row: str | None = None
    """The row into which it was written ahead of its announcement, and those of its blocks that were new there."""
    new_blocks: BlockHashes | None = None


@dataclass(slots=True)
class _Known:
    """What is known of one engine's cache."""

    engine: Engine
    feed: FeedState = FeedState.NONE
    rows: tuple[str, ...] = ()
    """Index rows that the engine's events fill, one per data-parallel rank."""
    events: Agreement = field(default_factory=Agreement)
    observed: Agreement = field(default_factory=Agreement)
    cache: ObservedCache | None = None
    source: PrefixSource = PrefixSource.UNKNOWN


class Prefixes:
    """The index, its sources per engine, and the check on them."""

    def __init__(self, *, max_blocks: int, max_age_s: float) -> None:
        """`max_blocks` >= 1 bounds the index; a guess that is unused for `max_age_s` > 0 is dropped."""
        self.index = PrefixIndex(max_blocks=max_blocks)
        self._max_age_s = max_age_s
        self._engines: dict[str, _Known] = {}
        self._sent: dict[str, _Sent] = {}
        self._changes: list[SourceChange] = []

    # ---- what is known ----------------------------------------------------------------------------------------------

    def cached_tokens(self, request: Request, engines: Sequence[Engine]) -> NDArray[np.int64]:
        """Prompt tokens that each engine has cached and can use, shape (engines,), 0 <= tokens < prompt tokens.

        Whole blocks, and never the whole prompt: an engine computes at least the last token, which gives the logits.
        Source: vLLM 0.32, v1/core/kv_cache_manager.py get_computed_blocks.
        """
        cached = np.zeros(len(engines), dtype=np.int64)
        if not request.block_hashes:
            return cached
        match = self.index.match(request.block_hashes)
        row_of = {row: number for number, row in enumerate(match.engine_ids)}
        tokens = match.cached_tokens
        for number, engine in enumerate(engines):
            known = self._engines[engine.id]
            if known.source is PrefixSource.UNKNOWN or engine.block_tokens not in request.block_hashes:
                continue
            rows = known.rows if known.source is PrefixSource.EVENTS else (_observed_row(engine.id),)
            # Which rank of an engine takes a request is the engine's choice: only what all of them hold is sure.
            held = min((int(tokens[row_of[row]]) for row in rows if row in row_of), default=0)
            cached[number] = self._usable(request, engine, held)
        return cached

    def source(self, engine_id: str) -> PrefixSource:
        """How that engine's prefixes are known."""
        known = self._engines.get(engine_id)
        return PrefixSource.UNKNOWN if known is None else known.source

    def agreement(self, engine_id: str) -> Agreement | None:
        """The check of that engine's present source; None without one."""
        known = self._engines.get(engine_id)
        if known is None or known.source is PrefixSource.UNKNOWN:
            return None
        return known.events if known.source is PrefixSource.EVENTS else known.observed

    def take_changes(self) -> list[SourceChange]:
        """The changes of source since the last call."""
        changes, self._changes = self._changes, []
        return changes

    # ---- engines ----------------------------------------------------------------------------------------------------

    def found(self, engine: Engine) -> None:
        """An engine exists, or its facts changed."""
        known = self._engines.get(engine.id)
        if known is None:
            known = self._engines[engine.id] = _Known(engine)
        is_same_cache = known.cache is not None and _capacity_blocks(known.engine) == _capacity_blocks(engine)
        known.engine = engine
        if not is_same_cache:
            self._observe_anew(known)
        self._choose_source(known, "its block size and capacity are known")

    def lost(self, engine_id: str) -> None:
        """An engine left for good."""
        known = self._engines.pop(engine_id, None)
        if known is not None:
            for row in (*known.rows, _observed_row(engine_id)):
                self.index.remove_engine(row)

    def restarted(self, engine_id: str) -> None:
        """The engine was down: what was guessed of its cache is void. Announced blocks are their stream's business."""
        known = self._engines.get(engine_id)
        if known is not None:
            known.observed.forget()
            self._observe_anew(known)
            self._choose_source(known, "it was down")

    def feed_changed(self, engine_id: str, state: FeedState, rows: tuple[str, ...]) -> None:
        """The engine's event stream came, went, or is being repaired; `rows` are the ids in its block events."""
        known = self._engines.get(engine_id)
        if known is None:
            return
        for row in set(known.rows) - set(rows):
            self.index.remove_engine(row)
        for row in rows:
            self.index.add_engine(row)
        known.feed, known.rows = state, rows
        known.events.forget()
        self._choose_source(known, f"its event stream is {state}")

    def announced(self, event: BlocksStored | BlocksRemoved | BlocksCleared) -> None:
        """An engine's event about its blocks. Events for rows that no feed owns are ignored."""
        self.index.apply(event)

    # ---- snapshots --------------------------------------------------------------------------------------------------

    def rows(self, engine_id: str) -> tuple[str, ...]:
        """The index rows that the engine's events fill."""
        known = self._engines.get(engine_id)
        return () if known is None else known.rows

    def feeds(self) -> list[KvFeed]:
        """How the event stream of each engine stands."""
        return [KvFeed(name, known.feed, known.rows) for name, known in sorted(self._engines.items())]

    def restore(self, row: str, tier: Tier, hashes: BlockHashes, *, now: float) -> None:
        """Takes over what another gateway knew to be in that row. Ignored for rows that are not known here."""
        known = self._engines.get(row.removesuffix(_OBSERVED))
        if row.endswith(_OBSERVED) and known is not None and known.cache is not None:
            name = f"restored {row}"
            self._apply(known.cache.dispatched(name, hashes, now=now))
            self._apply(known.cache.finished(name, now=now))
        elif not row.endswith(_OBSERVED):
            self.index.store(row, hashes, tier)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def dispatched(self, request: Request, engine_id: str, cached_tokens: int, *, now: float) -> None:
        """A request was sent to prefill on that engine, which was believed to have `cached_tokens` of it."""
        known = self._engines.get(engine_id)
        hashes = request.block_hashes.get(known.engine.block_tokens or 0) if known else None
        if known is None or hashes is None or known.source is PrefixSource.UNKNOWN:
            return
        sent = self._sent[request.id] = _Sent(engine_id, cached_tokens)
        if known.source is PrefixSource.EVENTS:
            if len(known.rows) == 1:  # of several ranks nobody knows which one takes it
                sent.row = known.rows[0]
                sent.new_blocks = hashes[cached_tokens // (known.engine.block_tokens or 1) :]
                self.index.store(sent.row, sent.new_blocks)
        elif known.cache is not None:
            self._apply(known.cache.expire(now=now))
            self._apply(known.cache.dispatched(request.id, hashes, now=now))

    def sent_elsewhere(self, request: Request, engine_id: str, first_block: int, *, now: float) -> None:
        """Another gateway sent a request to prefill there; its block hashes are those from `first_block` on."""
        known = self._engines.get(engine_id)
        hashes = request.block_hashes.get(known.engine.block_tokens or 0) if known else None
        if known is None or hashes is None or known.source is PrefixSource.UNKNOWN:
            return
        sent = self._sent[request.id] = _Sent(engine_id, 0)
        if known.source is PrefixSource.EVENTS and len(known.rows) == 1:
            sent.row, sent.new_blocks = known.rows[0], hashes
            self.index.store(sent.row, hashes)
        elif known.source is PrefixSource.OBSERVED and known.cache is not None:
            self._apply(known.cache.expire(now=now))
            self._apply(known.cache.dispatched(request.id, hashes, now=now))

    def prefilled(self, request_id: str, cached_tokens: int | None, *, now: float) -> None:
        """Its prefill is done; the engine said that it had `cached_tokens` of it, if it said."""
        sent = self._sent.pop(request_id, None)
        known = self._engines.get(sent.engine_id) if sent else None
        if sent is None or known is None:
            return
        if known.cache is not None:
            self._apply(known.cache.finished(request_id, now=now))
        if cached_tokens is not None:
            self._check(known, sent, cached_tokens)

    def failed(self, request_id: str) -> None:
        """Its attempt ended before its prefill did: what it alone vouched for is not there."""
        sent = self._sent.pop(request_id, None)
        known = self._engines.get(sent.engine_id) if sent else None
        if sent is None or known is None:
            return
        if known.cache is not None:
            self._apply(known.cache.failed(request_id))
        if sent.row is not None and sent.new_blocks is not None:
            self.index.remove(sent.row, sent.new_blocks)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _usable(self, request: Request, engine: Engine, tokens: int) -> int:
        block_tokens = engine.block_tokens or 1
        return min(tokens, (request.prompt_tokens - 1) // block_tokens * block_tokens)

    def _check(self, known: _Known, sent: _Sent, reported_tokens: int) -> None:
        agreement = self.agreement(known.engine.id)
        if agreement is None:
            return
        agreement.check(
            predicted_tokens=sent.said_tokens,
            reported_tokens=reported_tokens,
            block_tokens=known.engine.block_tokens or 1,
            # A model of an engine's cache starts empty beside a warm engine, and sees nothing that others send there.
            may_know_less=known.source is PrefixSource.OBSERVED,
        )
        if agreement.is_wrong:
            self._choose_source(known, "what it reports as cached is not what was believed")

    def _choose_source(self, known: _Known, reason: str) -> None:
        if known.feed in (FeedState.LIVE, FeedState.REPAIRING) and not known.events.is_wrong:
            source = PrefixSource.EVENTS
        elif known.cache is not None and not known.observed.is_wrong:
            source = PrefixSource.OBSERVED
        else:
            source = PrefixSource.UNKNOWN
        if source is known.source:
            return
        is_worse = SOURCES.index(source) > SOURCES.index(known.source)
        known.source = source
        self._changes.append(SourceChange(known.engine.id, source, reason, is_worse))

    def _observe_anew(self, known: _Known) -> None:
        """Starts the model of the engine's cache from nothing, if its size is known."""
        row = _observed_row(known.engine.id)
        self.index.remove_engine(row)
        capacity_blocks = _capacity_blocks(known.engine)
        known.cache = None
        if capacity_blocks is not None and known.engine.block_tokens is not None:
            self.index.add_engine(row)
            known.cache = ObservedCache(
                row, known.engine.block_tokens, capacity_blocks=capacity_blocks, max_age_s=self._max_age_s
            )

    def _apply(self, events: Sequence[BlocksStored | BlocksRemoved]) -> None:
        for event in events:
            self.index.apply(event)


def _observed_row(engine_id: str) -> str:
    return engine_id + _OBSERVED


def _capacity_blocks(engine: Engine) -> int | None:
    """How many blocks the engine's cache holds; None when it did not say."""
    if not engine.block_tokens or not engine.kv_capacity_tokens:
        return None
    return max(1, engine.kv_capacity_tokens // engine.block_tokens)
