from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEventSource,
    decode_batch,
    decode_frames,
    engine_hashes,
    parse_kv_event_sources,
    parse_server_info,
    tier_of,
)
from gateway.core.errors import MalformedEngineData
from gateway.core.events import Tier

STORED = {
    "type": "BlockStored",
    "block_hashes": [1403909460543360175],
    "parent_block_hash": None,
    "token_ids": list(range(1, 17)),
    "block_size": 16,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
}
REMOVED = {"type": "BlockRemoved", "block_hashes": [1403909460543360175], "medium": "GPU"}
CLEARED = {"type": "AllBlocksCleared"}


def pack(*events, batch=None):
    return msgspec.msgpack.encode([1.5, list(events), 0] if batch is None else batch)


def test_the_documented_vllm_batch_is_read():
    stored, removed, cleared = decode_batch(pack(STORED, REMOVED, CLEARED))
    assert stored == BlockStored(
        block_hashes=[1403909460543360175], token_ids=array("Q", range(1, 17)), block_size=16, medium="GPU"
    )
    assert removed == BlockRemoved(block_hashes=[1403909460543360175], medium="GPU")
    assert cleared == AllBlocksCleared()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (
            ["BlockStored", [7], 5, [1, 2], 2, None],
            BlockStored(block_hashes=[7], parent_block_hash=5, token_ids=array("Q", [1, 2]), block_size=2),
        ),
        (
            ["BlockStored", [7], None, [1, 2], 2, 3, "CPU", "sql"],
            BlockStored(
                block_hashes=[7], token_ids=array("Q", [1, 2]), block_size=2, lora_id=3, medium="CPU", lora_name="sql"
            ),
        ),
        (["BlockRemoved", [7, -8]], BlockRemoved(block_hashes=[7, -8])),
        (["BlockRemoved", [7], "GPU", 1], BlockRemoved(block_hashes=[7], medium="GPU", group_idx=1)),
        (["AllBlocksCleared"], AllBlocksCleared()),
    ],
)
def test_older_engines_arrays_are_read(array, expected):
    assert decode_batch(pack(array)) == [expected]
    assert decode_batch(pack(batch=[1.5, [array]])) == [expected]


def test_a_batch_written_as_a_map_is_read():
    assert decode_batch(pack(batch={"ts": 1.5, "events": [CLEARED]})) == [AllBlocksCleared()]


def test_events_and_fields_of_later_engines_are_passed_over():
    later = {"type": "BlockMoved", "block_hashes": [7]}
    assert decode_batch(pack(later, {**REMOVED, "ownership": "x", "future": 1})) == [
        BlockRemoved(block_hashes=[1403909460543360175], medium="GPU")
    ]


def test_of_pairs_of_tokens_the_first_are_kept():
    event = {**STORED, "token_ids": [[1, 2], [2, 3]], "block_size": 2}
    assert decode_batch(pack(event))[0].token_ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": [1, 2, 3]},
        {"token_ids": ["a"] * 16},
        {"token_ids": [-1] * 16},
        {"token_ids": [1.5] * 16},
        {"token_ids": [1] * 15 + [[1, 2]]},
        {"token_ids": [[1]] * 16},
        {"token_ids": [[1, 2]] * 15 + [1]},
        {"block_size": 0},
        {"block_size": "16"},
        {"block_hashes": None},
        {"block_hashes": [1.5]},
        {"medium": "TAPE"},
        {"extra_keys": []},
        {"parent_block_hash": [1]},
    ],
)
def test_events_that_contradict_themselves_are_refused(change):
    with pytest.raises(MalformedEngineData):
        decode_batch(pack({**STORED, **change}))


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", b"\x93", pack(batch=7), pack(batch=[1.5]), pack(7), pack([]), pack({})]
)
def test_payloads_that_are_no_batches_are_refused(payload):
    with pytest.raises(MalformedEngineData):
        decode_batch(payload)


