"""`sluice sim`, `sluice compare` and `sluice papers` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.cli import USER_ERROR, main
from gateway.core.errors import ConfigError
from loadtest.sim_options import settings_of

POOL = ["--workload", "conversation", "--seconds", "12", "--prefill", "2", "--decode", "1"]
ITEM_7 = {
    *("requests", "goodput_per_s", "attained_ratio", "attained_tokens_ratio", "rejected", "rejected_after_prefill"),
    *("wasted_prefill_tokens", "ttft_s", "tbt_s", "hit_ratio", "prefill_busy_ratio", "decode_busy_ratio", "prediction"),
}


def test_one_run_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", *POOL, "--speed", "2", "--admission", "ttft", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result.keys() >= ITEM_7
    assert set(result["ttft_s"]) == {"mean", "p50", "p90", "p99"}
    assert result["spec"]["admission"] == "ttft"
    assert "simulated" in err


def test_for_people_it_is_a_table_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = tmp_path / "run.html"
    assert main(["sim", *POOL, "--html", str(html)]) == 0
    assert "attained" in capsys.readouterr().out
    assert html.read_text().count("<svg") == 5


def test_a_rule_takes_settings(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--admission", "ttft", "--admission-set", "margin=1000", "--slo-ttft", "1", "--json"]
    assert main(["sim", *POOL, *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rejected"] == result["requests"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "nonsense"], "known: "),
        (["--admission", "nonsense"], "known: sluice, none, ttft"),
        (["--profile", "nonsense"], "unknown name"),
        (["--admission", "ttft", "--admission-set", "margin=-1"], "margin"),
        (["--fault", "dies:p9@1+2"], "no engine"),
        (["--noise", "-1"], "noise"),
        (["--gateways", "0"], "gateway"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", *POOL, *words]) == USER_ERROR
    assert message in capsys.readouterr().err


def test_a_damaged_trace_is_not_simulated_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    line = {"timestamp": 0, "input_length": 100, "output_length": 5, "hash_ids": [1]}
    trace.write_text(json.dumps(line) + "\n" + json.dumps({**line, "input_length": -1}) + "\n")
    assert main(["sim", "--trace", str(trace), "--prefill", "1", "--decode", "1"]) != 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{trace}:2" in err


@pytest.mark.slow
def test_a_comparison_has_a_row_for_each_combination(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = tmp_path / "comparison.html"
    several = ["--policy", "random", "least_work", "--admission", "none", "ttft", "--seed", "1", "2"]
    assert main(["compare", *POOL, *several, "--jobs", "1", "--json", "--html", str(html)]) == 0
    out, err = capsys.readouterr()
    specs = [json.loads(line)["spec"] for line in out.splitlines()]
    assert [(spec["policy"], spec["admission"], spec["seed"]) for spec in specs] == [
        (policy, admission, seed)
        for policy in ("random", "least_work")
        for admission in ("none", "ttft")
        for seed in (1, 2)
    ]
    assert "8/8" in err
    assert "goodput" in html.read_text()


def test_settings_are_json_where_they_can_be() -> None:
    assert settings_of(["a=1.5", "b=true", "c=text"]) == (("a", 1.5), ("b", True), ("c", "text"))
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        settings_of(["a"])
