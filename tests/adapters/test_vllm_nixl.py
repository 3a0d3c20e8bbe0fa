"""Every row of adapters/vllm/in_turn.py and every ending with NIXL, and what must never reach a decode engine."""

from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.base import Answered, Broken, Call, Cause, HeadEvent, Leg
from adapters.vllm.in_turn import InTurn
from adapters.vllm.nixl import Nixl
from gateway.core.errors import MalformedEngineData
from gateway.core.types import Engine, Role
from tests.adapters.transcripts import (
    TRANSFER,
    VLLM,
    D,
    P,
    answered,
    broken,
    error_event,
    payload,
    prefilled,
    said,
    token,
)


def exchange(request=None, decode=D, mode=None):
    return InTurn(request or payload(), P, decode, Nixl(lease_s=25.0, mode=mode))


def call(commands):
    return next(command for command in commands if isinstance(command, Call))


def body(commands):
    return msgspec.json.decode(call(commands).body)


def play(*happenings, **settings):
    """The whole exchange in words."""
    run = exchange(**settings)
    return " | ".join([said(run.start()), *(said(run.receive(happening)) for happening in happenings)])


PLAIN_PREFILL = answered(Leg.PREFILL, 200, b'{"id":"x","kv_transfer_params":null}')


@pytest.mark.parametrize(
    ("happenings", "transcript"),
    [
        ([prefilled(), token()], "call p | prefilled, call d | commit"),
        ([prefilled(), answered(Leg.DECODE, 200, b"{}")], "call p | prefilled, call d | answer 200"),
        ([broken(Leg.PREFILL, Cause.CONNECT)], "call p | retry p down"),
        ([broken(Leg.PREFILL, Cause.HEAD_TIMEOUT)], "call p | retry p"),
        ([broken(Leg.PREFILL, Cause.LOST)], "call p | retry p"),
        ([broken(Leg.PREFILL, Cause.TOO_LARGE)], "call p | retry p"),
        ([HeadEvent(Leg.PREFILL, b"{}")], "call p | hangup, retry p"),
        *(([answered(Leg.PREFILL, status)], f"call p | answer {status}") for status in (400, 404, 413, 422)),
        *(([answered(Leg.PREFILL, status)], "call p | retry p") for status in (302, 401, 403, 408, 429, 500, 503)),
        ([answered(Leg.PREFILL, 200, b"<html>")], "call p | retry p"),
        ([answered(Leg.PREFILL, 200, b'{"kv_transfer_params":7}')], "call p | retry p"),
        ([PLAIN_PREFILL, token()], "call p | prefilled, call d | commit"),
        ([prefilled(), broken(Leg.DECODE, Cause.CONNECT)], "call p | prefilled, call d | retry d down"),
        ([prefilled(), broken(Leg.DECODE, Cause.LOST)], "call p | prefilled, call d | retry d"),
        ([prefilled(), answered(Leg.DECODE, 503)], "call p | prefilled, call d | retry d"),
        ([prefilled(), answered(Leg.DECODE, 500)], "call p | prefilled, call d | retry d"),
        ([prefilled(), answered(Leg.DECODE, 400)], "call p | prefilled, call d | answer 400"),
        ([prefilled(), answered(Leg.DECODE, 200, b"<html>")], "call p | prefilled, call d | retry d"),
        ([prefilled(), error_event(500)], "call p | prefilled, call d | hangup, retry d"),
        ([prefilled(), error_event(400)], "call p | prefilled, call d | hangup, answer 400"),
        ([prefilled(), HeadEvent(Leg.DECODE, b"[DONE]")], "call p | prefilled, call d | hangup, retry d"),
    ],
)
def test_each_happening_has_its_ending(happenings, transcript):
    assert play(*happenings) == transcript


def test_the_prefill_leg_asks_for_one_token_and_for_blocks():
    sent = body(exchange(payload(max_tokens=500, stream_options={"include_usage": True}, min_tokens=9, n=1)).start())
    assert sent == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": False,
        "n": 1,
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
    }


def test_the_prefill_leg_keeps_what_shapes_the_prompt():
    shaping = {
        "tools": [{"type": "function"}],
        "chat_template_kwargs": {"a": 1},
        "response_format": {"type": "text"},
        "cache_salt": "s",
        "stop": ["x"],
        "truncate_prompt_tokens": 9,
    }
    sent = body(exchange(payload(**shaping)).start())
    assert {name: sent[name] for name in shaping} == shaping


def test_the_decode_leg_is_the_client_s_request_with_the_parameters_byte_for_byte():
    raw = b'{"do_remote_prefill":true, "remote_block_ids":[[1]], "remote_engine_id":"e", "remote_request_id":"r",'
    raw += b' "remote_host":"h", "remote_port":1, "later":1.50}'
    run = exchange(payload(max_tokens=500))
    run.start()
    decode = call(run.receive(answered(Leg.PREFILL, 200, b'{"kv_transfer_params":' + raw + b"}")))
    assert raw in decode.body
    assert msgspec.json.decode(decode.body)["max_tokens"] == 500
    assert (decode.is_answer, decode.is_replayable) == (True, False)


