"""Finished runs kept in a folder, so that a long comparison that was ended goes on where it was.

One file per run, named by what was asked for; a file that is damaged or of another version counts as not there. The
code that ran is no part of the name: after a change of the scheduler the folder is to be emptied.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from loadtest.sim_html import Result
from loadtest.sim_options import Spec


def load(folder: Path, spec: Spec) -> Result | None:
    """The run of that spec, when it was kept and can be read."""
    try:
        result = msgspec.msgpack.decode(path_of(folder, spec).read_bytes(), type=Result)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return result if result.spec == spec else None


def save(folder: Path, result: Result) -> None:
    """Keeps the run; a reader sees it whole or not at all. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, result.spec)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(msgspec.msgpack.encode(result))
    part.replace(path)


def path_of(folder: Path, spec: Spec) -> Path:
    """Where the run of that spec is kept."""
    return folder / f"{hashlib.sha256(msgspec.msgpack.encode(spec)).hexdigest()[:32]}.msgpack"
