"""What each engine has cached, how it is known, and what happens when that turns out wrong."""

from __future__ import annotations

import numpy as np
import pytest

from gateway.core.agreement import MIN_CHECKS
from gateway.core.blocks import hash_prompt
from gateway.core.events import BlocksCleared, BlocksRemoved, BlocksStored, FeedState
from gateway.core.prefixes import Prefixes, PrefixSource
from gateway.core.types import BlockHashes, Engine, Request
from tests.builders import a_request, an_engine

BLOCK = 16


def blocks(count: int, seed: int = 0) -> BlockHashes:
    return hash_prompt(np.arange(BLOCK * count) + 100_000 * seed, BLOCK)


def a_prompt(request_id: str, count: int, seed: int = 0) -> Request:
    """A prompt of that many blocks and one token more."""
    return a_request(request_id, prompt_tokens=BLOCK * count + 1, block_hashes={BLOCK: blocks(count, seed)})


def known(**facts: object) -> tuple[Prefixes, Engine]:
    engine = an_engine("e", **{"block_tokens": BLOCK, "kv_capacity_tokens": BLOCK * 1000, **facts})
    prefixes = Prefixes(max_blocks=4096, max_age_s=600.0)
    prefixes.found(engine)
    return prefixes, engine


def announcing(state: FeedState = FeedState.LIVE) -> tuple[Prefixes, Engine]:
    prefixes, engine = known()
    prefixes.feed_changed("e", state, ("e",))
    return prefixes, engine


def cached(prefixes: Prefixes, engine: Engine, request: Request) -> int:
    return int(prefixes.cached_tokens(request, [engine])[0])


def send(prefixes: Prefixes, engine: Engine, request: Request, now: float = 0.0) -> None:
    prefixes.dispatched(request, engine.id, cached(prefixes, engine, request), now=now)


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_an_engine_of_unknown_size_is_unknown_not_empty() -> None:
    prefixes, _ = known(block_tokens=None)
    assert prefixes.source("e") is PrefixSource.UNKNOWN


def test_an_engine_without_events_is_observed() -> None:
    prefixes, engine = known()
    assert prefixes.source("e") is PrefixSource.OBSERVED
    send(prefixes, engine, a_prompt("r1", 4))
    assert cached(prefixes, engine, a_prompt("r2", 6)) == 4 * BLOCK


@pytest.mark.parametrize(
    ("state", "source"),
    [
        (FeedState.CONNECTING, PrefixSource.OBSERVED),
        (FeedState.LIVE, PrefixSource.EVENTS),
        (FeedState.REPAIRING, PrefixSource.EVENTS),
        (FeedState.LOST, PrefixSource.OBSERVED),
    ],
)
def test_the_source_follows_the_state_of_the_stream(state: FeedState, source: PrefixSource) -> None:
    assert announcing(state)[0].source("e") is source


def test_every_change_of_source_is_announced_once_with_its_reason() -> None:
    prefixes, _ = announcing()
    prefixes.feed_changed("e", FeedState.LOST, ("e",))
    changes = prefixes.take_changes()
    assert [change.source for change in changes] == ["observed", "events", "observed"]
    assert changes[-1].reason == "its event stream is lost"
    assert prefixes.take_changes() == []


# ---- events ----------------------------------------------------------------------------------------------------------


def test_announced_blocks_count_and_dropped_ones_do_not() -> None:
    prefixes, engine = announcing()
    prefixes.announced(BlocksStored("e", BLOCK, blocks(8)))
    prefixes.announced(BlocksRemoved("e", BLOCK, blocks(8)[5:]))
    assert cached(prefixes, engine, a_prompt("r", 8)) == 5 * BLOCK
    prefixes.announced(BlocksCleared("e"))
    assert cached(prefixes, engine, a_prompt("r", 8)) == 0


def test_a_prompt_that_is_cached_whole_still_computes_its_last_block() -> None:
    prefixes, engine = announcing()
    prefixes.announced(BlocksStored("e", BLOCK, blocks(4)))
    whole = a_request("r", prompt_tokens=4 * BLOCK, block_hashes={BLOCK: blocks(4)})
    assert cached(prefixes, engine, whole) == 3 * BLOCK


def test_a_prompt_on_its_way_counts_before_it_is_announced() -> None:
    prefixes, engine = announcing()
    send(prefixes, engine, a_prompt("r1", 8))
    assert cached(prefixes, engine, a_prompt("r2", 10)) == 8 * BLOCK
    prefixes.prefilled("r1", 0, now=5.0)
    prefixes.announced(BlocksStored("e", BLOCK, blocks(8)))
    assert cached(prefixes, engine, a_prompt("r2", 10)) == 8 * BLOCK


def test_a_failed_attempt_takes_nothing_with_it_that_was_announced_before() -> None:
    prefixes, engine = announcing()
    prefixes.announced(BlocksStored("e", BLOCK, blocks(5)))
    send(prefixes, engine, a_prompt("r1", 8))
    prefixes.failed("r1")
    assert cached(prefixes, engine, a_prompt("r2", 8)) == 5 * BLOCK


def test_of_several_ranks_none_is_believed_to_have_a_prompt_on_its_way() -> None:
    prefixes, engine = known()
    prefixes.feed_changed("e", FeedState.LIVE, ("e", "e/dp1"))
    send(prefixes, engine, a_prompt("r1", 8))
    assert cached(prefixes, engine, a_prompt("r2", 8)) == 0


