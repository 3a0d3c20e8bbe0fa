"""Several worker processes on one port, and the supervisor that keeps them: `sluice serve --workers N`.

    supervisor   opens one listening socket per worker (SO_REUSEPORT: the kernel deals connections out), serves the hub
                 through which the workers share their view, and starts the command again once for each worker
    worker       an ordinary gateway that accepts on the socket it was given

The supervisor holds every socket open and accepts nothing. So connections that wait in a socket's queue while its
worker is gone, crashed or being replaced are not lost: the next worker of that seat takes them. A worker that dies is
replaced, later and later if it dies at once. SIGHUP replaces one worker after the other: the new one listens before the
old one is told to stop, and reads the configuration anew. Workers that lose their supervisor stop as if told to.

The word that a worker is ready is a line on its standard output; its standard input is the leash, whose end it notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import uvloop

from gateway import logs
from gateway.config import Config
from gateway.core.errors import ConfigError
from gateway.seat import Seat
from gateway.stores.memory import Hub
from gateway.stores.socket import serving_hub

READY = b"ready\n"
"""What a worker writes on its standard output when it listens."""
START_S = 30.0
"""A worker that is not ready by then is taken for dead."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Between the death of a worker and its successor's start, doubled while they die young."""
LIVED_S = 10.0
"""A worker that lived so long died of something else than its start."""
MORE_S = 5.0
"""What a worker is given beyond its grace before it is killed."""

log = structlog.get_logger("sluice.workers")


@dataclass(slots=True)
class _Place:
    """One seat and who sits there."""

    seat: Seat
    process: asyncio.subprocess.Process | None = None
    started_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a worker is put there: a death and a replacement may come together."""


class Supervisor:
    """Keeps one worker on each seat until it is stopped."""

    def __init__(self, config: Config, words: Sequence[str], seats: Sequence[Seat]) -> None:
        """`words` are those after `sluice serve`: each worker is started with them."""
        self._words = words
        self._grace_s = config.server.shutdown_grace_s + MORE_S
        self._places = [_Place(seat) for seat in seats]
        self._stopped = asyncio.Event()
        self._hung_up = asyncio.Event()

    def stop(self) -> None:
        """Lets every worker end, and then the supervisor."""
        self._stopped.set()

    def hang_up(self) -> None:
        """Lets every worker be replaced, one after the other."""
        self._hung_up.set()

    async def run(self) -> None:
        """Starts the workers; returns when all have ended. Raises ConfigError when none can be started."""
        try:
            async with asyncio.TaskGroup() as group:
                if not all(await asyncio.gather(*map(self._seat_worker, self._places))):
                    raise ConfigError("server.workers: a worker ended before it served; its own words say why")
                keepers = [group.create_task(self._keep(place)) for place in self._places]
                keepers.append(group.create_task(self._replace_when_asked()))
                await self._stopped.wait()
                for keeper in keepers:
                    keeper.cancel()
        except* ConfigError as errors:
            raise errors.exceptions[0] from None
        finally:
            await asyncio.gather(*(self._end(place.process) for place in self._places))

    # ---- one worker -------------------------------------------------------------------------------------------------

    async def _seat_worker(self, place: _Place) -> bool:
        """Starts a worker and makes it the one of that seat; whether it came so far as to listen."""
        seat = place.seat
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "serve", *self._words),
            env=dict(os.environ) | seat.environment(),
            pass_fds=seat.socket_numbers,
            stdin=pipe,
            stdout=pipe,
        )
        assert process.stdout is not None
        said = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_S):
                said = await process.stdout.readline()
        if said != READY:
            await self._end(process)
            return False
        place.process, place.started_at = process, asyncio.get_running_loop().time()
        log.info("worker_started", worker=seat.number, pid=process.pid)
        return True

    async def _keep(self, place: _Place) -> None:
        """Puts another worker on the seat whenever the one there dies."""
        loop = asyncio.get_running_loop()
        while True:
            process = place.process
            assert process is not None
            code = await process.wait()
            async with place.changing:
                if place.process is not process:
                    continue  # its successor sits already
                log.error("worker_died", worker=place.seat.number, pid=process.pid, code=code)
                place.pause_s = FIRST_PAUSE_S if loop.time() - place.started_at > LIVED_S else place.pause_s
                is_seated = False
                while not is_seated:
                    await asyncio.sleep(place.pause_s)
                    place.pause_s = min(2 * place.pause_s, LONGEST_PAUSE_S)
                    is_seated = await self._seat_worker(place)

    async def _replace_when_asked(self) -> None:
        while True:
            await self._hung_up.wait()
            self._hung_up.clear()
            for place in self._places:
                await self._replace(place)

    async def _replace(self, place: _Place) -> None:
        """The successor listens before the predecessor stops; one that does not come leaves all as it is."""
        async with place.changing:
            before = place.process
            if not await self._seat_worker(place):
                log.error("worker_not_replaced", worker=place.seat.number)
                return
        log.info("worker_replaced", worker=place.seat.number)
        await self._end(before)

    async def _end(self, process: asyncio.subprocess.Process | None) -> None:
        """Asks a worker to stop, and makes it."""
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(self._grace_s):
                await process.wait()
        except TimeoutError:
            log.error("worker_killed", pid=process.pid)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


# ---- the port --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(config: Config, worker_count: int) -> Iterator[list[list[socket.socket]]]:
    """For each worker its sockets, one per address of the host, all on one port. Raises ConfigError."""
    server = config.server
    with contextlib.ExitStack() as stack:
        try:
            found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            addresses = list(dict.fromkeys((family, address[0]) for family, _, _, _, address in found))
            if server.port:
                _refuse_taken(addresses, server.port)
            port, rows = server.port, []
            for _ in range(worker_count):
                row = []
                for family, host in addresses:
                    one = stack.enter_context(_listener(family, str(host), port, server.backlog))
                    port = port or int(one.getsockname()[1])
                    row.append(one)
                rows.append(row)
        except OSError as error:
            where = f"{server.host}:{server.port}"
            raise ConfigError(f"server.port: cannot listen on {where}: {error.strerror or error}") from None
        yield rows


def _refuse_taken(addresses: Sequence[tuple[int, object]], port: int) -> None:
    """Two supervisors of one user could share the port without noticing: SO_REUSEPORT allows it. Raises OSError."""
    for family, host in addresses:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))


def _listener(family: int, host: str, port: int, backlog: int) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind((host, port))
        one.listen(backlog)
    except OSError:
        one.close()
        raise
    return one


# ---- the command -----------------------------------------------------------------------------------------------------


async def supervise(config: Config, words: Sequence[str]) -> None:
    """Serves until SIGINT or SIGTERM."""
    count = config.server.workers
    hub = Hub(shard_count=config.store.shard_count, max_bytes=config.store.max_stream_bytes)
    with listening(config, count) as rows, tempfile.TemporaryDirectory(prefix="sluice-") as folder:
        path = Path(folder) / "hub"
        seats = [Seat(number, tuple(one.fileno() for one in row), path) for number, row in enumerate(rows, 1)]
        supervisor = Supervisor(config, words, seats)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, supervisor.stop)
        loop.add_signal_handler(signal.SIGHUP, supervisor.hang_up)
        host, port = rows[0][0].getsockname()[:2]
        log.info("supervising", workers=count, host=host, port=port, pid=os.getpid())
        async with serving_hub(path, hub):
            await supervisor.run()


def serve(config: Config, words: Sequence[str]) -> int:
    """Runs the workers until the supervisor is stopped; returns the exit code. Raises ConfigError."""
    logs.configure(config.log)
    uvloop.run(supervise(config, words))
    return 0
