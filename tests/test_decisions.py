from __future__ import annotations

import json

from gateway.core.types import Slo
from gateway.decisions import Filter, explained, listed, log_line, row
from gateway.records import Outcome
from tests.record_builders import a_record, an_attempt


def refused(**fields):
    attempt = an_attempt(sent_at=None, prefilled_at=None, first_token_at=None, ended_at=10.001)
    usual = {"outcome": Outcome.REFUSED, "reason": "ttft_slo", "message": "too late", "retry_after_s": 2.5}
    return a_record(**(usual | {"attempts": (attempt,), "status": 429, "slo": Slo(ttft_s=1.0)} | fields))


def test_a_row_sets_what_was_predicted_beside_what_came():
    told = row(a_record(slo=Slo(ttft_s=2.0, tbt_s=0.055)))
    assert (told["predicted_ttft_s"], told["ttft_s"], told["ttft_headroom_s"]) == (1.151, 0.9, 0.849)
    assert (told["predicted_tbt_s"], told["tbt_s"], told["tbt_headroom_s"]) == (0.05, 0.06, 0.005)
    assert (told["cached_tokens"], told["reported_cached_tokens"]) == (32, 48)
    assert told["at"] == 1010.0


def test_a_refusal_says_how_far_off_the_best_pair_was_and_when_to_come_back():
    told = explained(refused())
    assert (told["reason"], told["message"], told["retry_after_s"]) == ("ttft_slo", "too late", 2.5)
    assert told["ttft_headroom_s"] == -0.151
    (attempt,) = told["tries"]
    assert attempt["best"]["prefill"] == "p1"
    assert "chosen" not in attempt


def test_every_candidate_is_there_and_one_that_was_not_allowed_has_no_cost():
    (attempt,) = explained(a_record())["tries"]
    assert attempt["pair_count"] == 4
    assert [(pair["prefill"], pair["decode"]) for pair in attempt["candidates"]] == [
        ("p1", "d1"),
        ("p2", "d1"),
        ("p1", "d2"),
        ("p2", "d2"),
    ]
    assert [pair.get("cost") for pair in attempt["candidates"]] == [1.0, 2.0, 3.0, None]


def test_a_list_is_filtered_before_it_is_cut():
    records = [a_record(id=f"r{number}", tenant="ab"[number % 2]) for number in range(10)] + [refused(id="no")]
    ids = [told["id"] for told in listed(records, Filter(tenant="b"), limit=3)]
    assert ids == ["r1", "r3", "r5"]
    assert [told["id"] for told in listed(records, Filter(outcome="refused"), limit=3)] == ["no"]
    assert [told["id"] for told in listed(records, Filter(outcome="ttft_slo"), limit=3)] == ["no"]
    assert listed(records, Filter(model="other"), limit=3) == []


def test_no_prompt_is_in_any_of_it():
    record = a_record(prompt="xylophone")
    for told in (row(record), explained(record), log_line(record)):
        assert "xylophone" not in json.dumps(told)
    assert "xylophone" not in repr(record)


def test_a_request_that_never_got_a_decision_is_told_too():
    told = explained(a_record(outcome=Outcome.BAD_REQUEST, attempts=(), gathered_at=None, model=None, trace=None))
    assert (told["outcome"], told["attempts"], told["tries"]) == ("bad_request", 0, [])
