"""What every engine adapter must keep, whatever it speaks."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters import ADAPTERS, adapter
from adapters.base import Answer, Answered, Broken, Call, Cause, Commit, HeadEvent, Leg, Retry
from gateway.core.errors import ConfigError, MalformedEngineData
from tests.adapters.transcripts import B, D, P, payload

pytestmark = pytest.mark.parametrize("name", sorted(ADAPTERS))

PAIRS = [(P, D), (B, B)]
ENDS = Commit | Retry | Answer


def open_exchanges(name):
    return [ADAPTERS[name]().open(payload(stream=stream), *pair) for pair in PAIRS for stream in (True, False)]


def test_it_is_known_by_its_name(name):
    assert adapter(name) is ADAPTERS[name]


def test_its_paths_are_absolute(name):
    speaks = ADAPTERS[name]()
    assert all(path.startswith("/") for path in (speaks.health_path, speaks.report_path, speaks.models_path))


def test_it_starts_with_calls_to_engines_of_the_pair(name):
    for exchange in open_exchanges(name):
        calls = exchange.start()
        assert calls
        assert all(isinstance(call, Call) and call.engine in (P, D, B) for call in calls)


@pytest.mark.parametrize("cause", list(Cause))
def test_a_broken_call_ends_in_a_retry_that_names_its_engine(name, cause):
    for exchange in open_exchanges(name):
        call = exchange.start()[0]
        (retry,) = [command for command in exchange.receive(Broken(call.leg, cause)) if isinstance(command, Retry)]
        assert retry.engine_id == call.engine.id
        assert retry.is_engine_down == (cause is Cause.CONNECT)


@given(
    st.lists(
        st.builds(Answered, st.sampled_from(Leg), st.integers(100, 599), st.binary(max_size=30))
        | st.builds(HeadEvent, st.sampled_from(Leg), st.binary(max_size=30))
        | st.builds(Broken, st.sampled_from(Leg), st.sampled_from(Cause)),
        max_size=5,
    )
)
def test_whatever_happens_an_exchange_ends_at_most_once(name, happenings):
    for exchange in open_exchanges(name):
        exchange.start()
        commands = [command for happening in happenings for command in exchange.receive(happening)]
        assert sum(isinstance(command, ENDS) for command in commands) <= 1


@given(st.binary())
def test_any_report_gives_facts_or_a_typed_error(name, body):
    with suppress(MalformedEngineData):
        assert ADAPTERS[name]().parse_report(body).report is not None
    with suppress(MalformedEngineData):
        assert ADAPTERS[name]().parse_models(body).models is not None


def test_an_unknown_adapter_is_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=name):
        adapter("unheard-of")
