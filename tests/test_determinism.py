"""The same seed gives the same run to the last byte, whatever Python's own hash seed is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN = ["--workload", "conversation", "--seconds", "40", "--prefill", "3", "--decode", "2", "--noise", "0.1", "--json"]


def printed(hash_seed: str, *words: str) -> bytes:
    """What `sluice sim` prints in a process of its own."""
    command = [sys.executable, "-m", "gateway", "sim", *RUN, *words]
    environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--policy", "random", "--admission", "stage", "--random-faults", "3"),
        ("--policy", "mooncake_global", "--predictor", "online", "--gateways", "2", "--view-delay-ms", "50"),
    ],
    ids=["faults", "gateways"],
)
def test_a_run_does_not_depend_on_the_hash_seed(words: tuple[str, ...]) -> None:
    first = printed("0", "--seed", "7", *words)
    assert first == printed("4242", "--seed", "7", *words)
    assert first != printed("0", "--seed", "8", *words)