@given(st.binary(max_size=200))
def test_random_bytes_give_events_or_a_typed_error(payload):
    try:
        events = decode_batch(payload)
    except MalformedEngineData:
        return
    assert events == []


@given(st.integers(0, 300), st.binary(min_size=1, max_size=3))
def test_a_damaged_batch_gives_events_or_a_typed_error(at, damage):
    payload = pack(STORED, REMOVED, CLEARED)
    try:
        events = decode_batch(payload[:at] + damage + payload[at + len(damage) :])
    except MalformedEngineData:
        return
    for event in events:
        if isinstance(event, BlockStored) and event.token_ids:
            assert len(event.token_ids) == event.block_size * len(event.block_hashes)


def test_frames_are_read_from_the_end_with_or_without_a_topic():
    number = (7).to_bytes(8, "big")
    assert decode_frames([b"kv", number, b"x"]) == (7, b"x")
    assert decode_frames([b"", number, b"x"]) == (7, b"x")
    assert decode_frames([b"", b"kv", number, b"x"]) == (7, b"x")


@pytest.mark.parametrize("frames", [[], [b"x"], [b"kv", b"short", b"x"]])
def test_frames_without_a_sequence_number_are_refused(frames):
    with pytest.raises(MalformedEngineData):
        decode_frames(frames)


def test_every_form_of_an_engines_hash_comes_down_to_64_unsigned_bits():
    digest = bytes.fromhex("cd7c51bc5a8fc8643f383a2b9e01522fba7473c669e9270c7b0bf7bf7fd01682")
    names = engine_hashes([-4579669293437864591, 8866452693264111234, digest])
    assert names == [2**64 - 4579669293437864591, 8866452693264111234, 8866452693264111234]


def test_media_of_both_engines_have_a_tier():
    media = ["GPU", "CPU", "cpu", "CPU_PINNED", "DISK", "STORAGE", "EXTERNAL", None]
    tiers = [Tier.DEVICE, Tier.HOST, Tier.HOST, Tier.HOST, Tier.DISK, Tier.DISK, Tier.REMOTE, Tier.DEVICE]
    assert [tier_of(medium) for medium in media] == tiers


def test_vllm_names_its_sources_rank_by_rank():
    body = b"""{"1": {"publisher": "zmq", "endpoint": "tcp://*:5558", "replay_endpoint": "tcp://*:6558", "topic": "kv"},
                "0": {"publisher": "zmq", "endpoint": "tcp://10.0.0.5:5557", "replay_endpoint": null, "hwm": 3}}"""
    assert parse_kv_event_sources(body, engine_id="e", host="node") == (
        KvEventSource("e", 0, "tcp://10.0.0.5:5557"),
        KvEventSource("e", 1, "tcp://node:5558", "tcp://node:6558", "kv"),
    )


def test_sglang_names_its_sources_by_a_first_port_and_a_number_of_ranks():
    body = b"""{"kv_events": {"publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 5557, "topic": "",
                "block_size": 64, "dp_size": 2, "replay_endpoint_port_base": 5568, "load_topic": "load"}}"""
    assert parse_server_info(body, engine_id="e", host="node") == (
        KvEventSource("e", 0, "tcp://node:5557", "tcp://node:5568"),
        KvEventSource("e", 1, "tcp://node:5558", "tcp://node:5569"),
    )


@pytest.mark.parametrize(
    "body", [b"{}", b'{"kv_events": null}', b'{"kv_events":{"publisher":"null","endpoint_port_base":1}}']
)
def test_an_sglang_that_publishes_nothing_has_no_sources(body):
    assert parse_server_info(body, engine_id="e", host="node") == ()


@pytest.mark.parametrize("parse", [parse_kv_event_sources, parse_server_info])
@pytest.mark.parametrize("body", [b"", b"[]", b'{"0": 5, "kv_events": 5}', b"\xff"])
def test_answers_that_name_no_sources_are_refused(parse, body):
    with pytest.raises(MalformedEngineData):
        parse(body, engine_id="e", host="node")
