"""The emulated SGLang against what real engines answered to the same requests; tests/engines/sglang asks them live."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.engines.sglang.emulated import UNLIKE_SGLANG, emulated_sglang
from tests.engines.sglang.record import RECORDED, record_all
from tests.engines.shapes import recording_differences

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

HANDSHAKE = "error_handshake.json"
"""Left out here: it is how long it takes, which tests/loadtest/test_fake_sglang.py looks at on a faster clock."""
FILES = json.loads((RECORDED / "exchanges.json").read_text())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def emulated(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """The directory with what the emulated engines answered."""
    directory = tmp_path_factory.mktemp("emulated-sglang")
    async with emulated_sglang() as fleet:
        await record_all(fleet, directory, has_single=True, with_handshake=False)
    yield directory


@pytest.mark.parametrize("file", [file for file in FILES if file not in (*UNLIKE_SGLANG, HANDSHAKE)])
async def test_an_emulated_engine_answers_in_the_recorded_shape(file: str, emulated: Path) -> None:
    assert recording_differences(RECORDED, emulated, file) == []


@pytest.mark.parametrize("file", UNLIKE_SGLANG)
async def test_each_stated_exception_is_still_one(file: str, emulated: Path) -> None:
    assert recording_differences(RECORDED, emulated, file) != []
