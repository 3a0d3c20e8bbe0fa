import json

import pytest

from loadtest.bench_index import Figure, measure, render, render_json


@pytest.fixture(scope="module")
def figures():
    return list(measure(70_000, 1, few_engines=2, many_engines=3, ingested_blocks=4000))


def test_every_goal_of_the_index_is_measured(figures):
    goals = {(figure.unit, figure.goal) for figure in figures if figure.goal is not None}
    assert goals == {("bytes/block", 40.0), ("us", 300.0), ("us", 3000.0), ("blocks/s", 500_000.0)}
    assert all(figure.value >= 0 and figure.limited_by for figure in figures)


def test_a_goal_is_met_from_the_side_its_unit_asks_for():
    assert Figure("time", 3.0, "us", 4.0, True, "").is_met is True
    assert Figure("rate", 3.0, "blocks/s", 4.0, False, "").is_met is False
    assert Figure("rate", 3.0, "blocks/s", None, False, "").is_met is None


def test_the_table_shows_each_figure_with_its_goal_and_limit():
    table = render([Figure("match", 412.3, "us", 300.0, True, "cache misses")], 1000)
    assert table.splitlines()[-1].split() == ["match", "412.3", "us", "<=", "300", "MISSED", "cache", "misses"]


def test_the_json_shows_whether_each_goal_was_met():
    report = json.loads(render_json([Figure("match", 412.3, "us", 300.0, True, "cache misses")], 1000))
    assert report["blocks"] == 1000
    assert report["figures"][0]["value"] == 412.3
    assert report["figures"][0]["is_met"] is False
