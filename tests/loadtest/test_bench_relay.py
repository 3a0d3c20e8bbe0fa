"""The benches of the data plane: real processes, a second of each, and the arithmetic of their figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from loadtest import bench_decide, bench_relay, bench_streams
from loadtest.bench_decide import Shape
from loadtest.bench_relay import quantile
from loadtest.processes import cpu_s, family


@pytest.mark.slow
def test_it_measures_the_gateway_beside_the_floor_in_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--rounds", "1", "--round-s", "1", "--load", "0.3"]
    cases = ["--case", "whole 0.4K", "--case", "stream 0.4K", "--case", "pd stream 0.4K"]
    assert bench_relay.main([*short, *cases, "--start", "floor", "--start", "aiohttp", "--json"]) == 0
    rows = {(row["case"], row["proxy"]): row for row in json.loads(capsys.readouterr().out)}
    assert {case for case, _ in rows} == {"whole 0.4K", "stream 0.4K", "pd stream 0.4K"}
    assert all(row["requests"] >= 10 and row["failed"] == 0 for row in rows.values())
    assert rows["whole 0.4K", "direct"]["cpu_us"] is None
    assert rows["stream 0.4K", "sluice"]["first_p50_ms"] > 0
    assert ("pd stream 0.4K", "floor") not in rows


@pytest.mark.slow
def test_gateways_with_telemetry_on_and_off_are_measured_too(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--rounds", "1", "--round-s", "1", "--load", "0.3", "--case", "pd stream 0.4K"]
    assert bench_relay.main([*short, "--telemetry", "--json"]) == 0
    rows = {row["proxy"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"sluice", "sluice, telemetry off", "sluice, telemetry on"} <= rows.keys()
    assert all(row["failed"] == 0 for row in rows.values())


@pytest.mark.slow
def test_streams_are_held_and_none_is_lost() -> None:
    figures = bench_streams.measure(100, seconds=2.0, step_s=0.2)
    assert (figures.streams, figures.lost) == (100, 0)
    assert figures.delay_p50_ms > 0


def test_a_decision_is_measured_on_a_busy_pool() -> None:
    figure = bench_decide.measure(Shape(2, 3, 512), decisions=20, seed=1)
    assert (figure.prefills, figure.decodes, figure.prompt_blocks) == (2, 3, 32)
    assert 0 < figure.p50_us <= figure.p99_us


def test_processor_time_counts_threads_and_children() -> None:
    burn = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); input()"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE) as process:
        ends_at = time.monotonic() + 30
        while cpu_s(process.pid) < 0.3 and time.monotonic() < ends_at:
            time.sleep(0.02)
        used_s = cpu_s(process.pid)
        assert process.pid in family(os.getpid())
        process.kill()
    assert used_s >= 0.3


@pytest.mark.parametrize(("ratio", "value"), [(0.0, 1), (0.5, 3), (0.99, 4), (1.0, 4)])
def test_a_quantile_is_one_of_the_values(ratio: float, value: int) -> None:
    assert quantile([4, 1, 3, 2], ratio) == value


@pytest.mark.parametrize("text", ["smg", "smg=http://x", "smg=x@1", "=http://x@1", "smg=http://x@y"])
def test_a_peer_that_is_not_one_is_a_user_error(text: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_relay.main(["--peer", text])
    assert stopped.value.code == 2
