"""Asks engines for token ids and for the text of ids: the first that is up, serves the model and told the last time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import aiohttp
import msgspec

from adapters.base import Adapter
from adapters.token_ids import Ids, check_tokenize, detokenize_body, parse_detokenize, parse_tokenize, tokenize_body
from gateway.control_http import IDLE_S, bearer, read_bounded
from gateway.core.errors import EngineUnavailable, GatewayError, MalformedEngineData
from gateway.core.types import Engine, Health
from gateway.driver import Driver
from gateway.tokens import AskEngine

SILENT_S = 30.0
"""An engine that did not tell is not asked again for so long: every request would wait for it."""
MAX_ANSWER_BYTES = 64 * 2**20
DETOKENIZE_PATH = "/detokenize"
MAX_ASKED = 3
"""Engines asked for one text: a client waits for the rest of its stream meanwhile."""


class EngineTokenizers:
    """The `/tokenize` and `/detokenize` endpoints of the engines."""

    def __init__(
        self, driver: Driver, adapters: Mapping[str, Adapter], api_key: Callable[[str], str | None], *, timeout_s: float
    ) -> None:
        self._driver = driver
        self._adapters = adapters
        self._api_key = api_key
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._silent_until: dict[str, float] = {}

    def asker(self, model: str) -> AskEngine | None:
        """What posts a body to an engine that serves the model; None when there is none to ask."""
        engine = next(self._able(model), None)
        if engine is None:
            return None

        async def ask(body: dict[str, object]) -> bytes:
            return await self._post(engine, self._adapters[engine.adapter].tokenize_path, body, check_tokenize)

        return ask

    async def ids(self, body: Mapping[str, object], model: str) -> Ids | None:
        """The ids an engine makes of this request's prompt; None when none tells."""
        question, ask = tokenize_body(body), self.asker(model)
        if question is None or ask is None:
            return None
        try:
            return parse_tokenize(await ask(question))
        except (GatewayError, OSError, TimeoutError):
            return None

    async def text(self, model: str, ids: Sequence[int]) -> str | None:
        """The text of these ids by an engine that serves the model and whose streams are continued; None when none
        tells."""
        question = detokenize_body(ids, model)
        asked: set[str] = set()
        while len(asked) < MAX_ASKED:
            engine = next((one for one in self._able(model) if self._continues(one) and one.id not in asked), None)
            if engine is None:
                break
            asked.add(engine.id)
            with contextlib.suppress(GatewayError, OSError, TimeoutError):
                return parse_detokenize(await self._post(engine, DETOKENIZE_PATH, question, parse_detokenize))
        return None

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    def _able(self, model: str) -> Iterator[Engine]:
        """The engines to ask."""
        now = self._driver.now()
        for state in self._driver.scheduler.cluster.engines.values():
            engine = state.engine
            is_able = state.health is Health.UP and (not engine.models or model in engine.models)
            if is_able and self._silent_until.get(engine.id, 0.0) <= now:
                yield engine

    def _continues(self, engine: Engine) -> bool:
        return self._adapters[engine.adapter].can_continue

    async def _post(
        self, engine: Engine, path: str, body: dict[str, object], check: Callable[[bytes], object]
    ) -> bytes:
        """The answer's body, which passed the check. Raises EngineUnavailable, and then does not ask that engine for a
        while."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)
            self._session = aiohttp.ClientSession(timeout=self._timeout, connector=connector)
        headers = {"content-type": "application/json"} | bearer(self._api_key(engine.id))
        try:
            async with self._session.post(
                engine.url + path, data=msgspec.json.encode(body), headers=headers
            ) as response:
                answer = await read_bounded(response, MAX_ANSWER_BYTES)
                if response.status == 200:
                    check(answer)
                    return answer
                reason = f"status {response.status}"
                is_request_at_fault = response.status == 400
        except (aiohttp.ClientError, TimeoutError, OSError, MalformedEngineData) as error:
            reason, is_request_at_fault = str(error) or type(error).__name__, False
        if not is_request_at_fault:
            self._silent_until[engine.id] = self._driver.now() + SILENT_S
        raise EngineUnavailable(f"{engine.id} does not tokenise: {reason}")
