"""Plots: round ticks, and XML that parses."""

import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loadtest.html_page import heading, page, plots, table
from loadtest.svg import Series, chart, ticks


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
@example(0.0, 5e-324)
def test_ticks_are_few_ascend_and_enclose_the_range(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert found == sorted(found)
    assert found[0] <= low + 1e-6 * max(1.0, abs(low))
    assert found[-1] >= low + span - 1e-6 * max(1.0, abs(low + span))
    assert 2 <= len(found) <= 14


@pytest.mark.parametrize("points", [[], [(0.0, 0.0)], [(1.0, -5.0), (2.0, 7.5)]])
def test_a_chart_is_xml_whatever_its_points(points: list[tuple[float, float]]) -> None:
    series = [Series("a < b", points), Series("dots", points, is_dots=True), Series("c", points, is_dashed=True)]
    root = ET.fromstring(chart("T & T", series, x_label="x", y_label="y"))
    assert root.attrib["aria-label"] == "T & T"


def test_a_spread_is_a_band_around_its_line() -> None:
    band = Series("a", [(0.0, 1.0), (1.0, 2.0)], low=[0.5, 1.5], high=[1.5, 2.5])
    text = chart("t", [band], x_label="x", y_label="y")
    assert text.count("<polygon") == 1
    assert text.count("<polyline") == 1


def test_a_page_escapes_what_it_shows_and_needs_nothing_else() -> None:
    text = page("<t>", [heading("a & b"), table(("<x>",), [("1",)]), plots(["<svg></svg>"])])
    assert "&lt;t&gt;" in text
    assert "a &amp; b" in text
    assert "http" not in text
    assert "<svg></svg>" in text


def test_the_legend_draws_a_curve_as_the_plot_does() -> None:
    series = [Series("line", []), Series("dots", [], is_dots=True), Series("dashes", [], is_dashed=True)]
    text = chart("t", series, x_label="x", y_label="y")
    legend = text[text.index("</clipPath>") :]
    assert (legend.count("<rect"), legend.count("<circle"), legend.count("stroke-dasharray")) == (1, 1, 2)
