"""Every failure of every connector: nobody waits long, nobody gets a wrong token, nothing is held without need."""

from __future__ import annotations

import json

import pytest

from loadtest import fault_matrix
from loadtest.bench_faults import faults_of, main
from loadtest.fault_matrix import FAULTS, MARGIN_S, TRIES, Cell, Fault, fault_of, nothing, run_cell
from loadtest.fault_pools import HOLD_S, LIMIT_S, POOLS

MID_STREAM = ("decode dies mid-stream", "decode freezes mid-stream")
CELLS = [(connector, fault) for connector in POOLS for fault in FAULTS if fault_of(connector, fault) is not None]


@pytest.mark.slow
@pytest.mark.parametrize(("connector", "fault"), CELLS)
async def test_each_cell_reaches_its_goals(connector: str, fault: str) -> None:
    cell = await run_cell(connector, fault)
    assert cell is not None
    assert faults_of(cell) == []
    if fault.startswith("client leaves"):
        assert (cell.ending, cell.client) == ("stopped", "left")
    elif fault == "none":
        assert (cell.ending, cell.client) == ("served", "right text")
    elif fault in MID_STREAM and connector == "sglang":
        assert cell.ending == "failed"
        assert cell.client.startswith("stream_error")
    elif fault in MID_STREAM:
        assert (cell.ending, cell.client) == ("continued", "right text")
    else:
        assert cell.client == "right text"


@pytest.mark.slow
async def test_a_cell_whose_fault_nobody_met_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that nobody asks may fail as it likes: the request never met it."""
    nobody_asks = Fault(FAULTS["none"].arrange, nothing, ("d0",))
    monkeypatch.setattr(fault_matrix, "OTHERWISE", {("shared store", "decode refuses"): nobody_asks})
    plays = []
    play = fault_matrix._play

    async def counted(connector: str, fault: str, played: Fault) -> Cell:
        plays.append(fault)
        return await play(connector, fault, played)

    monkeypatch.setattr(fault_matrix, "_play", counted)
    cell = await run_cell("shared store", "decode refuses")
    assert cell is not None
    assert (cell.ending, cell.client, len(plays)) == ("served", "right text", TRIES)
    assert faults_of(cell) == ["the fault was never met"]


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
