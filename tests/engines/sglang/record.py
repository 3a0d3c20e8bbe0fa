"""Records what real SGLang engines answer: `python -m tests.engines.sglang.record` writes tests/recorded/sglang-0.5.23.

Each answer is one file with the body's bytes as they came; exchanges.json tells for each the request, the status and
the headers. Paths of the machine are cut, and of the page that tells all settings those stay that somebody reads. Needs
an interpreter with SGLang (see loadtest/sglang_process.py). Takes about three minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import aiohttp
import zmq
import zmq.asyncio

from gateway.core.types import Role
from loadtest.engine_process import MODEL
from loadtest.sglang_process import SglangFleet, SglangSpec, find_sglang_python
from tests.engines.record import fresh, shortened

ROOT = Path(__file__).parents[3]
RECORDED = ROOT / "tests" / "recorded" / "sglang-0.5.23"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "The miller reads the mark on the wall. " * 8
MESSAGES = [{"role": "user", "content": TEXT}]
CHAT_BODY = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
COMPLETION_BODY = {"model": MODEL, "prompt": TEXT, "max_tokens": 8, "temperature": 0}
STREAM = {"stream": True}
STREAM_WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
NOBODYS_PORT = 9
"""Discard: nobody listens there."""
LONG_TOKENS = 6000
"""A prompt that keeps a prefill engine busy for a second or two."""
WAIT_S = 0.7
"""After this a request has reached its scheduler, and the load that tells of it was written."""
INFO_KEPT = (
    *("disaggregation_mode", "disaggregation_transfer_backend", "disaggregation_bootstrap_port", "page_size"),
    *("max_total_num_tokens", "context_length", "dp_size", "tp_size", "kv_events", "version"),
    *("enable_priority_scheduling", "schedule_low_priority_values_first", "served_model_name"),
)
METRICS_KEPT = (
    *("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:num_used_tokens", "sglang:max_total_num_tokens"),
    *("sglang:token_usage", "sglang:gen_throughput", "sglang:prompt_tokens", "sglang:cached_tokens"),
    *("sglang:generation_tokens", "sglang:kv_transfer_total_mb", "sglang:num_transfer_failed", "sglang:num_bootstrap"),
    *("sglang:num_prefill_", "sglang:num_decode_", "sglang:page_size", "sglang:num_aborted"),
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request to an engine and the file its answer goes to."""

    file: str
    engine: str
    path: str
    body: dict[str, object] | bytes | None = None
    """None is a GET; bytes are sent as they are."""
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


ROOM = {"bootstrap_host": "127.0.0.1", "bootstrap_port": NOBODYS_PORT, "bootstrap_room": 77}
"""For requests that are refused before anybody looks for the room."""
ASKED = [
    *(
        Recorded(f"server_info_{name}.json", engine, "/server_info")
        for name, engine in (("prefill", "p0"), ("decode", "d0"))
    ),
    Recorded("models.json", "p0", "/v1/models"),
    Recorded("ready.txt", "p0", "/ready"),
    Recorded("loads_prefill.json", "p0", "/v1/loads"),
    Recorded("loads_decode.json", "d0", "/v1/loads"),
    Recorded("tokenize.json", "p0", "/tokenize", {"model": MODEL, "prompt": "The gate opens."}),
    Recorded("tokenize_chat.json", "p0", "/tokenize", {"model": MODEL, "messages": MESSAGES}),
    Recorded("detokenize.json", "p0", "/detokenize", {"model": MODEL, "tokens": [54, 295, 3]}),
    Recorded("abort_unknown.txt", "p0", "/abort_request", {"rid": "nobody"}),
]
BAD = [
    Recorded("error_no_room.json", "d0", CHAT, CHAT_BODY),
    Recorded("error_no_room_prefill.json", "p0", COMPLETIONS, COMPLETION_BODY),
    Recorded("error_negative_max_tokens.json", "d0", CHAT, CHAT_BODY | ROOM | {"max_tokens": -1}),
    Recorded("error_max_tokens_over_context.json", "d0", CHAT, CHAT_BODY | ROOM | {"max_tokens": 9000}),
    Recorded("error_prompt_too_long.json", "d0", COMPLETIONS, COMPLETION_BODY | ROOM | {"prompt": [5] * 9000}),
    Recorded("error_empty_messages.json", "d0", CHAT, CHAT_BODY | ROOM | {"messages": []}),
    Recorded("error_wrong_type.json", "d0", CHAT, CHAT_BODY | ROOM | {"max_tokens": "many"}),
    Recorded("error_rid_list.json", "d0", CHAT, CHAT_BODY | ROOM | {"rid": ["a", "b"]}),
    Recorded("error_dp_rank.json", "d0", CHAT, CHAT_BODY | ROOM | {"routed_dp_rank": 5}),
    Recorded("error_no_route.json", "d0", "/nowhere"),
]
SINGLE = [
    Recorded("server_info_single.json", "s0", "/server_info"),
    Recorded("single_chat.json", "s0", CHAT, CHAT_BODY),
    Recorded("single_chat.sse", "s0", CHAT, CHAT_BODY | STREAM),
]
HAND_OFFS = [("chat", CHAT, CHAT_BODY), ("completion", COMPLETIONS, COMPLETION_BODY)]


