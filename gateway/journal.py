"""One JSON line per event and decision: the program's memory, the bug report, and the input of replay.

Lines are `{"at": seconds, "do": "apply" | "decide" | "wake", ...}` with values under their type's name, in the order in
which the scheduler saw them. Feeding them back to a scheduler of the same settings gives the same decisions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from gateway.core.events import Event
from gateway.core.types import Decision, Request

FLUSH_BYTES = 65_536


class Journal:
    """Writes nowhere. The base of the file journal, and what runs when no journal is configured."""

    def event(self, event: Event, now: float) -> None:
        """An event was applied."""

    def decided(self, request: Request, decision: Decision, now: float) -> None:
        """A request was decided on arrival or retry."""

    def woke(self, decisions: Iterable[Decision], now: float) -> None:
        """The waiting requests were looked at again."""

    def close(self) -> None:
        """Writes out what is held back."""


def plain(value: object) -> object:
    """A value of the core as JSON-able data, its type's name under `type`."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


class FileJournal(Journal):
    """Writes to a file; when it would pass `max_bytes` the file is kept as `.1` and begun anew."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._encoder = msgspec.json.Encoder()
        self._file: BinaryIO = path.open("ab")
        self._held: list[bytes] = []
        self._held_bytes = 0

    def event(self, event: Event, now: float) -> None:
        self._line({"at": now, "do": "apply", "event": plain(event)})

    def decided(self, request: Request, decision: Decision, now: float) -> None:
        self._line({"at": now, "do": "decide", "request": plain(request), "decision": plain(decision)})

    def woke(self, decisions: Iterable[Decision], now: float) -> None:
        self._line({"at": now, "do": "wake", "decisions": [plain(decision) for decision in decisions]})

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _line(self, line: dict[str, object]) -> None:
        encoded = self._encoder.encode(line) + b"\n"
        self._held.append(encoded)
        self._held_bytes += len(encoded)
        if self._held_bytes >= FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._file.tell() + self._held_bytes > self._max_bytes and self._file.tell() > 0:
            self._file.close()
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._file = self._path.open("ab")
        self._file.writelines(self._held)
        self._file.flush()
        self._held.clear()
        self._held_bytes = 0
