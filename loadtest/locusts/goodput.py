"""What Locust does not count by itself: TTFT, TBT and tokens per second as rows of their own, and goodput.

The rows are kept beside Locust's totals, not in them: a stream is one request, however many things are measured of it.
Locust rounds times before it counts them (two digits above 100 ms); the summary at the end is made of the exact ones.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from locust.env import Environment
from locust.runners import WorkerRunner

from gateway.core.types import Slo
from loadtest.answer import ClientResult
from loadtest.locusts.stream import clock
from loadtest.report import Outcome, Report, Status, summarise

MAX_OUTCOMES = 2_000_000
"""Bound on what a long run remembers, some 300 bytes each; later ones are counted by Locust only, and that is said."""


class Refused(Exception):
    """The gateway declined the request; the text is its reason."""


class Failed(Exception):
    """The request has no whole answer; the text says how."""


class Goodput:
    """The outcomes of one run: this process's own, and at a master those of its workers."""

    def __init__(self, environment: Environment, slo_of: Callable[[], Slo]) -> None:
        self._environment = environment
        self._slo_of = slo_of
        self._unsent: list[Outcome] = []
        self.outcomes: list[Outcome] = []
        self.dropped_count = 0
        events = environment.events
        events.test_start.add_listener(self._start)
        events.report_to_master.add_listener(self._report_to_master)
        events.worker_report.add_listener(self._worker_report)

    def add(self, result: ClientResult, name: str) -> None:
        """One more request ended: told to Locust and kept, by the wall clock, which processes share."""
        outcome = replace(result.outcome, arrived_at=result.scheduled_at + time.time() - clock())
        self._log(result, outcome, name)
        if len(self.outcomes) >= MAX_OUTCOMES:
            self.dropped_count += 1
            return
        self.outcomes.append(outcome)
        if self._is_worker:
            self._unsent.append(outcome)

    def report(self) -> Report:
        """The figures so far."""
        return summarise(self.outcomes, self._slo_of())

    def show(self) -> None:
        """Prints the figures of the run, at the process that knows all of them."""
        if self._is_worker or not self.outcomes:
            return
        print(f"\nStreams (latencies from the instant a request was due)\n{self.report().to_table()}")
        if self.dropped_count:
            print(f"{self.dropped_count} more requests are not in these figures (bound of {MAX_OUTCOMES})")
        sys.stdout.flush()

    def save(self, path: Path) -> None:
        """Writes the figures as JSON, at the process that knows all of them."""
        if not self._is_worker:
            path.write_text(self.report().to_json())

    def exit_code(self) -> int:
        """0 when every request was answered or refused, else 1."""
        return int(any(outcome.status is Status.ERROR for outcome in self.outcomes) or not self.outcomes)

    @property
    def _is_worker(self) -> bool:
        return isinstance(self._environment.runner, WorkerRunner)

    def _log(self, result: ClientResult, outcome: Outcome, name: str) -> None:
        error: Exception | None = None
        if outcome.status is Status.REFUSED:
            error = Refused(result.headers.get("x-sluice-reason", outcome.reason))
        elif outcome.status is Status.ERROR:
            error = Failed(f"{outcome.reason} {result.detail}"[:200].strip())
        self._environment.events.request.fire(
            request_type="POST",
            name=name,
            response_time=(outcome.e2e_s or 0.0) * 1e3,
            response_length=0,
            exception=error,
            context={},
        )
        if error is None:
            self._log_row("TTFT ms", name, outcome.ttft_s and outcome.ttft_s * 1e3)
            self._log_row("TBT ms", name, outcome.tbt_s and outcome.tbt_s * 1e3)
            self._log_row("tokens/s", name, outcome.tpot_s and 1 / outcome.tpot_s)

    def _log_row(self, kind: str, name: str, value: float | None) -> None:
        if value is not None:
            self._environment.stats.get(name, kind).log(round(value), 0)

    # ---- between processes ------------------------------------------------------------------------------------------

    def _start(self, environment: Environment, **_: object) -> None:
        self.outcomes.clear()
        self._unsent.clear()
        self.dropped_count = 0

    def _report_to_master(self, client_id: str, data: dict[str, Any], **_: object) -> None:
        data["sluice_outcomes"] = msgspec.to_builtins(self._unsent)
        self._unsent.clear()

    def _worker_report(self, client_id: str, data: dict[str, Any], **_: object) -> None:
        told = msgspec.convert(data.pop("sluice_outcomes", []), list[Outcome])
        room = MAX_OUTCOMES - len(self.outcomes)
        self.outcomes.extend(told[:room])
        self.dropped_count += max(0, len(told) - room)
