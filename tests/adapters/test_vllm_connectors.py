"""Each connector beside NIXL: what it says on its legs, and how it ends."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.base import Call, Cause, Expect, Facts, HeadEvent, Leg
from adapters.openai import COMPLETIONS
from adapters.vllm import Vllm
from adapters.vllm.connectors import CONNECTORS, contradiction, families_in, name_of
from adapters.vllm.mooncake import parse_query
from adapters.vllm.moriio import Moriio
from gateway.core.errors import ConfigError, MalformedEngineData
from tests.adapters.transcripts import VLLM, B, D, P, answered, broken, error_event, payload, prefilled, said, token

IDS = ("engine-a", "engine-b")
MORIIO = {
    "remote_handshake_port": 6301,
    "remote_notify_port": 61005,
    "transfer_id": "xfer-r1",
    "remote_port": None,
    "remote_request_id": None,
}


def pair(connector, **facts):
    prefill = replace(P, connector=connector, **({"transfer_ids": IDS[:1]} | facts))
    return prefill, replace(D, connector=connector)


def open_on(connector, request=None, **facts):
    return Vllm().open(request or payload(), *pair(connector, **facts))


def play(connector, *happenings, **facts):
    run = open_on(connector, **facts)
    return " | ".join([said(run.start()), *(said(run.receive(happening)) for happening in happenings)])


def calls(commands):
    return {command.leg: command for command in commands if isinstance(command, Call)}


def body(call):
    return msgspec.json.decode(call.body)


def by_length(reason="length"):
    usage = {"prompt_tokens": 7, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 3}}
    return answered(Leg.PREFILL, 200, msgspec.json.encode({"choices": [{"finish_reason": reason}], "usage": usage}))


# ---- Mooncake --------------------------------------------------------------------------------------------------------

BOTH = "call p, call d"


@pytest.mark.parametrize(
    ("happenings", "transcript"),
    [
        ([by_length(), token()], f"{BOTH} | prefilled, expect | commit"),
        ([token(), by_length()], f"{BOTH} | commit | "),
        ([by_length("stop")], f"{BOTH} | hangup, retry p"),
        ([answered(Leg.PREFILL, 200, b"<html>")], f"{BOTH} | hangup, retry p"),
        ([answered(Leg.PREFILL, 500)], f"{BOTH} | hangup, retry p"),
        ([answered(Leg.PREFILL, 400), answered(Leg.DECODE, 400)], f"{BOTH} | hangup, answer 400 | "),
        ([broken(Leg.PREFILL, Cause.CONNECT)], f"{BOTH} | hangup, retry p down"),
        ([broken(Leg.PREFILL, Cause.HEAD_TIMEOUT)], f"{BOTH} | hangup, retry p"),
        ([HeadEvent(Leg.PREFILL, b"{}")], f"{BOTH} | hangup, hangup, retry p"),
        ([broken(Leg.DECODE, Cause.CONNECT)], f"{BOTH} | hangup, retry d down"),
        ([answered(Leg.DECODE, 503), by_length()], f"{BOTH} | hangup, retry d | "),
        ([error_event(500)], f"{BOTH} | hangup, hangup, retry d"),
        ([by_length(), error_event(500)], f"{BOTH} | prefilled, expect | hangup, retry d"),
        ([by_length(), broken(Leg.DECODE, Cause.LEASE)], f"{BOTH} | prefilled, expect | retry d"),
        ([by_length(), broken(Leg.DECODE), token()], f"{BOTH} | prefilled, expect | retry d | "),
    ],
)
def test_the_legs_of_mooncake_stand_and_fall_together(happenings, transcript):
    assert play("mooncake", *happenings) == transcript


def test_the_legs_of_mooncake_meet_by_one_transfer_id():
    legs = calls(open_on("mooncake", payload(max_tokens=50, stop=["x"], stop_token_ids=[4])).start())
    send, take = body(legs[Leg.PREFILL]), body(legs[Leg.DECODE])
    assert send["kv_transfer_params"] == {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "transfer_id": "xfer-r1",
    }
    assert (send["max_tokens"], send["ignore_eos"], send["stream"]) == (1, True, False)
    assert "stop" not in send
    assert "stop_token_ids" not in send
    assert take["kv_transfer_params"] == {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": "xfer-r1",
        "remote_bootstrap_addr": "http://p:8998",
        "remote_engine_id": "engine-a",
    }
    assert (take["max_tokens"], take["stop"], take.get("ignore_eos")) == (50, ["x"], None)
    assert (legs[Leg.DECODE].is_answer, legs[Leg.DECODE].waits_for) == (True, "p")
    assert not any(call.is_replayable for call in legs.values())


def test_a_prefill_engine_of_several_ranks_is_told_which_of_them():
    for number in range(8):
        legs = calls(open_on("mooncake", replace(payload(), request_id=f"r{number}"), transfer_ids=IDS).start())
        rank = dict(legs[Leg.PREFILL].headers)["X-data-parallel-rank"]
        assert body(legs[Leg.DECODE])["kv_transfer_params"]["remote_engine_id"] == IDS[int(rank)]
        assert "X-data-parallel-rank" not in dict(legs[Leg.DECODE].headers)


def test_the_bootstrap_server_of_the_settings_is_the_one_that_decode_asks():
    legs = calls(open_on("mooncake", transfer_address="http://10.0.0.5:9000").start())
    assert body(legs[Leg.DECODE])["kv_transfer_params"]["remote_bootstrap_addr"] == "http://10.0.0.5:9000"


def test_a_prefill_engine_that_has_not_told_who_it_is_is_not_called():
    assert play("mooncake", token(), transfer_ids=()) == "retry p | "


def test_only_what_is_streamed_shows_a_sign_of_life_that_can_be_expected():
    streamed, whole = open_on("mooncake"), open_on("mooncake", payload(stream=False))
    assert Expect(Leg.DECODE, 25.0) in [streamed.start(), streamed.receive(by_length())][1]
    whole.start()
    assert said(whole.receive(by_length())) == "prefilled"


@pytest.mark.parametrize(
    ("raw", "ids"),
    [
        (b'{"0":{"engine_id":"a","worker_addr":{"0":{"0":"tcp://h:1"}}}}', ("a",)),
        (b'{"1":{"engine_id":"b"},"0":{"engine_id":"a"}}', ("a", "b")),
        (b"{}", None),
        (b'{"1":{"engine_id":"b"}}', None),
        (b'{"0":{"engine_id":""}}', None),
        (b'{"0":{}}', None),
        (b"[]", None),
        (b"<html>", None),
    ],
)
def test_the_bootstrap_server_tells_the_ids_by_rank(raw, ids):
    if ids is not None:
        assert Vllm().parse_transfer(raw) == Facts(transfer_ids=ids)
    else:
        with pytest.raises(MalformedEngineData):
            parse_query(raw)


def test_only_prefill_engines_with_a_bootstrap_server_are_asked():
    prefill, decode = pair("mooncake")
    assert Vllm().transfer_url(prefill) == "http://p:8998/query"
    assert Vllm().transfer_url(replace(prefill, url="http://[::1]:80")) == "http://[::1]:8998/query"
    assert Vllm().transfer_url(decode) is None
    assert Vllm().transfer_url(pair("nixl")[0]) is None


# ---- stores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("happenings", "transcript"),
    [
        ([by_length("stop"), token()], "call p | prefilled, call d | commit"),
        ([by_length(), broken(Leg.DECODE, Cause.CONNECT)], "call p | prefilled, call d | retry d down"),
        ([answered(Leg.PREFILL, 503)], "call p | retry p"),
        ([answered(Leg.PREFILL, 400)], "call p | answer 400"),
    ],
)
def test_a_store_is_filled_then_read(happenings, transcript):
    assert play("ExampleConnector", *happenings) == transcript


def test_a_store_needs_no_word_on_either_leg():
    run = open_on("store", payload(path=COMPLETIONS, prompt="hi", messages=None, max_tokens=50))
    (send,) = calls(run.start()).values()
    (take,) = calls(run.receive(by_length())).values()
    assert "kv_transfer_params" not in body(send)
    assert body(send)["max_tokens"] == 1
    assert body(take) == {"model": "m", "messages": None, "stream": True, "prompt": "hi", "max_tokens": 50}
    assert (take.is_replayable, take.head_within_s, take.waits_for) == (True, None, None)


# ---- push, MoRIIO, several -------------------------------------------------------------------------------------------


def test_a_decode_engine_that_is_written_to_waits_for_the_prefill_engine_and_not_for_long():
    run = open_on("NixlPushConnector")
    run.start()
    (decode,) = calls(run.receive(prefilled(transfer_mode="push"))).values()
    assert (decode.waits_for, decode.first_event_within_s) == ("p", 25.0)
    assert play("nixl_push", prefilled(transfer_mode="pull")) == "call p | retry p"


def test_a_decode_engine_that_reads_waits_for_nobody():
    run = open_on("nixl_pull")
    run.start()
    (decode,) = calls(run.receive(prefilled())).values()
    assert (decode.waits_for, decode.first_event_within_s, decode.head_within_s) == (None, None, 25.0)


def test_moriio_reads_under_an_id_of_ours_what_ended_by_its_length():
    run = open_on("moriio", payload(stop=["x"]))
    (send,) = calls(run.start()).values()
    assert body(send)["kv_transfer_params"]["transfer_id"] == "xfer-r1"
    assert body(send)["ignore_eos"] is True
    assert "stop" not in body(send)
    assert play("moriio", prefilled(**MORIIO), token()) == "call p | prefilled, call d | commit"


@pytest.mark.parametrize("missing", ["remote_host", "remote_handshake_port", "remote_notify_port", "transfer_id"])
def test_half_an_address_never_reaches_a_moriio_decode_engine(missing):
    assert play("moriio", prefilled(**(MORIIO | {missing: None}))) == "call p | retry p"


def test_several_connectors_hand_on_as_the_one_that_answers():
    assert play("MultiConnector", prefilled(), token()) == "call p | prefilled, call d | commit"
    assert play("MultiConnector", by_length(), token()) == "call p | prefilled, call d | commit"


@given(st.binary() | st.binary().map(lambda tail: b'{"kv_transfer_params":' + tail))
def test_any_bytes_are_a_moriio_transfer_or_a_typed_error(raw):
    with suppress(MalformedEngineData):
        transfer = Moriio(25.0).transfer(raw)
        assert transfer is None or bytes(transfer.params) in raw


@given(st.binary())
def test_any_bytes_are_engine_ids_or_a_typed_error(raw):
    with suppress(MalformedEngineData):
        assert parse_query(raw)


# ---- names and what engines show -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CONNECTORS))
def test_a_connector_is_known_by_its_name_and_by_the_engines(name):
    assert {name_of(known) for known in (name, *CONNECTORS[name].class_names)} == {name}


def test_an_unknown_connector_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"mooncake.*NixlConnector"):
        name_of("P2pNcclConnector")


def test_a_report_shows_the_connector_that_an_engine_was_started_with():
    report = (VLLM / "metrics_prefill.txt").read_bytes()
    assert families_in(report) == ("vllm:nixl_",)
    assert Vllm().parse_report(report).connector_families == ("vllm:nixl_",)


@pytest.mark.parametrize(
    ("connector", "families", "is_wrong"),
    [
        ("nixl", ("vllm:nixl_",), False),
        ("NixlPushConnector", ("vllm:nixl_",), False),
        ("multi", ("vllm:nixl_", "vllm:kv_offload_"), False),
        ("mooncake", ("vllm:nixl_",), True),
        ("nixl", ("vllm:mooncake_store_",), True),
        ("store", ("vllm:nixl_",), True),
        ("mooncake", (), False),
    ],
)
def test_settings_that_the_report_contradicts_are_known(connector, families, is_wrong):
    assert (contradiction(connector, families) is not None) == is_wrong


def test_an_engine_that_does_both_may_keep_its_own_store():
    facts = Facts(connector_families=("vllm:kv_offload_",))
    assert Vllm().contradiction(B, facts) is None
    assert "kv_offload" in Vllm().contradiction(P, facts)


def test_what_is_held_for_nobody_is_held_as_long_as_the_engine_says():
    held = {name: Vllm().hold_s(replace(P, connector=name)) for name in ("nixl", "mooncake", "store", "moriio")}
    assert held == {"nixl": 30.0, "mooncake": 480.0, "store": 0.0, "moriio": 3600.0}
