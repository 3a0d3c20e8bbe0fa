"""One JSON line per event and decision: the program's memory, the bug report, and the input of replay.

Lines are `{"at": seconds, "do": "apply" | "decide" | "wake", ...}` with values under their type's name, in the order in
which the scheduler saw them; a line `{"do": "start"}` with the settings begins each run, and `{"do": "refuse"}` is a
request that the scheduler was not asked about. `replay` feeds a run back to a scheduler of the
same settings, which then makes the same decisions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, get_args

import msgspec
import numpy as np
import structlog

from gateway.core.errors import ConfigError
from gateway.core.events import Event
from gateway.core.scheduler import Scheduler
from gateway.core.types import Decision, Reject, Request

FLUSH_BYTES = 65_536
START = {"do": "start"}

log = structlog.get_logger("sluice.journal")


class Journal:
    """Writes nowhere. The base of the file journal, and what runs when no journal is configured."""

    def event(self, event: Event, now: float) -> None:
        """An event was applied."""

    def decided(self, request: Request, decision: Decision, now: float) -> None:
        """A request was decided on arrival or retry."""

    def woke(self, decisions: Iterable[Decision], now: float) -> None:
        """The waiting requests were looked at again."""

    def refused(self, reject: Reject, tenant: str, now: float) -> None:
        """A request was refused before the scheduler was asked: its tenant's limits, or a deadline that had passed."""

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
    """Writes to a file, and keeps one older one as `.1`: a journal that is full begins anew. Both take at most
    `max_bytes`, but for a single line over half of that. A disk that fails ends the journal, not the gateway."""

    def __init__(self, path: Path, *, max_bytes: int, settings: str = "") -> None:
        """`settings` is the TOML of this run, for whoever feeds it back. Raises OSError when the file cannot be
        opened."""
        self._path = path
        self._max_file_bytes = max_bytes // 2
        self._flush_bytes = min(FLUSH_BYTES, self._max_file_bytes)
        self._encoder = msgspec.json.Encoder()
        self._file: BinaryIO | None = path.open("ab")
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._line(START | ({"settings": settings} if settings else {}))

    def event(self, event: Event, now: float) -> None:
        self._line({"at": now, "do": "apply", "event": plain(event)})

    def decided(self, request: Request, decision: Decision, now: float) -> None:
        self._line({"at": now, "do": "decide", "request": plain(request), "decision": plain(decision)})

    def woke(self, decisions: Iterable[Decision], now: float) -> None:
        self._line({"at": now, "do": "wake", "decisions": [plain(decision) for decision in decisions]})

    def refused(self, reject: Reject, tenant: str, now: float) -> None:
        self._line({"at": now, "do": "refuse", "tenant": tenant, "decision": plain(reject)})

    def close(self) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _line(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        encoded = self._encoder.encode(line) + b"\n"
        if self._held_bytes + len(encoded) > self._flush_bytes:
            self._flush()
        self._held.append(encoded)
        self._held_bytes += len(encoded)

    def _flush(self) -> None:
        if self._file is None:
            return
        try:
            self._file = self._with_room(self._file)
            self._file.writelines(self._held)
            self._file.flush()
        except OSError as error:
            log.error("the journal ends here", path=str(self._path), reason=error.strerror)
            self._file = None
        self._held.clear()
        self._held_bytes = 0

    def _with_room(self, file: BinaryIO) -> BinaryIO:
        if file.tell() == 0 or file.tell() + self._held_bytes <= self._max_file_bytes:
            return file
        file.close()
        self._path.replace(self._path.with_name(self._path.name + ".1"))
        return self._path.open("ab")


# ---- back again ------------------------------------------------------------------------------------------------------

_EVENTS = {kind.__name__: kind for kind in get_args(Event)}
_DECISIONS = {kind.__name__: kind for kind in get_args(Decision)}


@dataclasses.dataclass(frozen=True, slots=True)
class Mismatch:
    """A line whose decision came out differently."""

    line_number: int
    """Counted from 1."""
    recorded: object
    replayed: object


def replay(lines: Iterable[bytes], scheduler: Scheduler) -> list[Mismatch]:
    """Feeds the last run in a journal to a fresh scheduler; where it decides otherwise than was recorded, in order.

    Raises ConfigError when a line is not one of a journal, or the run's beginning is missing.
    """
    mismatches: list[Mismatch] = []
    for step in last_run(lines)[1]:
        recorded, replayed = feed(step, scheduler)
        if recorded != replayed:
            mismatches.append(Mismatch(step.line_number, recorded, replayed))
    return mismatches


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One call to the scheduler and what came of it."""

    line_number: int
    """Counted from 1."""
    at: float
    asked: Event | Request | None
    """An event to apply, a request to decide; None: a wake-up."""
    decisions: tuple[Decision, ...] = ()


def last_run(lines: Iterable[bytes]) -> tuple[str, list[Step]]:
    """The settings of the last run in a journal ("" where it does not say), and its steps in order.

    Raises ConfigError when a line is not one of a journal, or the run's beginning is missing.
    """
    numbered = [(number, _decoded(number, line)) for number, line in enumerate(lines, 1)]
    starts = [index for index, (_, line) in enumerate(numbered) if line["do"] == "start"]
    if not starts:
        raise ConfigError("journal: the beginning of the run is missing; its file was full and began anew")
    settings = numbered[starts[-1]][1].get("settings", "")
    run = numbered[starts[-1] + 1 :]
    return str(settings), [_step(number, line) for number, line in run if line["do"] != "refuse"]


def feed(step: Step, scheduler: Scheduler) -> tuple[tuple[Decision, ...], tuple[Decision, ...]]:
    """What was recorded, and what the scheduler decides when the same is asked of it."""
    match step.asked:
        case Request() as request:
            return step.decisions, (scheduler.decide(request, now=step.at),)
        case None:
            return step.decisions, tuple(scheduler.wake(now=step.at))
        case event:
            scheduler.apply(event, now=step.at)
            return (), ()


def _decoded(number: int, line: bytes) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"journal: line {number} is not sound: {error}") from None
    if decoded.get("do") not in ("start", "apply", "decide", "wake", "refuse"):
        raise ConfigError(f"journal: line {number} does nothing known")
    return decoded


def _step(number: int, line: dict[str, Any]) -> Step:
    try:
        match line["do"]:
            case "apply":
                return Step(number, line["at"], _value(line["event"], _EVENTS))
            case "decide":
                request = msgspec.convert(line["request"], Request, str_keys=True, dec_hook=_array)
                return Step(number, line["at"], request, (_value(line["decision"], _DECISIONS),))
            case _:
                decisions = tuple(_value(decision, _DECISIONS) for decision in line["decisions"])
                return Step(number, line["at"], None, decisions)
    except (KeyError, msgspec.ValidationError) as error:
        raise ConfigError(f"journal: line {number} is not sound: {error}") from None


def _value(data: dict[str, Any], kinds: dict[str, Any]) -> Any:
    return msgspec.convert(data, kinds[data["type"]], str_keys=True, dec_hook=_array)


def _array(kind: type, value: object) -> object:
    """Block hashes: the only thing in the journal that JSON has no word for."""
    return np.array(value, dtype=np.uint64)
