"""Starting real SGLang engines, as far as it can be tested without one; tests/engines/sglang has the rest."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gateway.core.types import Role
from loadtest.engine_process import EngineStartFailed
from loadtest.sglang_process import SglangEngine, SglangFleet, SglangSpec, find_sglang_python

PYTHON = Path(sys.executable)


def engine(tmp_path: Path, role: Role, **fields: bool) -> SglangEngine:
    """An engine that was not started."""
    return SglangEngine(SglangSpec("e", role, **fields), PYTHON, tmp_path / "model", tmp_path / "engine.log")


def test_the_variable_or_the_root_names_the_interpreter(tmp_path: Path) -> None:
    assert find_sglang_python({"SLUICE_SGLANG_PYTHON": sys.executable}, tmp_path) == PYTHON
    assert find_sglang_python({}, tmp_path) is None


@pytest.mark.parametrize(
    ("role", "mode"), [(Role.PREFILL, ["prefill"]), (Role.DECODE, ["decode"]), (Role.BOTH, [])], ids=str
)
def test_each_role_has_its_mode(role: Role, mode: list[str], tmp_path: Path) -> None:
    command = engine(tmp_path, role).command()
    assert [command[at + 1] for at, word in enumerate(command) if word == "--disaggregation-mode"] == mode


def test_only_a_prefill_engine_has_a_bootstrap_server_and_its_own_variable(tmp_path: Path) -> None:
    prefill, decode = engine(tmp_path, Role.PREFILL), engine(tmp_path, Role.DECODE)
    assert str(prefill.bootstrap_port) in prefill.command()
    assert str(decode.bootstrap_port) not in decode.command()
    assert prefill.environment().keys() - decode.environment().keys()


def test_kv_events_are_bound_to_the_engine_s_own_port(tmp_path: Path) -> None:
    started = engine(tmp_path, Role.PREFILL, publishes_kv_events=True)
    command = started.command()
    config = json.loads(command[command.index("--kv-events-config") + 1])
    assert config["bind"] is True
    assert config["endpoint"] == f"tcp://127.0.0.1:{started.kv_events_port}"


async def test_a_process_that_ends_before_it_serves_fails_the_start_with_the_end_of_its_log(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").touch()
    with pytest.raises(EngineStartFailed, match="No module named"):
        async with SglangFleet(PYTHON, [SglangSpec("e")], tmp_path):
            pass
