"""The exchange that calls nobody: an engine would die of this request."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.answers import error_body
from adapters.base import Answer, Command, Happening


@dataclass(frozen=True, slots=True)
class Refusal:
    """Answers the client with 400 and this message."""

    message: str
    param: str

    def start(self) -> list[Command]:
        """The answer."""
        return [Answer(400, error_body(self.message, "invalid_request_error", self.param, 400))]

    def receive(self, happening: Happening) -> list[Command]:
        """Nothing: nobody was called."""
        return []
