"""KV blocks kept for one reader after a prefill: a lease that the reader ends, heartbeats extend and time runs out.

Source: vllm distributed/kv_transfer/kv_connector/v1/nixl/{pull_scheduler,pull_worker,base_worker}.py, version 0.32.0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Hold:
    blocks: list[int]
    expires_at: float


class Holds:
    """The leases of one prefill engine, by request id."""

    def __init__(self) -> None:
        self._holds: dict[str, _Hold] = {}
        self._check_at = math.inf

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._holds

    def __len__(self) -> int:
        return len(self._holds)

    @property
    def block_count(self) -> int:
        """Blocks under all leases."""
        return sum(len(hold.blocks) for hold in self._holds.values())

    @property
    def next_check_at(self) -> float:
        """No lease ends before this instant; `inf` when there is none."""
        return self._check_at if self._holds else math.inf

    def add(self, request_id: str, blocks: list[int], *, expires_at: float) -> None:
        """Holds these blocks until then."""
        self._holds[request_id] = _Hold(blocks, expires_at)
        self._check_at = min(self._check_at, expires_at)

    def extend(self, request_ids: Sequence[str], *, expires_at: float) -> None:
        """A heartbeat: these leases, where they still stand, last at least until then."""
        for request_id in request_ids:
            if hold := self._holds.get(request_id):
                hold.expires_at = max(hold.expires_at, expires_at)

    def pop(self, request_id: str) -> list[int] | None:
        """Ends a lease; its blocks, or None when it had ended before."""
        hold = self._holds.pop(request_id, None)
        return None if hold is None else hold.blocks

    def pop_expired(self, *, now: float) -> list[tuple[str, list[int]]]:
        """Ends every lease that is over by `now`; the request ids and their blocks."""
        expired = [request_id for request_id, hold in self._holds.items() if hold.expires_at <= now]
        over = [(request_id, self._holds.pop(request_id).blocks) for request_id in expired]
        self._check_at = min((hold.expires_at for hold in self._holds.values()), default=math.inf)
        return over
