"""Every failure of every connector: nobody waits long, nobody gets a wrong token, nothing is held without need."""

from __future__ import annotations

import json

import pytest

from loadtest.bench_faults import faults_of, main
from loadtest.fault_matrix import FAULTS, MARGIN_S, Cell, run_cell
from loadtest.fault_pools import HOLD_S, LIMIT_S, POOLS

CONTINUED = ("decode dies mid-stream", "decode freezes mid-stream")


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("connector", list(POOLS))
async def test_each_cell_reaches_its_goals(connector: str, fault: str) -> None:
    cell = await run_cell(connector, fault)
    assert faults_of(cell) == []
    if fault.startswith("client leaves"):
        assert (cell.ending, cell.client) == ("stopped", "left")
    elif fault == "none" or fault in CONTINUED:
        assert (cell.ending, cell.client) == ("served", "right text")
    else:
        assert cell.client == "right text"


def test_a_cell_that_misses_a_goal_says_which() -> None:
    good = Cell("mooncake", "x", "retried", "right text", LIMIT_S, 1.0, HOLD_S)
    assert faults_of(good) == []
    late = Cell("mooncake", "x", "retried", "wrong text", LIMIT_S + 5.1, 1.0, HOLD_S + MARGIN_S + 0.1)
    assert len(faults_of(late)) == 3
    assert faults_of(Cell("shared store", "x", "retried", "right text", 0.1, 1.0, MARGIN_S + 0.1)) != []


@pytest.mark.slow
def test_the_command_prints_its_cells(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--connector", "shared store", "--fault", "none"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert (cell["connector"], cell["client"]) == ("shared store", "right text")
    assert main(["--connector", "shared store", "--fault", "none"]) == 0
    assert "1 cells, 0 miss a goal" in capsys.readouterr().out
