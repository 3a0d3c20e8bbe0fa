"""The live page: its static files, and one stream of events that all open pages share.

Whatever the load, a page gets one message each half second. Between two messages the finished records only leave their
numbers in a few bounded lists; the message is made once and its bytes go to every viewer. A viewer that reads slowly
misses messages, for there is no queue: when it is ready it gets the next one. What a page needs of the past (the series
of its charts, the last decisions) comes with its first message, so that it may be closed, reloaded, or lose a gateway
that restarts, and look the same again.

The files are served as they lie in `gateway/dashboard/`: no build step, nothing from elsewhere, and a content security
policy under which nothing else could run.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from secrets import token_hex
from typing import Any

import msgspec
from aiohttp import web

from gateway.core.cluster import EngineState
from gateway.core.errors import GatewayError
from gateway.decisions import row
from gateway.driver import Driver
from gateway.records import Outcome, RequestRecord

EVERY_S = 0.5
HISTORY_TICKS = 360
"""Three minutes of series."""
MAX_SAMPLES = 1_024
"""Times kept per tick for its percentiles: what comes beyond (2,000 requests per second) is left out of them."""
TICK_ROWS = 40
FIRST_ROWS = 120
TICK_POINTS = 60
MAX_ENGINES = 256
WRITE_WITHIN_S = 10.0

FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "detail.js": "text/javascript; charset=utf-8",
    "words.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
SAFE = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

View = Callable[[web.BaseRequest, Mapping[str, str]], Awaitable[web.StreamResponse]]


class TooManyViewers(GatewayError):
    """As many pages are open as the settings allow."""

    status = 503
    kind = "service_unavailable_error"


@dataclass(slots=True)
class Interval:
    """What happened since the last message."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    tbt_s: list[float] = field(default_factory=list)
    bound_ttft_s: float | None = None
    bound_tbt_s: float | None = None
    retry_after_s: float | None = None
    promised: int = 0
    kept: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    predicted_tokens: int = 0
    notable: deque[RequestRecord] = field(default_factory=lambda: deque(maxlen=TICK_ROWS))
    """Those that were not served."""
    served: deque[RequestRecord] = field(default_factory=lambda: deque(maxlen=TICK_ROWS))
    points: deque[tuple[float, float, float | None]] = field(default_factory=lambda: deque(maxlen=TICK_POINTS))

    def add(self, record: RequestRecord) -> None:
        """Takes a finished record in."""
        self.outcomes[record.outcome] += 1
        (self.served if record.outcome is Outcome.SERVED else self.notable).append(record)
        if record.outcome is Outcome.REFUSED:
            self.reasons[record.reason] += 1
            self.retry_after_s = record.retry_after_s or self.retry_after_s
        self._add_times(record)
        if (cached := record.cached_tokens) is not None and record.last is not None:
            self.prompt_tokens += record.last.reported_prompt_tokens or record.prompt_tokens or 0
            self.predicted_tokens += cached[0]
            self.cached_tokens += cached[1]

    def _add_times(self, record: RequestRecord) -> None:
        ttft_s, tbt_s, slo = record.ttft_s, record.tbt_s, record.slo
        if ttft_s is not None and len(self.ttft_s) < MAX_SAMPLES:
            self.ttft_s.append(ttft_s)
            if (predicted_s := record.predicted_ttft_s) is not None:
                self.points.append((round(predicted_s, 4), round(ttft_s, 4), slo.ttft_s))
        if tbt_s is not None and len(self.tbt_s) < MAX_SAMPLES:
            self.tbt_s.append(tbt_s)
        self.bound_ttft_s = slo.ttft_s or self.bound_ttft_s
        self.bound_tbt_s = slo.step_s or self.bound_tbt_s
        if slo.has_bounds:
            self.promised += 1
            self.kept += is_kept(record)

    def rows(self) -> list[RequestRecord]:
        """The youngest first; of more than fit, those that were not served before those that were."""
        served_count = TICK_ROWS - len(self.notable)
        chosen = [*self.notable, *islice(reversed(self.served), served_count)]
        return sorted(chosen, key=lambda record: record.ended_at, reverse=True)

    def series(self, at: float, *, waiting: int, in_flight: int) -> dict[str, Any]:
        """Its point on every chart."""
        return {
            "at": round(at, 2),
            "outcomes": dict(self.outcomes),
            "reasons": dict(self.reasons),
            "ttft": percentiles(self.ttft_s),
            "tbt": percentiles(self.tbt_s),
            "slo": [self.bound_ttft_s, self.bound_tbt_s],
            "kept": [self.kept, self.promised],
            "tokens": [self.prompt_tokens, self.cached_tokens, self.predicted_tokens],
            "retry_after": self.retry_after_s,
            "waiting": waiting,
            "in_flight": in_flight,
        }


def is_kept(record: RequestRecord) -> bool:
    """Whether the request was served within every bound that can be seen from here."""
    slo = record.slo
    pairs = (
        (record.ttft_s, slo.ttft_s),
        (record.tbt_s, slo.tbt_s),
        (record.ended_at - record.arrived_at, slo.deadline_s),
    )
    return record.outcome is Outcome.SERVED and all(
        actual_s is None or bound_s is None or actual_s <= bound_s for actual_s, bound_s in pairs
    )


