"""Ports that lost speed."""

import pytest

from loadtest.links import Links


def test_a_slow_port_slows_the_transfers_under_way_and_recovers() -> None:
    links = Links(bytes_per_s=100.0, latency_s=0.0)
    links.start("p", "d", "r", 300.0, now=0.0)
    links.slow_down("p", 4.0, now=1.0)
    assert links.next_done_at("d") == pytest.approx(9.0)
    links.slow_down("p", 1.0, now=5.0)
    assert links.next_done_at("d") == pytest.approx(6.0)


def test_the_slower_end_decides() -> None:
    links = Links(bytes_per_s=100.0, latency_s=0.0)
    links.slow_down("p", 2.0, now=0.0)
    links.slow_down("d", 5.0, now=0.0)
    links.start("p", "d", "r", 100.0, now=0.0)
    assert links.next_done_at("d") == pytest.approx(5.0)


def test_every_change_is_counted() -> None:
    links = Links(bytes_per_s=100.0, latency_s=0.0)
    links.start("p", "d", "r", 100.0, now=0.0)
    links.take_done("d", now=1.0)
    assert links.change_count == 2
