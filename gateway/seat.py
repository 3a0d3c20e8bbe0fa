"""A worker's place among its siblings: what the supervisor gives it on its way, in the environment."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NUMBER, SOCKETS, HUB = "SLUICE_WORKER", "SLUICE_WORKER_SOCKETS", "SLUICE_WORKER_HUB"


@dataclass(frozen=True, slots=True)
class Seat:
    """Which worker this is, the sockets on which it accepts clients, and where the hub is."""

    number: int
    """Counted from 1."""
    socket_numbers: tuple[int, ...]
    """File descriptors of listening sockets; the supervisor keeps them open whatever becomes of the worker."""
    hub: Path

    def environment(self) -> dict[str, str]:
        """The seat as environment variables."""
        return {
            NUMBER: str(self.number),
            SOCKETS: ",".join(map(str, self.socket_numbers)),
            HUB: str(self.hub),
        }

    def sockets(self) -> list[socket.socket]:
        """The sockets themselves."""
        return [socket.socket(fileno=number) for number in self.socket_numbers]


def seat_of(environ: Mapping[str, str]) -> Seat | None:
    """The seat that a supervisor gave this process; None: it is nobody's worker."""
    if NUMBER not in environ:
        return None
    numbers = tuple(int(number) for number in environ[SOCKETS].split(","))
    return Seat(int(environ[NUMBER]), numbers, Path(environ[HUB]))
