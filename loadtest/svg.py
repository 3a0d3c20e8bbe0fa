"""Plots as inline SVG: lines with spread, steps and dots over two linear axes. Pure, and no dependency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933", "#882255", "#44aa99")
"""Okabe and Ito's palette and its usual extension: told apart by colour-blind readers too."""
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 30, 44
ROW = 15
"""Height of a line of the legend."""


@dataclass(frozen=True, slots=True)
class Series:
    """One curve. `low` and `high`, where given, have a value for each point: the spread around it."""

    name: str
    points: Sequence[tuple[float, float]]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    is_dots: bool = False
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class _Scale:
    """Values to pixels along one axis."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_max: float | None = None,
    x_max: float | None = None,
) -> str:
    """An SVG element with its axes from zero, or from the least value when that is negative, and a legend."""
    xs = [x for s in series for x, _ in s.points] or [0.0]
    ys = [y for s in series for y in (*(y for _, y in s.points), *s.low, *s.high)] or [0.0]
    x_ticks = ticks(min(0.0, *xs) if min(xs) < 0 else 0.0, max(xs) if x_max is None else x_max)
    y_ticks = ticks(min(0.0, min(ys)), max(ys) if y_max is None else y_max)
    legend = ROW * len(series) if len(series) > 1 else 0
    height = HEIGHT + legend
    x = _Scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    y = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" aria-label="{escape(title)}">',
        f'<text x="{WIDTH / 2}" y="18" text-anchor="middle" class="title">{escape(title)}</text>',
        *_axes(x, y, x_ticks, y_ticks, x_label, y_label),
        '<clipPath id="plot">'
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/></clipPath>',
    ]
    for number, entry in enumerate(series):
        parts += _curve(entry, COLOURS[number % len(COLOURS)], x, y)
    if legend:
        parts += [_legend(entry, number) for number, entry in enumerate(series)]
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float, *, about: int = 6) -> list[float]:
    """Round numbers that enclose the range, 1, 2 or 5 times a power of ten apart."""
    # A range that is nothing beside its own numbers is widened: its ticks could not be told apart.
    span = high - low if high - low > 1e-9 * max(1.0, abs(low), abs(high)) else 1.0
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _axes(
    x: _Scale, y: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str
) -> list[str]:
    parts = []
    for tick in x_ticks:
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{y.start}" y2="{y.end}" class="grid"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{y.start + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        parts.append(f'<line x1="{x.start}" x2="{x.end}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="grid"/>')
        parts.append(f'<text x="{x.start - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle_x, middle_y = (x.start + x.end) / 2, (y.start + y.end) / 2
    parts.append(f'<text x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="rotate(-90 14 {middle_y})"'
    parts.append(f'<text x="14" y="{middle_y}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    return parts


def _curve(series: Series, colour: str, x: _Scale, y: _Scale) -> list[str]:
    places = [(x(px), y(py)) for px, py in series.points]
    if series.is_dots:
        dots = "".join(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="1.6"/>' for px, py in places)
        return [f'<g fill="{colour}" fill-opacity="0.45" clip-path="url(#plot)">{dots}</g>']
    parts = []
    if series.low and series.high:
        across = [px for px, _ in places]
        upper = list(zip(across, (y(value) for value in series.high), strict=True))
        lower = list(zip(across, (y(value) for value in series.low), strict=True))
        parts.append(f'<polygon points="{_path([*upper, *reversed(lower)])}" fill="{colour}" fill-opacity="0.15"/>')
    dash = ' stroke-dasharray="5 4"' if series.is_dashed else ""
    parts.append(
        f'<polyline points="{_path(places)}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}'
        ' clip-path="url(#plot)"/>'
    )
    return parts


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in places)


def _legend(series: Series, number: int) -> str:
    at = HEIGHT + ROW * number + 6
    colour = COLOURS[number % len(COLOURS)]
    mark = f'<rect x="{LEFT}" y="{at - 8}" width="18" height="4" fill="{colour}"/>'
    if series.is_dots:
        mark = f'<circle cx="{LEFT + 9}" cy="{at - 6}" r="2.5" fill="{colour}"/>'
    elif series.is_dashed:
        ends = f'x1="{LEFT}" x2="{LEFT + 18}" y1="{at - 6}" y2="{at - 6}"'
        mark = f'<line {ends} stroke="{colour}" stroke-width="2" stroke-dasharray="5 4"/>'
    return f'{mark}<text x="{LEFT + 26}" y="{at - 2}">{escape(series.name)}</text>'