def test_a_prompt_whose_attempt_failed_does_not_count() -> None:
    prefixes, engine = announcing()
    send(prefixes, engine, a_prompt("r1", 8))
    prefixes.failed("r1")
    assert cached(prefixes, engine, a_prompt("r2", 8)) == 0


def test_a_stream_that_comes_back_finds_its_blocks_as_it_left_them() -> None:
    prefixes, engine = announcing()
    prefixes.announced(BlocksStored("e", BLOCK, blocks(8)))
    prefixes.feed_changed("e", FeedState.LOST, ("e",))
    assert cached(prefixes, engine, a_prompt("r", 8)) == 0
    prefixes.feed_changed("e", FeedState.LIVE, ("e",))
    assert cached(prefixes, engine, a_prompt("r", 8)) == 8 * BLOCK


def test_of_several_ranks_only_what_all_hold_is_sure() -> None:
    prefixes, engine = known()
    prefixes.feed_changed("e", FeedState.LIVE, ("e", "e/dp1"))
    prefixes.announced(BlocksStored("e", BLOCK, blocks(8)))
    prefixes.announced(BlocksStored("e/dp1", BLOCK, blocks(3)))
    assert cached(prefixes, engine, a_prompt("r", 8)) == 3 * BLOCK


def test_guesses_never_mix_with_announcements() -> None:
    prefixes, engine = known()
    send(prefixes, engine, a_prompt("r1", 8))
    prefixes.feed_changed("e", FeedState.LIVE, ("e",))
    assert cached(prefixes, engine, a_prompt("r2", 8)) == 0


# ---- observed --------------------------------------------------------------------------------------------------------


def test_a_failed_attempt_leaves_no_guess_behind() -> None:
    prefixes, engine = known()
    send(prefixes, engine, a_prompt("r1", 4))
    prefixes.failed("r1")
    assert cached(prefixes, engine, a_prompt("r2", 4)) == 0


def test_guesses_are_bounded_by_the_engines_own_capacity() -> None:
    prefixes, engine = known(kv_capacity_tokens=10 * BLOCK)
    for seed in range(3):
        send(prefixes, engine, a_prompt(f"r{seed}", 4, seed))
        prefixes.prefilled(f"r{seed}", None, now=0.0)
    held = [cached(prefixes, engine, a_prompt("r", 4, seed)) // BLOCK for seed in range(3)]
    assert held[1:] == [4, 4]
    assert sum(held) <= 10


def test_an_engine_that_was_down_holds_nothing_that_was_guessed() -> None:
    prefixes, engine = known()
    send(prefixes, engine, a_prompt("r1", 4))
    prefixes.restarted("e")
    assert cached(prefixes, engine, a_prompt("r2", 4)) == 0


# ---- the check -------------------------------------------------------------------------------------------------------


def check(prefixes: Prefixes, engine: Engine, reported_tokens: int, times: int) -> None:
    for number in range(times):
        name = f"check{reported_tokens}-{number}"
        send(prefixes, engine, a_prompt(name, 4, seed=1000 + number))
        prefixes.prefilled(name, reported_tokens, now=0.0)


def disappoint(prefixes: Prefixes, engine: Engine, times: int) -> None:
    """The engine has nothing of a prompt that it is believed to hold."""
    for number in range(times + 1):
        send(prefixes, engine, a_prompt(f"again{number}", 8))
        prefixes.prefilled(f"again{number}", 0, now=0.0)


def test_an_index_that_is_wrong_is_not_believed_and_falls_back_step_by_step() -> None:
    prefixes, engine = announcing()
    check(prefixes, engine, reported_tokens=400, times=MIN_CHECKS)
    assert prefixes.source("e") is PrefixSource.OBSERVED
    disappoint(prefixes, engine, times=MIN_CHECKS)
    assert prefixes.source("e") is PrefixSource.UNKNOWN
    assert cached(prefixes, engine, a_prompt("r", 4)) == 0
    assert "not what was believed" in prefixes.take_changes()[-1].reason


def test_a_model_that_began_beside_a_warm_engine_may_know_less_than_there_is() -> None:
    prefixes, engine = known()
    check(prefixes, engine, reported_tokens=400, times=3 * MIN_CHECKS)
    assert prefixes.source("e") is PrefixSource.OBSERVED


def test_a_stream_connected_anew_is_believed_again() -> None:
    prefixes, engine = announcing()
    check(prefixes, engine, reported_tokens=400, times=MIN_CHECKS)
    prefixes.feed_changed("e", FeedState.LIVE, ("e",))
    assert prefixes.source("e") is PrefixSource.EVENTS


def test_agreement_is_counted() -> None:
    prefixes, engine = announcing()
    check(prefixes, engine, reported_tokens=0, times=5)
    agreement = prefixes.agreement("e")
    assert agreement is not None
    assert (agreement.checked_count, agreement.agreed_count) == (5, 5)


def test_an_engine_that_left_takes_everything_with_it() -> None:
    prefixes, engine = announcing()
    prefixes.announced(BlocksStored("e", BLOCK, blocks(8)))
    send(prefixes, engine, a_prompt("r1", 4))
    prefixes.lost("e")
    prefixes.prefilled("r1", 0, now=0.0)
    prefixes.failed("r1")
    prefixes.announced(BlocksStored("e", BLOCK, blocks(8)))
    assert len(prefixes.index) == 0
    prefixes.found(engine)
    assert cached(prefixes, engine, a_prompt("r", 8)) == 0
