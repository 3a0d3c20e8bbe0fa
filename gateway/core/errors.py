"""Every error Sluice raises on purpose: one sentence for a person, one status for HTTP."""

from __future__ import annotations


class GatewayError(Exception):
    """Base of all errors on purpose. `status` is the HTTP status a client sees, `kind` stands in the body."""

    status = 500
    kind = "internal_error"
    closes_connection = False
    """Whether the rest of the request is not worth reading, so that the connection ends with the answer."""
    code: str | None = None
    """What stands as `code` in the body instead of the status."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(GatewayError):
    """A setting is unknown, impossible or contradicts another. The message starts with the key's path."""

    kind = "config_error"


class BadRequest(GatewayError):
    """The client's request cannot be served as it is."""

    status = 400
    kind = "invalid_request_error"


class BodyTooLarge(GatewayError):
    """The request body is over the limit."""

    status = 413
    kind = "invalid_request_error"
    closes_connection = True


class RequestTimeout(GatewayError):
    """The client stopped sending in the middle of its request."""

    status = 408
    kind = "invalid_request_error"
    closes_connection = True


class NotFound(GatewayError):
    """There is nothing at that path."""

    status = 404
    kind = "not_found_error"


class MethodNotAllowed(GatewayError):
    """The path exists and takes another method, named in `allow`."""

    status = 405
    kind = "invalid_request_error"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class EngineUnavailable(GatewayError):
    """No engine could serve the request, or every attempt failed before the first byte."""

    status = 502
    kind = "engine_error"


class EngineTimeout(GatewayError):
    """An engine accepted the request and did not answer within the limit."""

    status = 504
    kind = "engine_timeout"


class MalformedEngineData(GatewayError):
    """An engine sent bytes that are not what its protocol says."""

    status = 502
    kind = "engine_error"
