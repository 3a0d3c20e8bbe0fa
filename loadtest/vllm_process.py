"""Starts and stops real vLLM engines on this machine's CPU, with a tiny random model and KV hand-off between them.

    async with VllmFleet(python, [EngineSpec("p0", Role.PREFILL), EngineSpec("d0", Role.DECODE)], directory) as fleet:
        print(fleet["p0"].url)

The engines are ordinary `vllm.entrypoints.openai.api_server` processes. Each runs under loadtest/leash.py, so none of
them outlives this process, however it ends. Flags and environment were found by running vLLM 0.32.0 on two cores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.core.types import Role
from loadtest.engine_process import (
    MAX_MODEL_TOKENS,
    MODEL,
    EngineFleet,
    EngineProcess,
    EngineStartFailed,
    free_ports,
    make_model,
)

__all__ = ["MAX_MODEL_TOKENS", "MODEL", "EngineStartFailed", "free_ports", "make_model"]
BLOCK_TOKENS = 128
"""vLLM's default KV block on the CPU."""
PYTHON_VARIABLE = "SLUICE_VLLM_PYTHON"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; 1.3 GB resident per engine
    "OMP_NUM_THREADS": "1",  # several engines share few cores
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "UCX_TLS": "tcp,shm,self,sysv,posix,cma",
    "UCX_NET_DEVICES": "lo",
}
KV_ROLES = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer"}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What one engine is started as. Role BOTH is a plain engine without a KV connector."""

    name: str
    role: Role = Role.BOTH
    kv_load_failure_policy: str = "fail"
    """What a decode engine does when KV cannot be loaded: `fail` the request or `recompute` the prompt."""
    publishes_kv_events: bool = False
    store: Path | None = None
    """The folder over which KV is handed on with the ExampleConnector; None: NIXL."""


def find_engine_python(environ: Mapping[str, str], root: Path) -> Path | None:
    """The interpreter that has vLLM: the one `SLUICE_VLLM_PYTHON` names, else `.venv-vllm` under root, else None."""
    named = environ.get(PYTHON_VARIABLE)
    candidate = Path(named) if named else root / ".venv-vllm" / "bin" / "python"
    return candidate if candidate.exists() else None


class VllmEngine(EngineProcess):
    """One vLLM process and its ports, which stay the same over restarts."""

    spec: EngineSpec

    def __init__(self, spec: EngineSpec, python: Path, model: Path, log_path: Path) -> None:
        super().__init__(spec, python, model, log_path)
        self._side_channel_port, self.kv_events_port, self.kv_replay_port = free_ports(3)

    def command(self) -> list[str]:
        """The command line that starts the engine."""
        command = [str(self._python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", self._model.name, "--served-model-name", MODEL]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", str(MAX_MODEL_TOKENS)]
        command += ["--dtype", "float32", "--enforce-eager"]
        command += ["--enable-prompt-tokens-details"]
        # A prompt of k blocks and one token that is both in the prefix cache and in the folder counts as -1 blocks of
        # external hits (example_connector.py:299 aligns len - 1, the cache len): metrics/loggers.py:1184 dies of it.
        command += ["--enable-prefix-caching" if self.spec.store is None else "--no-enable-prefix-caching"]
        if self.spec.role in KV_ROLES:
            command += ["--kv-transfer-config", json.dumps(self._kv_transfer_config())]
        if self.spec.store is not None:
            # The ExampleConnector writes a prompt's KV with its first chunk, all of it: a prompt must be one chunk.
            command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(MAX_MODEL_TOKENS)]
        if self.spec.publishes_kv_events:
            command += ["--kv-events-config", json.dumps(self._kv_events_config())]
        return command

    def environment(self) -> Mapping[str, str]:
        """The variables that vLLM needs on the CPU, and its own side-channel port."""
        return {**ENVIRONMENT, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self._side_channel_port)}

    def _kv_transfer_config(self) -> dict[str, object]:
        if self.spec.store is not None:
            extra = {"shared_storage_path": str(self.spec.store)}
            return {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
        return {
            "kv_connector": "NixlConnector",
            "kv_role": KV_ROLES[self.spec.role],
            "kv_buffer_device": "cpu",
            "kv_load_failure_policy": self.spec.kv_load_failure_policy,
        }

    def _kv_events_config(self) -> dict[str, object]:
        # With a concrete address in place of the star vLLM connects instead of binding.
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{self.kv_events_port}",
            "replay_endpoint": f"tcp://*:{self.kv_replay_port}",
        }


class VllmFleet(EngineFleet[VllmEngine]):
    """Several engines started side by side, gone when the `async with` ends. Iterates over its engines."""

    def __init__(
        self, python: Path, specs: Sequence[EngineSpec], directory: Path, *, ready_timeout_s: float = 300.0
    ) -> None:
        """`directory` takes the model and the logs.

        `ready_timeout_s` > 0: on two cores vLLM needs 20 s alone and some 70 s for four side by side.
        """
        model = directory / "model"
        engines = [VllmEngine(spec, python, model, directory / f"{spec.name}.log") for spec in specs]
        super().__init__(python, model, engines, ready_timeout_s=ready_timeout_s)
