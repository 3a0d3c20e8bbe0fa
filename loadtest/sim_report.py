"""The figures of a simulation, as one JSON-able object and as a table for people. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gateway.core.types import Role, Slo
from loadtest.flight import Flight
from loadtest.fluid import attainable_ratio
from loadtest.promises import Promise, kept_ratio, promises, tbt_predictions, ttft_predictions
from loadtest.report import Outcome, Spread, Status, is_attained, summarise
from loadtest.sim_plan import LoadSample, Run
from loadtest.sim_returns import return_figures
from predictors.calibration import Calibration, MarginState
from predictors.profile import Profile
from predictors.score import Score, pinball_loss_s, score


def figures(run: Run) -> dict[str, Any]:
    """What the run came to. Ratios are of all requests (or their prompt tokens), refused and failed ones included.

    `fluid_bound_ratio` is what no policy could pass (loadtest/fluid.py). `wasted_prefill_tokens` were computed for
    requests that then missed a bound, were refused or failed. Spreads are in seconds over answered requests;
    `ttft_of_shortest_s` is that of the quarter with the shortest prompts, `local_prefill_ratio` the share of requests
    whose prompt a decode engine computed. `prediction` compares the estimate at dispatch with what happened.
    """
    slo = run.plan.slo
    report = summarise(outcomes(run), slo, duration_s=run.duration_s)
    missed = [flight for flight in run.flights if not is_attained(outcome_of(flight), slo)]
    return {
        "requests": report.requests,
        "duration_s": run.duration_s,
        "goodput_per_s": report.goodput_per_s,
        "attained_ratio": report.attained_ratio,
        "attained_tokens_ratio": report.attained_tokens_ratio,
        "fluid_bound_ratio": attainable_ratio([flight.trace for flight in run.flights], run.plan.fleet, slo),
        "rejected": report.refused,
        "rejected_after_prefill": sum(flight.is_refused_after_prefill for flight in run.flights),
        "failed": report.errors,
        "reasons": report.reasons,
        "prefilled_tokens": sum(flight.prefilled_tokens for flight in run.flights),
        "wasted_prefill_tokens": sum(flight.prefilled_tokens for flight in missed),
        "wasted_prefill_s": sum(prefill_s(flight, run.plan.fleet.profile) for flight in missed),
        "ttft_s": spread(report.ttft_s),
        "tbt_s": spread(report.tbt_s),
        "ttft_of_shortest_s": spread(ttft_of_shortest(run.flights)),
        "local_prefill_ratio": sum(map(is_local, run.flights)) / max(1, len(run.flights)),
        "hit_ratio": hit_ratio(run.flights),
        "prefill_busy_ratio": run.prefill_busy_ratio,
        "decode_busy_ratio": run.decode_busy_ratio,
        "anti_phase": anti_phase(run.samples),
        "returns": return_figures(run.visits, [is_attained(outcome_of(visit), slo) for visit in run.visits]),
        "prediction": {
            "ttft": prediction(run.flights, lambda f: f.predicted_ttft_s, lambda o: o.ttft_s, slo.ttft_s),
            "tbt": prediction(run.flights, predicted_tbt_s, lambda o: o.tbt_s, slo.tbt_s),
        },
        "quantile": {
            "ttft": quantile(promises(ttft_predictions(run.flights), Role.PREFILL)),
            "tbt": quantile(promises(tbt_predictions(run.flights), Role.DECODE)),
        },
    }


def prefill_s(flight: Flight, profile: Profile) -> float:
    """Seconds of prefill, by the profile, behind the prompt tokens that were computed for the request."""
    computed, length = flight.prefilled_tokens, flight.trace.prompt_tokens
    return profile.whole_prefill_s(length, max(0, length - computed)) if computed else 0.0


def anti_phase(samples: Sequence[LoadSample]) -> float:
    """Correlation of prefill and decode load over time, -1 to 1: below 0 they swing against one another."""
    prefill = np.array([sample.prefill_work_s for sample in samples])
    decode = np.array([sample.decoding_count for sample in samples])
    if prefill.size < 2 or prefill.std() == 0 or decode.std() == 0:
        return 0.0
    return float(np.corrcoef(prefill, decode)[0, 1])


def outcomes(run: Run) -> list[Outcome]:
    """How each request ended, in order of arrival."""
    return [outcome_of(flight) for flight in run.flights]


def outcome_of(flight: Flight) -> Outcome:
    """How the request ended; the run must be over."""
    assert flight.outcome is not None, "a run is over when every request is"
    return flight.outcome


def attained(run: Run, slo: Slo) -> list[bool]:
    """For each request in order of arrival whether it was answered within these bounds."""
    return [is_attained(outcome, slo) for outcome in outcomes(run)]


def spread(value: Spread) -> dict[str, float | None]:
    """Mean and quantiles, seconds."""
    return {name: getattr(value, name) for name in ("mean", "p50", "p90", "p99")}


def is_local(flight: Flight) -> bool:
    """Whether the request was sent to a decode engine alone."""
    return flight.prefill is not None and flight.prefill is flight.decode and flight.prefill.role is Role.DECODE


def ttft_of_shortest(flights: Sequence[Flight]) -> Spread:
    """Over the quarter of requests with the shortest prompts, seconds."""
    ranked = sorted(flights, key=lambda flight: flight.trace.prompt_tokens)
    return Spread.of(outcome_of(flight).ttft_s for flight in ranked[: -(-len(ranked) // 4)])


def hit_ratio(flights: Sequence[Flight]) -> float | None:
    """Prompt tokens that needed no computing over all prompt tokens of prefills; None without any."""
    prefilled = [flight for flight in flights if flight.prefilled_tokens or flight.cached_tokens]
    total = sum(flight.trace.prompt_tokens for flight in prefilled)
    return sum(flight.cached_tokens for flight in prefilled) / total if total else None


def predicted_tbt_s(flight: Flight) -> float | None:
    """The step time that was predicted when its decode engine was chosen."""
    if flight.predicted_tbt_s is not None:
        return flight.predicted_tbt_s
    return None if flight.dispatch is None else flight.dispatch.estimate.tbt_s


def pairs_of(
    flights: Sequence[Flight],
    predicted: Callable[[Flight], float | None],
    actual: Callable[[Outcome], float | None],
) -> list[tuple[float, float]]:
    """Predicted and actual seconds of the answered requests that have both."""
    pairs = []
    for flight in flights:
        outcome = outcome_of(flight)
        if outcome.status is Status.OK:
            promise, truth = predicted(flight), actual(outcome)
            if promise is not None and truth is not None and truth > 0:
                pairs.append((promise, truth))
    return pairs


def prediction(
    flights: Sequence[Flight],
    predicted: Callable[[Flight], float | None],
    actual: Callable[[Outcome], float | None],
    bound_s: float | None,
) -> dict[str, float | None] | None:
    """Errors relative to the actual time; None when nothing was answered."""
    pairs = pairs_of(flights, predicted, actual)
    if not pairs:
        return None
    result: Score = score([p for p, _ in pairs], [a for _, a in pairs], bound_s=bound_s)
    return {
        "mean_absolute_error_ratio": result.mean_absolute_error_ratio,
        "p50_error_ratio": result.p50_error_ratio,
        "p95_error_ratio": result.p95_error_ratio,
        "pinball_loss_s": result.pinball_loss_s,
        "bias_ratio": result.bias_ratio,
        "coverage_ratio": result.coverage_ratio,
        "wrong_decisions_per_thousand": result.wrong_decisions_per_thousand,
    }


def quantile(made: Sequence[Promise]) -> dict[str, Any] | None:
    """How the p90 stated at dispatch was kept, loadtest/promises.py; None without predictions."""
    if not made:
        return None
    level = Calibration().quantile
    loss = pinball_loss_s(np.array([p.promised_s for p in made]), np.array([p.actual_s for p in made]), quantile=level)
    states = [str(promise.state) for promise in made]
    return {
        "level": level,
        "coverage_ratio": kept_ratio(made),
        "pinball_loss_s": loss,
        "promises": {str(state): states.count(str(state)) for state in MarginState},
    }


def table(run: Run) -> str:
    """The figures for people."""
    result = figures(run)
    lines = [
        summarise(outcomes(run), run.plan.slo, duration_s=run.duration_s).to_table(),
        "",
        f"bound     {percent(result['fluid_bound_ratio'])} of the requests could be in time at best",
        f"refused   {result['rejected']}, of these {result['rejected_after_prefill']} after their prefill",
        f"prefill   {result['prefilled_tokens']} tokens computed, {result['wasted_prefill_tokens']} of them in vain;"
        f" {percent(result['hit_ratio'])} of prompt tokens were cached",
        f"busy      prefill {percent(result['prefill_busy_ratio'])}, decode {percent(result['decode_busy_ratio'])}",
    ]
    for name, errors in result["prediction"].items():
        if errors is not None:
            lines.append(
                f"{name.upper():<10}predicted with a median error of {percent(errors['p50_error_ratio'])},"
                f" 95 % within {percent(errors['p95_error_ratio'])}, bias {percent(errors['bias_ratio'])}"
            )
    for name, promised in result["quantile"].items():
        if promised is not None:
            lines.append(
                f"{name.upper():<10}p{100 * promised['level']:g} kept {percent(promised['coverage_ratio'])} of the time"
            )
    return "\n".join(lines)


def percent(ratio: float | None) -> str:
    """A ratio for people."""
    return "-" if ratio is None else f"{ratio:.1%}"
