"""What every policy of the table keeps to, whatever the load, the reports and the prefixes."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.admission import AdmissionLimits
from gateway.core.estimate import estimate_at, estimate_pairs
from gateway.core.events import EngineFound, EngineHealth, EngineReport
from gateway.core.interfaces import Chooser, EngineLoad, PairTable
from gateway.core.scheduler import Scheduler
from gateway.core.types import Dispatch, Engine, Health, Report, Request, Role, Slo
from gateway.plugins import plug_in
from gateway.policies import POLICIES
from predictors.online import Online
from tests.builders import a_dispatch, a_load, a_mesh, a_pair_table, a_request, an_engine, hashes

every_policy = pytest.mark.parametrize("name", POLICIES)

TIGHT: dict[str, dict[str, Any]] = {
    "sglang_cache_aware": {"max_tree_tokens": 2048},
    "smg_cache_aware": {"max_tree_tokens": 2048},
    "aibrix_prefix_cache": {"max_blocks_per_engine": 128},
    "preble_e2": {"max_tree_tokens": 2048},
    "llm_d_sticky": {"prefix": {"max_blocks_per_engine": 32}},
    "llm_d_predicted_latency": {"prefix": {"max_blocks_per_engine": 32}},
}
"""Settings of policies with an index of their own under which 10,000 prompts are far over its limit."""


CACHE = {"block_tokens": 64, "kv_capacity_tokens": 100_000}
"""With these an engine's cache is modelled from what is sent to it."""


def started(name: str, seed: int = 1, **policy_settings: Any) -> Chooser:
    return plug_in("policy", POLICIES, name, policy_settings).start(random.Random(seed))


def dispatch_of(request: Request, pairs: PairTable, costs: Any) -> Dispatch:
    return Dispatch(request.id, request.attempt, estimate_at(pairs, int(np.argmin(costs))))


optional_reports = st.none() | st.builds(
    Report,
    running_count=st.integers(0, 300),
    waiting_count=st.integers(0, 300),
    kv_usage_ratio=st.none() | st.floats(0, 1),
    waiting_uncached_tokens=st.none() | st.integers(0, 10**7),
    gen_tokens_per_s=st.none() | st.floats(0, 1e6),
)


@st.composite
def loads(draw: st.DrawFn, engine: Engine) -> EngineLoad:
    report = draw(optional_reports)
    return a_load(
        engine,
        report=report,
        report_age_s=None if report is None else draw(st.floats(0, 1e4)),
        own_count=draw(st.integers(0, 300)),
        queued_count=draw(st.integers(0, 300)),
        decoding_count=draw(st.integers(0, 300)),
        prefill_work_s=draw(st.floats(0, 1e4)),
        queued_tokens=draw(st.integers(0, 10**8)),
        kv_tokens=draw(st.integers(0, 10**8)),
    )


requests = st.builds(
    a_request,
    request_id=st.sampled_from(["r1", "r2"]),
    prompt_tokens=st.integers(1, 5000),
    block_hashes=st.dictionaries(
        st.sampled_from([16, 512]), st.lists(st.integers(0, 2**64 - 1), max_size=9).map(lambda names: hashes(*names))
    ),
    slo=st.builds(Slo, ttft_s=st.none() | st.floats(0.01, 60), tbt_s=st.none() | st.floats(0.001, 1)),
)


@st.composite
def tables(draw: st.DrawFn) -> tuple[Request, PairTable]:
    """A request and the pairs of a fleet of at least one pair: two pools, all roles, prefixes that can be fetched."""
    engines = [an_engine("a0"), *a_mesh(draw(st.integers(0, 3)), draw(st.integers(0, 3)), can_share_prefixes=True)]
    engines += [an_engine(name, role, pool="other") for name, role in (("x", Role.PREFILL), ("y", Role.DECODE))]
    kept = draw(st.lists(st.sampled_from(engines), unique_by=lambda engine: engine.id)) or [engines[0]]
    request = draw(requests)
    fleet = [draw(loads(engine)) for engine in sorted(kept, key=lambda engine: engine.id)]
    cached = draw(st.lists(st.integers(0, request.prompt_tokens - 1), min_size=len(fleet), max_size=len(fleet)))
    pairs = estimate_pairs(request, fleet, Online().start(), np.array(cached, dtype=np.int64))
    if len(pairs) == 0:
        lone = [draw(loads(engines[0]))]
        pairs = estimate_pairs(request, lone, Online().start(), np.array(cached[:1], dtype=np.int64))
    return request, pairs


