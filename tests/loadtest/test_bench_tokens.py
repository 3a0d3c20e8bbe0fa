"""The bench runs on a small prompt and says what it measured in both forms."""

import json

import pytest

from loadtest.bench_tokens import main

SMALL = ["--prompt-bytes", "5000", "--prompts", "3", "--repeats", "1", "--training-chars", "50000"]


@pytest.mark.slow
def test_it_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["prompts_at_once"] == 3
    assert 0 < figures["prompt_tokens"] < figures["prompt_bytes"]
    assert figures["longest_own_stall_s"] <= figures["longest_stall_s"]


@pytest.mark.slow
def test_it_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    assert "longest stall of the loop" in capsys.readouterr().out
