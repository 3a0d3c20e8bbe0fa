"""Records what real vLLM engines answer: `python -m tests.engines.record` writes tests/recorded/vllm-0.32.

Each answer is one file with the body's bytes as they came; exchanges.json tells for each the request, the status and
the headers. Needs an interpreter with vLLM (see loadtest/vllm_process.py). Takes about two minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import aiohttp
import zmq
import zmq.asyncio

from gateway.core.types import Role
from loadtest.vllm_process import MODEL, EngineSpec, VllmFleet, find_engine_python

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests" / "recorded" / "vllm-0.32"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PREFILL_PARAMS = {"do_remote_decode": True, "do_remote_prefill": False}
PREFILL_LEG = {"max_tokens": 1, "stream": False, "kv_transfer_params": PREFILL_PARAMS}
TEXT = "The miller reads the mark on the wall. " * 8
MESSAGES = [{"role": "user", "content": TEXT}]
CHAT_BODY = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
COMPLETION_BODY = {"model": MODEL, "prompt": TEXT, "max_tokens": 8, "temperature": 0}
STREAM = {"stream": True}
USAGE = {"stream_options": {"include_usage": True}}
STREAM_WITH_USAGE = STREAM | USAGE
METRICS_KEPT = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:external_prefix_cache_queries",
    "vllm:external_prefix_cache_hits",
    "vllm:num_preemptions",
    "vllm:prompt_tokens",
    "vllm:prompt_tokens_by_source",
    "vllm:prompt_tokens_cached",
    "vllm:generation_tokens",
    "vllm:request_success",
    "vllm:engine_sleep_state",
    "vllm:time_to_first_token_seconds",
    "vllm:nixl_",
)
"""Metric families a router reads, and one histogram as an example of the rest."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request to an engine and the file its answer goes to."""

    file: str
    engine: str
    path: str
    body: dict[str, object] | bytes | None = None
    """None is a GET; bytes are sent as they are."""
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})

    def send(self, session: aiohttp.ClientSession, url: str) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """The request under way to the engine at the base URL."""
        if self.body is None:
            return session.get(url + self.path)
        data = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        return session.post(url + self.path, data=data, headers=self.headers)


