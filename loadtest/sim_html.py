"""The pages of `sluice sim` and `sluice compare`: figures and plots of simulated runs. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loadtest.html_page import heading, page, paragraph, plots, preformatted, table
from loadtest.sim_options import Spec
from loadtest.sim_plan import Run
from loadtest.sim_report import figures, outcomes, pairs_of, percent, predicted_tbt_s
from loadtest.svg import Series, chart

CURVE_POINTS = 201
MAX_DOTS = 1500


@dataclass(frozen=True)
class Curves:
    """What the plots of one run need, small enough to be sent between processes."""

    ttft_quantiles_s: tuple[float, ...]
    """At CURVE_POINTS equal steps of probability, over all requests: those without a first token come last, as inf."""
    prefill_work: tuple[tuple[float, float], ...]
    """(instant, mean seconds of prefill ahead of a new arrival)."""
    decoding: tuple[tuple[float, float], ...]
    """(instant, mean requests that produce tokens on an engine)."""
    ttft_pairs: tuple[tuple[float, float], ...]
    """(predicted, actual) seconds of at most MAX_DOTS requests."""
    tbt_pairs: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Result:
    """One finished run of a comparison."""

    spec: Spec
    figures: Mapping[str, Any]
    curves: Curves


def result_of(spec: Spec, run: Run) -> Result:
    """The figures and curves of a run."""
    return Result(spec, figures(run), curves_of(run))


def curves_of(run: Run) -> Curves:
    """The curves of a run that is over."""
    ttfts = sorted(np.inf if outcome.ttft_s is None else outcome.ttft_s for outcome in outcomes(run))
    ranks = np.linspace(0, len(ttfts) - 1, CURVE_POINTS if ttfts else 0).round().astype(int)
    return Curves(
        ttft_quantiles_s=tuple(float(ttfts[rank]) for rank in ranks),
        prefill_work=tuple((sample.at_s, sample.prefill_work_s) for sample in run.samples),
        decoding=tuple((sample.at_s, sample.decoding_count) for sample in run.samples),
        ttft_pairs=_thinned(pairs_of(run.flights, lambda f: f.predicted_ttft_s, lambda o: o.ttft_s)),
        tbt_pairs=_thinned(pairs_of(run.flights, predicted_tbt_s, lambda o: o.tbt_s)),
    )


def _thinned(pairs: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    return tuple(pairs[:: max(1, -(-len(pairs) // MAX_DOTS))])


def run_page(result: Result) -> str:
    """The page of one run."""
    curves = result.curves
    charts = [cdf_chart([result]), *load_charts(curves), *error_charts(curves)]
    return page(
        f"sluice sim: {name_of(result.spec)} at {result.spec.speed:g}x",
        [
            plots(charts),
            heading("Figures"),
            preformatted(json.dumps(result.figures, indent=2)),
            heading("Settings"),
            preformatted(json.dumps(asdict(result.spec), indent=2)),
        ],
    )


def comparison_page(results: Sequence[Result]) -> str:
    """The page of a comparison: load curves with the spread over seeds, then details at the highest load."""
    fastest = max(result.spec.speed for result in results)
    at_fastest = _first_of_each([result for result in results if result.spec.speed == fastest])
    details = []
    for result in at_fastest:
        charts = [*load_charts(result.curves), *error_charts(result.curves)]
        details += [heading(f"{name_of(result.spec)} at {fastest:g}x"), plots(charts)]
    ratios = (
        ("goodput_per_s", "goodput, requests/s", None),
        ("attained_ratio", "attained, ratio of requests", 1.0),
        ("attained_tokens_ratio", "attained, ratio of prompt tokens", 1.0),
    )
    return page(
        "sluice compare",
        [
            paragraph("Lines are means over seeds, bands run from the least to the most."),
            plots([*(load_curve(results, key, label, most) for key, label, most in ratios), cdf_chart(at_fastest)]),
            table(HEAD, [row_of(result) for result in results]),
            *details,
        ],
    )


HEAD = (
    "policy, admission",
    "speed",
    "seed",
    "goodput/s",
    "attained",
    "at best",
    "of tokens",
    "rejected",
    "after prefill",
    "wasted",
    "TTFT p50 s",
    "TTFT p90 s",
    "TBT p90 ms",
    "cached",
)


def row_of(result: Result) -> tuple[str, ...]:
    """The row of one run under HEAD."""
    f = result.figures
    wasted = f["wasted_prefill_tokens"] / f["prefilled_tokens"] if f["prefilled_tokens"] else None
    return (
        name_of(result.spec),
        f"{result.spec.speed:g}",
        str(result.spec.seed),
        _number(f["goodput_per_s"]),
        percent(f["attained_ratio"]),
        percent(f["fluid_bound_ratio"]),
        percent(f["attained_tokens_ratio"]),
        str(f["rejected"]),
        str(f["rejected_after_prefill"]),
        percent(wasted),
        _number(f["ttft_s"]["p50"]),
        _number(f["ttft_s"]["p90"]),
        _number(f["tbt_s"]["p90"], 1e3),
        percent(f["hit_ratio"]),
    )


def _number(value: float | None, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.3g}"


def name_of(spec: Spec) -> str:
    """What distinguishes a run from the others of its comparison, but for load and seed."""
    return f"{spec.policy}, {spec.admission}"


def _first_of_each(results: Sequence[Result]) -> list[Result]:
    return list({name_of(result.spec): result for result in reversed(results)}.values())[::-1]


def load_curve(results: Sequence[Result], key: str, label: str, most: float | None) -> str:
    """A figure against the speed, a line for each policy and admission rule, a band over seeds."""
    values: dict[str, dict[float, list[float]]] = {}
    for result in results:
        by_speed = values.setdefault(name_of(result.spec), {})
        by_speed.setdefault(result.spec.speed, []).append(float(result.figures[key] or 0.0))
    series = []
    for name, by_speed in values.items():
        speeds = sorted(by_speed)
        points = [(speed, sum(by_speed[speed]) / len(by_speed[speed])) for speed in speeds]
        low, high = ([edge(by_speed[speed]) for speed in speeds] for edge in (min, max))
        series.append(Series(name, points, low, high))
    if key == "attained_ratio":
        series.append(_bound_curve(results))
    return chart(f"{label} against load", series, x_label="speed of the workload", y_label=label, y_max=most)


def _bound_curve(results: Sequence[Result]) -> Series:
    """What no policy could pass, at each speed."""
    bounds = {result.spec.speed: float(result.figures["fluid_bound_ratio"]) for result in results}
    return Series("fluid bound", sorted(bounds.items()), is_dashed=True)


def cdf_chart(results: Sequence[Result]) -> str:
    """The distribution of TTFT over all requests; a curve that ends below 1 refused the rest."""
    series = [
        Series(
            name_of(result.spec),
            [
                (value, rank / (CURVE_POINTS - 1))
                for rank, value in enumerate(result.curves.ttft_quantiles_s)
                if value < np.inf
            ],
        )
        for result in results
    ]
    bound = results[0].spec.slo_ttft
    edge = None if bound is None else 2 * bound
    return chart("TTFT", series, x_label="seconds", y_label="share of all requests", y_max=1.0, x_max=edge)


def load_charts(curves: Curves) -> list[str]:
    """Prefill and decode load over time."""
    return [
        chart("prefill load", [Series("", curves.prefill_work)], x_label="seconds", y_label="work ahead, s"),
        chart("decode load", [Series("", curves.decoding)], x_label="seconds", y_label="requests decoding per engine"),
    ]


def error_charts(curves: Curves) -> list[str]:
    """Predicted against actual."""
    charts = []
    for name, pairs, scale, unit in (
        ("TTFT", curves.ttft_pairs, 1.0, "s"),
        ("TBT", curves.tbt_pairs, 1e3, "ms"),
    ):
        dots = [(predicted * scale, actual * scale) for predicted, actual in pairs]
        edge = max((max(dot) for dot in dots), default=1.0)
        series = [Series("requests", dots, is_dots=True), Series("exact", [(0, 0), (edge, edge)], is_dashed=True)]
        charts.append(chart(f"{name} as predicted", series, x_label=f"predicted, {unit}", y_label=f"actual, {unit}"))
    return charts
