"""Readers of published traces: files in, TraceRequest by TraceRequest out, with an error at the first doubtful line.

A trace is read a line at a time and a line is bounded, so neither a huge file nor a huge line fills the memory. What
does not parse is never skipped: a replay of most of a trace would look like a replay of the trace. One damage cannot be
seen: a CSV file cut inside its very last number (the published Azure file itself ends without a newline).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Annotated

import msgspec

from loadtest.workload import TraceRequest, WorkloadError, block_count

MAX_LINE_BYTES = 1 << 20
"""The longest line of the Mooncake traces has 2 KB; a prompt of 16 M tokens would need 330 KB of block ids."""

MAX_TOKENS = 1 << 24
"""No model reads prompts of 16 M tokens: a longer one is a damaged line."""


class TraceError(WorkloadError):
    """A trace cannot be read. The message starts with `file:line`."""

    kind = "trace_error"

    def __init__(self, path: Path, line: int, problem: str) -> None:
        super().__init__(f"{path}:{line}: {problem}")
        self.path = path
        self.line = line


class _BadLine(Exception):
    """A line is not what its format promises; becomes a TraceError where file and line are known."""


def read_mooncake(path: Path) -> Iterator[TraceRequest]:
    """The requests of a Mooncake JSONL trace, arrivals counted from the first. Raises TraceError.

    Source: FAST25-release/README.md of the Mooncake repository (milliseconds, 512-token blocks).
    """
    return _read(path, _lines(path), _parse_mooncake)


def read_azure(path: Path) -> Iterator[TraceRequest]:
    """The requests of an Azure LLM inference CSV (TIMESTAMP,ContextTokens,GeneratedTokens). Raises TraceError.

    Source: AzureLLMInferenceDataset2023.md in the Azure Public Dataset repository.
    """
    return _read_csv(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _parse_azure)


def read_burstgpt(path: Path) -> Iterator[TraceRequest]:
    """The answered requests of a BurstGPT CSV; columns `Session ID` and `Elapsed time` may be there. Raises TraceError.

    Rows with 0 response tokens are failed requests, and are left out as in the data set's own `without_fails` files.
    Source: README.md of the BurstGPT repository.
    """
    columns = ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type")
    return _read_csv(path, columns, _parse_burstgpt)


FORMATS: dict[str, Callable[[Path], Iterator[TraceRequest]]] = {
    "mooncake": read_mooncake,
    "azure": read_azure,
    "burstgpt": read_burstgpt,
}


def read_trace(path: Path, format_name: str | None = None) -> Iterator[TraceRequest]:
    """The requests of a trace in that format, by default told by its first line. Raises TraceError, WorkloadError."""
    name = guess_format(path) if format_name is None else format_name
    if name not in FORMATS:
        raise WorkloadError(f"unknown trace format {name!r}; known: {', '.join(FORMATS)}", param="format")
    return FORMATS[name](path)


def guess_format(path: Path) -> str:
    """The format whose first line this is. Raises TraceError when it is none's."""
    line, first = next(_lines(path), (0, ""))
    for start, name in (("{", "mooncake"), ("TIMESTAMP,", "azure"), ("Timestamp,", "burstgpt")):
        if first.startswith(start):
            return name
    raise TraceError(path, line, f"is no known format ({', '.join(FORMATS)}): {first[:60]!r}")


class _MooncakeLine(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
    output_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] | None = None


_decode_mooncake = msgspec.json.Decoder(_MooncakeLine).decode


def _parse_mooncake(text: str) -> TraceRequest:
    try:
        line = _decode_mooncake(text)
    except msgspec.MsgspecError as error:
        raise _BadLine(str(error)) from error
    if line.hash_ids is not None and len(line.hash_ids) != block_count(line.input_length):
        raise _BadLine(f"{len(line.hash_ids)} hash ids for {line.input_length} tokens in blocks of 512")
    return TraceRequest(line.timestamp / 1e3, line.input_length, line.output_length, line.hash_ids)


