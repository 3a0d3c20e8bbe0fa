"""Runs kept in a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gateway.cli import main
from loadtest.compare_cli import run_one
from loadtest.results import load, path_of, save
from loadtest.sim_options import Spec

SPEC = Spec(workload="conversation", seconds=5.0, prefill=1, decode=1, admission="ttft", faults=())


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    result = run_one(SPEC)
    save(tmp_path, result)
    assert load(tmp_path, SPEC) == result
    assert load(tmp_path, replace(SPEC, seed=7)) is None


def test_a_damaged_file_is_run_again(tmp_path: Path) -> None:
    save(tmp_path, run_one(SPEC))
    path = path_of(tmp_path, SPEC)
    path.write_bytes(path.read_bytes()[:-20])
    assert load(tmp_path, SPEC) is None


@pytest.mark.slow
def test_a_comparison_goes_on_from_what_was_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "compare",
        "--workload",
        "conversation",
        "--seconds",
        "5",
        "--prefill",
        "1",
        "--decode",
        "1",
        "--jobs",
        "1",
    ]
    kept = ["--results", str(tmp_path)]
    assert main([*words, *kept, "--policy", "random"]) == 0
    first = capsys.readouterr().out
    assert main([*words, *kept, "--policy", "random", "least_work"]) == 0
    out, err = capsys.readouterr()
    assert "1 of 2 runs were kept" in err
    assert first.splitlines()[-1].split() in [line.split() for line in out.splitlines()]
    assert len(list(tmp_path.iterdir())) == 2
