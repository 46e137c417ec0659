"""Every way in which a request can fail.

    VoxgateError
    |-- InvalidInput            400
    |   `-- TooLarge            413
    |-- Unauthenticated         401
    |-- InsufficientQuota       402
    |-- Forbidden               403
    |-- NotFound                404  no such path
    |   `-- ModelNotFound       404
    |-- MethodNotAllowed        405
    |-- RequestTimeout          408
    |-- UpgradeRequired         426  the live socket was asked for without an upgrade
    |-- IdempotencyConflict     409
    |-- RateLimited             429
    |-- Overloaded              503
    |-- ProviderUnavailable     502
    `-- ClientGone              499  nobody is left to read the answer

    ProviderError                    one attempt at one provider; never reaches a client
    InvalidCatalog, InvalidSettings  the operator's mistake, said at start

The envelope is OpenAI's, `{"error": {"message", "type", "param", "code"}}`; the codes are those
of the stats contract (`dialects.md`, "Errors"). What a class says of itself the OpenAPI document says too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum


class VoxgateError(Exception):
    """A failure that the client is told of. `message` is for the client's eyes."""

    status = 500
    code = "internal_error"
    type = "server_error"
    own_headers: Mapping[str, str] = {}

    def __init__(self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = {**self.own_headers, **(headers or {})}

    def envelope(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidInput(VoxgateError):
    """A field is missing or has a bad value, or the audio cannot be used; `param` names the field."""

    status = 400
    code = "invalid_input"
    type = "invalid_request_error"


class TooLarge(InvalidInput):
    """The audio is larger than 25 MB."""

    status = 413


class Unauthenticated(VoxgateError):
    """The API key is missing, malformed, unknown, revoked or expired."""

    status = 401
    code = "unauthenticated"
    type = "authentication_error"
    # RFC 9110, 11.6.1: a 401 names the scheme that would be accepted.
    own_headers: Mapping[str, str] = {"www-authenticate": 'Bearer realm="voxgate"'}


class InsufficientQuota(VoxgateError):
    """Out of credit, or a monthly budget is spent; the message says what is left and what it takes."""

    status = 402
    code = "insufficient_quota"
    type = "insufficient_quota"
    # OpenAI's SDKs obey this header: credit does not come by asking again.
    own_headers: Mapping[str, str] = {"x-should-retry": "false"}


class Forbidden(VoxgateError):
    """The account is suspended, or the key has not the scope or may not use the model."""

    status = 403
    type = "permission_error"

    def __init__(self, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.code = code


class NotFound(VoxgateError):
    status = 404
    code = "not_found"
    type = "invalid_request_error"


class ModelNotFound(NotFound):
    """No such model, or none of its providers passes the request's filters."""

    code = "model_not_found"


class MethodNotAllowed(VoxgateError):
    status = 405
    code = "method_not_allowed"
    type = "invalid_request_error"

    def __init__(self, method: str, path: str, allowed: list[str]) -> None:
        allow = ", ".join(sorted(allowed))
        super().__init__(f"{path} does not take {method}; it takes {allow}.", headers={"allow": allow})


class RequestTimeout(VoxgateError):
    """The upload stalled for a minute."""

    status = 408
    code = "request_timeout"
    type = "invalid_request_error"


class UpgradeRequired(VoxgateError):
    status = 426
    code = "upgrade_required"
    type = "invalid_request_error"
    own_headers: Mapping[str, str] = {"upgrade": "websocket"}


class IdempotencyConflict(VoxgateError):
    """The Idempotency-Key is another request's, or this one's that is still running."""

    status = 409
    code = "idempotency_conflict"
    type = "invalid_request_error"

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        """`retry_after` is in seconds; None where asking again cannot help."""
        wait = {"x-should-retry": "false"} if retry_after is None else {"retry-after": str(retry_after)}
        super().__init__(message, param="Idempotency-Key", headers=wait)


class RateLimited(VoxgateError):
    """A rate or concurrency limit; `Retry-After` and `retry-after-ms` say when to come back."""

    status = 429
    code = "rate_limited"
    type = "rate_limit_error"

    def __init__(self, message: str, *, wait: float) -> None:
        """`wait` is in seconds: whoever waits that long gets in."""
        milliseconds = max(math.ceil(wait * 1000), 1)
        super().__init__(
            message,
            headers={"retry-after": str(math.ceil(milliseconds / 1000)), "retry-after-ms": str(milliseconds)},
        )


class Overloaded(VoxgateError):
    """The queue is full, or too long for the request's deadline; `Retry-After` says when to come back."""

    status = 503
    code = "overloaded"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, headers={"retry-after": str(retry_after)})
        self.retry_after = retry_after


class ProviderUnavailable(VoxgateError):
    """Every provider for the model failed."""

    status = 502
    code = "provider_unavailable"


class ClientGone(VoxgateError):
    """The client hung up. The status is nginx's; it is only ever seen in our own log."""

    status = 499
    code = "client_gone"


class FailureClass(StrEnum):
    """What one failed attempt means for the next one. Routing reads nothing else of a failure."""

    CALLER_FAULT = "caller_fault"  # the audio or a parameter: no other provider would do better
    CREDENTIAL = "credential"  # our key is wrong there
    QUOTA = "quota"  # we are out of credit there
    RATE_LIMIT = "rate_limit"  # not now: see retry_after
    TRANSIENT = "transient"  # a crash, a timeout, a broken answer
    UNSUPPORTED = "unsupported"  # this one cannot, another may
    OVERLOADED = "overloaded"  # our own engine's queue is full


class ProviderError(Exception):
    """One attempt at one provider failed.

    `message` may be shown to the client only for CALLER_FAULT; `status` is the provider's HTTP
    status where there was one; `retry_after` is in seconds.
    """

    def __init__(
        self,
        failure: FailureClass,
        message: str,
        *,
        status: int | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.failure = failure
        self.message = message
        self.status = status
        self.param = param
        self.retry_after = retry_after


class InvalidCatalog(Exception):
    """The catalogue file is wrong; the message names the file, the key and what is wrong."""


class InvalidSettings(Exception):
    """An environment variable has an unusable value; the message names it."""
