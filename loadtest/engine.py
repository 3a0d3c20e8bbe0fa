"""An engine as a pure model: FCFS queue, paged KV memory with a prefix cache, continuous batching, KV hand-off.

Nothing here knows a clock or a socket. The simulator steps it in virtual time; `loadtest/fake_engine.py` serves the
same object over HTTP in real time. One scheduler does all three roles, as in vLLM: a step gives every decoding request
one token and fills the rest of its token budget with prompt chunks, first come first served. A prefill engine is one
whose requests end after a token and hold their KV; a decode engine one whose requests bring their KV along.

    engine.submit(request, now=t)
    while (at := engine.next_step_at()) is not None:
        for outcome in engine.step(now=at): ...

While the batch does not change, many decode steps are advanced as one run whose step times grow linearly with the KV
tokens (exact when `StepTimes.decode_s` is affine in them). A submit, an abort or an arriving hand-off cuts the run at
the step under way. Engines on one fabric touch one another: after any call, ask each for its next step again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from gateway.core.errors import BadRequest
from loadtest.engine_types import (
    Counters,
    Crashed,
    EngineLoad,
    EngineRequest,
    EngineSettings,
    Finished,
    FinishReason,
    HeldKv,
    LeaseExpired,
    LoadFailure,
    Outcome,
    Preempted,
    PrefillFinished,
    RemoteKv,
    Tokens,
    TransferFailed,
)
from loadtest.fabric import Fabric
from loadtest.fetches import Fetches
from loadtest.holds import Holds
from loadtest.kv_cache import KvCache, KvEvent
from loadtest.kv_content import BlockContent
from loadtest.sequence import Run, Sequence
from loadtest.step_times import StepTimes, mixed_step_s


class Engine:
    """One emulated engine. `now` is any clock's seconds, the same for all engines of a fabric, never going back."""

    def __init__(self, id: str, settings: EngineSettings, times: StepTimes, fabric: Fabric | None = None) -> None:
        self.id = id
        self.settings = settings
        self.counters = Counters()
        self._times = times
        self._fetches = Fetches(id, settings, fabric or Fabric(), self.counters)
        self._cache = KvCache(
            block_count=settings.kv_blocks, block_tokens=settings.block_tokens, has_events=settings.has_kv_events
        )
        self._holds = Holds()
        self._waiting: deque[Sequence] = deque()
        self._ready: deque[Sequence] = deque()
        """Fetched sequences: they hold their blocks and wait for a place in the batch."""
        self._to_fetch_count = 0
        """Of `_waiting`, those whose KV is to be read from elsewhere."""
        self._pending: set[str] = set()
        """Of `_waiting`, ids of those whose prefix is on its way."""
        self._running: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._run: Run | None = None
        self._wake_at: float | None = None
        self._outbox: list[Outcome] = []
        self.is_crashed = False

    # ---- what the world does to it -----------------------------------------------------------------------------------

    def submit(self, request: EngineRequest, *, now: float) -> None:
        """Queues a request. Raises BadRequest when it can never fit or its id is in use."""
        if request.id in self._by_id:
            raise BadRequest(f"request id {request.id} is in use")
        if request.prompt_tokens < 1 or request.max_tokens < 1:
            raise BadRequest("a request has at least one prompt token and one output token")
        if request.prompt_tokens + request.max_tokens > self.settings.max_model_tokens:
            raise BadRequest(f"request {request.id} is longer than {self.settings.max_model_tokens} tokens")
        sequence = Sequence.of(request, self.settings, now=now)
        if not self._waiting:
            self._interrupt(now)
        self._by_id[request.id] = sequence
        self._waiting.append(sequence)
        if request.is_prefix_pending:
            self._pending.add(request.id)
        if request.remote is not None:
            self._to_fetch_count += 1
            self._fetches.expect(request.remote, now=now)

    def abort(self, request_id: str, *, now: float) -> bool:
        """Ends a request early; its memory is free at the next step. False when it is unknown or over."""
        sequence = self._by_id.get(request_id)
        if sequence is None or sequence.is_aborted:
            return False
        sequence.is_aborted = True
        self._interrupt(now)
        if sequence not in self._running:
            self._drop_waiting(sequence, now)
        return True

    def prefix_arrived(self, request_id: str, keys: Seq[int], *, now: float) -> int:
        """Takes a prefix that this request waited for into the prefix cache; how many blocks of it fit."""
        self._pending.discard(request_id)
        self._interrupt(now)
        return self._cache.adopt(keys)

    def load_blocks(self, keys: Seq[int], contents: Seq[BlockContent]) -> None:
        """Takes blocks that were computed elsewhere into the prefix cache."""
        cached_count = self._cache.match_count(keys)
        loaded_count = self._cache.adopt(keys, contents) - cached_count
        self.counters.external_hit_tokens += loaded_count * self.settings.block_tokens

    def cached_blocks(self, keys: Seq[int]) -> dict[int, BlockContent]:
        """What the prefix cache holds of these keys."""
        return self._cache.cached(keys)

    @property
    def held_block_count(self) -> int:
        """Blocks kept for readers of finished prefills."""
        return self._holds.block_count

    def holds(self, request_id: str) -> bool:
        """Whether the blocks of that finished prefill are still kept for a reader."""
        return request_id in self._holds

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix; False (and nothing done) while any block is in use."""
        return self._cache.clear()

    def stall(self, duration_s: float) -> None:
        """The engine stood still for that long: the step under way ends that much later."""
        if self._run is not None:
            self._run.started_at += duration_s

    # ---- time --------------------------------------------------------------------------------------------------------

    def next_step_at(self) -> float | None:
        """When `step` has something to do; None when nothing will happen by itself. May lie in the past."""
        if self.is_crashed:
            return None
        at = min(self._holds.next_check_at, self._fetches.next_at)
        if self._run is not None:
            at = min(at, self._run.ends_at)
        if self._wake_at is not None:
            at = min(at, self._wake_at)
        return None if at == math.inf else at

    def step(self, *, now: float) -> list[Outcome]:
        """Does what is due by `now`, one run of steps at most, and begins the next; what happened, oldest first."""
        if self.is_crashed:
            return []
        out, self._outbox = self._outbox, []
        self._expire_leases(now, out)
        self._fetches.send_heartbeats(self._waiting, now=now)
        self._land_transfers(now, out)
        at = now
        if self._run is not None and self._run.ends_at <= now:
            at = self._run.ends_at
            self._complete(self._run, out)
            self._run = None
        if self._run is None:
            self._wake_at = None
            self._plan(at, out)
        return out

    # ---- what it says of itself --------------------------------------------------------------------------------------

    def load(self) -> EngineLoad:
        """What the engine is busy with."""
        to_fetch = self._to_fetch_count
        fetching_count = self._fetches.active_count
        return EngineLoad(
            running_count=len(self._running),
            waiting_count=len(self._waiting) - to_fetch,
            deferred_count=to_fetch + fetching_count + len(self._ready) + self._fetches.parked_count,
            fetching_count=fetching_count,
            fetched_count=len(self._ready),
            kv_usage_ratio=self._cache.used_count / self._cache.block_count,
            held_count=len(self._holds),
        )

    def take_kv_events(self) -> list[KvEvent]:
        """The prefix cache's changes since the last call; empty unless `has_kv_events`."""
        return self._cache.take_events()

    # ---- the far side of a hand-off (KvSource) -----------------------------------------------------------------------

    def read_blocks(self, block_ids: Seq[int]) -> list[BlockContent]:
        """What these blocks hold now, whoever owns them: nothing stops a late reader."""
        contents = (self._cache.content(block) for block in block_ids)
        return [BlockContent(c.entry, c.exit, c.filled) for c in contents]

    def reader_done(self, request_id: str, *, now: float) -> None:
        """Frees the held blocks; counts a notification for blocks that were not held any more."""
        blocks = self._holds.pop(request_id)
        if blocks is None:
            self.counters.reads_after_release += 1
        else:
            self._free_hold(blocks, now)

    def drop_hold(self, request_id: str, *, now: float) -> None:
        """Frees the held blocks where they still are: their reader will not come."""
        if blocks := self._holds.pop(request_id):
            self._free_hold(blocks, now)

    def heartbeat(self, request_ids: Seq[str], *, now: float) -> None:
        """Extends the leases of these requests that still stand."""
        self._holds.extend(request_ids, expires_at=now + self.settings.lease_extension_s)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _plan(self, at: float, out: list[Outcome]) -> None:
        """Begins the next run: decoding requests, prompt chunks under way, then new ones while budget lasts."""
        had_room = self._make_room(at, out)
        decodes = [s for s in self._running if s.remaining == 1]
        chunks: list[tuple[Sequence, int]] = []
        budget = self.settings.step_tokens - len(decodes)
        for sequence in self._running:
            if sequence.remaining > 1 and budget > 0:
                chunks.append((sequence, min(budget, sequence.remaining)))
                budget -= chunks[-1][1]
        if had_room or not self._running:
            self._admit(budget, at, decodes, chunks, out)
        if (decodes or chunks) and not self.is_crashed:
            # After a preemption nobody was admitted: the next step asks again whether the victim fits.
            steps = self._steps_ahead(decodes) if had_room and not chunks else 1
            self._run = self._price(at, decodes, chunks, steps=steps)

    def _make_room(self, at: float, out: list[Outcome]) -> bool:
        """Preempts the latest requests until the others can take a step; whether nobody had to go."""
        had_room = True
        if len(self._running) <= self._cache.free_count:
            return had_room  # a step takes a block of each at most
        while self._blocks_needed(self._running, 1) > self._cache.free_count:
            victim = self._running.pop()
            self._release(victim)
            victim.computed = victim.published = 0
            victim.preemptions += 1
            self._waiting.appendleft(victim)
            self.counters.preemptions += 1
            out.append(Preempted(victim.request.id, at))
            had_room = False
        return had_room

    def _blocks_needed(self, sequences: Iterable[Sequence], steps: int) -> int:
        """Blocks that decoding for `steps` steps takes beyond those held."""
        size = self._cache.block_tokens
        needed = 0
        for s in sequences:
            if s.remaining == 1:
                needed += max(0, -(-(s.computed + steps) // size) - len(s.blocks))
        return needed

    def _admit(
        self,
        budget: int,
        at: float,
        decodes: list[Sequence],
        chunks: list[tuple[Sequence, int]],
        out: list[Outcome],
    ) -> None:
        reserved = self._blocks_needed(decodes, 1) if self._waiting else 0
        while budget > 0 and len(self._running) < self.settings.batch_limit and not self.is_crashed:
            if self._ready:
                sequence = self._ready.popleft()
            elif self._waiting and self._is_here(self._waiting[0]) and self._allocate(self._waiting[0], reserved, at):
                sequence = self._waiting.popleft()
                if sequence.request.remote is not None and not sequence.is_fetch_over:
                    self._to_fetch_count -= 1
                    self._fetch(sequence, sequence.request.remote, at, out)
                    continue
            else:
                return
            self._running.append(sequence)
            if sequence.remaining == 1:
                decodes.append(sequence)
                budget -= 1
            else:
                chunks.append((sequence, min(budget, sequence.remaining)))
                budget -= chunks[-1][1]

    def _is_here(self, sequence: Sequence) -> bool:
        """Whether it waits for no prefix."""
        return sequence.request.id not in self._pending

    def _allocate(self, sequence: Sequence, reserved: int, at: float) -> bool:
        """Gives the sequence blocks for all its known tokens, cached ones first; False when they do not fit."""
        size, known = self._cache.block_tokens, sequence.known_tokens
        usable = sequence.keys[: (known - 1) // size]
        matched = usable[: self._cache.match_count(usable)]
        new_count = math.ceil(known / size) - len(matched)
        if not self._cache.can_allocate(matched, new_count, reserved_count=reserved):
            return False
        sequence.blocks = self._cache.share(matched) + self._cache.take(new_count)
        sequence.computed = len(matched) * size
        sequence.published = len(matched)
        if sequence.scheduled_at is None:
            sequence.scheduled_at = at
            sequence.cached_tokens = sequence.computed
            self.counters.prefix_query_tokens += known
            self.counters.prefix_hit_tokens += sequence.computed
            self.counters.external_query_tokens += known - sequence.computed
        return True

    def _price(self, at: float, decodes: list[Sequence], chunks: list[tuple[Sequence, int]], *, steps: int) -> Run:
        kv_tokens = sum(s.computed for s in decodes) + len(decodes)
        if chunks:
            sizes = [(count, s.computed) for s, count in chunks]
            return Run(at, chunks, decodes, 1, mixed_step_s(self._times, sizes, len(decodes), kv_tokens))
        first_s = self._times.decode_s(len(decodes), kv_tokens)
        growth_s = 0.0
        if steps > 1:
            last_s = self._times.decode_s(len(decodes), kv_tokens + len(decodes) * (steps - 1))
            growth_s = (last_s - first_s) / (steps - 1)
        return Run(at, chunks, decodes, steps, first_s, growth_s)

    def _steps_ahead(self, decodes: list[Sequence]) -> int:
        """Steps until the first request ends or memory runs out, >= 1; one where a first token is due, to tell it."""
        if any(s.first_token_at is None for s in decodes):
            return 1
        limits = [s.limit for s in decodes]
        if None in limits:
            return 1
        steps = min(limit - s.output for s, limit in zip(decodes, limits, strict=True) if limit is not None)
        if self.settings.max_run_steps is not None:
            steps = min(steps, self.settings.max_run_steps)
        size, free_count = self._cache.block_tokens, self._cache.free_count
        if len(decodes) * (steps // size + 1) <= free_count:
            return steps
        while steps > 1 and self._blocks_needed(decodes, steps) > self._cache.free_count:
            steps //= 2
        return steps

    def _complete(self, run: Run, out: list[Outcome]) -> None:
        """Books a run that is over: KV, tokens, ends."""
        token_at = run.token_at()
        self.counters.steps += run.steps
        self.counters.busy_s += run.ends_at - run.started_at
        told: list[tuple[Sequence, tuple[int, ...]]] = []
        for sequence, count in run.chunks:
            if sequence.is_aborted:
                continue
            sequence.write(self._cache, sequence.computed + count)
            if sequence.remaining == 0:
                told.append((sequence, self._speak(sequence, run, out)))
        told += [(s, self._decode(s, run, out)) for s in run.decodes if not s.is_aborted]
        if told:
            self.counters.generated_tokens += run.steps * len(told)
            ids = tuple(s.request.id for s, _ in told)
            out.append(Tokens(ids, token_at, tuple(said for _, said in told)))
        self._retire([s for s, _ in told], run.ends_at, out)

    def _decode(self, sequence: Sequence, run: Run, out: list[Outcome]) -> tuple[int, ...]:
        blocks = -(-(sequence.computed + run.steps) // self._cache.block_tokens) - len(sequence.blocks)
        if blocks > 0:
            sequence.blocks += self._cache.take(blocks)
        if sequence.is_only_counted:
            sequence.computed += run.steps
            sequence.output += run.steps
            return ()
        sequence.write(self._cache, sequence.known_tokens)
        said = self._speak(sequence, run, out)
        if run.steps > 1:
            said += sequence.speak(self._cache, self.settings, run.steps - 1)
            sequence.write(self._cache, sequence.known_tokens - 1)
        return said

    def _speak(self, sequence: Sequence, run: Run, out: list[Outcome]) -> tuple[int, ...]:
        said = sequence.speak(self._cache, self.settings, 1)
        if sequence.first_token_at is None:
            sequence.first_token_at = run.started_at + run.first_s
            assert sequence.scheduled_at is not None, "it was scheduled before it spoke"
            self._count_prompt(sequence)
            out.append(
                PrefillFinished(
                    sequence.request.id, sequence.first_token_at, sequence.cached_tokens, sequence.scheduled_at
                )
            )
        return said

    def _count_prompt(self, sequence: Sequence) -> None:
        total = sequence.request.prompt_tokens
        self.counters.prompt_tokens += total
        self.counters.fetched_prompt_tokens += sequence.fetched_tokens
        self.counters.computed_prompt_tokens += total - sequence.cached_tokens - sequence.fetched_tokens

    def _retire(self, told: list[Sequence], at: float, out: list[Outcome]) -> None:
        """Ends the sequences that reached their limit or were aborted."""
        for sequence in told:
            if sequence.output == sequence.limit:
                self._finish(sequence, sequence.limit_reason, at, out)
        for sequence in [s for s in self._running if s.is_aborted]:
            self._finish(sequence, FinishReason.ABORT, at, out)
        self._running = [s for s in self._running if s.request.id in self._by_id]

    # ---- ends --------------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, reason: FinishReason, at: float, out: list[Outcome]) -> None:
        request = sequence.request
        del self._by_id[request.id]
        self.counters.finished[reason] += 1
        held = None
        if request.is_kv_held and reason in (FinishReason.STOP, FinishReason.LENGTH):
            held = HeldKv(request.id, tuple(sequence.blocks), sequence.computed, sequence.cached_tokens)
            self._holds.add(request.id, sequence.blocks, expires_at=at + self.settings.lease_s)
        else:
            self._release(sequence)
        out.append(
            Finished(
                request_id=request.id,
                at=at,
                reason=reason,
                output_tokens=sequence.output,
                cached_tokens=sequence.cached_tokens,
                arrived_at=sequence.arrived_at,
                scheduled_at=sequence.scheduled_at,
                first_token_at=sequence.first_token_at,
                preemptions=sequence.preemptions,
                held=held,
            )
        )

    def _release(self, sequence: Sequence) -> None:
        self._cache.release(sequence.blocks)
        sequence.blocks = []

    def _drop_waiting(self, sequence: Sequence, now: float) -> None:
        """Ends an aborted sequence that is not in the batch; frees the far side of its hand-off too."""
        self._pending.discard(sequence.request.id)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            self._to_fetch_count -= sequence.request.remote is not None and not sequence.is_fetch_over
        elif sequence in self._ready:
            self._ready.remove(sequence)
        self._fetches.cancel(sequence, now=now)
        self._finish(sequence, FinishReason.ABORT, now, self._outbox)

    def _expire_leases(self, now: float, out: list[Outcome]) -> None:
        if self._holds.next_check_at > now:
            return
        for request_id, blocks in self._holds.pop_expired(now=now):
            self.counters.expired_leases += 1
            self._free_hold(blocks, now)
            out.append(LeaseExpired(request_id, now))

    def _free_hold(self, blocks: list[int], now: float) -> None:
        self._cache.release(blocks)
        if self._waiting:
            self._interrupt(now)

    def _interrupt(self, now: float) -> None:
        """Something the next plan must see: end the run with the step under way, or plan at once."""
        if self._run is None:
            self._wake_at = now if self._wake_at is None else min(now, self._wake_at)
        else:
            self._run.cut(now)

    # ---- hand-offs received ------------------------------------------------------------------------------------------

    def _fetch(self, sequence: Sequence, remote: RemoteKv, at: float, out: list[Outcome]) -> None:
        """Begins to read the prompt's KV; the sequence left the queue and holds the blocks to be filled."""
        if not remote.block_ids:
            self._crash(at, "do_remote_prefill without remote_block_ids", out)
        elif (reason := self._fetches.start(sequence, remote, at=at)) is not None:
            self._fail_fetch(sequence, at, reason, out)

    def _land_transfers(self, now: float, out: list[Outcome]) -> None:
        for sequence, source in self._fetches.take_done(now=now):
            self._interrupt(now)
            if source is None and sequence.request.remote is not None and sequence.request.remote.is_waited_for:
                self._fetches.park(sequence)
            elif source is None:
                self._fail_fetch(sequence, now, "the engine went away during the transfer", out)
            else:
                out.append(self._fetches.land(sequence, source, self._cache, now=now))
                sequence.is_fetch_over = True
                self._ready.append(sequence)

    def _fail_fetch(self, sequence: Sequence, at: float, reason: str, out: list[Outcome]) -> None:
        self.counters.failed_transfers += 1
        out.append(TransferFailed(sequence.request.id, at, reason))
        sequence.is_fetch_over = True
        if self.settings.load_failure is LoadFailure.FAIL:
            self._finish(sequence, FinishReason.ERROR, at, out)
        else:
            self._ready.append(sequence)

    def _crash(self, at: float, reason: str, out: list[Outcome]) -> None:
        self.is_crashed = True
        self._run = None
        out.append(Crashed(at, reason))
