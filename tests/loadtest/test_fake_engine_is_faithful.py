"""The emulated engine against what real vLLM engines answered to the same requests; tests/engines asks them live."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.engines.emulated import UNLIKE_VLLM, emulated_fleet
from tests.engines.record import RECORDED, record_all
from tests.engines.shapes import recording_differences

FILES = [*json.loads((RECORDED / "exchanges.json").read_text()), "kv_event_frames.hex"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def emulated(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """The directory with what the emulated engines answered."""
    directory = tmp_path_factory.mktemp("emulated")
    async with emulated_fleet() as fleet:
        await record_all(fleet, directory)
    yield directory


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("file", [file for file in FILES if file not in UNLIKE_VLLM])
async def test_an_emulated_engine_answers_in_the_recorded_shape(file: str, emulated: Path) -> None:
    assert recording_differences(RECORDED, emulated, file) == []


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("file", UNLIKE_VLLM)
async def test_each_stated_exception_is_still_one(file: str, emulated: Path) -> None:
    assert recording_differences(RECORDED, emulated, file) != []
