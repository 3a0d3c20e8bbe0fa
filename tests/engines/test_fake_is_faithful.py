"""The same requests to real and to emulated engines: the answers have the same status, headers, fields and order."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.vllm_process import VllmFleet
from tests.engines.emulated import UNLIKE_VLLM, emulated_fleet
from tests.engines.record import record_all
from tests.engines.shapes import recording_differences

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]


async def test_real_and_emulated_engines_answer_the_same_requests_alike(fleet: VllmFleet, tmp_path: Path) -> None:
    real, emulated = tmp_path / "real", tmp_path / "emulated"
    real.mkdir()
    emulated.mkdir()
    await record_all(fleet, real, with_failed_load=False)
    async with emulated_fleet() as fakes:
        await record_all(fakes, emulated, with_failed_load=False)
    files = [path.name for path in real.iterdir() if path.name != "exchanges.json" and path.name not in UNLIKE_VLLM]
    found = {file: recording_differences(real, emulated, file) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}
