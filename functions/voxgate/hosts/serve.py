"""One machine's server: an ASGI app under uvicorn, on a socket that is bound before it starts."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import logging
import signal
import socket
import sys
from http import HTTPStatus

import uvicorn
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from voxgate.errors import InvalidInput
from voxgate.hosts import asgi
from voxgate.hosts.asgi import AsgiApp
from voxgate.hosts.http import error_response, request_id
from voxgate.live import MOST_MESSAGE

_LONGEST_HEAD = 64 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class _Impatient(asyncio.Protocol):
    """Ends the connection of who does not read: closed in order, it would wait for ever for that."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _stalled: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        self._stalled = self.loop.call_later(asgi.STALL_SECONDS, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)


class _SocketProtocol(_Impatient, WebSocketsSansIOProtocol):
    """uvicorn's, which leaves it to the application to say farewell to a session that is open."""

    def shutdown(self) -> None:
        if not self.handshake_complete or self.close_sent:
            super().shutdown()

    async def send(self, message: ASGISendEvent) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body":
            self.handshake_complete = True  # or it is taken for one that was never answered


class _Protocol(_Impatient, HttpToolsProtocol):
    """uvicorn's, with a bound on the request's head, and with its own refusals in our envelope."""

    _in_head = True
    _head = 0  # bytes

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._head += len(data)
        if self._in_head and self._head > _LONGEST_HEAD:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The request's headers are too long.")

    def on_message_begin(self) -> None:
        self._in_head, self._head = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        response = error_response(InvalidInput(message))
        headers = response.headers | {
            "x-request-id": request_id(),
            "content-length": str(len(response.body)),
            "connection": "close",
        }
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + response.body)
        self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048, reuse_port=False)


def url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _keep_memory() -> None:
    """Have glibc keep what is freed: uploads come in pieces that it would give back to the system, and
    get from it again page by page, hundreds of times a second (mallopt(3))."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 4 * 1024 * 1024)
        mallopt(_M_TRIM_THRESHOLD, 32 * 1024 * 1024)


class _Server(uvicorn.Server):
    """uvicorn's, which tells the application that its time is over."""

    def __init__(self, config: uvicorn.Config, app: AsgiApp) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.restart(float(self.config.timeout_graceful_shutdown or 0))
        await super().shutdown(sockets)


def run(app: AsgiApp, listening: socket.socket, *, drain_seconds: int) -> None:
    """Serve until a signal says otherwise; a request under way has `drain_seconds` to finish."""
    _keep_memory()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        loop="uvloop",
        lifespan="on",
        ws=_SocketProtocol,
        ws_max_size=MOST_MESSAGE,
        ws_per_message_deflate=False,
        # Who sends nothing is told apart by that; a pong waits where the audio does.
        ws_ping_timeout=None,
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        # Longer than any load balancer keeps a connection: it must not send on one that we are closing.
        timeout_keep_alive=620,
        timeout_graceful_shutdown=drain_seconds,
    )
    _Server(config, app).run(sockets=[listening])


def serve(app: AsgiApp, *, drain_seconds: int) -> None:
    """A container's whole life: `--host` and `--port` on the command line, until it is told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    # uvicorn raises the signal again when it has finished, which would make of an orderly end a failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    run(app, bind(arguments.host, arguments.port), drain_seconds=drain_seconds)
