import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.hash_table import HashTable

key_lists = st.lists(st.integers(1, 40) | st.integers(0, 2**64 - 1), max_size=30)
steps = st.lists(st.tuples(st.sampled_from(["insert", "free"]), key_lists), max_size=20)


def words(numbers):
    return np.array(numbers, np.uint64)


@settings(deadline=None)
@given(steps)
def test_it_agrees_with_a_dict_under_any_inserts_and_frees(steps):
    table, model = HashTable(600), {}
    for action, keys in steps:
        if action == "insert":
            slots = table.insert(words(keys))
            table.set_values(slots, words(keys) ^ np.uint64(7))
            model.update({max(key, 1): key ^ 7 for key in keys})
        else:
            slots = np.unique(table.find(words(keys)))
            table.free(slots[slots >= 0])
            model = {key: value for key, value in model.items() if key not in {max(k, 1) for k in keys}}
        assert len(table) == len(model)
    found = table.find(words(list(model)))
    assert (found >= 0).all()
    assert len(set(found.tolist())) == len(model)
    assert table.values(found).tolist() == list(model.values())


def test_a_table_filled_to_its_capacity_finds_every_key_and_no_other():
    keys = np.random.default_rng(1).integers(1, 2**64, 60_000, dtype=np.uint64)
    table = HashTable(50_000)
    for part in np.split(keys[:50_000], 10):
        table.insert(part)
    assert len(table) == 50_000
    assert (table.find(keys[:50_000]) >= 0).all()
    assert (table.find(keys[50_000:]) == -1).all()


def test_freeing_everything_leaves_no_trace_that_lengthens_searches():
    keys = np.random.default_rng(2).integers(1, 2**64, 20_000, dtype=np.uint64)
    table = HashTable(20_000)
    table.insert(keys)
    assert table._passed.any()
    table.free(table.find(keys))
    assert len(table) == 0
    assert not table._passed.any()
    assert not table._words.any()


def test_every_occupied_slot_is_found_by_walking_the_buckets():
    keys = np.random.default_rng(3).integers(1, 2**64, 500, dtype=np.uint64)
    table = HashTable(500)
    slots = table.insert(keys)
    walked = [table.slots_in(first, 16) for first in range(0, table.bucket_count, 16)]
    assert np.concatenate(walked).tolist() == sorted(slots.tolist())


def test_an_entry_of_a_table_at_its_capacity_costs_at_most_32_bytes():
    assert HashTable(1_000_000).allocated_bytes <= 32_000_000


def test_absent_keys_are_added_as_they_are_inserted():
    keys = np.random.default_rng(4).integers(0, 2**64, 3_000, dtype=np.uint64)
    keys[7] = 0
    batch = np.concatenate((keys, keys[:500]))
    added, inserted = HashTable(3_000), HashTable(3_000)
    assert added.add(batch).tolist() == inserted.insert(batch).tolist()
    assert np.array_equal(added._words, inserted._words)
    assert np.array_equal(added._passed, inserted._passed)
    assert len(added) == len(inserted) == 3_000
