"""Every way in which a request can fail.

    VoxgateError
    |-- InvalidInput            400  the request itself: `param` names the field
    |   `-- TooLarge            413
    |-- Unauthenticated         401
    |-- InsufficientQuota       402  out of credit, or a monthly budget is spent
    |-- Forbidden               403  suspended, out of the key's scopes, or a model it may not use
    |-- NotFound                404  no such path
    |   `-- ModelNotFound       404
    |-- MethodNotAllowed        405
    |-- RequestTimeout          408  the upload stalled
    |-- UpgradeRequired         426  the live socket was asked for without an upgrade
    |-- IdempotencyConflict     409  the Idempotency-Key is in use
    |-- RateLimited             429  `Retry-After` says when to come back
    |-- Overloaded              503  the queue is full; `retry_after` says when to come back
    |-- ProviderUnavailable     502  every provider for the model failed
    `-- ClientGone              499  nobody is left to read the answer

    ProviderError                    one attempt at one provider; never reaches a client
    InvalidCatalog, InvalidSettings  the operator's mistake, said at start

The envelope is OpenAI's, `{"error": {"message", "type", "param", "code"}}`; the codes are those
of the stats contract (`dialects.md`, "Errors").
"""

from __future__ import annotations

import math
from enum import StrEnum


class VoxgateError(Exception):
    """A failure that the client is told of. `message` is for the client's eyes."""

    status = 500
    code = "internal_error"
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = headers or {}

    def envelope(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidInput(VoxgateError):
    status = 400
    code = "invalid_input"
    type = "invalid_request_error"


class TooLarge(InvalidInput):
    status = 413


class Unauthenticated(VoxgateError):
    status = 401
    code = "unauthenticated"
    type = "authentication_error"

    def __init__(self, message: str) -> None:
        # RFC 9110, 11.6.1: a 401 names the scheme that would be accepted.
        super().__init__(message, headers={"www-authenticate": 'Bearer realm="voxgate"'})


class InsufficientQuota(VoxgateError):
    status = 402
    code = "insufficient_quota"
    type = "insufficient_quota"

    def __init__(self, message: str) -> None:
        # OpenAI's SDKs obey this header: credit does not come by asking again.
        super().__init__(message, headers={"x-should-retry": "false"})


class Forbidden(VoxgateError):
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
    code = "model_not_found"


class MethodNotAllowed(VoxgateError):
    status = 405
    code = "method_not_allowed"
    type = "invalid_request_error"

    def __init__(self, method: str, path: str, allowed: list[str]) -> None:
        allow = ", ".join(sorted(allowed))
        super().__init__(f"{path} does not take {method}; it takes {allow}.", headers={"allow": allow})


class RequestTimeout(VoxgateError):
    status = 408
    code = "request_timeout"
    type = "invalid_request_error"


class UpgradeRequired(VoxgateError):
    status = 426
    code = "upgrade_required"
    type = "invalid_request_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"upgrade": "websocket"})


class IdempotencyConflict(VoxgateError):
    """`retry_after` is in seconds; None where asking again cannot help."""

    status = 409
    code = "idempotency_conflict"
    type = "invalid_request_error"

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        wait = {"x-should-retry": "false"} if retry_after is None else {"retry-after": str(retry_after)}
        super().__init__(message, param="Idempotency-Key", headers=wait)


class RateLimited(VoxgateError):
    """`wait` is in seconds: whoever waits that long gets in."""

    status = 429
    code = "rate_limited"
    type = "rate_limit_error"

    def __init__(self, message: str, *, wait: float) -> None:
        milliseconds = max(math.ceil(wait * 1000), 1)
        super().__init__(
            message,
            headers={"retry-after": str(math.ceil(milliseconds / 1000)), "retry-after-ms": str(milliseconds)},
        )


class Overloaded(VoxgateError):
    status = 503
    code = "overloaded"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, headers={"retry-after": str(retry_after)})
        self.retry_after = retry_after


class ProviderUnavailable(VoxgateError):
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