@every_policy
@settings(max_examples=15, deadline=None)
@given(st.lists(tables(), min_size=1, max_size=3))
def test_costs_are_finite_or_inf_for_every_pair_and_some_pair_is_finite(
    name: str, decisions: list[tuple[Request, PairTable]]
) -> None:
    chooser = started(name)
    for number, (request, pairs) in enumerate(decisions):
        costs = chooser.costs(request, pairs, now=1e6 + number)
        assert costs.shape == (len(pairs),)
        assert costs.dtype == np.float64
        assert not np.isnan(costs).any()
        assert not np.isneginf(costs).any()
        assert np.isfinite(costs).any()
        chooser.dispatched(request, dispatch_of(request, pairs, costs), now=1e6 + number)


def decisions_of(name: str, engines: list[Engine], seed: int) -> list[object]:
    """What a scheduler with this policy decides for 40 requests of 5 conversations."""
    scheduler = Scheduler(
        policy=POLICIES[name](), predictor=Online(), limits=AdmissionLimits(), rng=random.Random(seed), max_blocks=4096
    )
    for engine in engines:
        scheduler.apply(EngineFound(engine), now=0.0)
        scheduler.apply(EngineHealth(engine.id, Health.UP), now=0.0)
    for engine in sorted(engines, key=lambda engine: engine.id)[::2]:
        scheduler.apply(EngineReport(engine.id, Report(1, 2, kv_usage_ratio=0.25)), now=0.0)
    requests = [
        a_request(
            f"r{number}",
            prompt_tokens=128 * (number // 5 + 1),
            block_hashes={64: hashes(*(100 * (number % 5) + block for block in range(2 * (number // 5 + 1))))},
            slo=Slo(2.0, 0.1),
        )
        for number in range(40)
    ]
    return [scheduler.decide(request, now=float(number)) for number, request in enumerate(requests)]


@every_policy
def test_the_order_in_which_engines_are_found_does_not_matter(name: str) -> None:
    engines = [*a_mesh(4, 4, **CACHE), an_engine("b1", **CACHE), an_engine("b2", **CACHE)]
    shuffled = random.Random(3).sample(engines, len(engines))
    assert decisions_of(name, engines, seed=7) == decisions_of(name, shuffled, seed=7)


@every_policy
def test_the_same_seed_gives_the_same_decisions(name: str) -> None:
    engines = a_mesh(3, 3, **CACHE)
    assert decisions_of(name, engines, seed=7) == decisions_of(name, engines, seed=7)


@every_policy
def test_a_single_pair_is_chosen(name: str) -> None:
    pairs = a_pair_table([a_load("p1", Role.PREFILL)], [a_load("d1", Role.DECODE)])
    assert np.isfinite(started(name).costs(a_request(), pairs, now=0.0)).tolist() == [True]


@every_policy
def test_a_large_fleet_that_never_reported_and_holds_nothing_is_chosen_from(name: str) -> None:
    prefills = [a_load(f"p{number:02}", Role.PREFILL) for number in range(32)]
    pairs = a_pair_table(prefills, [a_load(f"d{number:02}", Role.DECODE) for number in range(32)])
    costs = started(name).costs(a_request(prompt_tokens=8192), pairs, now=0.0)
    assert costs.shape == (1024,)
    assert np.isfinite(costs).any()


@every_policy
def test_only_policies_that_know_of_fetching_choose_it(name: str) -> None:
    """p2 holds all but waits for 9 s; p1 could fetch that prefix in no time, and holds nothing."""
    fleet = [
        a_load(an_engine("d1", Role.DECODE)),
        a_load(an_engine("p1", Role.PREFILL, can_share_prefixes=True)),
        a_load(an_engine("p2", Role.PREFILL, can_share_prefixes=True), prefill_work_s=9.0),
    ]
    request = a_request(prompt_tokens=4000)
    pairs = estimate_pairs(request, fleet, Online().start(), np.array([0, 0, 3999]))
    costs = started(name).costs(request, pairs, now=0.0)
    fetches = dispatch_of(request, pairs, costs).estimate.fetch_from is not None
    assert fetches == (name in ("sluice", "least_work", "prefix_affinity", "mooncake_global"))


@every_policy
def test_state_is_bounded(name: str) -> None:
    """After 10,000 prompts, all different, it is hardly larger than after 5,000."""
    chooser = started(name, **TIGHT.get(name, {}))
    pairs = a_pair_table(
        [a_load(f"p{n}", Role.PREFILL) for n in range(4)], [a_load(f"d{n}", Role.DECODE) for n in range(4)]
    )
    sizes = []
    for number in range(10_000):
        names = range(16 * number, 16 * number + 16)
        request = a_request(f"r{number}", prompt_tokens=256, block_hashes={16: hashes(*names)})
        if number % 100 == 0:
            chooser.costs(request, pairs, now=float(number))
        chooser.dispatched(request, a_dispatch(prefill=f"p{number % 4}", decode=f"d{number % 4}"), now=float(number))
        if number in (4_999, 9_999):
            sizes.append(len(pickle.dumps(chooser)))
    assert sizes[1] < 1.2 * sizes[0] + 100
