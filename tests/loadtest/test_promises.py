"""What a run promised, and whether it was kept, told from its predictions alone."""

from __future__ import annotations

import json
import math
import random

import pytest

from gateway.cli import main
from gateway.core.types import Role
from loadtest.bench_coverage import MAX_PROMPT_TOKENS, longer
from loadtest.promises import Prediction, kept_ratio, promises
from loadtest.workload import TraceRequest
from predictors.calibration import MarginState


def world(count: int, *, every_s: float = 0.1, late_s: float = 5.0, step_at: float = math.inf) -> list[Prediction]:
    """A second is predicted for each; it takes a lognormal time around that, twice as long from `step_at` on."""
    rng = random.Random(3)
    made = [number * every_s for number in range(count)]
    return [
        Prediction(at, at + late_s, 1000, 1.0, rng.lognormvariate(0.0, 0.2) * (2.0 if at >= step_at else 1.0))
        for at in made
    ]


def test_nine_of_ten_promises_are_kept() -> None:
    kept = kept_ratio(promises(world(4000), Role.PREFILL))
    assert kept is not None
    assert 0.88 <= kept <= 0.92


def test_what_is_not_known_yet_teaches_nothing() -> None:
    made = promises(world(40, late_s=1e6), Role.PREFILL)
    assert {promise.state for promise in made} == {MarginState.COLD}
    assert {promise.promised_s for promise in made} == {2.0}
    assert kept_ratio(made) is None


def test_thirty_seconds_after_a_step_promises_are_kept_again() -> None:
    made = promises(world(4000, step_at=200.0), Role.PREFILL)
    before = kept_ratio(made, start_s=200.0, end_s=204.0)
    after = kept_ratio(made, start_s=230.0, end_s=320.0)
    assert before is not None
    assert after is not None
    assert before < 0.2
    assert after >= 0.85


def test_every_second_prompt_is_made_longer_and_a_stranger() -> None:
    requests = [TraceRequest(float(number), 40_000, 5, (1,)) for number in range(6)]
    changed = list(longer(requests, 2.0))
    assert changed[:3] == requests[:3]
    assert [request.prompt_tokens for request in changed[3:]] == [MAX_PROMPT_TOKENS, 40_000, MAX_PROMPT_TOKENS]
    assert [request.block_ids for request in changed][3:] == [None, (1,), None]


@pytest.mark.slow
def test_promises_of_the_scheduler_are_kept_through_step_changes(capsys: pytest.CaptureFixture[str]) -> None:
    pool = ["--workload", "azure-conversation", "--seconds", "600", "--prefill", "2", "--decode", "2", "--seed", "1"]
    assert main(["bench", "coverage", *pool, "--profile", "llama3-8b-1xh100", "--at", "300", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["scenario"] for row in rows} == {
        *("nothing changes", "engine 2x slower", "engine lost", "half the prompts 4x longer")
    }
    for row in rows:
        assert 0.88 <= row["overall"] <= 0.92, row
        assert row["from_30_to_120_s"] >= 0.85, row
