from __future__ import annotations

import pytest

from predictors.measurements import DecodeStep, FitError, HandOff, Measurements, Prefill, parse_measurements


def test_measurements_are_read_line_by_line() -> None:
    lines = [
        b'{"prompt_tokens": 10, "cached_tokens": 0, "elapsed_s": 0.5}\n',
        b"\n",
        b'{"batch": 2, "kv_tokens": 100, "step_s": 0.02}',
        b'{"prompt_tokens": 10, "hand_off_s": 0.03}',
    ]
    measured = Measurements((Prefill(10, 0, 0.5),), (DecodeStep(2, 100, 0.02),), (HandOff(10, 0.03),))
    assert parse_measurements(lines) == measured
    assert parse_measurements(measured.lines().splitlines()) == measured


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt_tokens": 10, "cached_tokens": 0, "elapsed_s": 0',
        b"[]",
        b'{"prompt_tokens": 10, "cached_tokens": 10, "elapsed_s": 0.5}',
        b'{"prompt_tokens": -10, "cached_tokens": -20, "elapsed_s": 0.5}',
        b'{"prompt_tokens": 10, "cached_tokens": 0, "elapsed_s": 0}',
        b'{"prompt_tokens": 10, "cached_tokens": 0, "elapsed_s": 1, "note": 1}',
        b'{"batch": 0, "kv_tokens": 100, "step_s": 0.02}',
        b'{"batch": 1, "kv_tokens": 100, "step_s": -1}',
        b'{"prompt_tokens": 0, "hand_off_s": 1}',
        b'{"prompt_tokens": 10, "hand_off_s": 1e999}',
        b"\xff",
        b'{"note": "' + b"x" * 70_000 + b'"}',
    ],
)
def test_a_bad_line_is_refused_by_its_number(line: bytes) -> None:
    with pytest.raises(FitError, match=r"runs\.jsonl:2: "):
        parse_measurements([b"\n", line], where="runs.jsonl")
