"""HTTP without a server: paths to answers, for every host alike.

A host turns what it was given into a `Request`, calls `Application.handle`, and sends the
`Response`. Nothing here knows of sockets or of Lambda.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from voxgate import __version__
from voxgate.dialects import Dialect
from voxgate.errors import MethodNotAllowed, NotFound, ProviderUnavailable, VoxgateError
from voxgate.metrics import Metrics
from voxgate.transcribe import Incoming, Transcriber

logger = logging.getLogger("voxgate")
_KEY = re.compile(r"vg_\w+")  # some paste their key into an address, and no log may have it


def request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Request:
    """Header names are in lower case; `path` is decoded and without its query. Whatever becomes of the
    request, its answer carries the headers in `told`."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]
    content_length: int | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    id: str = field(default_factory=request_id)
    told: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    headers: dict[str, str]
    body: bytes


Handler = Callable[[Request], Awaitable[Response]]


class Application:
    """The routes of one service. `routes` maps a path to its methods; one that ends in `/` takes
    everything below it."""

    def __init__(self, routes: Mapping[str, Mapping[str, Handler]]) -> None:
        self.routes = routes

    async def handle(self, request: Request) -> Response:
        """Answer, whatever happens; `asyncio.CancelledError` alone comes through."""
        begun = time.perf_counter()
        try:
            response = await self._route(request)(request)
        except VoxgateError as error:
            response = error_response(error)
        except Exception:  # the entry point: the client gets the envelope, the log the traceback
            logger.exception("request %s failed", request.id)
            response = error_response(
                VoxgateError(f"Something went wrong here; quote {request.id} when you report it.")
            )
        response = replace(response, headers=request.told | response.headers | {"x-request-id": request.id})
        logger.info(
            "%s %s %d %.0f ms %s",
            request.method,
            _KEY.sub("vg_...", request.path if request.path.isprintable() else ascii(request.path)),
            response.status,
            (time.perf_counter() - begun) * 1000,
            request.id,
        )
        return response

    def _route(self, request: Request) -> Handler:
        methods = self.routes.get(request.path)
        if methods is None:
            below = [p for p in self.routes if p.endswith("/") and request.path.startswith(p) and request.path != p]
            if not below:
                raise NotFound(f"There is nothing at {request.method[:20]} {request.path[:200]}.")
            methods = self.routes[below[0]]
        method = "GET" if request.method == "HEAD" else request.method
        if method not in methods:
            raise MethodNotAllowed(request.method[:20], request.path[:200], list(methods))
        return methods[method]


def json_response(value: Any, status: int = 200) -> Response:
    return Response(status, {"content-type": "application/json"}, json.dumps(value, ensure_ascii=False).encode())


def error_response(error: VoxgateError) -> Response:
    response = json_response(error.envelope(), error.status)
    response.headers.update(error.headers)
    return response


def transcription(transcriber: Transcriber, dialect: Dialect) -> Handler:
    """The handler of one contract's path."""

    async def handle(request: Request) -> Response:
        incoming = Incoming(request.id, request.headers, request.body, request.content_length, request.told)
        begun, code = time.perf_counter(), ""
        try:
            reply = await transcriber(dialect, incoming)
        except BaseException as error:
            code = error.code if isinstance(error, VoxgateError) else VoxgateError.code
            raise
        finally:
            _count(transcriber.metrics, dialect, code, time.perf_counter() - begun)
        return Response(200, reply.headers, reply.content)

    return handle


def _count(metrics: Metrics, dialect: Dialect, code: str, seconds: float) -> None:
    """`code` is empty for what went well."""
    metrics.add("Requests", contract=dialect.name)
    metrics.add("Latency", seconds * 1000)
    if code:
        metrics.add("Errors", code=code)
    if code == ProviderUnavailable.code:
        metrics.add("ProviderUnavailable")


async def health(request: Request) -> Response:
    return json_response({"status": "ok", "version": __version__})
