"""Emulated vLLM engines over HTTP: the engine model of `loadtest/engine.py` in real time, several in one process.

    async with FakeCluster(speed=10) as cluster:
        prefill = await cluster.start(FakeSettings(engine=EngineSettings(role=Role.PREFILL)))
        decode = await cluster.start(FakeSettings(engine=EngineSettings(role=Role.DECODE)))
        ... prefill.url, decode.url, prefill.faults.is_silent = True, await decode.die() ...

Engines of one cluster can hand KV to one another: the cluster is their network, and its side-channel addresses are
looked up there, not on a socket. From the command line: `python -m loadtest.fake_engine --role prefill --port 8100
--role decode --port 8200`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from aiohttp import web

from gateway.core.errors import BadRequest
from gateway.core.types import Role
from loadtest import sglang_routes, tokenizer, vllm_routes
from loadtest.engine import Engine
from loadtest.engine_faults import Faults, ScaledTimes
from loadtest.engine_types import (
    Crashed,
    EngineRequest,
    EngineSettings,
    Finished,
    Outcome,
    Output,
    Tokens,
    TransferFailed,
    TransferFinished,
)
from loadtest.fabric import Fabric
from loadtest.kv_publisher import KvEventSettings, KvPublisher
from loadtest.sglang_legs import Legs
from loadtest.sglang_rooms import Rooms
from loadtest.step_times import LinearStepTimes, StepTimes
from loadtest.vllm_connectors import Meetings
from loadtest.vllm_metrics import VllmMetrics

KEEP_ALIVE_S = 5.0
"""VLLM_HTTP_TIMEOUT_KEEP_ALIVE's default: idle connections are closed after that."""


@dataclass(frozen=True, slots=True)
class FakeSettings:
    """How one emulated engine was started."""

    engine: EngineSettings = field(default_factory=EngineSettings)
    times: StepTimes = field(default_factory=LinearStepTimes)
    model: str = "emulated"
    loras: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one."""
    side_channel_host: str = "localhost"
    side_channel_port: int = 0
    """0: 5600 plus the engine's number in its cluster."""
    api_key: str | None = None
    has_connector: bool = True
    """Whether there is a `--kv-transfer-config`; without it `kv_transfer_params` are ignored."""
    connector: str = "nixl"
    """Which one: see loadtest/vllm_connectors.py."""
    has_prompt_tokens_details: bool = False
    has_request_id_headers: bool = False
    kv_events: KvEventSettings | None = None
    speaks: str = "vllm"
    """Whose protocol: `vllm` or `sglang`."""
    bootstrap_port: int = 0
    """Of an SGLang prefill engine, looked up in its cluster, not on a socket; 0: 8998 plus its number there."""


APPLICATIONS = {"vllm": vllm_routes.application, "sglang": sglang_routes.application}


