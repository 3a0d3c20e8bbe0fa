"""Predictions against a real prefill and decode pair, under bursts: a profile fitted to it, corrected online."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from gateway.cli import main as sluice
from gateway.core.types import Role
from loadtest.reality import Run, noise_floor, replay_once, scores, table
from loadtest.vllm_process import MODEL, VllmFleet

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]

GOAL_RATIO = 0.15
LEARNT_COUNT, REQUEST_COUNT = 200, 400


async def test_first_token_and_gaps_are_predicted_within_the_goal_or_the_noise_of_the_machine(
    fleet: VllmFleet, tmp_path: Path
) -> None:
    prefill, decode = fleet.urls(Role.PREFILL)[0], fleet.urls(Role.DECODE)[0]
    profile = tmp_path / "pair.json"
    assert (
        await asyncio.to_thread(sluice, ["fit", "--engine", prefill, "--decode-engine", decode, "--out", str(profile)])
        == 0
    )
    run = Run(prefill, decode, str(profile), MODEL, request_count=REQUEST_COUNT)
    replays = [await replay_once(run, number, tmp_path) for number in (1, 2)]
    print(f"\nload average {os.getloadavg()[0]:.1f}", table(replays, LEARNT_COUNT))
    floor = noise_floor(*(told[LEARNT_COUNT:] for told in replays))
    for told in replays:
        assert len(told) > 0.9 * REQUEST_COUNT
        errors = scores(told[LEARNT_COUNT:])
        for name in ("TTFT", "TBT"):
            assert errors[name].p50_error_ratio <= max(GOAL_RATIO, floor[name])
