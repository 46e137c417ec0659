"""One machine's server: an ASGI app under uvicorn, on a socket that is bound before it starts."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import signal
import socket
import sys
from dataclasses import replace
from http import HTTPStatus
from typing import cast
from urllib.parse import unquote

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from websockets.datastructures import Headers
from websockets.http11 import Request
from websockets.server import ServerProtocol

from voxgate.errors import InvalidInput, MethodNotAllowed, UpgradeRequired
from voxgate.hosts.asgi import AsgiApp
from voxgate.hosts.frames import QUIET, Impatient, SocketProtocol, last_response
from voxgate.hosts.http import Response, error_response, request_id
from voxgate.hosts.sockets import Sockets
from voxgate.live import MOST_MESSAGE

_LONGEST_HEAD = 64 * 1024
# Who sends a body in more reads than so many, of fewer bytes than that at the mean, is read again once so many should
# have come, in so many seconds at most, and not at once: a byte costs as much time as all of them, and it is others'.
_CRUMBS, _PIECE, _LEAST_NAP, _NAP = 64, 32 * 1024, 0.001, 0.03
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class _Protocol(Impatient, HttpToolsProtocol):
    """uvicorn's, with a bound on the request's head, with its own refusals in our envelope, and with WebSockets of
    our own: from a handshake that it has parsed itself, whatever came along with it."""

    _in_head = True
    _head = 0  # bytes
    _reads = _read = 0  # of this message, and their bytes
    _begun = 0.0

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._head += len(data)
        self._feed(data)
        if self._in_head and self._head > _LONGEST_HEAD:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The request's headers are too long.")
        self._reads, self._read = self._reads + 1, self._read + len(data)
        if self._reads > _CRUMBS and self._read < _PIECE * self._reads and self._may_read():
            nap = min(_PIECE * (self.loop.time() - self._begun) / self._read, _NAP)
            if nap >= _LEAST_NAP:
                self.transport.pause_reading()
                self.loop.call_later(nap, self._read_on)

    def _may_read(self) -> bool:
        mine = not self.transport.is_closing() and self.transport.get_protocol() is self
        return mine and not self.flow.read_paused

    def _read_on(self) -> None:
        if self._may_read():
            self.transport.resume_reading()

    def on_message_begin(self) -> None:
        self._in_head, self._head = True, 0
        self._reads = self._read = 0
        self._begun = self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > _LONGEST_HEAD:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The request's headers are too long.")
        elif self.parser.should_upgrade():
            self.scope["method"] = self.parser.get_method().decode("ascii")
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.transport.is_closing() and not self.parser.should_upgrade():
            super().on_message_complete()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if not self.transport.is_closing():
                self._upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _upgrade(self, rest: bytes) -> None:
        """`rest` came with the head."""
        tokens = [token.strip() for value in self._values(b"connection") for token in value.lower().split(b",")]
        wanted = [value.lower() for value in self._values(b"upgrade")] == [b"websocket"] and b"upgrade" in tokens
        method = self.scope["method"]
        if method == "CONNECT":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "This is no proxy.")
        elif not wanted or self.parser.get_http_version() != "1.1" or self._sockets is None:
            self._as_if_not_asked(rest)
        elif self._values(b"transfer-encoding") or set(self._values(b"content-length")) - {b"0"}:
            self._refuse(HTTPStatus.BAD_REQUEST, "A request for an upgrade has no body.")
        elif method != "GET":
            path = unquote(httptools.parse_url(self.url).path.decode("ascii"))
            self._send_last(error_response(MethodNotAllowed(method[:20], path[:200], ["GET"])))
        else:
            self._handshake(rest, self._sockets)

    def _as_if_not_asked(self, rest: bytes) -> None:
        """An upgrade that is not known is ignored (RFC 9110, 7.8), and its body is the request's."""
        lines = [b"%b %b HTTP/%b" % (self.scope["method"].encode(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join([*lines, b"", b""]) + rest)

    def _handshake(self, rest: bytes, sockets: Sockets) -> None:
        headers = Headers([(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.headers])
        accepting = ServerProtocol(logger=QUIET).accept(Request("/", headers))
        versions = [version.strip() for version in headers.get_all("sec-websocket-version")]
        if versions != ["13"] and accepting.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
            response = error_response(UpgradeRequired("The WebSocket's version must be 13."))
            response.headers["sec-websocket-version"] = "13"
            self._send_last(response)
        elif accepting.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
            self._refuse(HTTPStatus.BAD_REQUEST, "That is no WebSocket's handshake: a header is missing or odd.")
        else:
            url = httptools.parse_url(self.url)
            path, query = unquote(url.path.decode("ascii")), (url.query or b"").decode("latin-1")
            protocol = SocketProtocol(accepting, rest, most=MOST_MESSAGE, left=self.connections.discard)
            self.connections.discard(self)
            self.connections.add(protocol)  # type: ignore[arg-type] # which wants one with `shutdown`
            self.transport.set_protocol(protocol)
            task = protocol.begin(self.transport, sockets(protocol, path, query, headers))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    @property
    def _sockets(self) -> Sockets | None:
        return cast(AsgiApp, self.config.app).sockets

    def _values(self, name: bytes) -> list[bytes]:
        return [value for each, value in self.headers if each == name]

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._send_last(replace(error_response(InvalidInput(message)), status=status))

    def _send_last(self, response: Response) -> None:
        response.headers["x-request-id"] = request_id()
        self.transport.write(last_response(response))
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
        ws="none",
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
