"""One table or figure of a publication set beside what comes out here: the runs it needs and what they show. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.sim_html import Result
from loadtest.sim_options import Spec


@dataclass(frozen=True)
class Shown:
    """An exhibit for people: text that is complete by itself, and plots that say the same."""

    text: str
    charts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exhibit:
    """`show` gets one result for each of `specs`, in their order."""

    name: str
    title: str
    specs: tuple[Spec, ...]
    show: Callable[[Sequence[Result]], Shown]


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table: the first column to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    )
