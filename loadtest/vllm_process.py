"""Starts and stops real vLLM engines on this machine's CPU, with a tiny random model and KV hand-off between them.

    async with VllmFleet(python, [EngineSpec("p0", Role.PREFILL), EngineSpec("d0", Role.DECODE)], directory) as fleet:
        print(fleet["p0"].url)

The engines are ordinary `vllm.entrypoints.openai.api_server` processes. Each runs under loadtest/leash.py, so none of
them outlives this process, however it ends. Flags and environment were found by running vLLM 0.32.0 on two cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

from gateway.core.errors import GatewayError
from gateway.core.types import Role
from loadtest.leash import group_members, kill_group

MODEL = "tiny"
MAX_MODEL_TOKENS = 8192
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
READY_POLL_S = 0.25
PROBE_TIMEOUT_S = 5.0
LOG_LINES_SHOWN = 30
KV_ROLES = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer"}


class EngineStartFailed(GatewayError):
    """A vLLM process ended, or did not answer in time, before it was ready."""

    kind = "engine_start_failed"


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What one engine is started as. Role BOTH is a plain engine without a KV connector."""

    name: str
    role: Role = Role.BOTH
    kv_load_failure_policy: str = "fail"
    """What a decode engine does when KV cannot be loaded: `fail` the request or `recompute` the prompt."""
    publishes_kv_events: bool = False


def find_engine_python(environ: Mapping[str, str], root: Path) -> Path | None:
    """The interpreter that has vLLM: the one `SLUICE_VLLM_PYTHON` names, else `.venv-vllm` under root, else None."""
    named = environ.get(PYTHON_VARIABLE)
    candidate = Path(named) if named else root / ".venv-vllm" / "bin" / "python"
    return candidate if candidate.exists() else None


def make_model(python: Path, directory: Path) -> Path:
    """The directory with the tiny model in it, written by the engine's interpreter unless it is already there (5 s)."""
    if not (directory / "model.safetensors").exists():
        script = Path(__file__).with_name("tiny_model.py")
        made = subprocess.run([python, script, directory], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise EngineStartFailed(f"the tiny model could not be made: {made.stderr[-2000:]}")
    return directory


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports of the loopback interface that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class VllmEngine:
    """One vLLM process and its ports, which stay the same over restarts."""

    def __init__(self, spec: EngineSpec, python: Path, model: Path, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        self.port, self._side_channel_port, self.kv_events_port, self.kv_replay_port = free_ports(4)
        self._python = python
        self._model = model
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Base URL of the engine's HTTP server."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    def command(self) -> list[str]:
        """The command line that starts the engine."""
        command = [str(self._python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", self._model.name, "--served-model-name", MODEL]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", str(MAX_MODEL_TOKENS)]
        command += ["--dtype", "float32", "--enforce-eager"]
        command += ["--enable-prefix-caching", "--enable-prompt-tokens-details"]
        if self.spec.role in KV_ROLES:
            command += ["--kv-transfer-config", json.dumps(self._kv_transfer_config())]
        if self.spec.publishes_kv_events:
            command += ["--kv-events-config", json.dumps(self._kv_events_config())]
        return command

    def _kv_transfer_config(self) -> dict[str, str]:
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

    async def start(self, ready_timeout_s: float) -> None:
        """Start the process and wait until it serves. Raises EngineStartFailed with the end of its log."""
        environment = {**os.environ, **ENVIRONMENT, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self._side_channel_port)}
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(Path(__file__).with_name("leash.py")), *self.command()),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env=environment,
                cwd=self._model.parent,
            )
        try:
            await asyncio.wait_for(self._wait_ready(), ready_timeout_s)
        except TimeoutError:
            raise self._start_failure(f"was not ready within {ready_timeout_s:g} s") from None

    async def _wait_ready(self) -> None:
        # A connection made while the engine is only binding its port may never be answered: a new one each time.
        connector = aiohttp.TCPConnector(force_close=True)
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            while self.is_running:
                try:
                    async with session.get(f"{self.url}/health") as response:
                        if response.status == 200:
                            return
                except (aiohttp.ClientError, TimeoutError):
                    pass
                await asyncio.sleep(READY_POLL_S)
        raise self._start_failure("ended before it was ready")

    def _start_failure(self, what: str) -> EngineStartFailed:
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return EngineStartFailed("\n".join([f"engine {self.spec.name} {what}; its log ends:", *lines]))

    async def kill(self) -> None:
        """End the engine as a crash would: SIGKILL to all its processes at once."""
        if self._process is not None and self.is_running:
            kill_group(self._process.pid)
            await self._process.wait()

    def freeze(self) -> None:
        """Stop the engine's processes in their tracks: connections are still accepted, nothing is answered."""
        if self._process is not None and self.is_running:
            leash = self._process.pid
            for member in group_members(leash):
                if member != leash:
                    os.kill(member, signal.SIGSTOP)

    def unread_bytes(self) -> int:
        """Bytes sent to the engine's HTTP port that it has not read yet."""
        total = 0
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, _, _, queues, *_ = line.split()
            if int(local.partition(":")[2], 16) == self.port:
                total += int(queues.partition(":")[2], 16)
        return total

    async def stop(self) -> None:
        """End the engine as an operator would, and wait until all its processes are gone."""
        if self._process is not None and self.is_running:
            self._process.terminate()
            await self._process.wait()


class VllmFleet:
    """Several engines started side by side, gone when the `async with` ends. Iterates over its engines."""

    def __init__(
        self, python: Path, specs: Sequence[EngineSpec], directory: Path, *, ready_timeout_s: float = 300.0
    ) -> None:
        """`directory` takes the model and the logs.

        `ready_timeout_s` > 0: on two cores vLLM needs 20 s alone and some 70 s for four side by side.
        """
        self._python = python
        self._ready_timeout_s = ready_timeout_s
        model = directory / "model"
        self._model = model
        self._engines = {spec.name: VllmEngine(spec, python, model, directory / f"{spec.name}.log") for spec in specs}

    def __getitem__(self, name: str) -> VllmEngine:
        return self._engines[name]

    def __iter__(self) -> Iterator[VllmEngine]:
        return iter(self._engines.values())

    def urls(self, role: Role) -> list[str]:
        """Base URLs of the engines of that role."""
        return [engine.url for engine in self if engine.spec.role is role]

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(make_model, self._python, self._model)
        try:
            await self.start_missing()
        except BaseException:
            await self._stop_all()
            raise
        return self

    async def start_missing(self) -> None:
        """Start those engines that do not run, all at once, and wait until each serves."""
        missing = [engine for engine in self if not engine.is_running]
        failures = await asyncio.gather(
            *(each.start(self._ready_timeout_s) for each in missing), return_exceptions=True
        )
        for failure in failures:
            if isinstance(failure, BaseException):
                raise failure

    async def _stop_all(self) -> None:
        await asyncio.gather(*(engine.stop() for engine in self))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop_all()