class Stream:
    """The outputs of one HTTP request's sequences, in order; None when the engine is gone."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = ids
        self.outputs: asyncio.Queue[Output | None] = asyncio.Queue()


class FakeCluster:
    """The engines of one process: one clock, one network. Closes them all on exit."""

    def __init__(self, *, speed: float = 1.0, fabric: Fabric | None = None, seed: int = 0) -> None:
        """`speed` engine seconds pass in a second of wall time."""
        self.speed = speed
        self.fabric = fabric or Fabric()
        self.rng = random.Random(seed)
        self.engines: list[FakeEngine] = []
        self.meetings = Meetings()
        self.rooms: dict[int, Rooms] = {}
        """The bootstrap servers of SGLang prefill engines, by port."""

    def now(self) -> float:
        """Engine seconds, the clock of every engine here."""
        return asyncio.get_running_loop().time() * self.speed

    async def start(self, settings: FakeSettings | None = None) -> FakeEngine:
        """A new engine that serves HTTP."""
        settings = settings or FakeSettings()
        if not settings.side_channel_port:
            settings = replace(settings, side_channel_port=5600 + len(self.engines))
        if not settings.bootstrap_port:
            settings = replace(settings, bootstrap_port=8998 + len(self.engines))
        fake = FakeEngine(self, settings)
        self.engines.append(fake)
        await fake.revive()
        return fake

    def rearm(self) -> None:
        """Something changed on the network: every engine looks again when its next step is due."""
        for fake in self.engines:
            fake.rearm()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fake in self.engines:
            await fake.close()


class FakeEngine:
    """One emulated server. `faults` may be set at any time; `engine` is the model behind it."""

    engine: Engine
    metrics: VllmMetrics

    def __init__(self, cluster: FakeCluster, settings: FakeSettings) -> None:
        self.cluster = cluster
        self.settings = settings
        self.faults = Faults()
        self.publisher: KvPublisher | None = None
        self.port = settings.port
        self.bootstrap_port = settings.bootstrap_port
        self.legs = Legs(self)
        self.rooms: Rooms | None = None
        """The bootstrap server of an SGLang prefill engine."""
        self._kv_events = settings.kv_events
        self._times = ScaledTimes(settings.times)
        self._streams: dict[str, tuple[Stream, int]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._frozen_at: float | None = None
        self._listener: asyncio.Server | None = None
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where it serves, without a trailing slash."""
        return f"http://{self.settings.host}:{self.port}"

    # ---- life and death ----------------------------------------------------------------------------------------------

    async def revive(self) -> None:
        """Starts, or starts again after `die`, on the same port: empty memory and a new engine id."""
        settings = self.settings
        changes = replace(
            settings.engine,
            vocabulary=tokenizer.WORDS,
            max_run_steps=1,
            has_kv_events=settings.kv_events is not None,
        )
        engine_id = str(uuid.UUID(int=self.cluster.rng.getrandbits(128), version=4))
        self.engine = Engine(engine_id, changes, self._times, self.cluster.fabric)
        self.metrics = VllmMetrics(self.engine, settings.model, has_nixl=settings.connector.startswith("nixl"))
        self.cluster.fabric.attach(self.engine, settings.side_channel_host, settings.side_channel_port)
        if settings.speaks == "sglang" and settings.engine.role is Role.PREFILL:
            self.rooms = Rooms(settings.host, self.bootstrap_port)
            self.cluster.rooms[self.bootstrap_port] = self.rooms
        self.legs = Legs(self)
        if self._kv_events is not None:
            self.publisher = KvPublisher(self._kv_events)
            self._kv_events = self.publisher.settings
        if self._runner is None:
            self._runner = web.AppRunner(
                APPLICATIONS[settings.speaks](self),
                handler_cancellation=True,
                keepalive_timeout=KEEP_ALIVE_S,
                access_log=None,
            )
            await self._runner.setup()
        await self.accept_connections()

    async def accept_connections(self) -> None:
        """Listens on the engine's port, also after `refuse_connections`."""
        assert self._runner is not None, "revive sets it"
        assert self._runner.server is not None, "revive set it up"
        if self._listener is None:
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(self._runner.server, self.settings.host, self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

    def refuse_connections(self) -> None:
        """Stops listening; open connections live on."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def drop_connections(self) -> None:
        """Closes every open connection abruptly, the idle ones that clients keep for later too."""
        if self._runner is not None and self._runner.server is not None:
            for connection in self._runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()

    async def die(self) -> None:
        """Like SIGKILL: the socket and all connections close abruptly, memory is lost, nobody is told."""
        self.refuse_connections()
        self.cluster.fabric.detach(self.settings.side_channel_host, self.settings.side_channel_port)
        self.engine.is_crashed = True
        self._end_streams()
        self.legs.die()
        if self.rooms is not None:
            self.cluster.rooms.pop(self.bootstrap_port, None)
            self.rooms.close()
        self.rearm()
        self.drop_connections()
        if self.publisher is not None:
            await self.publisher.close()
            self.publisher = None

    async def close(self) -> None:
        """Ends it for good."""
        await self.die()
        if self._runner is not None:
            await self._runner.cleanup()

    def crash(self) -> None:
        """The engine core dies and its server lives: every request ends, none is served any more."""
        self.engine.is_crashed = True
        self._end_streams()
        self.rearm()

    def freeze(self) -> None:
        """Stops stepping: requests are accepted, no token comes."""
        if self._frozen_at is None:
            self._frozen_at = self.cluster.now()
            self.rearm()

    def thaw(self) -> None:
        """Goes on after `freeze` where it stood."""
        if self._frozen_at is not None:
            self.engine.stall(self.cluster.now() - self._frozen_at)
            self._frozen_at = None
            self.rearm()

    def slow_down(self, factor: float) -> None:
        """Every step from the next one on takes `factor` times what it should; 1 is health."""
        self._times.factor = factor

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix, as the development endpoint does; False while blocks are in use."""
        is_done = self.engine.reset_prefix_cache()
        self._publish()
        return is_done

    # ---- requests ----------------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[EngineRequest]) -> Stream:
        """Queues the sequences of one HTTP request. Raises BadRequest, then none is queued."""
        stream = Stream([request.id for request in requests])
        now = self.cluster.now()
        try:
            for choice, request in enumerate(requests):
                self.engine.submit(request, now=now)
                self._streams[request.id] = (stream, choice)
        except BadRequest:
            self.abort([request_id for request_id in stream.ids if request_id in self._streams])
            raise
        self.rearm()
        return stream

    def abort(self, ids: Iterable[str]) -> None:
        """Ends sequences whose client left or has heard enough; those over already are ignored."""
        for request_id in ids:
            self._streams.pop(request_id, None)
            self.engine.abort(request_id, now=self.cluster.now())
        self.cluster.rearm()

    # ---- time --------------------------------------------------------------------------------------------------------

    def rearm(self) -> None:
        """Sets the one timer to the engine's next step."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = None if self._frozen_at is not None else self.engine.next_step_at()
        if at is not None:
            self._timer = asyncio.get_running_loop().call_at(at / self.cluster.speed, self._step)

    def _step(self) -> None:
        outcomes = self.engine.step(now=self.cluster.now())
        self.metrics.observe(outcomes)
        self._publish()
        self._deliver(outcomes)
        if any(isinstance(outcome, TransferFinished | TransferFailed) for outcome in outcomes):
            self.cluster.rearm()
        else:
            self.rearm()

    def _publish(self) -> None:
        events = self.engine.take_kv_events()
        if self.publisher is not None:
            self.publisher.publish(events)

    def _deliver(self, outcomes: Sequence[Outcome]) -> None:
        """Gives each stream its tokens; a sequence's last tokens come with its end."""
        said: dict[str, tuple[int, ...]] = {}
        for outcome in outcomes:
            if isinstance(outcome, Tokens):
                said |= zip(outcome.request_ids, outcome.token_ids, strict=True)
            elif isinstance(outcome, Finished):
                self._tell(outcome.request_id, said.pop(outcome.request_id, ()), outcome)
                self._streams.pop(outcome.request_id, None)
            elif isinstance(outcome, Crashed):
                self._end_streams()
        for request_id, token_ids in said.items():
            self._tell(request_id, token_ids, None)

    def _tell(self, request_id: str, token_ids: tuple[int, ...], end: Finished | None) -> None:
        if (found := self._streams.get(request_id)) is not None:
            stream, choice = found
            stream.outputs.put_nowait(Output(choice, token_ids, end))

    def _end_streams(self) -> None:
        for stream, _ in self._streams.values():
            stream.outputs.put_nowait(None)
        self._streams.clear()


def _settings(arguments: argparse.Namespace) -> list[FakeSettings]:
    """One per `--role`, or a single engine that does both."""
    roles = [Role(role) for role in arguments.role or [Role.BOTH]]
    ports = [*arguments.port, *[0] * len(roles)]
    kv_events = KvEventSettings() if arguments.kv_events else None
    base = EngineSettings(
        block_tokens=arguments.block_tokens,
        kv_blocks=arguments.kv_blocks,
        max_model_tokens=arguments.max_model_tokens,
        mean_output_tokens=arguments.mean_output_tokens,
    )
    return [
        FakeSettings(
            engine=replace(base, role=role),
            model=arguments.model,
            host=arguments.host,
            port=port,
            api_key=arguments.api_key,
            kv_events=kv_events,
        )
        for role, port in zip(roles, ports, strict=False)
    ]


def _arguments() -> argparse.Namespace:
    defaults = EngineSettings()
    parser = argparse.ArgumentParser(prog="python -m loadtest.fake_engine", description="Emulated vLLM engines.")
    parser.add_argument(
        "--role", action="append", choices=[role.value for role in Role], help="repeat for more engines"
    )
    parser.add_argument("--port", action="append", type=int, default=[], help="one per --role; 0 or none: a free port")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--model", default="emulated")
    parser.add_argument("--api-key")
    parser.add_argument("--speed", type=float, default=1.0, help="engine seconds per second")
    parser.add_argument("--kv-events", action="store_true", help="publish KV events on a free port")
    parser.add_argument("--block-tokens", type=int, default=defaults.block_tokens)
    parser.add_argument("--kv-blocks", type=int, default=defaults.kv_blocks)
    parser.add_argument("--max-model-tokens", type=int, default=defaults.max_model_tokens)
    parser.add_argument("--mean-output-tokens", type=int, default=defaults.mean_output_tokens)
    return parser.parse_args()


async def _serve(arguments: argparse.Namespace) -> None:
    async with FakeCluster(speed=arguments.speed) as cluster:
        for settings in _settings(arguments):
            fake = await cluster.start(settings)
            print(f"{settings.engine.role} {fake.url}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(_arguments()))
