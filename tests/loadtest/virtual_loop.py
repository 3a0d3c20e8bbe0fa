"""An event loop whose clock stands still while anything can run, and jumps to the next timer when nothing can.

Client and server of one process talk over real loopback sockets in it, and only what waits on purpose takes time: what
is measured there is exact, on a busy machine too, and minutes pass in seconds.
"""

from __future__ import annotations

import asyncio
import selectors

LOOKS = 3
"""How often to look for bytes before the clock jumps. Never sleeping: a busy machine gives the processor back late."""


class JumpingSelector(selectors.DefaultSelector):
    """Does not wait for bytes; when there are none, the time that it was to wait has passed."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        for _ in range(LOOKS):
            if events := super().select(0):
                return events
        self.now_s += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop; starts at 0."""

    def __init__(self) -> None:
        self._clock = JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s
