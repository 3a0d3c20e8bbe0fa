from __future__ import annotations

import json

import pytest

from loadtest.bench import main


@pytest.mark.slow
def test_the_bench_measures_every_figure_against_a_real_redis(capsys):
    words = ["store", "--json", "--requests", "500", "--blocks", "20000", "--rate", "100", "--seconds", "1.5"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["follow"]["events"] == 6 * 500 - 5 * 64  # the first 64 have nobody before them to end
    assert result["publish"]["bytes_per_event"] < 50
    assert 7.9e6 < result["snapshot"]["bytes_per_million_blocks"] < 9e6
    assert result["kv_events"]["follow_us_per_block"] < result["kv_events"]["listen_us_per_block"]
    assert 0 < result["at_rate"]["staleness_p50_ms"] <= result["at_rate"]["staleness_p99_ms"]
    assert 0 < result["at_rate"]["cpu_share"] < 1