GOOD = [
    Recorded("models.json", "p0", "/v1/models"),
    Recorded("version.json", "p0", "/version"),
    Recorded("health.txt", "p0", "/health"),
    Recorded("load.json", "p0", "/load"),
    Recorded("kv_event_sources.json", "p0", "/kv_event_sources"),
    Recorded("kv_event_sources_off.json", "d0", "/kv_event_sources"),
    Recorded("tokenize.json", "p0", "/tokenize", {"model": MODEL, "prompt": "The gate opens."}),
    Recorded("tokenize_chat.json", "p0", "/tokenize", {"model": MODEL, "messages": MESSAGES[:1]}),
    Recorded("detokenize.json", "p0", "/detokenize", {"model": MODEL, "tokens": [54, 295, 3]}),
    Recorded("chat.json", "d0", CHAT, CHAT_BODY),
    Recorded("chat.sse", "d0", CHAT, CHAT_BODY | STREAM),
    Recorded("chat_usage.sse", "d0", CHAT, CHAT_BODY | STREAM_WITH_USAGE),
    Recorded("chat_n2.json", "d0", CHAT, CHAT_BODY | {"n": 2, "temperature": 1, "seed": 1}),
    Recorded("chat_logprobs.sse", "d0", CHAT, CHAT_BODY | STREAM | {"max_tokens": 2, "logprobs": True}),
    Recorded("completion.json", "d0", COMPLETIONS, COMPLETION_BODY),
    Recorded("completion.sse", "d0", COMPLETIONS, COMPLETION_BODY | STREAM),
    Recorded("completion_usage.sse", "d0", COMPLETIONS, COMPLETION_BODY | STREAM_WITH_USAGE),
    Recorded("completion_two_prompts.json", "d0", COMPLETIONS, COMPLETION_BODY | {"prompt": ["The gate", "A wheel"]}),
    Recorded("completion_two_prompts.sse", "d0", COMPLETIONS, COMPLETION_BODY | STREAM | {"prompt": ["Gate", "Wheel"]}),
]
BAD = [
    Recorded("error_unknown_model.json", "d0", CHAT, CHAT_BODY | {"model": "nobody"}),
    Recorded("error_negative_max_tokens.json", "d0", CHAT, CHAT_BODY | {"max_tokens": -1}),
    Recorded("error_max_tokens_over_context.json", "d0", COMPLETIONS, COMPLETION_BODY | {"max_tokens": 9000}),
    Recorded("error_prompt_too_long.json", "d0", COMPLETIONS, COMPLETION_BODY | {"prompt": [5] * 9000}),
    Recorded("error_prompt_too_long_stream.json", "d0", CHAT, CHAT_BODY | STREAM | {"messages": MESSAGES * 120}),
    Recorded("error_empty_prompt.json", "d0", COMPLETIONS, COMPLETION_BODY | {"prompt": ""}),
    Recorded("error_empty_messages.json", "d0", CHAT, CHAT_BODY | {"messages": []}),
    Recorded("error_wrong_type.json", "d0", CHAT, CHAT_BODY | {"max_tokens": "many"}),
    Recorded("error_missing_messages.json", "d0", CHAT, {"model": MODEL}),
    Recorded(
        "error_stream_options_without_stream.json", "d0", CHAT, CHAT_BODY | {"stream_options": {"include_usage": True}}
    ),
    Recorded("error_broken_json.json", "d0", CHAT, b'{"model": '),
    Recorded("error_content_type.json", "d0", CHAT, b"model=tiny", {"content-type": "text/plain"}),
    Recorded("error_get_chat.json", "d0", CHAT),
    Recorded("error_no_route.json", "d0", "/nowhere"),
    Recorded("error_not_a_pooling_model.json", "d0", "/v1/embeddings", {"model": MODEL, "input": "gate"}),
]
HAND_OFFS = [("chat", CHAT, CHAT_BODY), ("completion", COMPLETIONS, COMPLETION_BODY)]


class Engine(Protocol):
    """What is recorded: a real engine or an emulated one."""

    @property
    def url(self) -> str:
        """Base URL of the HTTP server."""
        ...

    @property
    def kv_events_port(self) -> int:
        """Where KV events are published."""
        ...

    async def kill(self) -> None:
        """End it abruptly."""
        ...


