"""An `Application` as an ASGI app: the server of one machine, and the streaming ingress.

ASGI 3.0: HTTP and lifespan (https://asgi.readthedocs.io/en/latest/specs/www.html).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from voxgate.errors import ClientGone, RequestTimeout
from voxgate.hosts import frames
from voxgate.hosts.http import Application, Parts, Request, Response, encoded
from voxgate.hosts.sockets import Sockets

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_T = TypeVar("_T")

# A client that is refused while it sends goes on sending, and would take a closed connection for
# a failure of the network; so what it sends is read and thrown away, within these bounds.
_FLOOR_SECONDS = 30.0  # in which an upload's mean speed is judged
_DRAIN_BYTES = 72 * 1024 * 1024
_DRAIN_SECONDS = 30.0
_EXPECT_SECONDS = 1.0
_FAREWELL_SECONDS = 5.0  # for live sessions to say what they still have to say


class AsgiApp:
    """`start` runs before the first request, `stop` after the last; `slowest_upload` is in bytes a second. The
    WebSockets are for the server to hand its connections to (`hosts.serve`)."""

    def __init__(
        self,
        application: Application,
        *,
        sockets: Sockets | None = None,
        start: Callable[[], Awaitable[None]],
        stop: Callable[[], Awaitable[None]],
        slowest_upload: int = 0,
    ) -> None:
        self._slowest_upload = slowest_upload
        self._application = application
        self.sockets = sockets
        self._start = start
        self._stop = stop
        self._working: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    def restart(self, seconds: float) -> None:
        """It is going to end in so many seconds, and nobody new comes: what may last longer is told."""
        if self.sockets is not None:
            asyncio.get_running_loop().call_later(max(seconds - _FAREWELL_SECONDS, 0.0), self.sockets.restart.set)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._start()
        except Exception as error:  # the entry point: the server is told, and says it
            logger.exception("the server cannot start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        # What still runs gives back what it holds before the store is closed under it.
        for work in self._working:
            work.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)
        await self._stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        length = headers.get("content-length", "")
        body = _Body(
            receive,
            # RFC 9112, 6.3: a request with neither header has no body.
            empty=length in ("", "0") and "transfer-encoding" not in headers,
            expects_continue=headers.get("expect", "").lower() == "100-continue",
            slowest=self._slowest_upload,
        )
        request = Request(
            method=scope["method"],
            path=scope["path"],
            headers=headers,
            body=body.chunks(),
            query=dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)),
            content_length=int(length) if length.isascii() and length.isdecimal() else None,
            streams=True,
        )
        work = await self._until_gone(self._application.handle(request), body)
        if work.cancelled():
            return
        response = work.result()
        if response.parts is None:
            await _send(response, body, send)
            return
        try:
            await self._until_gone(_stream(response, response.parts, send), body)
        finally:
            await response.parts.aclose()  # it may not have begun

    async def _until_gone(self, work: Coroutine[Any, Any, _T], body: _Body) -> asyncio.Task[_T]:
        """The work, done, or cancelled where its client has hung up."""
        working, watch = asyncio.create_task(work), asyncio.create_task(body.gone())
        self._working.add(working)
        working.add_done_callback(self._working.discard)
        try:
            await asyncio.wait({working, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            working.cancel()
            await asyncio.wait([working])
        return working


class _Body:
    """The request's body, and whether its sender is still there."""

    def __init__(self, receive: Receive, *, empty: bool, expects_continue: bool, slowest: int) -> None:
        self._receive = receive
        self._slowest = slowest
        self._expects_continue = expects_continue
        self._whole = asyncio.Event()
        if empty:
            self._whole.set()
        self._started = False

    async def chunks(self) -> AsyncIterator[bytes]:
        clock = asyncio.get_running_loop().time
        since, received = clock(), 0
        while not self._whole.is_set():
            if clock() - since >= _FLOOR_SECONDS:
                if received < self._slowest * _FLOOR_SECONDS:
                    message = f"The upload is slower than {self._slowest} bytes a second; send it over a faster line."
                    raise RequestTimeout(message)
                since, received = clock(), 0
            try:
                async with asyncio.timeout(frames.STALL_SECONDS):
                    chunk = await self._next()
            except TimeoutError as error:
                raise RequestTimeout(f"Nothing of the upload came for {frames.STALL_SECONDS:g} seconds.") from error
            if chunk is None:
                raise ClientGone("The client hung up in the middle of its upload.")
            if chunk:
                received += len(chunk)
                yield chunk

    async def gone(self) -> None:
        """Returns when the client hangs up after its whole body was read."""
        await self._whole.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    @property
    def unread(self) -> bool:
        return not self._whole.is_set()

    async def drain(self) -> None:
        """Read what the client still sends, and keep none of it."""
        # A client that waits for a 100 takes the final status for an answer and sends nothing; one
        # that does not wait has begun already (RFC 9110, 10.1.1 allows both).
        waits = self._expects_continue and not self._started
        left = _DRAIN_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                if waits:
                    async with asyncio.timeout(_EXPECT_SECONDS):
                        chunk = await self._next()
                    if chunk is None:
                        return
                while self.unread and left > 0:
                    chunk = await self._next()
                    if chunk is None:
                        return
                    left -= len(chunk)

    async def _next(self) -> bytes | None:
        self._started = True
        message = await self._receive()
        if message["type"] == "http.disconnect":
            return None
        if not message.get("more_body", False):
            self._whole.set()
        return bytes(message.get("body", b""))


async def _stream(response: Response, parts: Parts, send: Send) -> None:
    """Part by part, as long as the client reads; it is done when what it costs is settled."""
    try:
        await send({"type": "http.response.start", "status": response.status, "headers": encoded(response.headers)})
        async for part in parts:
            async with asyncio.timeout(frames.STALL_SECONDS):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        await parts.aclose()


async def _send(response: Response, body: _Body, send: Send) -> None:
    headers = response.headers | {"content-length": str(len(response.body))}
    if body.unread:
        headers["connection"] = "close"
    await send({"type": "http.response.start", "status": response.status, "headers": encoded(headers)})
    # The answer is whole for the client here; the connection stays open until the last message.
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    if body.unread:
        await body.drain()
    await send({"type": "http.response.body", "body": b"", "more_body": False})
