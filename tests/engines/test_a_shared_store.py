"""Real engines that hand KV on over a folder (ExampleConnector), behind the gateway.

A prompt of a single token ends an engine that has this connector, whoever sends it: the connector aligns the length
twice (vllm 0.32.0, example_connector.py:297 and :455), so that it promises -128 tokens, and the worker reads outside
of the prompt. So these prompts have two tokens at least.

The file's name puts it before the others: its two engines are gone when their four are started.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from gateway.core.types import Role
from loadtest.vllm_process import BLOCK_TOKENS, EngineSpec, VllmFleet
from tests.engines.conftest import HANDS_OFF, PROMPTS, serving_gateway
from tests.engines.metrics import read_metrics
from tests.engines.prompts import Answer, wrong_answers
from tests.engines.test_gateway import ask_all

pytestmark = [pytest.mark.engines, pytest.mark.asyncio(loop_scope="session")]

References = dict[str, dict[str, Answer]]
ANSWERS_AT_ONCE = 8
CONFIG = """
[[engines]]
url = "{prefill}"
role = "prefill"
connector = "ExampleConnector"

[[engines]]
url = "{decode}"
role = "decode"
connector = "ExampleConnector"
"""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def store_fleet(
    engine_python: Path, engine_directory: Path, reference_answers: References
) -> AsyncIterator[VllmFleet]:
    """One prefill and one decode engine with a folder between them."""
    store = engine_directory / "store"
    specs = [EngineSpec("sp", Role.PREFILL, store=store), EngineSpec("sd", Role.DECODE, store=store)]
    async with VllmFleet(engine_python, specs, engine_directory) as fleet:
        yield fleet


async def test_answers_over_a_shared_folder_equal_those_of_a_single_engine(
    store_fleet: VllmFleet, session: aiohttp.ClientSession, reference_answers: References, tmp_path: Path
) -> None:
    prefill, decode = store_fleet["sp"], store_fleet["sd"]
    config = tmp_path / "sluice.toml"
    config.write_text(HANDS_OFF + CONFIG.format(prefill=prefill.url, decode=decode.url))
    async with serving_gateway(store_fleet, tmp_path / "gateway.log", config) as gateway:
        asked = [prompt for prompt in PROMPTS if reference_answers["forty"][prompt.name].prompt_tokens > 1]
        answers = await ask_all(session, gateway, asked, ANSWERS_AT_ONCE)
    references = {prompt.name: reference_answers["forty"][prompt.name] for prompt in asked}
    assert len(references) >= 38
    assert wrong_answers(answers, references) == []
    assert answers.keys() == references.keys()
    pairs = {(each.headers["x-sluice-prefill"], each.headers["x-sluice-decode"]) for each in answers.values()}
    assert pairs == {(prefill.url.removeprefix("http://"), decode.url.removeprefix("http://"))}

    metrics = await read_metrics(session, decode.url)
    moved, computed = (metrics.prompt_tokens(source) for source in ("external_kv_transfer", "local_compute"))
    lengths = [answer.prompt_tokens for answer in references.values()]
    # Whole blocks of all but the last two tokens: the connector aligns once more than it has to.
    assert moved == sum((length - 2) // BLOCK_TOKENS * BLOCK_TOKENS for length in lengths)
    assert computed == sum(lengths) - moved
    print(f"KV shared store | {sum(lengths)} prompt tokens | {moved:.0f} read from the folder, {computed:.0f} computed")
