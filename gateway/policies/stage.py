"""One stage after the other: how routers that pick a prefill and a decode engine separately give a cost per pair.

Such a router looks at the engines of one stage, picks one, then looks at the engines of the other stage that can be
paired with it. A *rule* is one of these looks: the candidates of a stage -> a cost for each. The functions here turn
two rules into costs of pairs whose lowest is exactly the pair that the router would pick. An engine that does both
stages is a candidate of both, and once the first rule picks it the second has no choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gateway.core.interfaces import EngineLoad, PairTable

MAX_ENGINES = 1024
"""Engines that a stateful policy remembers. Of more, those not heard of for longest are forgotten."""

Costs: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Stage:
    """The candidates of one stage, ascending by engine id."""

    loads: tuple[EngineLoad, ...]
    rows: NDArray[np.intp]
    """For each candidate its first row in `pairs`; shape (candidates,). Its quantities are `pairs.column[rows]`."""
    pairs: PairTable

    def __len__(self) -> int:
        return len(self.loads)

    @property
    def engine_ids(self) -> list[str]:
        return [load.engine.id for load in self.loads]

    @property
    def does_both(self) -> NDArray[np.bool_]:
        """Whether each candidate would do both stages itself, shape (candidates,)."""
        pairs = self.pairs
        columns = zip(pairs.prefill_row[self.rows], pairs.decode_row[self.rows], strict=True)
        return np.array([pairs.prefills[p].engine.id == pairs.decodes[d].engine.id for p, d in columns], dtype=bool)

    @property
    def own_counts(self) -> NDArray[np.float64]:
        """Requests that this gateway has in flight on each candidate, shape (candidates,)."""
        return np.array([load.own_count for load in self.loads], dtype=float)

    @property
    def held_tokens(self) -> NDArray[np.int64]:
        """Prompt tokens that each candidate holds by its own account (KV events), shape (candidates,)."""
        return self.pairs.held_tokens[self.rows]

    @property
    def compute_s(self) -> NDArray[np.float64]:
        """Predicted seconds until each candidate has computed the prompt: queue and prefill, shape (candidates,)."""
        return self.pairs.wait_s[self.rows] + self.pairs.prefill_s[self.rows]


Rule: TypeAlias = Callable[[Stage], Costs]
"""The candidates of a stage -> a cost for each, finite for at least one; the lowest wins, ties go to the first."""


def fewest_in_flight(stage: Stage) -> Costs:
    """The requests that this gateway has in flight on each candidate."""
    return stage.own_counts


def predicted_tbt(stage: Stage) -> Costs:
    """Predicted TBT with the request on each candidate of the decode stage, seconds."""
    return stage.pairs.tbt_s[stage.rows]


def prefill_then_decode(pairs: PairTable, prefill_rule: Rule, decode_rule: Rule) -> Costs:
    """Costs, shape (pairs,): the prefill engine by the first rule, of its partners the decode engine by the second."""
    return _in_turn(
        pairs, (pairs.prefills, pairs.prefill_row, prefill_rule), (pairs.decodes, pairs.decode_row, decode_rule)
    )


def decode_then_prefill(pairs: PairTable, decode_rule: Rule, prefill_rule: Rule) -> Costs:
    """Costs, shape (pairs,): the decode engine by the first rule, of its partners the prefill engine by the second."""
    return _in_turn(
        pairs, (pairs.decodes, pairs.decode_row, decode_rule), (pairs.prefills, pairs.prefill_row, prefill_rule)
    )


def lexicographic(*keys: NDArray[np.float64] | NDArray[np.int64] | NDArray[np.bool_]) -> Costs:
    """Ranks 0, 1, 2 ... by the first key, ties by the next; full ties by position. Shape of each key: (n,)."""
    order = np.lexsort(keys[::-1])
    ranks = np.empty(len(order))
    ranks[order] = np.arange(len(order))
    return ranks


_Side: TypeAlias = tuple[Sequence[EngineLoad], NDArray[np.intp], Rule]


def _in_turn(pairs: PairTable, first: _Side, second: _Side) -> Costs:
    """Costs by the first side's rule, ties by the second's. None of these routers fetches: such rows cost +inf."""
    rows = np.flatnonzero(pairs.fetch_row < 0)
    first_ranks = np.full(len(first[0]), np.inf)
    engines, first_costs = _judge(pairs, first, rows)
    first_ranks[engines] = _dense_ranks(first_costs)
    winner = engines[int(np.argmin(first_costs))]
    second_ranks = np.full(len(second[0]), float(len(second[0])))
    partners, second_costs = _judge(pairs, second, rows[first[1][rows] == winner])
    second_ranks[partners] = _dense_ranks(second_costs)
    costs = np.full(len(pairs), np.inf)
    costs[rows] = first_ranks[first[1][rows]] * (len(second[0]) + 1) + second_ranks[second[1][rows]]
    return costs


def _judge(pairs: PairTable, side: _Side, rows: NDArray[np.intp]) -> tuple[NDArray[np.intp], Costs]:
    """The engines of a side that occur in these rows, and what its rule makes of them."""
    loads, engine_of_row, rule = side
    engines, firsts = np.unique(engine_of_row[rows], return_index=True)
    return engines, rule(Stage(tuple(loads[engine] for engine in engines), rows[firsts], pairs))


def _dense_ranks(costs: Costs) -> Costs:
    """0 for the lowest cost, 1 for the next ...; equal costs share a rank, +inf stays."""
    ranks = np.unique(costs, return_inverse=True)[1].astype(float)
    ranks[np.isinf(costs)] = np.inf
    return ranks