class Engine(Protocol):
    """What is recorded: a real engine or an emulated one."""

    @property
    def url(self) -> str:
        """Base URL of the HTTP server."""
        ...

    @property
    def bootstrap_port(self) -> int:
        """Where a prefill engine's bootstrap server listens."""
        ...

    @property
    def kv_events_port(self) -> int:
        """Where KV events are published."""
        ...

    async def kill(self) -> None:
        """End it abruptly."""
        ...


class Fleet(Protocol):
    """Engines by name: p0 (prefill, publishes KV events), d0 (decode)."""

    def __getitem__(self, name: str) -> Engine:
        """The engine of that name."""
        ...


class Recorder:
    """Sends requests to the fleet and keeps the answers in a directory."""

    def __init__(self, fleet: Fleet, session: aiohttp.ClientSession, directory: Path) -> None:
        self._fleet = fleet
        self._session = session
        self._directory = directory
        self._exchanges: dict[str, object] = {}
        self._room = 1000

    async def record(self, recorded: Recorded) -> None:
        """Send the request and write the answer's body to its file."""
        data = recorded.body if isinstance(recorded.body, bytes | None) else json.dumps(recorded.body).encode()
        method = "GET" if recorded.body is None else "POST"
        url = self._fleet[recorded.engine].url + recorded.path
        headers = recorded.headers if data else {}
        async with self._session.request(method, url, data=data, headers=headers) as response:
            answer = await response.read()
            self._exchanges[recorded.file] = {
                "engine": recorded.engine,
                "method": method,
                "path": recorded.path,
                "request": shortened(recorded.body),
                "status": response.status,
                "headers": dict(response.headers),
            }
        (self._directory / recorded.file).write_bytes(trimmed(recorded.file, answer))

    def room(self) -> dict[str, object]:
        """A room at p0 that nobody was in before."""
        self._room += 1
        port = self._fleet["p0"].bootstrap_port
        return {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": self._room}

    async def hand_off(self, name: str, path: str, body: dict[str, object]) -> None:
        """Record both legs of a hand-off from p0 to d0, not streamed, then streamed."""
        for prefill, decode, extra in [
            (f"prefill_{name}.json", f"decode_{name}.json", {}),
            (f"prefill_{name}_for_stream.json", f"decode_{name}.sse", STREAM_WITH_USAGE),
        ]:
            own = fresh(body, decode) | self.room()
            await asyncio.gather(
                self.record(Recorded(prefill, "p0", path, own | {"stream": False})),
                self.record(Recorded(decode, "d0", path, own | extra)),
            )

    async def abandoned(self, engine: str, file: str, loads: str, extra: Mapping[str, object]) -> None:
        """Record what an engine says that waited for the other in vain and was told to stop, and its load meanwhile."""
        body = fresh(CHAT_BODY, file) | self.room() | {"rid": f"lone-{file}"} | extra
        waiting = asyncio.create_task(self.record(Recorded(file, engine, CHAT, body)))
        await asyncio.sleep(WAIT_S)
        await self.record(Recorded(loads, engine, "/v1/loads"))
        await self.abort(engine, str(body["rid"]))
        await waiting

    async def abort(self, engine: str, rid: str) -> None:
        """Have the engine end that request."""
        async with self._session.post(f"{self._fleet[engine].url}/abort_request", json={"rid": rid}) as response:
            assert response.status == 200

    async def decode_gone(self, file: str) -> None:
        """Record what p0 says when d0 gives a request up while its prompt is computed."""
        prompt = {"prompt": [300 + i % 80 for i in range(LONG_TOKENS)]}
        body = COMPLETION_BODY | prompt | self.room() | {"rid": f"gone-{file}"}
        decode = asyncio.create_task(self._post("d0", body))
        prefill = asyncio.create_task(self.record(Recorded(file, "p0", COMPLETIONS, body)))
        await asyncio.sleep(0.4)
        await self.abort("d0", str(body["rid"]))
        await asyncio.gather(decode, prefill)

    async def metrics(self, engine: str, file: str) -> None:
        """Record the metric families that somebody reads."""
        await self.record(Recorded(file, engine, "/metrics/"))

    async def kv_event(self, engine: str, file: str) -> None:
        """Record the frames of the first KV event batch after a new prompt, each frame a line of hex digits."""
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as subscriber:
            subscriber.connect(f"tcp://127.0.0.1:{self._fleet[engine].kv_events_port}")
            subscriber.subscribe(b"")
            frames = subscriber.recv_multipart()
            while not frames.done():  # a subscription takes effect some time after it is made
                body = COMPLETION_BODY | {"prompt": os.urandom(100).hex()} | self.room()
                await asyncio.gather(self._post("p0", body), self._post("d0", body))
                await asyncio.wait([frames], timeout=1.0)
        lines = [frame.hex() for frame in frames.result()]
        (self._directory / file).write_text("\n".join(lines) + "\n")

    async def _post(self, engine: str, body: dict[str, object]) -> None:
        async with self._session.post(self._fleet[engine].url + COMPLETIONS, json=body) as response:
            await response.read()

    def write_exchanges(self) -> None:
        """Write what was asked for each file, with status and headers, an exchange a line."""
        lines = [f"{json.dumps(file)}: {json.dumps(exchange)}" for file, exchange in self._exchanges.items()]
        (self._directory / "exchanges.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def trimmed(file: str, answer: bytes) -> bytes:
    """The answer without what is the machine's own, and of long pages what somebody reads."""
    if file.startswith("server_info"):
        told = json.loads(answer)
        return json.dumps({key: told[key] for key in INFO_KEPT if key in told}).encode()
    if file.startswith("metrics"):
        return trimmed_metrics(answer.decode()).encode()
    return re.sub(rb'File \\\\\\"/[^"]*/site-packages/|File \\"/[^"]*/site-packages/', rb'File \\"/', answer)


def trimmed_metrics(text: str) -> str:
    """The lines of the metric families in METRICS_KEPT, comments included, without the time each was created."""
    kept = []
    for line in text.splitlines(keepends=True):
        name = line.split()[2] if line.startswith("#") else line
        if name.startswith(METRICS_KEPT) and "_created" not in name:
            kept.append(line)
    return "".join(kept)


async def record_all(fleet: Fleet, directory: Path, *, has_single: bool = False, with_handshake: bool = True) -> None:
    """Write every recording into the directory; those of s0 where there is one, and that of a handshake that fails
    after 14 s where there is time."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        recorder = Recorder(fleet, session, directory)
        for recorded in [*ASKED, *BAD, *(SINGLE if has_single else [])]:
            await recorder.record(recorded)
        for name, path, body in HAND_OFFS:
            await recorder.hand_off(name, path, body)
        for suffix, extra in [("json", {}), ("sse", STREAM)]:
            await recorder.abandoned("p0", f"error_prefill_aborted.{suffix}", "loads_prefill_waits.json", extra)
            await recorder.abandoned("d0", f"error_decode_aborted.{suffix}", "loads_decode_waits.json", extra)
        if with_handshake:
            await recorder.record(Recorded("error_handshake.json", "d0", CHAT, fresh(CHAT_BODY, "nobody") | ROOM))
        await recorder.decode_gone("error_decode_gone.json")
        await recorder.kv_event("p0", "kv_event_frames.hex")
        await recorder.metrics("p0", "metrics_prefill.txt")
        await recorder.metrics("d0", "metrics_decode.txt")
        recorder.write_exchanges()


async def main() -> None:
    """Start one engine of each kind, record, and end them."""
    python = find_sglang_python(os.environ, ROOT)
    if python is None:
        raise SystemExit("no interpreter with SGLang: run `make engines` or set SLUICE_SGLANG_PYTHON")
    RECORDED.mkdir(parents=True, exist_ok=True)
    specs = [
        SglangSpec("p0", Role.PREFILL, publishes_kv_events=True),
        SglangSpec("d0", Role.DECODE),
        SglangSpec("s0", Role.BOTH),
    ]
    with tempfile.TemporaryDirectory() as directory:
        async with SglangFleet(python, specs, Path(directory)) as fleet:
            await record_all(fleet, RECORDED, has_single=True)


if __name__ == "__main__":
    asyncio.run(main())
