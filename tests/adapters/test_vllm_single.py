from __future__ import annotations

import msgspec
import pytest

from adapters.base import Broken, Cause, HeadEvent, Leg
from adapters.vllm.single import Single
from tests.adapters.transcripts import VLLM, B, answered, broken, error_event, payload, said, token


def play(*happenings):
    run = Single(payload(), B)
    return " | ".join([said(run.start()), *(said(run.receive(happening)) for happening in happenings)])


@pytest.mark.parametrize(
    ("happening", "end"),
    [
        (token(), "commit"),
        (answered(Leg.DECODE, 200, b'{"id":1}'), "answer 200"),
        (answered(Leg.DECODE, 200, b"<html>"), "retry b"),
        (answered(Leg.DECODE, 404), "answer 404"),
        (answered(Leg.DECODE, 501), "answer 501"),
        (answered(Leg.DECODE, 500), "retry b"),
        (answered(Leg.DECODE, 401), "retry b"),
        (error_event(500), "hangup, retry b"),
        (error_event(422), "hangup, answer 422"),
        (error_event("no number"), "hangup, retry b"),
        (HeadEvent(Leg.DECODE, b"[DONE]"), "hangup, retry b"),
        (HeadEvent(Leg.DECODE, b'{"type":"response.created"}'), "commit"),
        (Broken(Leg.DECODE, Cause.CONNECT), "retry b down"),
        (Broken(Leg.DECODE, Cause.IDLE_TIMEOUT), "retry b"),
    ],
)
def test_each_happening_has_its_ending(happening, end):
    assert play(happening) == f"call b | {end}"


def test_the_body_travels_as_the_client_wrote_it():
    (call,) = Single(payload(stream=False, seed=2**63 - 1, temperature=1e-7, odd={"x": [2**64]}), B).start()
    sent = msgspec.json.decode(call.body)
    assert (sent["seed"], sent["temperature"], sent["odd"]) == (2**63 - 1, 1e-7, {"x": [2**64]})
    assert (call.path, call.is_answer, call.is_replayable) == ("/v1/chat/completions", True, True)


def test_after_its_end_an_exchange_is_silent():
    assert play(token(), broken(Leg.DECODE)) == "call b | commit | "


def test_an_engine_s_refusal_in_another_shape_is_put_in_openai_s():
    run = Single(payload(), B)
    (answer,) = run.receive(answered(Leg.DECODE, 404, (VLLM / "error_no_route.json").read_bytes()))
    assert msgspec.json.decode(answer.body)["error"]["code"] == 404
    own = (VLLM / "error_unknown_model.json").read_bytes()
    (answer,) = Single(payload(), B).receive(answered(Leg.DECODE, 404, own))
    assert answer.body == own
