"""Every cell of the table of endings, played by every exchange."""

from __future__ import annotations

import msgspec
import pytest

from adapters.base import Answer, Answered, Broken, Cause, Hangup, HeadEvent, Leg, Retry
from adapters.endings import ENDINGS, Ending, Event, Outcome, Release, State, ended, event_of
from tests.adapters.transcripts import D, P

BEFORE_RELAY = [state for state in State if state is not State.RELAY]
ERROR = msgspec.json.encode({"error": {"message": "no", "code": 0}})
ON_A_LEG = {
    Event.CONNECT: lambda leg: (Broken(leg, Cause.CONNECT), None),
    Event.HEAD_TIMEOUT: lambda leg: (Broken(leg, Cause.HEAD_TIMEOUT), None),
    Event.LEASE: lambda leg: (Broken(leg, Cause.LEASE), None),
    Event.REQUEST_FAULT: lambda leg: (Answered(leg, 400, ERROR), None),
    Event.STATUS: lambda leg: (Answered(leg, 503, ERROR), None),
    Event.ERROR_EVENT: lambda leg: (HeadEvent(leg, ERROR), 500),
    Event.GARBAGE: lambda leg: (HeadEvent(leg, b"<html>"), None),
    Event.LOST: lambda leg: (Broken(leg, Cause.LOST), None),
    Event.SILENCE: lambda leg: (Broken(leg, Cause.IDLE_TIMEOUT), None),
}
"""The events that an exchange hears of; the others are the shell's."""
CELLS = [(state, event) for state in BEFORE_RELAY for event in ENDINGS[state] if event in ON_A_LEG]


def test_each_state_has_an_ending_for_all_that_can_happen_in_it():
    impossible = {
        State.ALONE: {Event.SIBLING, Event.LEASE},
        State.PREFILL: {Event.SIBLING, Event.LEASE},
        State.BOTH: {Event.LEASE},
        State.DECODE: {Event.SIBLING},
        State.RELAY: {
            *(Event.CONNECT, Event.HEAD_TIMEOUT, Event.LEASE),
            *(Event.REQUEST_FAULT, Event.STATUS, Event.SIBLING),
        },
    }
    assert {state: set(Event) - set(cells) for state, cells in ENDINGS.items()} == impossible


@pytest.mark.parametrize(("state", "event"), CELLS, ids=lambda value: value.name.lower())
def test_a_failure_before_the_first_token_ends_as_its_cell_says(state, event):
    happening, status = ON_A_LEG[event](Leg.DECODE)
    assert event_of(happening, status) is event
    *hangups, last = ended(state, happening, D, status=status, siblings=[Leg.PREFILL])
    assert Hangup(Leg.PREFILL) in hangups
    assert (Hangup(Leg.DECODE) in hangups) == isinstance(happening, HeadEvent)
    match ENDINGS[state][event].outcome:
        case Outcome.ANSWER:
            assert isinstance(last, Answer)
            assert last.status == 400
        case Outcome.RETRY | Outcome.RETRY_DOWN as outcome:
            assert isinstance(last, Retry)
            assert (last.engine_id, last.is_engine_down) == ("d", outcome is Outcome.RETRY_DOWN)
        case outcome:
            pytest.fail(f"{outcome} is no ending before the first token")


@pytest.mark.parametrize("cause", list(Cause))
def test_every_cause_of_the_shell_is_an_event_of_the_table(cause):
    assert event_of(Broken(Leg.PREFILL, cause)) in Event


def test_an_error_event_with_a_clients_fault_is_the_clients_fault():
    (_, answer) = ended(State.DECODE, HeadEvent(Leg.DECODE, ERROR), D, status=422)
    assert isinstance(answer, Answer)
    assert (answer.status, answer.body) == (422, ERROR)


def test_after_the_first_token_nobody_is_left_without_an_ending():
    outcomes = {event: ending.outcome for event, ending in ENDINGS[State.RELAY].items()}
    gone = {Event.CLIENT_GONE: Outcome.STOP, Event.DRAINING: Outcome.STOP}
    failed = (Event.ERROR_EVENT, Event.GARBAGE, Event.LOST, Event.SILENCE)
    assert outcomes == dict.fromkeys(failed, Outcome.CONTINUE) | gone


def test_blocks_are_stranded_only_where_nobody_can_tell_the_prefill_engine():
    assert ENDINGS[State.DECODE][Event.CONNECT] == Ending(Outcome.RETRY_DOWN, Release.LEASE)
    assert ENDINGS[State.DECODE][Event.CLIENT_GONE].release is Release.NOTICE
    assert ENDINGS[State.BOTH][Event.LOST].release is Release.ABORT


def test_the_engine_at_fault_is_the_one_on_whose_leg_it_happened():
    (retry,) = ended(State.PREFILL, Broken(Leg.PREFILL, Cause.LOST), P)
    assert retry == Retry("p", "prefill_lost", strands=True)
