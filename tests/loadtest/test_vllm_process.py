"""Starting real engines, as far as it can be tested without one; tests/engines has the rest."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from gateway.core.types import Role
from loadtest.vllm_process import (
    EngineSpec,
    EngineStartFailed,
    VllmEngine,
    VllmFleet,
    find_engine_python,
    free_ports,
    make_model,
)

PYTHON = Path(sys.executable)


def engine(tmp_path: Path, spec: EngineSpec) -> VllmEngine:
    """An engine that was not started."""
    return VllmEngine(spec, PYTHON, tmp_path / "model", tmp_path / "engine.log")


def option(command: list[str], name: str) -> dict[str, object]:
    """The JSON after that flag."""
    value = json.loads(command[command.index(name) + 1])
    assert isinstance(value, dict)
    return value


def test_the_variable_names_the_interpreter(tmp_path: Path) -> None:
    assert find_engine_python({"SLUICE_VLLM_PYTHON": sys.executable}, tmp_path) == PYTHON


def test_without_the_variable_the_interpreter_is_looked_for_under_the_root(tmp_path: Path) -> None:
    assert find_engine_python({}, tmp_path) is None
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert find_engine_python({}, tmp_path) == python


def test_an_interpreter_that_is_not_there_is_none_at_all(tmp_path: Path) -> None:
    assert find_engine_python({"SLUICE_VLLM_PYTHON": str(tmp_path / "python")}, tmp_path) is None


def test_free_ports_are_distinct_and_free() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    with socket.create_server(("127.0.0.1", ports[0])):
        pass


@pytest.mark.parametrize(("role", "kv_role"), [(Role.PREFILL, "kv_producer"), (Role.DECODE, "kv_consumer")])
def test_each_role_becomes_its_connector_role_and_failure_policy(tmp_path: Path, role: Role, kv_role: str) -> None:
    command = engine(tmp_path, EngineSpec("e", role, kv_load_failure_policy="recompute")).command()
    config = option(command, "--kv-transfer-config")
    assert (config["kv_role"], config["kv_load_failure_policy"]) == (kv_role, "recompute")
    assert "--kv-events-config" not in command


def test_a_plain_engine_has_no_connector_and_events_have_a_port_of_their_own(tmp_path: Path) -> None:
    plain = engine(tmp_path, EngineSpec("e", publishes_kv_events=True))
    assert "--kv-transfer-config" not in plain.command()
    endpoint = option(plain.command(), "--kv-events-config")["endpoint"]
    assert endpoint == f"tcp://*:{plain.kv_events_port}"


async def test_an_engine_that_ends_at_once_is_an_error_that_shows_its_log(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    fleet = VllmFleet(PYTHON, [EngineSpec("one"), EngineSpec("two")], tmp_path)
    with pytest.raises(EngineStartFailed, match="No module named 'vllm'"):
        async with fleet:
            pass
    assert [each.is_running for each in fleet] == [False, False]


def test_a_model_that_cannot_be_made_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineStartFailed, match="No module named 'torch'"):
        make_model(PYTHON, tmp_path / "model")


def test_unread_bytes_are_those_nobody_has_taken_from_the_socket(tmp_path: Path) -> None:
    frozen = engine(tmp_path, EngineSpec("e"))
    address = ("127.0.0.1", frozen.port)
    with (
        socket.create_server(address) as server,
        socket.create_connection(address) as client,
        server.accept()[0] as end,
    ):
        client.sendall(b"x" * 5000)
        end.recv(5000, socket.MSG_PEEK | socket.MSG_WAITALL)
        assert frozen.unread_bytes() == 5000
        end.recv(5000, socket.MSG_WAITALL)
        assert frozen.unread_bytes() == 0
