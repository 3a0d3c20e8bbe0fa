"""Expected wait as a policy."""

import random

from gateway.core.interfaces import PairTable
from gateway.core.types import Report
from gateway.policies.load.expected_wait import ExpectedWait
from tests.builders import a_dispatch, a_load, a_pair_table, a_request, chosen


def table(*waiting: int) -> PairTable:
    reports = [Report(1, count) for count in waiting]
    engines = [a_load(name, report=report, report_age_s=1.0) for name, report in zip("abc", reports, strict=False)]
    return a_pair_table(engines, engines)


def test_what_was_sent_since_the_report_moves_the_choice() -> None:
    """a waits 0, b waits 1 x 1024 tokens: a, until 2000 tokens were sent to a."""
    chooser = ExpectedWait().start(random.Random(0))
    request = a_request(prompt_tokens=2000)
    assert chosen(chooser, request, table(0, 1), now=5.0) == ("a", "a")
    chooser.dispatched(request, a_dispatch(prefill="a", decode="a"), now=5.0)
    assert chosen(chooser, request, table(0, 1), now=5.0) == ("b", "b")


def test_engines_at_the_cap_are_skipped_unless_all_are() -> None:
    chooser = ExpectedWait(max_waiting_requests=2).start(random.Random(0))
    assert list(chooser.costs(a_request(), table(1, 2), now=5.0)) == [0.0, float("inf")]
    assert chosen(chooser, a_request(), table(3, 2), now=5.0) == ("b", "b")
