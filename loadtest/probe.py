"""Times single requests at one engine from outside, as a gateway would see them.

A probe asks for output without end-of-sequence and at temperature 0, so that what is measured is what was asked for.
Whatever goes wrong is a ProbeFailed of one line that names the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp
import msgspec

from adapters import adapter
from adapters.base import Adapter, Answered, Call, Commit, Facts, HeadEvent, Leg, Payload
from adapters.sse import first_event
from gateway.core.errors import ConfigError, GatewayError
from gateway.core.types import Engine, Report, Role

COMPLETIONS = "/v1/completions"
CONTROL_TIMEOUT_S = 10.0
MAX_CONTROL_BYTES = 16 << 20
DETAIL_CHARACTERS = 200


class ProbeFailed(GatewayError):
    """An engine could not be reached, refused a probe, or answered what its protocol does not know."""

    kind = "probe_failed"


class EngineBusy(GatewayError):
    """An engine serves others, so that nothing measured there would be its own time."""

    kind = "engine_busy"


class Probe:
    """One engine to be measured."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        role: Role,
        kind: str = "vllm",
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.engine = Engine(id=f"{role} engine", url=url.rstrip("/"), role=role, adapter=kind)
        self.adapter: Adapter = adapter(kind)()
        self._session = session
        self._headers = {"content-type": "application/json", **dict(headers)}

    # ---- what it says of itself -------------------------------------------------------------------------------------

    async def facts(self) -> Facts:
        """Load, KV capacity and cache counters now."""
        return self.adapter.parse_report(await self._get(self.adapter.report_path))

    async def report(self) -> Report:
        """Its load now."""
        report = (await self.facts()).report
        if report is None:
            raise ProbeFailed(f"{self._where} does not report its load")
        return report

    async def model(self, name: str | None) -> tuple[str, int | None]:
        """The named model, else the first, and its longest context (tokens). ConfigError when it is not served."""
        facts = self.adapter.parse_models(await self._get(self.adapter.models_path))
        models = facts.models or ()
        if not models or (name is not None and name not in models):
            raise ConfigError(f"model: {self._where} does not serve {name!r}; it serves {', '.join(models) or 'none'}")
        return name or models[0], facts.max_model_tokens

    # ---- timed requests ---------------------------------------------------------------------------------------------

    async def prefill_s(self, model: str, prompt: Sequence[int]) -> float:
        """Seconds from the call to the whole answer of one token."""
        clock = asyncio.get_running_loop().time
        began_at = clock()
        await self._post(COMPLETIONS, _body(model, prompt, max_tokens=1))
        return clock() - began_at

    async def token_instants(self, model: str, prompt: Sequence[int], output_tokens: int) -> list[float]:
        """When each event of a stream of so many tokens came, on the loop's clock; mostly one event per token."""
        body = _body(model, prompt, max_tokens=output_tokens, is_stream=True)
        async with self._answer(COMPLETIONS, body) as response:
            return [at async for _, at in self._events(response)]

    async def hand_off_s(self, decode: Probe, model: str, prompt: Sequence[int]) -> float:
        """Seconds from the call at the decode engine to its first token, after the prefill here is done."""
        body: dict[str, object] = _fields(model, prompt, max_tokens=2, is_stream=True)
        payload = Payload("probe", COMPLETIONS, body, is_stream=True, model=model, can_hand_off=True)
        exchange = self.adapter.open(payload, self.engine, decode.engine)
        (first,) = (command for command in exchange.start() if isinstance(command, Call))
        answer = await self._post(first.path, first.body)
        calls = [each for each in exchange.receive(Answered(Leg.PREFILL, 200, answer)) if isinstance(each, Call)]
        if not calls or b"kv_transfer_params" not in calls[0].body:
            raise ProbeFailed(f"{self._where} offers no hand-off; was it started with a KV connector?")
        clock = asyncio.get_running_loop().time
        began_at, first_at = clock(), None
        async with decode._answer(calls[0].path, calls[0].body) as response:
            async for data, at in decode._events(response):
                commands = exchange.receive(HeadEvent(Leg.DECODE, data))
                if first_at is None and any(isinstance(command, Commit) for command in commands):
                    first_at = at
        if first_at is None:
            raise ProbeFailed(f"{decode._where} gave no token for a prompt that was handed off")
        return first_at - began_at

    # ---- HTTP -------------------------------------------------------------------------------------------------------

    @property
    def _where(self) -> str:
        return f"{self.engine.id} {self.engine.url}"

    async def _get(self, path: str) -> bytes:
        timeout = aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_S)
        async with (
            self._told(path),
            self._session.get(
                self.engine.url + path, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as response,
        ):
            return await self._whole(response, path)

    async def _post(self, path: str, body: bytes) -> bytes:
        async with self._answer(path, body) as response:
            return await self._whole(response, path)

    @asynccontextmanager
    async def _answer(self, path: str, body: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        async with (
            self._told(path),
            self._session.post(
                self.engine.url + path, data=body, headers=self._headers, allow_redirects=False
            ) as response,
        ):
            yield response

    @asynccontextmanager
    async def _told(self, path: str) -> AsyncIterator[None]:
        """Turns what the HTTP client raises into a ProbeFailed."""
        try:
            yield
        except TimeoutError:
            raise ProbeFailed(f"{self._where}{path} did not answer in time") from None
        except aiohttp.ClientError as error:
            raise ProbeFailed(f"{self._where}{path}: {error or type(error).__name__}") from None

    async def _whole(self, response: aiohttp.ClientResponse, path: str) -> bytes:
        body = await response.content.read(MAX_CONTROL_BYTES)
        while not response.content.at_eof() and len(body) < MAX_CONTROL_BYTES:
            body += await response.content.read(MAX_CONTROL_BYTES - len(body))
        if response.status != 200:
            detail = " ".join(body[:DETAIL_CHARACTERS].decode(errors="replace").split())
            raise ProbeFailed(f"{self._where}{path} answered {response.status}: {detail}")
        return body

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncIterator[tuple[bytes, float]]:
        """The data of each event but the last (`[DONE]`), and when it came. ProbeFailed for an error inside."""
        clock = asyncio.get_running_loop().time
        if response.status != 200 or not response.content_type.startswith("text/event-stream"):
            body = await self._whole(response, COMPLETIONS)
            raise ProbeFailed(f"{self._where} answered a stream with {body[:DETAIL_CHARACTERS]!r}")
        held = b""
        async for piece in response.content.iter_any():
            came_at = clock()
            held += piece
            while (found := first_event(held))[1]:
                data, size = found
                held = held[size:]
                if data is None or data == b"[DONE]":
                    continue
                if data.startswith(b'{"error"'):
                    detail = data[:DETAIL_CHARACTERS].decode(errors="replace")
                    raise ProbeFailed(f"{self._where} broke a stream off: {detail}")
                yield data, came_at


def _fields(model: str, prompt: Sequence[int], *, max_tokens: int, is_stream: bool = False) -> dict[str, object]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": is_stream,
    }


def _body(model: str, prompt: Sequence[int], *, max_tokens: int, is_stream: bool = False) -> bytes:
    return msgspec.json.encode(_fields(model, prompt, max_tokens=max_tokens, is_stream=is_stream))
