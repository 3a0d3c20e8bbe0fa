"""Chosen samples out of an engine's Prometheus text, without parsing the rest.

An engine's page holds thousands of samples of which a gateway wants a dozen, twice a second and engine, so the wanted
names are searched in the bytes and only their lines are parsed. Wanted lines are read strictly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from gateway.core.errors import MalformedEngineData

_LABEL: Final = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\\n]|\\.)*)"\s*(?:,|(?=}))')
# After the labels: a value, then an optional time stamp and an optional OpenMetrics exemplar, which are not wanted.
_VALUE: Final = re.compile(r"[ \t]+([^\s#_]+)(?:[ \t]+-?[0-9.]+)?[ \t]*(?:#.*)?")
_CLOSE: Final = re.compile(r"\s*}")
_ESCAPE: Final = re.compile(r"\\(.)")
_ESCAPED: Final = {"n": "\n", '"': '"', "\\": "\\"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of the text."""

    name: str
    labels: Mapping[str, str]
    value: float
    """May be NaN or infinite."""


def samples(body: bytes, names: Iterable[str]) -> Iterator[Sample]:
    """The samples with these names, name by name, in the order of the text.

    Raises MalformedEngineData for a wanted line that is not well-formed or a text that breaks off within a line.
    """
    if body and not body.endswith(b"\n"):
        raise MalformedEngineData("The metrics break off within a line.")
    text = b"\n" + body
    for name in names:
        for line in _lines(text, name.encode()):
            yield _sample(name, line)


def _lines(text: bytes, name: bytes) -> Iterator[str]:
    """What follows the name on each of its lines."""
    at = text.find(b"\n" + name)
    while at >= 0:
        start = at + 1 + len(name)
        end = text.find(b"\n", start)
        if text[start : start + 1] in (b"{", b" ", b"\t"):
            try:
                yield text[start:end].decode()
            except UnicodeDecodeError:
                raise MalformedEngineData(f"The metric {name.decode()} is not UTF-8.") from None
        at = text.find(b"\n" + name, end)


def _sample(name: str, rest: str) -> Sample:
    labels, at = _labels(rest) if rest.startswith("{") else ({}, 0)
    found = _VALUE.fullmatch(rest, at)
    if found is None:
        raise MalformedEngineData(f"The metric {name} has no value.")
    try:
        return Sample(name, labels, float(found[1]))
    except ValueError:
        raise MalformedEngineData(f"The metric {name} has a value that is not a number.") from None


def _labels(rest: str) -> tuple[dict[str, str], int]:
    """The labels in the braces at the start, and the place after them."""
    labels: dict[str, str] = {}
    at = 1
    while found := _LABEL.match(rest, at):
        labels[found[1]] = _ESCAPE.sub(lambda escape: _ESCAPED.get(escape[1], escape[0]), found[2])
        at = found.end()
    close = _CLOSE.match(rest, at)
    if close is None:
        raise MalformedEngineData("A metric's labels are not well-formed.")
    return labels, close.end()
