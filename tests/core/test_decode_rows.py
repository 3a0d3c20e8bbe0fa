"""What decodes now and will, per engine: sums over rows, with places that move when a row is taken out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from gateway.core.decode_rows import FIRST_ROWS, DecodeRows


@dataclass
class Owner:
    row: int = -1


@dataclass
class Halves:
    """A law under which half of them have ended at every later time."""

    def survival(self, group: tuple[str, ...], generated: ArrayLike, ahead: ArrayLike) -> NDArray[np.float64]:
        return np.where(np.asarray(ahead) > 0.0, 0.5, 1.0)

    def remaining_tokens(self, group: tuple[str, ...], generated: ArrayLike) -> NDArray[np.float64]:
        return np.ones(np.shape(generated))


def rows_of(*prompts: tuple[int, int]) -> tuple[DecodeRows, list[Owner]]:
    """One decoding row for each (engine, prompt tokens), begun at 0 and told of no output."""
    rows, owners = DecodeRows(), []
    for engine, prompt_tokens in prompts:
        owner = Owner()
        rows.add(owner, engine, ("m",), prompt_tokens=prompt_tokens, begins_at=0.0, bound_s=0.1 * (engine + 1))
        rows.begin(owner.row, engine, 0.0)
        owners.append(owner)
    return rows, owners


def test_present_counts_per_engine_and_leaves_one_out_where_asked() -> None:
    rows, owners = rows_of((0, 100), (2, 30), (0, 7))
    batch, tokens = rows.present(3)
    assert batch.tolist() == [2, 0, 1]
    assert tokens.tolist() == [107, 0, 30]
    batch, tokens = rows.present(3, but=owners[0].row)
    assert batch.tolist() == [1, 0, 1]
    assert tokens.tolist() == [7, 0, 30]


def test_the_last_row_moves_into_the_place_of_one_taken_out() -> None:
    rows, owners = rows_of((0, 100), (1, 30), (2, 7))
    rows.remove(owners[0])
    assert owners[0].row == -1
    assert owners[2].row == 0
    assert len(rows) == 2
    assert rows.present(3)[1].tolist() == [0, 30, 7]


def test_more_rows_than_there_was_place_for_keep_what_they_held() -> None:
    rows, _ = rows_of(*((number % 3, number) for number in range(FIRST_ROWS + 1)))
    assert rows.present(3)[1].sum() == sum(range(FIRST_ROWS + 1))


def test_the_tightest_bound_is_infinite_where_nobody_decodes() -> None:
    rows, _ = rows_of((0, 1), (2, 1))
    assert rows.tightest_s(3) == pytest.approx([0.1, np.inf, 0.3])


def test_ahead_without_a_law_everybody_stays_and_gets_a_token_a_step() -> None:
    rows, _ = rows_of((0, 100), (0, 50), (2, 10))
    batch, tokens = rows.ahead(np.array([0.0, 1.0]), np.array([0.1, 0.1, 0.5]), None, now=0.0)
    assert batch.tolist() == [[2, 2], [0, 0], [1, 1]]
    assert tokens == pytest.approx(np.array([[150, 170], [0, 0], [10, 12]]))


def test_ahead_counts_who_arrives_by_then_and_who_will_have_ended_by_his_chance() -> None:
    rows, _ = rows_of((1, 100))
    rows.add(Owner(), 0, ("m",), prompt_tokens=40, begins_at=2.0, bound_s=np.inf)
    batch, tokens = rows.ahead(np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.5]), Halves(), now=0.0)
    assert batch.tolist() == [[0, 1, 0.5], [0.5, 0.5, 0.5]]
    assert tokens == pytest.approx(np.array([[0, 40, 21], [51, 52, 53]]))


def test_ahead_of_nobody_is_nothing() -> None:
    batch, tokens = DecodeRows().ahead(np.array([1.0, 2.0]), np.array([0.1, 0.1, 0.1]), None, now=0.0)
    assert batch.shape == tokens.shape == (3, 2)
    assert not batch.any()
    assert not tokens.any()
