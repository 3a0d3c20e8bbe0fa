"""The engine model against queueing theory, vLLM's rules, and itself advanced one step at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.errors import BadRequest, ConfigError
from loadtest.engine import Engine
from loadtest.engine_types import (
    Crashed,
    EngineRequest,
    EngineSettings,
    Finished,
    FinishReason,
    HeldKv,
    LeaseExpired,
    LoadFailure,
    Outcome,
    Preempted,
    PrefillFinished,
    RemoteKv,
    Tokens,
    TransferFailed,
    TransferFinished,
)
from loadtest.fabric import Fabric
from loadtest.kv_cache import BlockRemoved, BlockStored
from loadtest.step_times import LinearStepTimes

TIMES = LinearStepTimes()
SMALL = EngineSettings(
    block_tokens=4, kv_blocks=64, step_tokens=64, batch_limit=8, max_model_tokens=128, vocabulary=tuple(range(50))
)


def make(id: str = "e", fabric: Fabric | None = None, **changes: Any) -> Engine:
    engine = Engine(id, replace(SMALL, **changes), TIMES, fabric)
    if fabric is not None:
        fabric.attach(engine, id, 5600)
    return engine


def sized(id: str, prompt: int, output: int, **more: Any) -> EngineRequest:
    return EngineRequest(id, prompt, output, **more)


def spoken(id: str, tokens: Sequence[int], output: int = 8, **more: Any) -> EngineRequest:
    return EngineRequest(id, len(tokens), output, token_ids=tuple(tokens), is_eos_ignored=True, **more)


def run(*engines: Engine, until: float = 1e6, arrivals: Sequence[tuple[float, EngineRequest]] = ()) -> list[Outcome]:
    """Submits to the first engine at the given instants and steps all in time order."""
    out: list[Outcome] = []
    coming = sorted(arrivals, key=lambda arrival: arrival[0], reverse=True)
    while True:
        due = [(at, i) for i, e in enumerate(engines) if (at := e.next_step_at()) is not None]
        at, i = min(due, default=(float("inf"), -1))
        if coming and coming[-1][0] <= at:
            at, request = coming.pop()
            engines[0].submit(request, now=at)
        elif at <= until:
            out += engines[i].step(now=at)
        else:
            return out


def ends(outcomes: Sequence[Outcome]) -> dict[str, Finished]:
    return {o.request_id: o for o in outcomes if isinstance(o, Finished)}


def kinds(outcomes: Sequence[Outcome]) -> set[type]:
    return {type(o) for o in outcomes}


def text(outcomes: Sequence[Outcome], id: str) -> tuple[int, ...]:
    said = (dict(zip(o.request_ids, o.token_ids, strict=True)) for o in outcomes if isinstance(o, Tokens))
    return tuple(token for part in said for token in part.get(id, ()))


def remote(held: HeldKv | None, host: str = "p", **changes: Any) -> RemoteKv:
    assert held is not None
    return replace(RemoteKv(held.block_ids, host, held.request_id, host, 5600), **changes)


def prefilled(engine: Engine, tokens: Sequence[int], id: str = "r") -> HeldKv:
    engine.submit(spoken(id, tokens, 1, is_kv_held=True), now=0.0)
    held = ends(run(engine, until=1.0))[id].held
    assert held is not None
    return held


# ---- time and order ------------------------------------------------------------------------------------------------


def test_a_prefill_takes_the_time_of_its_chunks() -> None:
    done = ends(run(make(), arrivals=[(2.0, sized("r", 100, 1))]))["r"]
    assert done.at == pytest.approx(2.0 + TIMES.prefill_s(64, 0) + TIMES.prefill_s(36, 64))


def test_an_engine_with_work_never_idles() -> None:
    engine = make()
    out = run(engine, arrivals=[(0.0, sized(f"r{i}", 20 + i, 5)) for i in range(20)])
    assert engine.counters.busy_s == pytest.approx(max(end.at for end in ends(out).values()))


def test_requests_are_prefilled_in_order_of_arrival() -> None:
    out = run(make(), arrivals=[(i * 1e-4, sized(f"r{i}", 120 - i, 1)) for i in range(9)])
    assert [o.request_id for o in out if isinstance(o, PrefillFinished)] == [f"r{i}" for i in range(9)]


def test_decoding_goes_on_while_another_prompt_is_prefilled() -> None:
    out = run(make(step_tokens=16), arrivals=[(0.0, sized("a", 4, 60)), (0.02, sized("b", 100, 1))])
    done, shared = ends(out), [o for o in out if isinstance(o, Tokens) and o.request_ids == ("a",)]
    during = [t for o in shared for t in o.token_at if 0.02 < t < done["b"].at]
    assert len(during) >= 6


@pytest.mark.slow
def test_the_mean_wait_is_that_of_an_m_d_1_queue() -> None:
    rng, at, load = random.Random(7), 0.0, 0.7
    engine = make(batch_limit=1)
    service_s = TIMES.prefill_s(50, 0)
    arrivals = []
    for i in range(20_000):
        at += rng.expovariate(load / service_s)
        arrivals.append((at, sized(f"r{i}", 50, 1)))
    waits = [e.at - e.arrived_at - service_s for e in ends(run(engine, arrivals=arrivals)).values()]
    assert sum(waits) / len(waits) == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.05)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 0.5), st.integers(1, 60), st.integers(1, 60), st.booleans()), min_size=1, max_size=12
    ),
    st.sampled_from([32, 40, 64]),
)
def test_runs_of_steps_give_the_same_instants_as_single_steps(
    wanted: list[tuple[float, int, int, bool]], kv_blocks: int
) -> None:
    arrivals = [
        (at, spoken(f"r{i}", range(prompt), output) if has_text else sized(f"r{i}", prompt, output))
        for i, (at, prompt, output, has_text) in enumerate(wanted)
    ]
    whole = run(make(kv_blocks=kv_blocks), arrivals=arrivals)
    single = run(make(kv_blocks=kv_blocks, max_run_steps=1), arrivals=arrivals)
    for id, end in ends(single).items():
        assert ends(whole)[id].at == pytest.approx(end.at)
        assert text(whole, id) == text(single, id)


def test_a_submit_cuts_a_run_at_the_step_under_way() -> None:
    engine = make()
    engine.submit(sized("a", 4, 100), now=0.0)
    first = engine.step(now=0.0), engine.step(now=engine.next_step_at() or 0.0)
    assert ends(first[1]) == {}
    far = engine.next_step_at()
    engine.submit(sized("b", 4, 1), now=0.05)
    near = engine.next_step_at()
    assert far is not None
    assert near is not None
    assert 0.05 <= near < 0.06 < far


# ---- memory ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 0.3), st.integers(1, 64), st.integers(1, 64), st.integers(0, 3)), max_size=25),
    st.integers(0, 30),
)
def test_memory_is_never_over_capacity_and_all_of_it_comes_back(
    wanted: list[tuple[float, int, int, int]], abort_every: int
) -> None:
    engine = make(kv_blocks=32)
    arrivals = [
        (at, spoken(f"r{i}", [family, *range(prompt)], min(output, 63)))
        for i, (at, prompt, output, family) in enumerate(wanted)
    ]
    for at, request in sorted(arrivals, key=lambda arrival: arrival[0]):
        run(engine, until=at)
        engine.submit(request, now=at)
        if abort_every and int(request.id[1:]) % abort_every == 0:
            engine.abort(request.id, now=at)
        assert 0 <= engine.load().kv_usage_ratio <= 1
    run(engine)
    assert engine.load().kv_usage_ratio == 0
    assert sum(engine.counters.finished.values()) == len(wanted)


def test_a_request_that_loses_its_memory_is_computed_again_and_says_the_same() -> None:
    arrivals = [(0.0, spoken(f"r{i}", range(i, i + 20), 100)) for i in range(4)]
    tight, roomy = run(make(kv_blocks=50), arrivals=arrivals), run(make(kv_blocks=500), arrivals=arrivals)
    assert Preempted in kinds(tight)
    assert Preempted not in kinds(roomy)
    for i in range(4):
        assert text(tight, f"r{i}") == text(roomy, f"r{i}")


def test_the_latest_request_is_preempted_first() -> None:
    out = run(make(kv_blocks=32), arrivals=[(i * 1e-3, sized(f"r{i}", 40, 60)) for i in range(3)])
    assert next(o.request_id for o in out if isinstance(o, Preempted)) == "r2"


def test_a_shared_prefix_is_computed_once() -> None:
    engine = make()
    run(engine, arrivals=[(0.0, spoken("a", range(30))), (1.0, spoken("b", [*range(24), 99, 98]))])
    assert engine.counters.prefix_hit_tokens == 24


def test_a_full_hit_still_computes_the_last_token() -> None:
    engine = make()
    out = run(engine, arrivals=[(0.0, spoken("a", range(32), 1)), (1.0, spoken("b", range(32), 1))])
    assert engine.counters.prefix_hit_tokens == 28
    assert text(out, "a") == text(out, "b")


@pytest.mark.parametrize("key", [{"salt": "s"}, {"lora": "l"}])
def test_salt_and_adapter_keep_prefixes_apart(key: dict[str, Any]) -> None:
    engine = make()
    run(engine, arrivals=[(0.0, spoken("a", range(30))), (1.0, spoken("b", range(30), **key))])
    assert engine.counters.prefix_hit_tokens == 0


def test_the_least_recently_used_prefix_is_evicted_and_its_tail_first() -> None:
    engine = make(kv_blocks=32, has_kv_events=True)
    prompts = {"a": range(60), "b": range(100, 140), "c": range(200, 260)}
    run(engine, arrivals=[(i, spoken(id, tokens, 1)) for i, (id, tokens) in enumerate(prompts.items())])
    events = engine.take_kv_events()
    stored = [e for e in events if isinstance(e, BlockStored)]
    removed = [e.block_hash for e in events if isinstance(e, BlockRemoved)]
    assert removed == list(reversed(stored[0].block_hashes))[: len(removed)]
    assert 0 < len(removed) < 15


def test_events_describe_the_chain_of_full_blocks_with_their_tokens() -> None:
    engine = make(has_kv_events=True)
    run(engine, arrivals=[(0.0, spoken("a", range(10), 4)), (1.0, spoken("b", range(12), 1))])
    first, grown, other = [e for e in engine.take_kv_events() if isinstance(e, BlockStored)]
    assert first.token_ids == tuple(range(8))
    assert first.parent_block_hash is None
    assert grown.token_ids[:2] == (8, 9)
    assert grown.parent_block_hash == other.parent_block_hash == first.block_hashes[-1]


def test_a_reset_forgets_prefixes_only_while_nothing_is_in_use() -> None:
    engine = make()
    engine.submit(spoken("a", range(30)), now=0.0)
    engine.step(now=0.0)
    assert not engine.reset_prefix_cache()
    run(engine)
    assert engine.reset_prefix_cache()
    run(engine, arrivals=[(9.0, spoken("b", range(30)))])
    assert engine.counters.prefix_hit_tokens == 0


# ---- hand-off --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_a_pair_says_what_a_single_engine_says(prompt: list[int], earlier: list[int]) -> None:
    alone = text(run(make(), arrivals=[(0.0, spoken("r", prompt))]), "r")
    fabric = Fabric()
    prefill, decode = make("p", fabric), make("d", fabric)
    run(decode, arrivals=[(0.0, spoken("earlier", earlier))])
    held = prefilled(prefill, prompt)
    out = run(decode, prefill, arrivals=[(1.0, spoken("r", prompt, remote=remote(held)))])
    assert TransferFinished in kinds(out)
    assert text(out, "r") == alone
    assert prefill.load().held_count == 0


def test_the_text_follows_the_kv_and_not_the_prompt() -> None:
    fabric = Fabric()
    prefill, decode = make("p", fabric), make("d", fabric)
    held = prefilled(prefill, range(40))
    swapped = replace(remote(held), block_ids=(held.block_ids[1], held.block_ids[0], *held.block_ids[2:]))
    out = run(decode, prefill, arrivals=[(1.0, spoken("r", range(40), remote=swapped))])
    assert text(out, "r") != text(run(make(), arrivals=[(0.0, spoken("r", range(40)))]), "r")


def test_a_second_read_is_counted_and_may_find_other_memory() -> None:
    fabric = Fabric()
    prefill, decode = make("p", fabric, kv_blocks=32), make("d", fabric)
    held = prefilled(prefill, range(40))
    right = run(decode, prefill, arrivals=[(1.0, spoken("r", range(40), remote=remote(held)))])
    run(prefill, arrivals=[(2.0, spoken("other", range(50, 170), 1))])
    decode.reset_prefix_cache()
    wrong = run(decode, prefill, arrivals=[(3.0, spoken("again", range(40), remote=remote(held)))])
    assert prefill.counters.reads_after_release == 1
    assert text(wrong, "again") != text(right, "r")


def test_an_unread_lease_expires_after_thirty_seconds_and_frees_the_blocks() -> None:
    prefill = make("p", Fabric())
    prefilled(prefill, range(40))
    assert prefill.load().kv_usage_ratio > 0
    out = run(prefill)
    assert [o.at for o in out if isinstance(o, LeaseExpired)] == [pytest.approx(30.0, abs=0.1)]
    assert prefill.counters.expired_leases == 1
    assert prefill.load().kv_usage_ratio == 0


def test_a_decode_engine_that_has_the_request_keeps_the_lease_alive() -> None:
    fabric = Fabric()
    prefill, decode = make("p", fabric), make("d", fabric, batch_limit=1, kv_blocks=20_000, max_model_tokens=60_000)
    held = prefilled(prefill, range(40))
    blocker = sized("blocker", 4, 20_000)
    out = run(decode, prefill, arrivals=[(1.0, blocker), (1.1, spoken("r", range(40), remote=remote(held)))])
    assert ends(out)["blocker"].at > 60
    assert prefill.counters.expired_leases == 0
    assert ends(out)["r"].reason is FinishReason.LENGTH


def test_without_tp_size_there_is_no_heartbeat() -> None:
    fabric = Fabric()
    prefill, decode = make("p", fabric), make("d", fabric, batch_limit=1, kv_blocks=20_000, max_model_tokens=60_000)
    held = prefilled(prefill, range(40))
    mute = remote(held, is_heartbeat_possible=False)
    run(decode, prefill, arrivals=[(1.0, sized("b", 4, 20_000)), (1.1, spoken("r", range(40), remote=mute))])
    assert prefill.counters.expired_leases == 1
    assert prefill.counters.reads_after_release == 1


def test_an_abort_while_waiting_frees_the_far_side() -> None:
    fabric = Fabric()
    prefill, decode = make("p", fabric), make("d", fabric)
    held = prefilled(prefill, range(40))
    decode.submit(spoken("r", range(40), remote=remote(held)), now=1.0)
    assert decode.abort("r", now=1.0)
    assert ends(run(decode, until=2.0))["r"].reason is FinishReason.ABORT
    assert prefill.load().held_count == 0


def test_concurrent_transfers_share_the_bandwidth_of_their_source() -> None:
    fabric = Fabric(bytes_per_s=40 * 131072 / 0.1, latency_s=0.0)
    prefill = make("p", fabric, batch_limit=2)
    decodes = [make(f"d{i}", fabric) for i in range(2)]
    for i, decode in enumerate(decodes):
        held = prefilled(prefill, range(i, i + 40), f"r{i}")
        decode.submit(spoken(f"r{i}", range(i, i + 40), remote=remote(held)), now=1.0)
    out = run(*decodes, prefill)
    taken = [o.at - o.started_at for o in out if isinstance(o, TransferFinished)]
    assert taken == [pytest.approx(0.2), pytest.approx(0.2)]


def test_unreadable_kv_fails_the_request_or_is_computed_again_as_configured() -> None:
    outcomes = {}
    for policy in LoadFailure:
        fabric = Fabric()
        held = prefilled(make("p", fabric), range(40))
        stranger = remote(held, engine_id="restarted since")
        decode = make("d", fabric, load_failure=policy)
        outcomes[policy] = run(decode, arrivals=[(1.0, spoken("r", range(40), remote=stranger))])
        assert TransferFailed in kinds(outcomes[policy])
    assert ends(outcomes[LoadFailure.FAIL])["r"].reason is FinishReason.ERROR
    alone = run(make(), arrivals=[(0.0, spoken("r", range(40)))])
    assert text(outcomes[LoadFailure.RECOMPUTE], "r") == text(alone, "r")


def test_incomplete_parameters_park_a_request_until_it_is_aborted() -> None:
    fabric = Fabric()
    held = prefilled(make("p", fabric), range(40))
    decode = make("d", fabric)
    lost = remote(held, request_id=None)
    out = run(decode, arrivals=[(1.0, spoken("r", range(40), remote=lost)), (1.1, spoken("s", range(9)))])
    assert set(ends(out)) == {"s"}
    assert decode.load().deferred_count == 1
    decode.abort("r", now=2.0)
    assert set(ends(run(decode))) == {"r"}
    assert decode.load().kv_usage_ratio == 0


def test_a_remote_prefill_without_blocks_kills_the_engine() -> None:
    engine = make("d", Fabric())
    engine.submit(spoken("r", range(9), remote=RemoteKv((), "p", "x", "p", 5600)), now=0.0)
    assert Crashed in kinds(run(engine))
    assert engine.next_step_at() is None
    assert engine.step(now=9.0) == []


# ---- ends and refusals -----------------------------------------------------------------------------------------------


def test_an_abort_in_the_batch_takes_effect_at_the_end_of_the_step() -> None:
    engine = make()
    engine.submit(spoken("r", range(9), 60), now=0.0)
    engine.step(now=0.0)
    assert engine.abort("r", now=0.001)
    out = run(engine)
    assert ends(out)["r"].reason is FinishReason.ABORT
    assert text(out, "r") == ()
    assert not engine.abort("r", now=1.0)


def test_a_text_ends_at_its_end_of_sequence_unless_told_otherwise() -> None:
    plain = replace(spoken("r", range(9), 100), is_eos_ignored=False)
    engine = make(mean_output_tokens=10)
    out = run(
        engine, arrivals=[(0.0, plain), (1.0, replace(plain, id="s", min_tokens=50)), (2.0, spoken("t", range(9), 100))]
    )
    ended = ends(out)
    assert (ended["r"].reason.value, ended["s"].reason.value, ended["t"].reason.value) == ("stop", "stop", "length")
    assert ended["r"].output_tokens < 50 <= ended["s"].output_tokens < ended["t"].output_tokens == 100
    assert text(out, "t")[: len(text(out, "r"))] == text(out, "r")


@pytest.mark.parametrize("bad", [sized("r", 0, 1), sized("r", 1, 0), sized("r", 100, 29), sized("taken", 1, 1)])
def test_a_request_that_cannot_be_served_is_refused(bad: EngineRequest) -> None:
    engine = make()
    engine.submit(sized("taken", 1, 1), now=0.0)
    with pytest.raises(BadRequest):
        engine.submit(bad, now=0.0)


@pytest.mark.parametrize("change", [{"kv_blocks": 31}, {"step_tokens": 7}, {"block_tokens": 0}])
def test_settings_that_cannot_work_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(SMALL, **change)