def percentiles(values: Sequence[float]) -> list[float] | None:
    """The median and the 90th percentile; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return [round(ordered[int(share * (len(ordered) - 1) + 0.5)], 5) for share in (0.5, 0.9)]


class Page:
    """An observer of records; serves the page and keeps the open ones up to date."""

    def __init__(self, driver: Driver, *, max_viewers: int, unix_clock: Callable[[], float]) -> None:
        self._driver = driver
        self._max_viewers = max_viewers
        self._unix_clock = unix_clock
        self._boot = token_hex(8)
        self._interval = Interval()
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY_TICKS)
        self._points: deque[tuple[float, float, float | None]] = deque(maxlen=600)
        self._message = b""
        self._next: asyncio.Future[None] | None = None
        self._viewers = 0
        self._is_closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._files = {name: (_FOLDER / name).read_bytes() for name in FILES}

    @property
    def views(self) -> dict[str, View]:
        """Path -> what is there."""
        files = {f"/dashboard/{name}": self.file for name in FILES if name != "index.html"}
        return {"/dashboard": self.file, "/dashboard/": self.file, "/dashboard/events": self.events, **files}

    @property
    def viewer_count(self) -> int:
        """Pages open now."""
        return self._viewers

    def __call__(self, record: RequestRecord) -> None:
        """A request is over."""
        self._interval.add(record)

    def start(self) -> None:
        """Begins to send. Call it on the event loop."""
        self._schedule()

    def close(self) -> None:
        """Ends every stream, so that open pages do not hold up the gateway's end."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._wake()

    # ---- routes -----------------------------------------------------------------------------------------------------

    async def file(self, request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
        """A static file."""
        name = request.path.removeprefix("/dashboard").strip("/") or "index.html"
        return web.Response(body=self._files[name], headers={**headers, **SAFE, "content-type": FILES[name]})

    async def events(self, request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
        """Server-sent events until the viewer leaves or the gateway ends."""
        if self._viewers >= self._max_viewers:
            raise TooManyViewers(f"{self._max_viewers} pages are open already")
        response = web.StreamResponse(headers={**headers, **SAFE, "content-type": "text/event-stream"})
        self._viewers += 1
        try:
            await response.prepare(request)
            await self._write(response, b"retry: 500\n" + event("hello", self._hello()))
            while not self._is_closed:
                await self._tick()
                await self._write(response, self._message)
        finally:
            self._viewers -= 1
        return response

    async def _write(self, response: web.StreamResponse, message: bytes) -> None:
        """Raises ConnectionError when the viewer reads nothing."""
        try:
            async with asyncio.timeout(WRITE_WITHIN_S):
                await response.write(message)
        except TimeoutError:
            raise ConnectionError("the viewer reads nothing") from None

    # ---- messages ---------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Returns at the next message. Viewers share one future: one that leaves must not cancel it for all."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._next)

    def _wake(self) -> None:
        waited_for, self._next = self._next, None
        if waited_for is not None:
            waited_for.set_result(None)

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._send)

    def _send(self) -> None:
        interval, self._interval = self._interval, Interval()
        scheduler = self._driver.scheduler
        in_flight = len(scheduler.cluster.reservations)
        series = interval.series(self._unix_clock(), waiting=scheduler.waiting_count, in_flight=in_flight)
        self._history.append(series)
        self._points.extend(interval.points)
        if self._viewers:
            rows = [row(record) for record in interval.rows()]
            total = sum(interval.outcomes.values())
            told = {"engines": self._engines(), "rows": rows, "total": total, "points": list(interval.points)}
            self._message = event("tick", {**series, **told})
        self._wake()
        self._schedule()

    def _hello(self) -> dict[str, Any]:
        return {
            "boot": self._boot,
            "every_s": EVERY_S,
            "history": list(self._history),
            "points": list(self._points),
            "engines": self._engines(),
            "rows": [row(record) for record in islice(self._driver.recorder.latest(), FIRST_ROWS)],
        }

    def _engines(self) -> list[dict[str, Any]]:
        states: Iterable[EngineState] = self._driver.scheduler.cluster.engines.values()
        now, limits = self._driver.now(), self._driver.scheduler.limits
        return [
            {
                "id": state.engine.id,
                "role": state.engine.role,
                "pool": state.engine.pool,
                "health": state.health,
                "reason": state.health_reason,
                "in_flight": state.in_flight_count,
                "limit": limits.room(state.engine),
                "queued": state.report.waiting_count if state.report else None,
                "kv": state.report.kv_usage_ratio if state.report else None,
                "age": None if state.reported_at is None else round(now - state.reported_at, 2),
                "work": round(state.prefill_work_s(now), 3),
            }
            for state in islice(states, MAX_ENGINES)
        ]


def event(name: str, data: Any) -> bytes:
    """One server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))


_FOLDER = Path(__file__).parent / "dashboard"