def test_both_legs_carry_the_same_request_id_and_the_client_s_trace():
    run = exchange(payload(headers=[("traceparent", "00-ab"), ("X-Request-Id", "theirs")]))
    legs = [call(run.start()), call(run.receive(prefilled()))]
    expected = (("traceparent", "00-ab"), ("Content-Type", "application/json"), ("X-Request-Id", "r1"))
    assert [leg.headers for leg in legs] == [expected, expected]


@pytest.mark.parametrize(("stream", "limit"), [(True, 25.0), (False, None)])
def test_only_a_stream_s_head_is_held_to_the_lease(stream, limit):
    run = exchange(payload(stream=stream))
    assert call(run.start()).head_within_s is None
    assert call(run.receive(prefilled())).head_within_s == limit


def test_without_parameters_the_decode_engine_gets_the_plain_request():
    run = exchange()
    run.start()
    decode = call(run.receive(PLAIN_PREFILL))
    assert "kv_transfer_params" not in msgspec.json.decode(decode.body)
    assert decode.is_replayable


def test_without_parameters_an_engine_that_cannot_prefill_is_spared():
    decode = Engine("d", "http://d", Role.DECODE, can_serve_alone=False)
    assert play(PLAIN_PREFILL, decode=decode) == "call p | retry p"


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in TRANSFER if name not in ("tp_size", "do_remote_decode")),
        {"remote_block_ids": []},
        {"remote_block_ids": [[], []]},
        {"remote_block_ids": [[-1]]},
        {"remote_block_ids": "12"},
        {"remote_engine_id": ""},
        {"remote_port": 0},
        {"remote_port": "5600"},
        {"tp_size": 0},
        {"do_remote_prefill": False},
        {"do_remote_decode": True},
    ],
)
def test_unsound_parameters_never_reach_a_decode_engine(changes):
    assert play(prefilled(**changes)) == "call p | retry p"


def test_a_flat_block_list_of_older_versions_is_sound():
    assert play(prefilled(remote_block_ids=[1, 2])) == "call p | prefilled, call d"


@pytest.mark.parametrize(
    ("mode", "said_mode", "goes_on"),
    [
        (None, "pull", True),
        (None, "push", True),
        ("pull", "push", False),
        ("push", "push", True),
        ("push", None, False),
        ("pull", None, True),
    ],
)
def test_an_engine_that_moves_its_kv_the_other_way_is_not_believed(mode, said_mode, goes_on):
    transcript = play(prefilled(transfer_mode=said_mode), mode=mode)
    assert transcript == ("call p | prefilled, call d" if goes_on else "call p | retry p")


def test_after_its_end_an_exchange_is_silent():
    assert play(prefilled(), token(), broken(Leg.DECODE), token()) == "call p | prefilled, call d | commit |  | "
    assert play(broken(Leg.PREFILL), prefilled()) == "call p | retry p | "


def test_a_happening_on_the_leg_that_is_not_open_is_ignored():
    assert play(token(), prefilled(), prefilled(), token()) == "call p |  | prefilled, call d |  | commit"


def test_a_failed_kv_load_shows_only_after_the_role_chunk_and_is_still_retried():
    events = [event[6:] for event in (VLLM / "error_kv_load.sse").read_bytes().split(b"\n\n")]
    heads = [HeadEvent(Leg.DECODE, event) for event in events[:2]]
    assert play(prefilled(), *heads) == "call p | prefilled, call d |  | hangup, retry d"


def test_a_recorded_stream_commits_with_its_first_output():
    events = [event[6:] for event in (VLLM / "decode_chat.sse").read_bytes().split(b"\n\n")]
    heads = [HeadEvent(Leg.DECODE, event) for event in events[:2]]
    assert play(prefilled(), *heads) == "call p | prefilled, call d |  | commit"


@pytest.mark.parametrize("name", ["prefill_chat", "prefill_completion", "prefill_chat_for_stream"])
def test_recorded_prefill_answers_lead_to_the_decode_leg(name):
    answer = (VLLM / f"{name}.json").read_bytes()
    assert play(Answered(Leg.PREFILL, 200, answer)) == "call p | prefilled, call d"
    assert Nixl(25.0).transfer(answer) is not None


@given(st.binary() | st.binary().map(lambda tail: b'{"kv_transfer_params":' + tail))
def test_any_bytes_give_parameters_or_a_typed_error(raw):
    with suppress(MalformedEngineData):
        transfer = Nixl(25.0).transfer(raw)
        assert transfer is None or bytes(transfer.params) in raw


_HAPPENINGS = st.one_of(
    st.builds(
        Answered, st.sampled_from(Leg), st.integers(100, 599), st.binary(max_size=20) | st.just(prefilled().body)
    ),
    st.builds(HeadEvent, st.sampled_from(Leg), st.sampled_from([b"{}", b"[DONE]", b'{"error":{}}', token().data])),
    st.builds(Broken, st.sampled_from(Leg), st.sampled_from(Cause)),
)


@given(st.lists(_HAPPENINGS, max_size=6))
def test_an_exchange_ends_once_and_never_calls_the_decode_engine_twice(happenings):
    words = play(*happenings).replace(",", " ").split()
    assert sum(words.count(end) for end in ("commit", "answer", "retry")) <= 1
    assert play(*happenings).count("call d") <= 1
