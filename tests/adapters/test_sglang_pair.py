"""Every row of the table in adapters/sglang/pair.py: both legs at once, and neither left waiting for the other."""

from __future__ import annotations

import random

import msgspec
import pytest

from adapters.base import Answered, Call, Cause, Expect, Hangup, HeadEvent, Leg, Prefilled, Retry
from adapters.sglang import Sglang
from gateway.core.types import Engine, Role
from tests.adapters.transcripts import D, P, answered, broken, error_event, payload, said, token

PREFILLED = answered(
    Leg.PREFILL, 200, b'{"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":4},"completion_tokens":1}}'
)
START = "call p, call d"
ROLE = HeadEvent(Leg.DECODE, b'{"choices":[{"delta":{"reasoning_content":null,"role":"assistant","content":""}}]}')


def flat(message, code=500):
    """An error as SGLang writes it."""
    return msgspec.json.encode({"object": "error", "message": message, "type": "t", "param": None, "code": code})


def failed(leg, message, code=500):
    return answered(leg, code, flat(message, code))


def exchange(request=None, seed=1, **engines):
    pair = {"prefill": P, "decode": D} | engines
    return Sglang(rng=random.Random(seed)).open(request or payload(), pair["prefill"], pair["decode"])


def play(*happenings, **settings):
    """The whole exchange in words."""
    run = exchange(**settings)
    return " | ".join([said(run.start()), *(said(run.receive(happening)) for happening in happenings)])


def bodies(run):
    return {call.leg: msgspec.json.decode(call.body) for call in run.start()}


@pytest.mark.parametrize(
    ("happenings", "transcript"),
    [
        ([PREFILLED, token()], "prefilled, expect d | commit"),
        ([token()], "commit"),
        ([ROLE, token()], " | commit"),
        ([PREFILLED, answered(Leg.DECODE, 200, b"{}")], "prefilled, expect d | answer 200"),
        ([answered(Leg.DECODE, 200, b"{}")], "answer 200"),
        ([broken(Leg.PREFILL, Cause.CONNECT)], "hangup d, retry p down"),
        ([broken(Leg.DECODE, Cause.CONNECT)], "hangup p, retry d down"),
        ([broken(Leg.PREFILL, Cause.LOST)], "hangup d, retry p"),
        ([broken(Leg.DECODE, Cause.LOST)], "hangup p, retry d"),
        ([broken(Leg.PREFILL, Cause.HEAD_TIMEOUT)], "hangup d, retry p"),
        ([broken(Leg.DECODE, Cause.HEAD_TIMEOUT)], "hangup p, retry d"),
        ([PREFILLED, broken(Leg.DECODE, Cause.LEASE)], "prefilled, expect d | retry d"),
        ([PREFILLED, broken(Leg.DECODE, Cause.LOST)], "prefilled, expect d | retry d"),
        ([failed(Leg.PREFILL, "too long", 400)], "hangup d, answer 400"),
        ([failed(Leg.DECODE, "too long", 400)], "hangup p, answer 400"),
        ([failed(Leg.PREFILL, "The request queue is full.", 503)], "hangup d, retry p"),
        ([failed(Leg.DECODE, "The request queue is full.", 503)], "hangup p, retry d"),
        ([failed(Leg.PREFILL, "Prefill transfer failed for request")], "hangup d, retry d"),
        ([failed(Leg.PREFILL, "Prefill bootstrap failed for request")], "hangup d, retry d"),
        ([failed(Leg.DECODE, "Decode handshake failed for request")], "hangup p, retry p"),
        ([failed(Leg.DECODE, "Decode transfer failed for request")], "hangup p, retry p"),
        ([HeadEvent(Leg.DECODE, b'{"error":' + flat("Decode transfer failed") + b"}")], "hangup d, hangup p, retry p"),
        ([error_event(503)], "hangup d, hangup p, retry d"),
        ([error_event(400)], "hangup d, hangup p, answer 400"),
        ([ROLE, error_event(500)], " | hangup d, hangup p, retry d"),
        ([HeadEvent(Leg.DECODE, b"<html>")], "hangup d, hangup p, retry d"),
        ([answered(Leg.DECODE, 200, b"<html>")], "hangup p, retry d"),
        ([HeadEvent(Leg.PREFILL, b"{}")], "hangup p, hangup d, retry p"),
    ],
)
def test_each_happening_has_its_ending(happenings, transcript):
    def word(command):
        match command:
            case Hangup(leg) | Expect(leg):
                return f"{type(command).__name__.lower()} {leg[0]}"
            case _:
                return said([command])

    run = exchange()
    assert said(run.start()) == START
    assert " | ".join(", ".join(map(word, run.receive(happening))) for happening in happenings) == transcript


