"""Over real HTTP and simulated: the same workload, engines and bounds."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import pytest

from gateway.cli import main
from gateway.core.types import Role, Slo
from loadtest.bench_overload_http import CHARACTERS_PER_TOKEN, Setting, fake_engines, simulated, table
from loadtest.generators import generate
from loadtest.prompts import synthesise
from loadtest.tokenizer import encode

SETTING = Setting(
    trace=None,
    workload="conversation",
    seconds=10.0,
    speed=1.0,
    scale=4.0,
    prefill=2,
    decode=1,
    profile="llama3-70b-8xa800-reference",
    slo=Slo(ttft_s=10.0, tbt_s=0.05),
    policy="least_work",
    admission="ttft",
)


def test_prompts_have_the_tokens_of_the_workload_on_the_emulated_engines() -> None:
    for request in islice(generate("conversation", seed=3), 5):
        text = synthesise(request, characters_per_token=CHARACTERS_PER_TOKEN)
        assert len(encode(text)) == pytest.approx(request.prompt_tokens, rel=0.03)


def test_bounds_and_leases_are_scaled_with_time() -> None:
    assert SETTING.scaled_slo == Slo(ttft_s=2.5, tbt_s=0.0125)
    assert replace(SETTING, slo=Slo()).scaled_slo == Slo()
    engines = list(fake_engines(SETTING))
    assert [engine.engine.role for engine in engines] == [Role.PREFILL, Role.PREFILL, Role.DECODE]
    assert {engine.engine.lease_s for engine in engines} == {120.0}


def test_the_simulator_gets_the_same_requests() -> None:
    assert simulated(SETTING)["requests"] == len(SETTING.requests())


def test_the_table_has_a_row_for_each_figure() -> None:
    row = {"requests": 7, "attained_ratio": 0.5, "attained_tokens_ratio": 0.25, "rejected": 2}
    assert table({"simulator": row}).splitlines()[1].split() == ["simulator", "7", "0.500", "0.250", "2"]


@pytest.mark.slow
def test_all_three_figures_come_out_of_real_processes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "overload-http", "--seconds", "10", "--scale", "4", "--prefill", "2", "--admission", "ttft"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.keys() == {"simulator", "http", "http_round_robin"}
    assert told["http"]["requests"] == told["http_round_robin"]["requests"] == told["simulator"]["requests"] > 10
    assert told["http"]["errors"] == told["http_round_robin"]["errors"] == told["http_round_robin"]["refused"] == 0