def _parse_azure(row: dict[str, str]) -> TraceRequest:
    try:
        instant = datetime.fromisoformat(row["TIMESTAMP"])
    except ValueError as error:
        raise _BadLine(f"TIMESTAMP is no date and time: {row['TIMESTAMP'][:40]!r}") from error
    at = instant if instant.tzinfo else instant.replace(tzinfo=UTC)
    return TraceRequest(at.timestamp(), _tokens(row, "ContextTokens"), _tokens(row, "GeneratedTokens"))


def _parse_burstgpt(row: dict[str, str]) -> TraceRequest | None:
    if row["Log Type"] not in ("Conversation log", "API log"):
        raise _BadLine(f"Log Type is neither a conversation nor an API log: {row['Log Type'][:40]!r}")
    arrival_s = _number(row, "Timestamp")
    if _number(row, "Response tokens") == 0:
        return None
    return TraceRequest(
        arrival_s,
        _tokens(row, "Request tokens"),
        _tokens(row, "Response tokens"),
        session=row.get("Session ID") or None,
    )


_NUMBER = re.compile(r"\d{1,15}(\.\d{1,15})?", re.ASCII)


def _number(row: dict[str, str], column: str) -> float:
    if not _NUMBER.fullmatch(row[column]):
        raise _BadLine(f"{column} is no number >= 0: {row[column][:40]!r}")
    return float(row[column])


def _tokens(row: dict[str, str], column: str) -> int:
    value = _number(row, column)
    if not value.is_integer() or not 1 <= value <= MAX_TOKENS:
        raise _BadLine(f"{column} is no token count from 1 to {MAX_TOKENS}: {row[column]}")
    return int(value)


def _read_csv(
    path: Path, columns: tuple[str, ...], parse: Callable[[dict[str, str]], TraceRequest | None]
) -> Iterator[TraceRequest]:
    """Each row under a header with those columns. These traces quote nothing: a comma always parts two cells."""
    lines = _lines(path)
    line, text = next(lines, (1, ""))
    header = text.split(",")
    if missing := [column for column in columns if column not in header]:
        raise TraceError(path, line, f"the header lacks {', '.join(missing)}")
    yield from _read(path, lines, lambda text: parse(_row(header, text)))


def _row(header: list[str], text: str) -> dict[str, str]:
    cells = text.split(",")
    if len(cells) != len(header):
        raise _BadLine(f"{len(cells)} cells under a header of {len(header)}")
    return dict(zip(header, cells, strict=True))


def _read(
    path: Path, lines: Iterator[tuple[int, str]], parse: Callable[[str], TraceRequest | None]
) -> Iterator[TraceRequest]:
    """The parsed lines with arrivals counted from the first; None is a line that stands for no request."""
    start_s: float | None = None
    previous_s, line = -math.inf, 1
    for line, text in lines:
        try:
            request = parse(text)
        except _BadLine as error:
            raise TraceError(path, line, str(error)) from error
        if request is None:
            continue
        if request.arrival_s < previous_s:
            raise TraceError(path, line, f"time goes back by {previous_s - request.arrival_s:g} s")
        previous_s = request.arrival_s
        start_s = previous_s if start_s is None else start_s
        yield replace(request, arrival_s=previous_s - start_s)
    if start_s is None:
        raise TraceError(path, line, "holds no request")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of each line that is not blank, reading at most one bounded line ahead."""
    try:
        with path.open("rb") as file:
            for line in count(1):
                data = file.readline(MAX_LINE_BYTES + 1)
                if not data:
                    return
                if len(data) > MAX_LINE_BYTES:
                    raise TraceError(path, line, f"the line is longer than {MAX_LINE_BYTES} bytes")
                if text := _decode_text(path, line, data).strip():
                    yield line, text
    except OSError as error:
        raise TraceError(path, 0, error.strerror or str(error)) from error


def _decode_text(path: Path, line: int, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise TraceError(path, line, f"the line is not UTF-8: {error.reason}") from error
