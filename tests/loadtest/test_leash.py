"""The leash: whatever happens to the starter or the command, the whole process group is gone afterwards."""

from __future__ import annotations

import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest import leash

FAMILY = "import subprocess, sys; print('up', flush=True); subprocess.run(['sleep', '600'])"
MAPPER = """
import mmap, signal, sys
file = open(sys.argv[1], "r+b")
mapped = mmap.mmap(file.fileno(), 64)
print("up", flush=True)
signal.pause()
"""
LIMIT_S = 10


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """A Python program on a leash held by this process, after it has said that it is up."""
    command = [sys.executable, leash.__file__, sys.executable, "-c", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


@pytest.fixture
def family() -> Iterator[subprocess.Popen[bytes]]:
    """A command on a leash, with a process below it."""
    with start(FAMILY) as process:
        yield process


def is_gone(process: subprocess.Popen[bytes]) -> bool:
    """Whether leash, command and all below end within the limit: nobody holds their common output open any more."""
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], LIMIT_S)
    return bool(readable) and process.stdout.read() == b""


def test_all_end_when_the_starter_goes_away(family: subprocess.Popen[bytes]) -> None:
    assert family.stdin is not None
    family.stdin.close()
    assert is_gone(family)


def test_all_end_when_the_starter_asks(family: subprocess.Popen[bytes]) -> None:
    family.terminate()
    assert is_gone(family)


def test_all_end_when_the_command_ends() -> None:
    orphan = "import subprocess; subprocess.Popen(['sleep', '600']); print('up', flush=True)"
    with start(orphan) as process:
        assert is_gone(process)


def test_the_processes_of_a_group_are_found(family: subprocess.Popen[bytes]) -> None:
    assert family.pid in leash.group_members(family.pid)
    assert len(leash.group_members(family.pid)) >= 2
    leash.kill_group(family.pid)
    assert is_gone(family)


def test_a_killed_group_leaves_no_shared_memory() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm", delete=False) as file:
        file.truncate(64)
    path = Path(file.name)
    with start(MAPPER, file.name) as process:
        assert leash.shared_memory_files(process.pid) == [path]
        leash.kill_group(process.pid)
        assert is_gone(process)
    assert not path.exists()
