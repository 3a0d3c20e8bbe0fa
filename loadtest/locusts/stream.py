"""One connection of a Locust user: sends a request, reads the stream as it comes, and tells what was seen.

gevent's twin of `loadtest/client.py`: the same AnswerRecord reads the same bytes, so both tools count the same things.
"""

from __future__ import annotations

import time
from http import HTTPStatus

import gevent
import msgspec
from geventhttpclient.client import HTTPClient
from geventhttpclient.response import HTTPParseError, HTTPSocketPoolResponse

from loadtest.answer import AnswerRecord, ClientResult, ErrorKind, TooLarge
from loadtest.client import IDLE_CONNECTION_S, MAX_BODY_BYTES, ClientRequest

clock = time.perf_counter
"""The clock of every instant here."""

BLOCK_BYTES = 16_384


class Connection:
    """Sends one request at a time to one base URL; the connection is kept while it is in use."""

    def __init__(self, base_url: str, *, timeout_s: float, keep_text: bool = False) -> None:
        self._base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._keep_text = keep_text
        self._client: HTTPClient | None = None
        self._used_at = 0.0

    def send(self, request: ClientRequest, *, scheduled_at: float) -> ClientResult:
        """Sends it now; latencies count from `scheduled_at`. Never raises for what a server can do."""
        record = AnswerRecord(
            scheduled_at=scheduled_at, prompt_tokens=request.prompt_tokens, clock=clock, keep_text=self._keep_text
        )
        try:
            with gevent.Timeout(self._timeout_s, TimeoutError):
                self._converse(request, record)
        except TimeoutError:
            self._fail(record, ErrorKind.TIMEOUT, f"no whole answer within {self._timeout_s:g} s")
        except ConnectionRefusedError as error:
            self._fail(record, ErrorKind.CONNECT, str(error))
        except (OSError, HTTPParseError) as error:
            self._fail(record, ErrorKind.LOST, str(error))
        except (msgspec.MsgspecError, UnicodeDecodeError, TooLarge) as error:
            self._fail(record, ErrorKind.MALFORMED, str(error))
        except BaseException:  # the user is stopped: what was under way is not kept, nor is its connection
            self.close()
            raise
        self._used_at = clock()
        return record.result()

    def close(self) -> None:
        """Closes the connection; the next request makes a new one."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _fail(self, record: AnswerRecord, kind: ErrorKind, detail: str) -> None:
        record.fail(kind, detail)
        self.close()

    def _converse(self, request: ClientRequest, record: AnswerRecord) -> None:
        headers = {"content-type": "application/json", **dict(request.headers)}
        response = self._connected().request("POST", request.path, body=request.body, headers=headers)
        record.head(response.status_code, dict(response.items()))
        if response.status_code != HTTPStatus.OK:
            record.fail(ErrorKind.HTTP_STATUS, _whole(response)[:500].decode(errors="replace"))
        elif not request.is_stream:
            record.whole(_whole(response))
        else:
            while event := response.readline(b"\n\n"):
                record.feed(event)
            record.end_of_stream()

    def _connected(self) -> HTTPClient:
        if clock() - self._used_at > IDLE_CONNECTION_S:
            self.close()
        if self._client is None:
            # The limit on the whole answer is ours; this one is only for a socket that is silent for longer.
            self._client = HTTPClient.from_url(
                self._base_url, network_timeout=self._timeout_s + 1, block_size=BLOCK_BYTES
            )
        return self._client


def _whole(response: HTTPSocketPoolResponse) -> bytes:
    body = response.read(MAX_BODY_BYTES)
    if not response.message_complete:
        raise TooLarge(f"the answer is longer than {MAX_BODY_BYTES} bytes")
    return body
