"""The same requests to real and to emulated SGLang: the answers have the same status, headers, fields and order."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.sglang_process import SglangFleet
from tests.engines.sglang.emulated import UNLIKE_SGLANG, emulated_sglang
from tests.engines.sglang.record import record_all
from tests.engines.shapes import recording_differences

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]


async def test_real_and_emulated_engines_answer_the_same_requests_alike(sglang: SglangFleet, tmp_path: Path) -> None:
    real, emulated = tmp_path / "real", tmp_path / "emulated"
    real.mkdir()
    emulated.mkdir()
    await record_all(sglang, real)
    async with emulated_sglang() as fakes:
        await record_all(fakes, emulated)
    files = [path.name for path in real.iterdir() if path.name != "exchanges.json" and path.name not in UNLIKE_SGLANG]
    found = {file: recording_differences(real, emulated, file) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}
