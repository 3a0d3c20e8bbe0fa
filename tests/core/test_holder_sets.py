import numpy as np
import pytest

from gateway.core.holder_sets import EMPTY, HolderSets


@pytest.fixture
def sets():
    return HolderSets(capacity=100)


def hold(sets, set_id, row, tier=0, held=True, blocks=1):
    """Moves `blocks` blocks from a set to the same one with or without a holder; the new id."""
    old = np.array([set_id])
    new = sets.with_holder(old, row, tier, held)
    sets.move(old, new, np.array([blocks]))
    return int(new[0])


def test_the_same_holders_in_any_order_are_one_set(sets):
    one = hold(sets, hold(sets, EMPTY, row=3), row=6)
    other = hold(sets, hold(sets, EMPTY, row=6), row=3)
    assert one == other != EMPTY


def test_tiers_are_told_apart(sets):
    assert hold(sets, EMPTY, row=3, tier=0) != hold(sets, EMPTY, row=3, tier=1)


def test_removing_the_last_holder_gives_the_empty_set_and_the_id_back(sets):
    only = hold(sets, EMPTY, row=3)
    assert hold(sets, only, row=3, held=False) == EMPTY
    assert len(sets) == 0
    assert hold(sets, EMPTY, row=5) == only


def test_a_set_lives_as_long_as_one_block_carries_it(sets):
    only = hold(sets, EMPTY, row=3, blocks=2)
    hold(sets, only, row=3, held=False, blocks=1)
    assert sets.block_count(3) == 1
    assert hold(sets, EMPTY, row=3) == only


def test_clearing_an_engine_leaves_the_other_holders(sets):
    both = hold(sets, hold(sets, EMPTY, row=1), row=2)
    sets.clear_row(1)
    assert sets.prefix_blocks(np.array([both]))[0, :3].tolist() == [0, 0, 1]
    assert sets.block_count(1) == 0


def test_sets_that_became_equal_by_a_clearing_can_both_go_on(sets):
    both, single = hold(sets, hold(sets, EMPTY, row=1), row=2), hold(sets, EMPTY, row=2)
    sets.clear_row(1)
    assert sets.block_count(2) == 2
    assert hold(sets, both, row=2, held=False) == EMPTY
    assert hold(sets, single, row=2, held=False) == EMPTY
    assert len(sets) == 0


def test_a_set_emptied_by_a_clearing_is_dead_until_its_blocks_are_gone(sets):
    dead = hold(sets, EMPTY, row=1, blocks=5)
    sets.clear_row(1)
    assert sets.dead_block_count() == 5
    assert sets.is_dead(np.array([dead])).all()
    sets.move(np.array([dead]), np.array([EMPTY]), np.array([5]))
    assert sets.dead_block_count() == 0
    assert len(sets) == 0


def test_when_ids_run_out_a_block_is_held_by_nobody_and_that_is_counted(sets):
    ids = [hold(sets, EMPTY, row=0, tier=0)]
    sets.widen(200)
    ids += [hold(sets, EMPTY, row=row) for row in range(1, 200)]
    assert len(sets) == 100
    assert ids[100:] == [EMPTY] * 100
    assert sets.refused_count == 100


def test_many_sets_are_moved_at_once_as_one_by_one(sets):
    sets.widen(80)
    singles = np.array([hold(sets, EMPTY, row=row) for row in range(40)])
    together = sets.with_holder(singles, 70, 0, True)
    assert len(set(together.tolist())) == 40
    assert [int(sets.with_holder(singles[row : row + 1], 70, 0, True)[0]) for row in range(40)] == together.tolist()


def test_prefixes_end_where_an_engine_is_missing_first(sets):
    a = hold(sets, EMPTY, row=0, blocks=2)
    ab = hold(sets, a, row=1)
    assert sets.prefix_blocks(np.array([ab, ab, a, ab]))[0, :3].tolist() == [4, 2, 0]
