"""Runs a command that cannot outlive the program that started it: `python loadtest/leash.py COMMAND...`.

An engine is several processes, and a starter that is killed with SIGKILL can clean up nothing. So the leash stands
between them as the head of the engine's process group, holding the read end of a pipe from the starter. Whether the
starter asks (SIGTERM), goes away (the pipe ends) or the engine itself exits, the whole group is gone afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType

GRACE_S = 15.0
"""Time for the command to end by itself; vLLM takes 1 to 3 s on idle cores and removes its shared memory on the way."""


def group_members(group: int) -> list[int]:
    """The ids of the processes in the group, its head included."""
    members = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):  # ended meanwhile
            if os.getpgid(int(process.name)) == group:
                members.append(int(process.name))
    return members


def shared_memory_files(group: int) -> list[Path]:
    """The files in /dev/shm that processes of the group have mapped: nobody removes them after a SIGKILL."""
    inodes = set()
    for member in group_members(group):
        with contextlib.suppress(OSError):  # ended meanwhile
            mapped = Path(f"/proc/{member}/maps").read_text().splitlines()
            inodes |= {int(line.split()[4]) for line in mapped if "/dev/shm/" in line}
    # By inode, for a semaphore is mapped under a temporary name.
    return [file for file in Path("/dev/shm").iterdir() if file.stat().st_ino in inodes]


def kill_group(group: int) -> None:
    """End every process of the group with SIGKILL and remove the shared memory they had."""
    for file in shared_memory_files(group):
        file.unlink(missing_ok=True)
    os.killpg(group, signal.SIGKILL)


def end_group(child: subprocess.Popen[bytes]) -> None:
    """Ask the child to end, wait at most `GRACE_S`, then kill the whole process group, this process included."""
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_S)
    kill_group(os.getpgid(0))


def main(command: list[str]) -> None:
    """Run the command until it ends, the starter asks, or standard input ends. Does not return."""
    ending = threading.Event()

    def ask_to_end(signum: int, frame: FrameType | None) -> None:
        ending.set()

    def wait_for_starter() -> None:
        sys.stdin.buffer.read()
        ending.set()

    def wait_for_child() -> None:
        child.wait()
        ending.set()

    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, ask_to_end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=wait_for_starter, daemon=True).start()
    threading.Thread(target=wait_for_child, daemon=True).start()
    ending.wait()
    end_group(child)


if __name__ == "__main__":
    main(sys.argv[1:])
