"""The exhibits on a trace of two conversations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.cli import USER_ERROR, main
from loadtest.exhibits_mooncake import hit_ratios
from loadtest.exhibits_overload import FULL_GRID, with_rule
from loadtest.papers import NAMES, exhibits
from loadtest.sim_options import Spec


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A B A B: two prompts of two blocks each, twice."""
    lines = [
        {"timestamp": 3000 * number, "input_length": 1024, "output_length": 5, "hash_ids": blocks}
        for number, blocks in enumerate(([1, 2], [3, 4], [1, 2], [3, 4]))
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_hits_need_room_for_what_comes_in_between(trace: Path) -> None:
    assert hit_ratios(trace, (None, 4 * 512, 2 * 512)) == [0.5, 0.5, 0.0]


def test_the_full_grid_has_the_settings_of_the_reference(trace: Path) -> None:
    assert len(set(FULL_GRID)) == 128
    assert [exhibit.name for exhibit in exhibits(Spec(trace=str(trace)), NAMES, is_full=True)] == list(NAMES)


def test_a_rule_brings_its_margin_and_its_duration() -> None:
    spec = with_rule(Spec(trace="t", slo_tbt=0.1), "predicted, residual", 1.05)
    assert spec.admission == "predicted"
    settings = dict(spec.admission_settings)
    assert settings == {"is_residual": True, "tbt_margin": 1.05, "decode_s": pytest.approx(34.3)}


@pytest.mark.slow
def test_exhibits_say_what_holds(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = tmp_path / "papers.html"
    names = ["figure5", "figure9", "figure10", "figure15", "setting-b", "overload"]
    assert (
        main(
            ["papers", "--trace", str(trace), "--only", *names, "--requests", "40", "--jobs", "1", "--html", str(html)]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "The order" in out
    assert "of the maximum" in out
    assert html.read_text().count("<h2>") == 6


def test_an_unknown_exhibit_is_named(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["papers", "--trace", str(trace), "--only", "figure99"]) == USER_ERROR
    assert "figure99" in capsys.readouterr().err
