"""An asyncio loop whose clock jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable
from typing import Any


class _Jump(selectors.SelectSelector):
    """Never waits for files: there are none but the loop's own."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: Callable[[], None] = lambda: None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing will ever happen in this loop"
        if timeout > 0:
            self.waited()
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at 0; only timers move its clock."""

    def __init__(self) -> None:
        selector = _Jump()
        super().__init__(selector)
        self._at = 0.0
        selector.waited = self._jump

    def time(self) -> float:
        return self._at

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, **more: Any) -> asyncio.TimerHandle:
        """Never early, not even by the rounding of `now + (at - now)`: a timer must find its instant reached."""
        at = self._at + delay
        return self.call_at(math.nextafter(at, math.inf) if delay > 0 else at, callback, *args, **more)

    def _jump(self) -> None:
        timers = self._scheduled  # type: ignore[attr-defined]
        self._at = max(self._at, timers[0].when())
