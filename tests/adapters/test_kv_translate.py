from array import array

import numpy as np
import pytest

from adapters.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from adapters.kv_translate import HashTranslator
from gateway.core.blocks import Media, hash_prompt
from gateway.core.events import BlocksCleared, BlocksRemoved, BlocksStored, Tier

TOKENS = list(range(1, 9))


@pytest.fixture
def translator():
    return HashTranslator("e", max_blocks=100)


def stored(hashes, tokens, parent=None, **rest):
    return BlockStored(
        block_hashes=hashes, token_ids=array("Q", tokens), parent_block_hash=parent, block_size=2, **rest
    )


def ours(tokens, **extra):
    return hash_prompt(np.array(tokens), 2, **extra).tolist()


def plain(events):
    """Events as tuples, for comparison."""
    return [
        (type(event).__name__, event.tier.value, event.hashes.tolist())
        if not isinstance(event, BlocksCleared)
        else event
        for event in events
    ]


def test_a_prompt_gets_the_hashes_the_request_side_computes(translator):
    (event,) = translator.fold([stored([10, 11, 12, 13], TOKENS)])
    assert isinstance(event, BlocksStored)
    assert (event.engine_id, event.block_tokens, event.tier) == ("e", 2, Tier.DEVICE)
    assert event.hashes.tolist() == ours(TOKENS)


def test_a_chain_goes_on_from_its_parent_in_this_message_or_an_earlier_one(translator):
    translator.fold([stored([10], TOKENS[:2])])
    (event,) = translator.fold([stored([11], TOKENS[2:4], parent=10), stored([12, 13], TOKENS[4:], parent=11)])
    assert event.hashes.tolist() == ours(TOKENS)[1:]


def test_signed_and_whole_digests_name_the_same_block(translator):
    translator.fold([stored([-1], TOKENS[:2])])
    (event,) = translator.fold([stored([11], TOKENS[2:4], parent=b"\x07" * 24 + b"\xff" * 8)])
    assert event.hashes.tolist() == ours(TOKENS[:4])[1:]


def test_blocks_whose_parent_was_never_seen_are_left_out_and_counted(translator):
    assert translator.fold([stored([12, 13], TOKENS[4:], parent=11)]) == []
    assert translator.orphan_count == 2


def test_a_dropped_block_is_named_by_our_hash(translator):
    translator.fold([stored([10, 11], TOKENS[:4])])
    (event,) = translator.fold([BlockRemoved(block_hashes=[11, 99])])
    assert isinstance(event, BlocksRemoved)
    assert event.hashes.tolist() == ours(TOKENS)[1:2]


def test_a_dropped_block_still_serves_as_a_parent(translator):
    translator.fold([stored([10], TOKENS[:2])])
    translator.fold([BlockRemoved(block_hashes=[10])])
    (event,) = translator.fold([stored([11], TOKENS[2:4], parent=10)])
    assert event.hashes.tolist() == ours(TOKENS)[1:2]


def test_of_several_events_on_one_block_the_last_counts(translator):
    translator.fold([stored([10], TOKENS[:2])])
    events = translator.fold(
        [BlockRemoved(block_hashes=[10]), stored([10, 11], TOKENS[:4]), BlockRemoved(block_hashes=[11])]
    )
    assert plain(events) == [("BlocksStored", "device", ours(TOKENS)[:1])]


def test_a_block_that_moves_to_another_tier_keeps_its_name(translator):
    translator.fold([stored([10], TOKENS[:2])])
    placeholder = BlockStored(block_hashes=[10], block_size=0, medium="CPU")
    events = translator.fold([placeholder, BlockRemoved(block_hashes=[10], medium="GPU")])
    name = ours(TOKENS)[:1]
    assert plain(events) == [("BlocksRemoved", "device", name), ("BlocksStored", "host", name)]
    assert plain(translator.fold([BlockRemoved(block_hashes=[10], medium="CPU")])) == [("BlocksRemoved", "host", name)]


def test_a_placeholder_for_an_unknown_block_is_an_orphan(translator):
    assert translator.fold([BlockStored(block_hashes=[10], medium="CPU")]) == []
    assert translator.orphan_count == 1


def test_a_reset_forgets_what_came_before_it(translator):
    events = translator.fold([stored([10], TOKENS[:2]), AllBlocksCleared(), stored([20], TOKENS[2:4])])
    assert plain(events) == [BlocksCleared("e"), ("BlocksStored", "device", ours(TOKENS[2:4]))]
    assert translator.fold([stored([11], TOKENS[2:4], parent=10)]) == []


@pytest.mark.parametrize(
    ("event", "extra"),
    [
        (stored([10], [1, 2], lora_name="sql", extra_keys=[["sql"]]), {"lora_name": "sql"}),
        (stored([10], [1, 2], lora_id=3), {"lora_name": "#3"}),
        (stored([10], [1, 2], extra_keys=[["salt"]]), {"cache_salt": "salt"}),
        (stored([10], [1, 2], cache_salt="salt"), {"cache_salt": "salt"}),
        (
            stored([10], [1, 2], lora_name="sql", extra_keys=[["sql", "salt"]]),
            {"lora_name": "sql", "cache_salt": "salt"},
        ),
        (stored([10], [1, 2], extra_keys=[[["cat", 1]]]), {"media": [Media("cat", 1, 1)]}),
        (stored([10], [1, 2], extra_keys=[None]), {}),
    ],
)
def test_extra_keys_of_both_engines_are_those_of_the_request_side(translator, event, extra):
    (result,) = translator.fold([event])
    assert result.hashes.tolist() == ours([1, 2], **extra)


def test_a_media_item_over_several_blocks_is_told_apart_in_each(translator):
    keys = [None, [["cat", 1]], [["cat", -1]], None]
    (event,) = translator.fold([stored([9], [1, 2]), stored([10, 11, 12, 13], TOKENS, extra_keys=keys)])
    assert event.hashes.tolist()[1:] == ours(TOKENS, media=[Media("cat", 3, 3)])


def test_groups_without_full_attention_are_passed_over(translator):
    window = stored([10], TOKENS[:2], group_idx=1, kv_cache_spec_kind="sliding_window")
    full = stored([10], TOKENS[:2], group_idx=0, kv_cache_spec_kind="full_attention")
    assert len(translator.fold([window, full])) == 1
    assert translator.fold([BlockRemoved(block_hashes=[10], group_idx=1)]) == []
    assert len(translator.fold([BlockRemoved(block_hashes=[10], group_idx=0)])) == 1


def test_blocks_beyond_the_bound_are_left_out_and_counted():
    translator = HashTranslator("e", max_blocks=3)
    (event,) = translator.fold([stored([10, 11, 12, 13], TOKENS)])
    assert event.hashes.tolist() == ours(TOKENS)[:3]
    assert translator.overflow_count == 1
    translator.fold([BlockRemoved(block_hashes=[12])])
    (event,) = translator.fold([stored([12], TOKENS[4:6], parent=11)])
    assert event.hashes.tolist() == ours(TOKENS)[2:3]


def test_a_name_given_to_another_block_takes_the_old_one_out_of_the_index(translator):
    translator.fold([stored([10], TOKENS[:2])])
    events = translator.fold([stored([10], TOKENS[2:4])])
    assert plain(events) == [
        ("BlocksRemoved", "device", ours(TOKENS[:2])),
        ("BlocksStored", "device", ours(TOKENS[2:4])),
    ]