class Fleet(Protocol):
    """Engines by name: p0 (prefill, publishes KV events) and d0 (decode, fails when KV cannot be loaded)."""

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

    async def record(self, recorded: Recorded) -> bytes:
        """Send the request, write the answer's body to its file and return it."""
        async with recorded.send(self._session, self._fleet[recorded.engine].url) as response:
            answer = await response.read()
            self._exchanges[recorded.file] = {
                "engine": recorded.engine,
                "method": response.method,
                "path": recorded.path,
                "request": shortened(recorded.body),
                "status": response.status,
                "headers": dict(response.headers),
            }
        (self._directory / recorded.file).write_bytes(answer)
        return answer

    async def hand_off(self, name: str, path: str, body: dict[str, object]) -> None:
        """Record both legs of a hand-off from p0 to d0, not streamed, then streamed."""
        for prefill, decode, extra in [
            (f"prefill_{name}.json", f"decode_{name}.json", {}),
            (f"prefill_{name}_for_stream.json", f"decode_{name}.sse", STREAM_WITH_USAGE),
        ]:
            own = fresh(body, decode)
            answer = await self.record(Recorded(prefill, "p0", path, own | PREFILL_LEG))
            params = {"kv_transfer_params": json.loads(answer)["kv_transfer_params"]}
            await self.record(Recorded(decode, "d0", path, own | extra | params))

    async def failed_load(self) -> None:
        """Record what d0 says when its KV is gone: p0 is killed between the legs. p0 is down afterwards."""
        legs = []
        for suffix, extra in [("json", {}), ("sse", STREAM)]:
            own = fresh(CHAT_BODY, f"lost.{suffix}")
            answer = await self.record(Recorded("prefill_chat_lost.json", "p0", CHAT, own | PREFILL_LEG))
            params = {"kv_transfer_params": json.loads(answer)["kv_transfer_params"]}
            legs.append(Recorded(f"error_kv_load.{suffix}", "d0", CHAT, own | extra | params))
        await self._fleet["p0"].kill()
        for leg in legs:
            await self.record(leg)

    async def metrics(self, engine: str, file: str) -> None:
        """Record the metric families a router reads."""
        text = (await self.record(Recorded(file, engine, "/metrics"))).decode()
        (self._directory / file).write_text(trimmed_metrics(text))

    async def kv_event(self, engine: str, file: str) -> None:
        """Record the frames of the first KV event batch after a new prompt, each frame a line of hex digits."""
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as subscriber:
            subscriber.connect(f"tcp://127.0.0.1:{self._fleet[engine].kv_events_port}")
            subscriber.subscribe(b"")
            frames = subscriber.recv_multipart()
            while not frames.done():  # a subscription takes effect some time after it is made
                await self._post(engine, COMPLETION_BODY | {"prompt": os.urandom(200).hex(), "max_tokens": 1})
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


def fresh(body: dict[str, object], mark: str) -> dict[str, object]:
    """The same body with a prompt that begins differently, so that no engine has it in its prefix cache."""
    if "prompt" in body:
        return body | {"prompt": f"{mark}: {TEXT}"}
    return body | {"messages": [{"role": "user", "content": f"{mark}: {TEXT}"}]}


def shortened(body: dict[str, object] | bytes | None) -> object:
    """The body as JSON can hold it, with long lists cut to three items."""
    if isinstance(body, bytes):
        return body.decode()
    if body is None:
        return None
    return {key: value[:3] if isinstance(value, list) else value for key, value in body.items()}


def trimmed_metrics(text: str) -> str:
    """The lines of the metric families in METRICS_KEPT, comments included, without the time each was created."""
    kept = []
    for line in text.splitlines(keepends=True):
        name = line.split()[2] if line.startswith("#") else line
        if name.startswith(METRICS_KEPT) and "_created" not in name:
            kept.append(line)
    return "".join(kept)


async def record_all(fleet: Fleet, directory: Path, *, with_failed_load: bool = True) -> None:
    """Write every recording into the directory. p0 is down afterwards, unless `with_failed_load` is False."""
    async with aiohttp.ClientSession() as session:
        recorder = Recorder(fleet, session, directory)
        for recorded in GOOD + BAD:
            await recorder.record(recorded)
        for name, path, body in HAND_OFFS:
            await recorder.hand_off(name, path, body)
        await recorder.metrics("p0", "metrics_prefill.txt")
        await recorder.metrics("d0", "metrics_decode.txt")
        await recorder.kv_event("p0", "kv_event_frames.hex")
        if with_failed_load:
            await recorder.failed_load()
        recorder.write_exchanges()


async def main() -> None:
    """Start one prefill and one decode engine, record, and end them."""
    python = find_engine_python(os.environ, ROOT)
    if python is None:
        raise SystemExit("no interpreter with vLLM: run `make engines` or set SLUICE_VLLM_PYTHON")
    RECORDED.mkdir(parents=True, exist_ok=True)
    specs = [EngineSpec("p0", Role.PREFILL, publishes_kv_events=True), EngineSpec("d0", Role.DECODE)]
    with tempfile.TemporaryDirectory() as directory:
        async with VllmFleet(python, specs, Path(directory)) as fleet:
            await record_all(fleet, RECORDED)


if __name__ == "__main__":
    asyncio.run(main())
