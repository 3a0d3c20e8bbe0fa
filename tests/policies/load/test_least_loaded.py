"""Least loaded: fewest requests of ours in each stage."""

import random

from gateway.core.types import Role
from gateway.policies.load.least_loaded import LeastLoaded
from tests.builders import a_load, a_pair_table, a_request, chosen


def test_the_fewest_of_ours_in_each_stage_ties_to_the_first() -> None:
    prefills = [a_load(name, Role.PREFILL, own_count=count) for name, count in (("p0", 2), ("p1", 1), ("p2", 1))]
    decodes = [a_load(name, Role.DECODE, own_count=count) for name, count in (("d0", 5), ("d1", 4))]
    assert chosen(LeastLoaded().start(random.Random(0)), a_request(), a_pair_table(prefills, decodes)) == ("p1", "d1")


def test_requests_of_others_are_not_known_to_it() -> None:
    engines = [a_load("a", own_count=1), a_load("b", in_flight_count=9)]
    assert chosen(LeastLoaded().start(random.Random(0)), a_request(), a_pair_table(engines, engines)) == ("b", "b")
