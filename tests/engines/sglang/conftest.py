"""Real SGLang engines for the tests of this package: two prefill, two decode servers, started once, gone after it."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from gateway.core.types import Role
from loadtest.sglang_process import PYTHON_VARIABLE, SglangEngine, SglangFleet, SglangSpec, find_sglang_python
from tests.engines.conftest import REQUIRED_VARIABLE, ROOT, serving_gateway
from tests.engines.prompts import Answer, Prompt, ask, make_prompts

PROMPTS = make_prompts(seed=3, lengths_tokens=(1, 2, 15, 16, 17, 500, 1000, 2000, 4000, 4980))
"""Forty, around one page of 16 tokens and up to 5,000 with the chat template's share."""
FRESH_PROMPTS = make_prompts(seed=5, lengths_tokens=(1000, 2000, 4000, 4980))
"""For tests that need engines busy with prompts which none of them has cached."""
SPECS = [
    SglangSpec("p0", Role.PREFILL, publishes_kv_events=True),
    SglangSpec("p1", Role.PREFILL, publishes_kv_events=True),
    SglangSpec("d0", Role.DECODE),
    SglangSpec("d1", Role.DECODE),
]


@pytest.fixture(scope="package")
def sglang_python() -> Path:
    """The interpreter that has SGLang. Without one the tests are skipped, or fail where engines are required."""
    python = find_sglang_python(os.environ, ROOT)
    if python is None:
        reason = f"no interpreter with SGLang: run `make engines` or set {PYTHON_VARIABLE}"
        if os.environ.get(REQUIRED_VARIABLE):
            pytest.fail(reason)
        pytest.skip(reason)
    return python


@pytest.fixture(scope="package")
def sglang_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where model and logs go."""
    return tmp_path_factory.mktemp("sglang")


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def references(sglang_python: Path, sglang_directory: Path, session: aiohttp.ClientSession) -> dict[str, Answer]:
    """What a single engine answers, by prompt name and whether it is of the forty (`4000 fresh` else)."""
    async with SglangFleet(sglang_python, [SglangSpec("single")], sglang_directory) as fleet:
        url = fleet["single"].url
        return {key_of(prompt): await ask(session, url, prompt) for prompt in (*PROMPTS, *FRESH_PROMPTS)}


def key_of(prompt: Prompt) -> str:
    """What a prompt's reference is found under: two sets have prompts of one name."""
    return prompt.name if any(prompt is each for each in PROMPTS) else f"{prompt.name} fresh"


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def sglang(
    sglang_python: Path, sglang_directory: Path, references: dict[str, Answer]
) -> AsyncIterator[SglangFleet]:
    """The engines of SPECS. Those that a test killed stay down, for a start takes half a minute."""
    async with SglangFleet(sglang_python, SPECS, sglang_directory) as fleet:
        yield fleet


StartGateway = Callable[..., AbstractAsyncContextManager[str]]


@pytest.fixture
def start_gateway(sglang: SglangFleet, tmp_path: Path) -> StartGateway:
    """Starts a gateway in front of the engines that run, or of those named; more TOML may be given."""

    def start(*names: str, more: str = "", **changes: Mapping[str, object]) -> AbstractAsyncContextManager[str]:
        engines = [each for each in sglang if each.is_running and (not names or each.spec.name in names)]
        config = tmp_path / "gateway.toml"
        config.write_text(more + "".join(engine_table(each, changes.get(each.spec.name, {})) for each in engines))
        return serving_gateway(None, tmp_path / "gateway.log", config)

    return start


def engine_table(engine: SglangEngine, changes: Mapping[str, object]) -> str:
    """The settings of one engine as TOML."""
    table = {"url": engine.url, "id": engine.spec.name, "role": engine.spec.role.value, "adapter": "sglang"} | changes
    lines = [f"{key} = {value!r}" for key, value in table.items()]
    return "\n".join(("\n[[engines]]", *lines, ""))


@dataclass(frozen=True, slots=True)
class Load:
    """What one engine is busy with."""

    running_count: int
    waiting_count: int
    in_flight_count: int
    used_tokens: int
    """Tokens whose memory is taken, those of prompts not yet computed included."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left of any request."""
        return not (self.running_count or self.waiting_count or self.in_flight_count or self.used_tokens)


async def load_of(session: aiohttp.ClientSession, engine: SglangEngine) -> Load:
    """The engine's load; its snapshot may be a third of a second old."""
    async with session.get(f"{engine.url}/v1/loads") as response:
        told = (await response.json())["loads"][0]
    in_flight = told["disaggregation"]["prefill_inflight_queue_reqs"]
    return Load(told["num_running_reqs"], told["num_waiting_reqs"], in_flight, told["num_total_tokens"])


class Cell:
    """One cell of the fault matrix: says on the output how the request ended, after what time, and what was seen."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began_at = time.monotonic()

    def ended(self, ending: str, client: str) -> float:
        """Prints the cell; seconds since it began."""
        elapsed_s = time.monotonic() - self._began_at
        print(f"CELL sglang | {self._name} | {ending} | {elapsed_s:.2f} s | {client}")
        return elapsed_s
