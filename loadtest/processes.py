"""Programs that a bench starts beside itself, and what the operating system says each of them cost. Linux only."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast
from urllib.error import URLError
from urllib.request import urlopen

from gateway.core.errors import GatewayError

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
"""Clock ticks of `/proc/PID/stat` per second; 100 on Linux, so a reading is exact to 10 ms."""
READY_WITHIN_S = 90.0
"""LiteLLM imports for half a minute on a busy machine."""
STOPS_WITHIN_S = 5.0


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return cast(int, probe.getsockname()[1])


def python(module: str, *words: str) -> list[str]:
    """The command line of one of our own modules."""
    return [sys.executable, "-m", module, *words]


@contextlib.contextmanager
def started(command: Sequence[str], *, log: Path | None = None, talks: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A child process with its output in `log` (none: thrown away), ended with its own children when the block ends.

    `talks`: its standard input and output are pipes instead.
    """
    with contextlib.ExitStack() as stack:
        sink: IO[Any] | int = stack.enter_context(log.open("ab")) if log is not None else subprocess.DEVNULL
        pipe: IO[Any] | int = subprocess.PIPE if talks else sink
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=pipe,
            stderr=sink,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOPS_WITHIN_S)
            break
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def told(process: subprocess.Popen[str]) -> Any:
    """The next line of JSON that the process prints. Raises GatewayError when it ended instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise GatewayError(f"{process.args!r} ended with code {process.wait()}")
    return json.loads(line)


def await_answer(url: str, process: subprocess.Popen[str], log: Path) -> None:
    """Returns when GET of `url` gives 200. Raises GatewayError, with the last words in `log`, when the process ends
    first or takes too long."""
    ends_at = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < ends_at and process.poll() is None:
        with contextlib.suppress(URLError, OSError), urlopen(url, timeout=1.0) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise GatewayError(f"{url} did not answer: exit code {process.poll()}: {log.read_text()[-500:]}")


def family(pid: int) -> list[int]:
    """The process and its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    members = [pid]
    for member in members:
        members += children.get(member, [])
    return members


def cpu_s(pid: int) -> float:
    """Processor time of the process, all its threads and its descendants so far, seconds: user and system.

    What ended children had used counts once they were waited for. Source: proc_pid_stat(5), fields 14 to 17.
    """
    ticks = 0
    for member in family(pid):
        if (fields := _stat(member)) is not None:
            ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS_PER_S


def resident_bytes(pid: int) -> int:
    """Memory of the process that is in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def _stat(pid: int) -> list[str] | None:
    """Fields of `/proc/PID/stat` from the state on; None when the process is gone. Its name may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
