"""The near side of a KV hand-off: what a decode engine reads from others, and the heartbeats that keep it readable.

Source: vllm distributed/kv_transfer/kv_connector/v1/nixl/{base_scheduler,pull_scheduler}.py, version 0.32.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeGuard

from loadtest.engine_types import Counters, EngineSettings, RemoteKv, TransferFinished
from loadtest.fabric import Fabric, KvSource
from loadtest.kv_cache import KvCache
from loadtest.sequence import Sequence


class Fetches:
    """The hand-offs one engine receives. The engine allocates blocks before and queues the sequence after."""

    def __init__(self, engine_id: str, settings: EngineSettings, fabric: Fabric, counters: Counters) -> None:
        self._engine_id = engine_id
        self._settings = settings
        self._fabric = fabric
        self._counters = counters
        self._active: dict[str, Sequence] = {}
        self._parked: dict[str, Sequence] = {}
        """Requests whose parameters lack a field: vLLM neither reads nor fails them, they wait for an abort."""
        self._heartbeat_at = math.inf

    @property
    def active_count(self) -> int:
        """Transfers under way."""
        return len(self._active)

    @property
    def parked_count(self) -> int:
        """Requests that will never be read."""
        return len(self._parked)

    @property
    def next_at(self) -> float:
        """When a transfer ends or a heartbeat is due; `inf` when neither."""
        done_at = self._fabric.next_done_at(self._engine_id) if self._active else None
        return self._heartbeat_at if done_at is None else min(done_at, self._heartbeat_at)

    def expect(self, remote: RemoteKv | None, *, now: float) -> None:
        """A request arrived: if it brings KV from elsewhere, its heartbeats begin."""
        if _can_heartbeat(remote):
            self._heartbeat_at = min(self._heartbeat_at, now)

    def start(self, sequence: Sequence, remote: RemoteKv, *, at: float) -> str | None:
        """Begins to fill the sequence's unmatched blocks; a sentence when that is known to be impossible."""
        source = self._find(remote)
        if not remote.is_complete or (source is None and remote.is_waited_for):
            self.park(sequence)
            return None
        if source is None:
            return "no such engine at the side-channel address"
        if len(remote.block_ids) < len(sequence.blocks) - sequence.published:
            return "fewer remote blocks than local ones"
        sequence.fetch_started_at = at
        self._active[sequence.request.id] = sequence
        self._fabric.start(source.id, self._engine_id, sequence.request.id, self._size_bytes(sequence), now=at)
        return None

    def park(self, sequence: Sequence) -> None:
        """Lets it wait for what will not come, until it is aborted."""
        self._parked[sequence.request.id] = sequence

    def _size_bytes(self, sequence: Sequence) -> int:
        """Whole blocks are moved, the last one too."""
        missing = len(sequence.blocks) - sequence.published
        return missing * self._settings.block_tokens * self._settings.kv_token_bytes

    def take_done(self, *, now: float) -> list[tuple[Sequence, KvSource | None]]:
        """Sequences whose transfer has ended by `now`; None in place of a source that is gone."""
        if not self._active:
            return []
        done = [self._active.pop(key) for key in self._fabric.take_done(self._engine_id, now=now)]
        return [(sequence, self._find(sequence.request.remote)) for sequence in done]

    def land(self, sequence: Sequence, source: KvSource, cache: KvCache, *, now: float) -> TransferFinished:
        """Copies the far blocks' memory as it is now and tells the far side that it may go."""
        remote, request = sequence.request.remote, sequence.request
        assert remote is not None, "only requests with remote KV are fetched"
        assert sequence.fetch_started_at is not None, "a transfer that ended was started"
        if sequence.tokens:
            missing = sequence.blocks[sequence.published :]
            far = remote.block_ids[len(remote.block_ids) - len(missing) :]
            for block, content in zip(missing, source.read_blocks(far), strict=True):
                cache.put_content(block, content)
        source.reader_done(remote.request_id or "", now=now)
        tokens, size_bytes = request.prompt_tokens - sequence.computed, self._size_bytes(sequence)
        self._counters.external_hit_tokens += tokens
        self._counters.transferred_bytes += size_bytes
        sequence.fetched_tokens = tokens
        sequence.computed = request.prompt_tokens - 1
        sequence.publish(cache)
        return TransferFinished(request.id, now, sequence.fetch_started_at, tokens, size_bytes)

    def cancel(self, sequence: Sequence, *, now: float) -> None:
        """An aborted request wants no KV any more: stops the transfer and lets the far side free its blocks."""
        request = sequence.request
        if self._active.pop(request.id, None):
            self._fabric.cancel(self._engine_id, request.id, now=now)
        self._parked.pop(request.id, None)
        if not sequence.is_fetch_over and (source := self._find(request.remote)):
            assert request.remote is not None, "it was found"
            source.reader_done(request.remote.request_id or "", now=now)

    def send_heartbeats(self, waiting: Iterable[Sequence], *, now: float) -> None:
        """Tells the far sides, when it is time, which prefills are still wanted: from arrival until the KV is here."""
        if now < self._heartbeat_at:
            return
        self._heartbeat_at = math.inf
        for sequence in (*waiting, *self._active.values()):
            remote = sequence.request.remote
            if _can_heartbeat(remote) and not sequence.is_fetch_over:
                self._heartbeat_at = now + self._settings.heartbeat_s
                if source := self._find(remote):
                    source.heartbeat([remote.request_id or ""], now=now)

    def _find(self, remote: RemoteKv | None) -> KvSource | None:
        if remote is None or not remote.is_complete:
            return None
        return self._fabric.find(remote.engine_id or "", remote.host or "", remote.port or 0)


def _can_heartbeat(remote: RemoteKv | None) -> TypeGuard[RemoteKv]:
    return remote is not None and remote.is_complete and remote.is_heartbeat_possible
