"""`sluice bench faults`: the fault matrix on emulated engines, as a table or JSON; 1 when a cell misses its goal."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict

from gateway import logs
from gateway.config import LogLevel, LogSettings
from loadtest.fault_matrix import FAULTS, MARGIN_S, Cell, run_cell
from loadtest.fault_pools import LIMIT_S, POOLS

BEYOND_LIMITS_S = 5.0
"""No cell may take longer than this beyond the gateway's own limits."""


def faults_of(cell: Cell) -> list[str]:
    """Which goals a cell misses; none in most."""
    missed = []
    if cell.took_s > LIMIT_S + BEYOND_LIMITS_S:
        missed.append(f"took {cell.took_s:.1f} s")
    if not cell.is_met:
        missed.append("the fault was never met")
    if cell.client not in ("right text", "left") and not (cell.ending == "failed" and cannot_go_on(cell)):
        missed.append(f"the client saw {cell.client}")
    if cell.longest_hold_s > cell.hold_limit_s + MARGIN_S:
        missed.append(f"blocks were held for {cell.longest_hold_s:.1f} s")
    return missed


def cannot_go_on(cell: Cell) -> bool:
    """Whether the stream had begun and no other engine can take it over: an error event is all that is left."""
    return cell.connector == "sglang" and cell.fault in ("decode dies mid-stream", "decode freezes mid-stream")


async def matrix(connectors: Sequence[str], faults: Sequence[str]) -> list[Cell]:
    """Each cell that there is, one after the other."""
    cells = [await run_cell(connector, fault) for connector in connectors for fault in faults]
    return [cell for cell in cells if cell is not None]


def main(words: Sequence[str] | None = None) -> int:
    """Runs the matrix and prints it: 0 when every cell reached its goals, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="sluice bench faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--connector", choices=POOLS, action="append", help="only this one; repeatable")
    parser.add_argument("--fault", choices=FAULTS, action="append", help="only this one; repeatable")
    flags = parser.parse_args(words)
    logs.configure(LogSettings(level=LogLevel.ERROR))
    cells = asyncio.run(matrix(flags.connector or list(POOLS), flags.fault or list(FAULTS)))
    missed = {f"{cell.connector}: {cell.fault}": told for cell in cells if (told := faults_of(cell))}
    if flags.json:
        print(json.dumps({"cells": [asdict(cell) for cell in cells], "missed": missed}))
    else:
        print(table(cells))
        print(f"\n{len(cells)} cells, {len(missed)} miss a goal", *missed.items(), sep="\n  ")
    return 1 if missed else 0


def _short(client: str) -> str:
    """An error by its kind alone."""
    return client if client in ("right text", "wrong text", "left") else client.partition(" ")[0]


def table(cells: Sequence[Cell]) -> str:
    """The cells for people."""
    lines = [f"{'connector':<13}{'fault':<38}{'ending':<11}{'client':<13}{'took s':>7}{'blocks x s':>12}{'held s':>8}"]
    lines += [
        f"{cell.connector:<13}{cell.fault:<38}{cell.ending:<11}{_short(cell.client):<13}{cell.took_s:>7.2f}"
        f"{cell.stranded_block_s:>12.1f}{cell.longest_hold_s:>8.2f}"
        for cell in cells
    ]
    return "\n".join(lines)
