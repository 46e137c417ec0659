"""HTTP without a server: paths to answers, for every host alike.

A host turns what it was given into a `Request`, calls `Application.handle`, and sends the
`Response`. Nothing here knows of sockets or of Lambda.
"""

from __future__ import annotations

import asyncio
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
from voxgate.formats import event
from voxgate.metering import Reply
from voxgate.metrics import Metrics
from voxgate.streaming import HEADERS, Events
from voxgate.tasks import whole
from voxgate.transcribe import Incoming, Transcriber

logger = logging.getLogger("voxgate")
_HEARTBEAT_SECONDS = 10.0
_KEY = re.compile(r"v[gt]_\w+")  # some paste their key into an address, and no log may have it


def request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Request:
    """Header names are in lower case; `path` is decoded and without its query. Whatever becomes of the
    request, its answer carries the headers in `told`. `streams` where the host can send an answer's parts."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]
    content_length: int | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    streams: bool = False
    id: str = field(default_factory=request_id)
    told: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    """`parts`, where there are any, come in place of the body; closed early, they stop the work for them."""

    status: int
    headers: dict[str, str]
    body: bytes
    parts: Parts | None = None


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
            response = error_response(_unforeseen(request.id))
        response = replace(response, headers=request.told | response.headers | {"x-request-id": request.id})
        logger.info(
            "%s %s %d %.0f ms %s",
            request.method,
            _KEY.sub("v._...", request.path if request.path.isprintable() else ascii(request.path)),
            response.status,
            (time.perf_counter() - begun) * 1000,
            request.id,
        )
        return response

    def _route(self, request: Request) -> Handler:
        above = (path for path in self.routes if path.endswith("/") and request.path.startswith(path))
        methods = self.routes.get(request.path) or self.routes.get(next(above, ""))
        if methods is None:
            raise NotFound(f"There is nothing at {request.method[:20]} {request.path[:200]}.")
        method = "GET" if request.method == "HEAD" else request.method
        if method not in methods:
            raise MethodNotAllowed(request.method[:20], request.path[:200], list(methods))
        return methods[method]


def _unforeseen(request_id: str) -> VoxgateError:
    return VoxgateError(f"Something went wrong here; quote {request_id} when you report it.")


def encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


def json_response(value: Any, status: int = 200) -> Response:
    return Response(status, {"content-type": "application/json"}, json.dumps(value, ensure_ascii=False).encode())


def error_response(error: VoxgateError) -> Response:
    response = json_response(error.envelope(), error.status)
    response.headers.update(error.headers)
    return response


def transcription(transcriber: Transcriber, dialect: Dialect) -> Handler:
    """The handler of one contract's path."""

    async def serve(incoming: Incoming) -> Reply:
        begun, code = time.perf_counter(), ""
        try:
            return await transcriber(dialect, incoming)
        except BaseException as error:
            code = error.code if isinstance(error, VoxgateError) else VoxgateError.code
            raise
        finally:
            count(transcriber.metrics, dialect.name, code, time.perf_counter() - begun)

    async def handle(request: Request) -> Response:
        events = Events(live=request.streams)
        work = asyncio.create_task(
            serve(Incoming(request.id, request.headers, request.body, request.content_length, request.told, events))
        )
        begun = asyncio.create_task(events.begun.wait())
        parts = None
        try:
            # An answer begins with its first event, so that until then another provider may serve, and a
            # failure has its status; or with a heartbeat, before somebody on the way takes it for dead.
            ready = False
            while not ready:
                done, _ = await asyncio.wait(
                    (work, begun), timeout=_HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                ready = bool(done) or (events.live and events.wanted)
            if work.done():
                reply = work.result()
                return Response(200, reply.headers, reply.content)
            # With a heartbeat it is not known yet who will have served.
            known = events.headers if events.begun.is_set() else {}
            parts = Parts(work, events, request.id)
            return Response(200, HEADERS | {"x-accel-buffering": "no"} | known, b"", parts)
        finally:
            begun.cancel()
            if parts is None:
                work.cancel()
                await asyncio.wait([work])

    return handle


class Parts:
    """What is told of a transcript that is being made. `aclose` stops the work for it, begun or not."""

    def __init__(self, work: asyncio.Task[Reply], events: Events, request_id: str) -> None:
        self._work = work
        self._events = events
        self._request_id = request_id
        self._closing = asyncio.create_task(self._close())

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._events.parts(heartbeat=_HEARTBEAT_SECONDS):
            yield part
        try:
            await self._work
        except VoxgateError as error:
            yield event(error.envelope())
        except Exception:  # the entry point, too
            logger.exception("request %s failed", self._request_id)
            yield event(_unforeseen(self._request_id).envelope())

    async def aclose(self) -> None:
        self._work.cancel()
        self._closing.cancel()
        await whole(asyncio.wait([self._work, self._closing]))

    async def _close(self) -> None:
        await asyncio.wait([self._work])
        await self._events.close()


def count(metrics: Metrics, contract: str, code: str, seconds: float) -> None:
    """`code` is empty for what went well."""
    metrics.add("Requests", contract=contract)
    metrics.add("Latency", seconds * 1000)
    if code:
        metrics.add("Errors", code=code)
    if code == ProviderUnavailable.code:
        metrics.add("ProviderUnavailable")


async def health(request: Request) -> Response:
    return json_response({"status": "ok", "version": __version__})
