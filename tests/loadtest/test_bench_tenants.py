"""Shares and classes under overload, in the simulator."""

from __future__ import annotations

import json

import pytest

from gateway.cli import main
from gateway.core.waiting import STARVE_S
from loadtest.bench_tenants import Stream, flooded, outranked, workload


def test_what_a_tenant_sends_does_not_depend_on_the_others() -> None:
    one, other = Stream("one", 2.0), Stream("other", 9.0)
    alone = [request.arrival_s for request in workload([one], 20.0, 0)]
    together = [request.arrival_s for request in workload([one, other], 20.0, 0) if request.tenant == "one"]
    assert alone == together
    assert len(alone) == pytest.approx(40, abs=20)


@pytest.mark.slow
def test_a_tenant_at_its_share_keeps_its_goodput_beside_one_that_sends_ten_times_as_much() -> None:
    told = flooded(seconds=400, seed=0, admission="ttft")
    assert told["kept_ratio"] >= 0.9
    assert told["flood"] > 0


@pytest.mark.slow
def test_a_high_class_keeps_its_bound_and_a_low_one_its_turns() -> None:
    told = outranked(seconds=150, seed=0, admission="ttft")
    assert told["kept_ratio"] >= 0.98
    assert told["low_longest_gap_s"] <= STARVE_S + 5.0  # its turn, and then the prefills ahead of it and its own


@pytest.mark.slow
def test_both_are_printed_as_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tenants", "--seconds", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"flooded", "outranked"}