@pytest.mark.parametrize("late", [broken(Leg.DECODE), broken(Leg.PREFILL), PREFILLED, token()])
@pytest.mark.parametrize("end", [token(), broken(Leg.PREFILL), answered(Leg.DECODE, 400)])
def test_nothing_happens_after_the_end(end, late):
    assert play(end, late).endswith(" | ")


@pytest.mark.parametrize(("leg", "culprit", "suspect"), [(Leg.PREFILL, "p", "d"), (Leg.DECODE, "d", "p")])
def test_of_two_silent_legs_both_engines_are_avoided(leg, culprit, suspect):
    run = exchange()
    run.start()
    *_, retry = run.receive(broken(leg, Cause.HEAD_TIMEOUT))
    assert (retry.engine_id, retry.suspects) == (culprit, (suspect,))


def test_a_decode_engine_that_is_silent_after_its_prefill_ended_is_the_only_one_at_fault():
    run = exchange()
    run.start()
    run.receive(PREFILLED)
    assert run.receive(broken(Leg.DECODE, Cause.HEAD_TIMEOUT)) == [Retry("d", "decode_head_timeout")]


def test_a_prefill_that_ended_is_not_hung_up():
    assert play(PREFILLED, broken(Leg.DECODE)) == f"{START} | prefilled, expect | retry d"


def test_a_whole_answer_has_all_the_time_it_needs_after_its_prefill():
    run = exchange(payload(stream=False))
    run.start()
    assert run.receive(PREFILLED) == [Prefilled(9, 4)]


def test_both_legs_carry_the_same_room_host_port_and_id():
    sent = bodies(exchange(payload(max_tokens=50), prefill=Engine("p", "http://10.0.0.5:30000", Role.PREFILL)))
    shared = ("bootstrap_host", "bootstrap_port", "bootstrap_room", "rid", "messages", "max_tokens")
    prefill, decode = ({name: sent[leg][name] for name in shared} for leg in (Leg.PREFILL, Leg.DECODE))
    assert prefill == decode
    assert (prefill["bootstrap_host"], prefill["bootstrap_port"]) == ("10.0.0.5", 8998)


def test_the_prefill_leg_is_answered_in_one_piece_and_the_decode_leg_as_asked():
    sent = bodies(exchange(payload(stream=True, stream_options={"include_usage": True}, logprobs=True)))
    assert sent[Leg.PREFILL]["stream"] is False
    assert "stream_options" not in sent[Leg.PREFILL]
    assert sent[Leg.PREFILL]["logprobs"] is True  # the first token's come from there
    assert sent[Leg.DECODE]["stream"] is True
    assert sent[Leg.DECODE]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("details", "port"),
    [
        ({"disaggregation_bootstrap_port": 9100}, 9100),
        ({"bootstrap_port": 30998, "disaggregation_bootstrap_port": 9100}, 30998),
    ],
)
def test_the_bootstrap_port_is_the_configured_one_else_the_engine_s_own(details, port):
    sent = bodies(exchange(prefill=Engine("p", "http://p", Role.PREFILL, details=details)))
    assert sent[Leg.DECODE]["bootstrap_port"] == port


def test_every_attempt_has_a_room_and_an_id_of_its_own_and_ids_of_one_length():
    speaks = Sglang(rng=random.Random(4))
    sent = [bodies(speaks.open(payload(), P, D))[Leg.DECODE] for _ in range(200)]
    assert len({body["bootstrap_room"] for body in sent}) == 200
    assert all(0 <= body["bootstrap_room"] < 2**63 for body in sent)
    assert len({body["rid"] for body in sent}) == 200
    assert len({len(body["rid"]) for body in sent}) == 1


def test_each_leg_can_be_aborted_by_its_id_and_is_never_sent_twice():
    run = exchange()
    for call in run.start():
        assert isinstance(call, Call)
        path, body = call.abort
        assert path == "/abort_request"
        assert msgspec.json.decode(body) == {"rid": msgspec.json.decode(call.body)["rid"]}
        assert not call.is_replayable


def test_the_engine_a_leg_accuses_is_the_one_that_is_avoided():
    run = exchange()
    run.start()
    *_, retry = run.receive(failed(Leg.DECODE, "Decode transfer failed ... Lost connection with prefill instance"))
    assert retry == Retry("p", "decode_status_500")


def test_a_prefill_answer_without_usage_is_still_the_end_of_the_prefill():
    run = exchange(payload(stream=False))
    run.start()
    assert run.receive(Answered(Leg.PREFILL, 200, b"<html>")) == [Prefilled(None, None)]
