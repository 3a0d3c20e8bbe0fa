"""Real engine processes on this machine: started under a leash, waited for, killed, frozen and stopped alike.

What is particular to an engine (its command line, its environment, the path that says it is ready) stands in
`vllm_process.py` and `sglang_process.py`. Each process runs under loadtest/leash.py, so none of them outlives this one,
however it ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import aiohttp

from gateway.core.errors import GatewayError
from gateway.core.types import Role
from loadtest.leash import group_members, kill_group

MODEL = "tiny"
MAX_MODEL_TOKENS = 8192
READY_POLL_S = 0.25
PROBE_TIMEOUT_S = 5.0
LOG_LINES_SHOWN = 30


class EngineStartFailed(GatewayError):
    """An engine's process ended, or did not answer in time, before it was ready."""

    kind = "engine_start_failed"


class Spec(Protocol):
    """What one engine is started as."""

    @property
    def name(self) -> str:
        """Its name in the fleet and of its log."""
        ...

    @property
    def role(self) -> Role:
        """Which stages it does."""
        ...


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


class EngineProcess:
    """One engine: a process group and its HTTP port, which stays the same over restarts."""

    ready_path = "/health"
    """GET it: 200 means that the engine serves."""

    def __init__(self, spec: Spec, python: Path, model: Path, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        (self.port,) = free_ports(1)
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
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """Environment variables of the engine, beside those of this process."""
        raise NotImplementedError

    async def start(self, ready_timeout_s: float) -> None:
        """Start the process and wait until it serves. Raises EngineStartFailed with the end of its log."""
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(Path(__file__).with_name("leash.py")), *self.command()),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **self.environment()},
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
                    async with session.get(self.url + self.ready_path) as response:
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


_Engine = TypeVar("_Engine", bound=EngineProcess)


class EngineFleet(Generic[_Engine]):
    """Several engines started side by side, gone when the `async with` ends. Iterates over its engines."""

    def __init__(self, python: Path, model: Path, engines: Sequence[_Engine], *, ready_timeout_s: float) -> None:
        """`model` is the directory of the tiny model, made when missing; `ready_timeout_s` > 0."""
        self._python = python
        self._model = model
        self._ready_timeout_s = ready_timeout_s
        self._engines = {engine.spec.name: engine for engine in engines}

    def __getitem__(self, name: str) -> _Engine:
        return self._engines[name]

    def __iter__(self) -> Iterator[_Engine]:
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
