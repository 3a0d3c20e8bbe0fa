"""What is seen of one answer on its way in: tokens as they come, errors in every disguise. Bytes in, a value out.

Engines report errors in three places: the HTTP status, an error event inside a stream that began with 200, and a
finish reason. All three count as failures here, and so does a stream that stops without saying that it is done.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from itertools import pairwise
from typing import Any

import msgspec

from loadtest.report import Outcome, Status, slowest_tenth_mean_s

KEPT_HEADERS = ("x-sluice-", "retry-after")
"""Prefixes of the response headers a result keeps, lower case."""

MAX_EVENT_BYTES = 1 << 20


class ErrorKind(StrEnum):
    """Why a request has no whole answer."""

    CONNECT = "connect"
    """No connection could be made."""
    TIMEOUT = "timeout"
    """The answer was not complete within the client's limit."""
    LOST = "lost"
    """The connection broke after the request was sent."""
    HTTP_STATUS = "http_status"
    """The status was not 200."""
    STREAM_ERROR = "stream_error"
    """The engine reported an error inside a stream that had begun with 200."""
    INCOMPLETE = "incomplete"
    """The stream ended in order but without `[DONE]`."""
    MALFORMED = "malformed"
    """The bytes were not what the API promises."""


@dataclass(frozen=True, slots=True)
class ClientResult:
    """What happened to one request. Instants are on the event loop's clock, seconds."""

    scheduled_at: float
    sent_at: float
    ended_at: float
    status: int | None = None
    """None: no response head arrived."""
    error: ErrorKind | None = None
    detail: str = ""
    first_token_at: float | None = None
    """The first event with content; None for answers that are not streamed."""
    tpot_s: float | None = None
    """Mean gap between content events; None below two."""
    tbt_s: float | None = None
    """Mean of the slowest 10 % of those gaps (Mooncake's definition); None below two."""
    prompt_tokens: int = 0
    """What the sender stated, so that refused and answered requests weigh alike; else from the server's usage."""
    output_tokens: int = 0
    """From the server's usage when it told, else the content events counted."""
    headers: dict[str, str] = field(default_factory=dict)
    """Response headers named in KEPT_HEADERS, lower-case names."""
    text: str = ""

    @property
    def lag_s(self) -> float:
        """How late the client sent it, seconds, >= 0."""
        return max(0.0, self.sent_at - self.scheduled_at)

    @property
    def is_refused(self) -> bool:
        """Whether the server declined it: 429 or 503."""
        return self.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)

    @property
    def outcome(self) -> Outcome:
        """The same in the report's words; durations count from the instant the request was due."""
        return Outcome(
            arrived_at=self.scheduled_at,
            status=Status.REFUSED if self.is_refused else Status.ERROR if self.error else Status.OK,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            ttft_s=None if self.first_token_at is None else max(0.0, self.first_token_at - self.scheduled_at),
            tbt_s=self.tbt_s,
            tpot_s=self.tpot_s,
            e2e_s=max(0.0, self.ended_at - self.scheduled_at),
            lag_s=self.lag_s,
            reason=self._reason(),
        )

    def _reason(self) -> str:
        if self.error is None:
            return ""
        return f"http_{self.status}" if self.error is ErrorKind.HTTP_STATUS else self.error.value


class TooLarge(Exception):
    """An event or body went over its bound."""


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Text(msgspec.Struct):
    """A streamed delta or a whole message. Reasoning and tool calls are tokens like any other."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None

    @property
    def has_content(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning or self.tool_calls)


class _Choice(msgspec.Struct):
    delta: _Text | None = None
    message: _Text | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    """A streamed chunk or a whole answer, chat or plain completion, as far as the client looks."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    object: str | None = None


_decode = msgspec.json.Decoder(_Answer).decode

_BROKEN_FINISHES = ("abort", "error")
"""Finish reasons with which engines end a stream they could not serve, under status 200."""


class AnswerRecord:
    """Collects what is seen of one answer until it becomes a ClientResult."""

    def __init__(
        self, *, scheduled_at: float, prompt_tokens: int, clock: Callable[[], float], keep_text: bool = True
    ) -> None:
        self._prompt_tokens = prompt_tokens
        self._scheduled_at = scheduled_at
        self._clock = clock
        self._keep_text = keep_text
        self._sent_at = clock()
        self._status: int | None = None
        self._headers: dict[str, str] = {}
        self._error: ErrorKind | None = None
        self._detail = ""
        self._token_at = array("d")
        self._usage: _Usage | None = None
        self._parts: list[str] = []
        self._rest = b""
        self._is_done = False

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        """The response's status and headers arrived."""
        self._status = status
        lowered = ((name.lower(), value) for name, value in headers.items())
        self._headers = {name: value for name, value in lowered if name.startswith(KEPT_HEADERS)}

    def fail(self, kind: ErrorKind, detail: str) -> None:
        """The request failed; the first failure is the one that counts."""
        if self._error is None:
            self._error, self._detail = kind, detail

    def feed(self, data: bytes) -> None:
        """Bytes of an event stream arrived."""
        now = self._clock()
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise TooLarge(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self._is_done = True
            return
        if payload and self._take(_decode(payload), payload):
            self._token_at.append(now)

    def whole(self, body: bytes) -> None:
        """The body of an answer that is not streamed arrived."""
        self._take(_decode(body), body)

    def _take(self, answer: _Answer, payload: bytes) -> bool:
        """Whether there is content in it."""
        if answer.error is not None or answer.object == "error":
            self.fail(ErrorKind.STREAM_ERROR, payload[:500].decode(errors="replace"))
        self._usage = answer.usage or self._usage
        has_content = False
        for choice in answer.choices:
            if choice.finish_reason in _BROKEN_FINISHES:
                self.fail(ErrorKind.STREAM_ERROR, f"finish_reason {choice.finish_reason}")
            part = choice.delta or choice.message
            text = choice.text or (part.content if part else None)
            has_content = has_content or bool(text) or (part is not None and part.has_content)
            if text and self._keep_text:
                self._parts.append(text)
        return has_content

    def end_of_stream(self) -> None:
        """The event stream ended in order."""
        if not self._is_done:
            self.fail(ErrorKind.INCOMPLETE, "the stream ended without [DONE]")

    def result(self) -> ClientResult:
        """What is known now, as a value."""
        instants = self._token_at
        gaps_s = [later - earlier for earlier, later in pairwise(instants)]
        usage = self._usage
        return ClientResult(
            scheduled_at=self._scheduled_at,
            sent_at=self._sent_at,
            ended_at=self._clock(),
            status=self._status,
            error=self._error,
            detail=self._detail,
            first_token_at=instants[0] if instants else None,
            tpot_s=sum(gaps_s) / len(gaps_s) if gaps_s else None,
            tbt_s=slowest_tenth_mean_s(gaps_s),
            prompt_tokens=self._prompt_tokens or (usage.prompt_tokens if usage else 0),
            output_tokens=usage.completion_tokens if usage else len(instants),
            headers=self._headers,
            text="".join(self._parts),
        )
