"""Starts and stops real SGLang engines on this machine's CPU, with a tiny random model and KV hand-off between them.

    async with SglangFleet(python, [SglangSpec("p0", Role.PREFILL), SglangSpec("d0", Role.DECODE)], directory) as fleet:
        print(fleet["p0"].url)

The engines are ordinary `sglang.launch_server` processes of the unmodified wheel; the KV goes over Mooncake's TCP
transport. Flags and environment were found by running SGLang 0.5.23 on two cores: each unusual one was a crash first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.core.types import Role
from loadtest.engine_process import MAX_MODEL_TOKENS, MODEL, EngineFleet, EngineProcess, free_ports

PYTHON_VARIABLE = "SLUICE_SGLANG_PYTHON"
PAGE_TOKENS = 16
CAPACITY_TOKENS = 40_960
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # several engines share few cores
    "TOKENIZERS_PARALLELISM": "false",
    "SGLANG_HOST_IP": "127.0.0.1",
    "SGLANG_USE_CPU_ENGINE": "0",  # 1 imports sgl_kernel, of which there is no build for the CPU
}
COMMON_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"),
    *("--model-impl", "transformers"),  # the native Llama imports vLLM's compiled operators
    *("--max-total-tokens", str(CAPACITY_TOKENS), "--max-running-requests", "64", "--page-size", str(PAGE_TOKENS)),
    *("--context-length", str(MAX_MODEL_TOKENS), "--random-seed", "0"),
    *("--enable-metrics", "--enable-cache-report"),
    "--sleep-on-idle",  # an idle scheduler otherwise spins on a core of its own
)
PREFILL_FLAGS = (
    *("--disaggregation-mode", "prefill", "--disaggregation-transfer-backend", "mooncake_tcp"),
    "--disable-overlap-schedule",  # with it the first transfer of a cached prefix asks for a CUDA event
)
PREFILL_ENVIRONMENT = {"SGLANG_DISAGGREGATION_ALL_CP_RANKS_TRANSFER": "1"}  # else it pins memory, which needs CUDA
DECODE_FLAGS = (
    *("--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "mooncake_tcp"),
    *("--disaggregation-decode-retraction-backup", "cpu_tensor"),  # the default pool is made with CUDA
)


@dataclass(frozen=True, slots=True)
class SglangSpec:
    """What one engine is started as. Role BOTH is a plain engine that hands nothing off."""

    name: str
    role: Role = Role.BOTH
    publishes_kv_events: bool = False


def find_sglang_python(environ: Mapping[str, str], root: Path) -> Path | None:
    """The interpreter that has SGLang: what `SLUICE_SGLANG_PYTHON` names, else `.venv-sglang` under root, else None."""
    named = environ.get(PYTHON_VARIABLE)
    candidate = Path(named) if named else root / ".venv-sglang" / "bin" / "python"
    return candidate if candidate.exists() else None


class SglangEngine(EngineProcess):
    """One SGLang server (three processes) and its ports, which stay the same over restarts."""

    ready_path = "/health"
    """It generates a token, so that what follows meets an engine that is warm; `/ready` says 200 before that."""
    spec: SglangSpec

    def __init__(self, spec: SglangSpec, python: Path, model: Path, log_path: Path) -> None:
        super().__init__(spec, python, model, log_path)
        self.bootstrap_port, self.kv_events_port, self.kv_replay_port = free_ports(3)

    def command(self) -> list[str]:
        """The command line that starts the engine."""
        command = [str(self._python), "-m", "sglang.launch_server"]
        command += ["--model-path", self._model.name, "--served-model-name", MODEL]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *COMMON_FLAGS]
        if self.spec.role is Role.PREFILL:
            command += [*PREFILL_FLAGS, "--disaggregation-bootstrap-port", str(self.bootstrap_port)]
        elif self.spec.role is Role.DECODE:
            command += DECODE_FLAGS
        if self.spec.publishes_kv_events:
            command += ["--kv-events-config", json.dumps(self._kv_events_config())]
        return command

    def environment(self) -> Mapping[str, str]:
        """The variables that SGLang needs on the CPU."""
        return {**ENVIRONMENT, **(PREFILL_ENVIRONMENT if self.spec.role is Role.PREFILL else {})}

    def _kv_events_config(self) -> dict[str, object]:
        # Without `bind` SGLang connects to a concrete address instead of binding it.
        return {
            "publisher": "zmq",
            "endpoint": f"tcp://127.0.0.1:{self.kv_events_port}",
            "replay_endpoint": f"tcp://127.0.0.1:{self.kv_replay_port}",
            "bind": True,
            "topic": "",
        }


class SglangFleet(EngineFleet[SglangEngine]):
    """Several engines started side by side, gone when the `async with` ends. Iterates over its engines."""

    def __init__(
        self, python: Path, specs: Sequence[SglangSpec], directory: Path, *, ready_timeout_s: float = 300.0
    ) -> None:
        """`directory` takes the model and the logs.

        `ready_timeout_s` > 0: on two cores SGLang needs 20 s alone and some 60 s for four side by side.
        """
        model = directory / "model"
        engines = [SglangEngine(spec, python, model, directory / f"{spec.name}.log") for spec in specs]
        super().__init__(python, model, engines, ready_timeout_s=ready_timeout_s)
