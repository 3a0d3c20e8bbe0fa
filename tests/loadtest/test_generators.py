"""Generated workloads: deterministic, well-formed, and near the traces whose names they bear."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import pytest

from loadtest.generators import SHAPES, generate
from loadtest.traces import read_trace
from loadtest.workload import BLOCK_TOKENS, Lengths, TraceRequest, WorkloadError, block_count, describe, sliced

TRACES = Path(__file__).parents[2].parent / "shared" / "traces"
HOUR_S = 3537.0


class Figures(NamedTuple):
    """A row of the table in the docstring of loadtest/generators.py; None is not known."""

    rate_per_s: float
    prompt: tuple[float, float | None, float | None]
    output: tuple[float, float | None, float | None]
    hit_ratio: float | None
    dispersion: float | None


PUBLISHED = {
    "conversation": Figures(3.40, (12035, 6909, 27367), (343, 350, 597), 0.366, 2.48),
    "azure-conversation": Figures(5.53, (1155, 1020, 2735), (211, 129, 424), None, 8.87),
    "toolagent": Figures(6.56, (8596, None, None), (182, None, None), 0.59, None),
    "synthetic": Figures(1.11, (15325, None, None), (149, None, None), 0.64, None),
}
FILES = {"conversation": "conversation_trace.jsonl", "azure-conversation": "azure_conv_2023.csv"}


def mean_figures(name: str) -> Figures:
    """Of several hours, each with its own seed: one hour of a drifting rate says little about the rate."""
    hours = [describe(sliced(generate(name, seed=seed), seconds=HOUR_S)) for seed in range(5)]
    return Figures(
        fmean(hour.rate_per_s for hour in hours),
        mean_lengths([hour.prompt for hour in hours]),
        mean_lengths([hour.output for hour in hours]),
        fmean(hour.hit_ratio or 0.0 for hour in hours),
        fmean(hour.dispersion for hour in hours),
    )


def mean_lengths(lengths: list[Lengths]) -> tuple[float, float, float]:
    return (fmean(one.mean for one in lengths), fmean(one.p50 for one in lengths), fmean(one.p90 for one in lengths))


def near(real: Iterable[float | None], generated: Iterable[float | None], tolerance: float) -> bool:
    pairs = list(zip(real, generated, strict=True))
    return all(a is None or (b is not None and abs(b - a) <= tolerance * a) for a, b in pairs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_generator_comes_near_the_published_figures_of_its_trace(name: str) -> None:
    real, generated = PUBLISHED[name], mean_figures(name)
    assert near([real.rate_per_s], [generated.rate_per_s], 0.1)
    assert near(real.prompt, generated.prompt, 0.15)
    assert near(real.output, generated.output, 0.1)
    assert near([real.hit_ratio], [generated.hit_ratio], 0.1)
    assert near([real.dispersion], [generated.dispersion], 0.3)


@pytest.mark.parametrize("name", FILES)
def test_the_published_figures_are_those_of_the_file(name: str) -> None:
    path = TRACES / FILES[name]
    if not path.exists():
        pytest.skip(f"{path.name} is not at hand (looked in {path.parent.name}/ beside the repository)")
    real = describe(read_trace(path))
    assert real.rate_per_s == pytest.approx(PUBLISHED[name].rate_per_s, abs=0.005)
    assert mean_lengths([real.prompt]) == pytest.approx(PUBLISHED[name].prompt, abs=0.5)
    assert mean_lengths([real.output]) == pytest.approx(PUBLISHED[name].output, abs=0.5)
    assert real.hit_ratio == pytest.approx(PUBLISHED[name].hit_ratio, abs=0.0005)
    assert real.dispersion == pytest.approx(PUBLISHED[name].dispersion, abs=0.005)


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_seed_gives_the_same_requests_and_another_seed_others(name: str) -> None:
    first, again, other = (list(islice(generate(name, seed=seed), 300)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", SHAPES)
def test_every_request_is_well_formed_and_time_never_goes_back(name: str) -> None:
    requests = list(islice(generate(name, seed=3), 5000))
    assert all(earlier.arrival_s <= later.arrival_s for earlier, later in pairwise(requests))
    assert all(request.prompt_tokens >= 1 and request.output_tokens >= 1 for request in requests)
    known = [request for request in requests if request.block_ids is not None]
    assert all(len(request.block_ids or ()) == block_count(request.prompt_tokens) for request in known)
    assert max(request.prompt_tokens for request in requests) <= SHAPES[name].max_prompt_tokens


def test_a_next_turn_grows_its_session_and_keeps_every_full_block() -> None:
    previous: dict[str | None, TraceRequest] = {}
    for request in islice(generate("conversation", seed=4), 5000):
        if request.turn:
            last = previous[request.session]
            full = last.prompt_tokens // BLOCK_TOKENS
            assert request.turn == (last.turn or 0) + 1
            assert request.prompt_tokens > last.prompt_tokens + last.output_tokens
            assert (request.block_ids or ())[:full] == (last.block_ids or ())[:full]
        previous[request.session] = request
    assert max(request.turn or 0 for request in previous.values()) > 3


def test_conversation_arrives_on_ticks_of_three_seconds() -> None:
    assert all(request.arrival_s % 3.0 == 0 for request in islice(generate("conversation", seed=5), 1000))


def test_an_unknown_workload_lists_the_known_ones() -> None:
    with pytest.raises(WorkloadError, match="conversation, azure-conversation, toolagent"):
        generate("chess", seed=1)
