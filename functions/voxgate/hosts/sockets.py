"""The live socket as ASGI has WebSockets.

https://asgi.readthedocs.io/en/latest/specs/www.html#websocket
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qsl

from voxgate.accounts import keys
from voxgate.dialects import live as dialect
from voxgate.errors import ClientGone, NotFound, Unauthenticated, VoxgateError
from voxgate.formats import json_body
from voxgate.hosts.http import count, encoded, error_response, request_id
from voxgate.live import INTERNAL_ERROR, Live, Socket
from voxgate.metrics import Metrics

logger = logging.getLogger("voxgate")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_SUBPROTOCOL = "voxgate.key"  # after which a browser's key or token comes


class Sockets:
    def __init__(self, live: Live, metrics: Metrics) -> None:
        self._live = live
        self._metrics = metrics
        self.restart = asyncio.Event()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await receive()  # that somebody wants to connect
        connection = _Connection(scope, receive, send)
        begun, code, closed = time.perf_counter(), "", INTERNAL_ERROR
        try:
            closed = await self._serve(connection)
        except VoxgateError as error:
            code = error.code
            await connection.refuse(error)
        except Exception:  # the entry point: the client gets the envelope, the log the traceback
            logger.exception("session %s failed", connection.id)
            code = VoxgateError.code
            await connection.refuse(VoxgateError(f"Something went wrong here; quote {connection.id}."))
        seconds = time.perf_counter() - begun
        count(self._metrics, dialect.NAME, code, seconds)
        logger.info("%s %s after %.1f s %s", dialect.PATH, code or closed, seconds, connection.id)

    async def _serve(self, connection: _Connection) -> int:
        if connection.path != dialect.PATH:
            raise NotFound(f"There is no socket at {connection.path[:200]}.")
        headers, query = connection.presented()
        async with self._live.session(connection.id, headers, query, connection.told) as session:
            await connection.accept()
            code = await session.run(Socket(connection.receive, connection.send), self.restart)
            await connection.close(code)
        return code


class _Connection:
    """One client's. Where it is gone, `receive` and `send` raise `ClientGone`."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.id = request_id()
        self.path: str = scope["path"]
        self.told: dict[str, str] = {}
        self._scope = scope
        self._receive = receive
        self._send = send
        self._accepted = False

    def presented(self) -> tuple[dict[str, str], dict[str, str]]:
        """The headers, with the key or token among them that came in another way, and the query."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self._scope["headers"]}
        headers.pop("idempotency-key", None)  # no session is had again
        query = dict(parse_qsl(self._scope["query_string"].decode("latin-1"), keep_blank_values=True))
        token, offered = query.pop("token", ""), self._scope["subprotocols"]
        if token.startswith(keys.KEY):
            raise Unauthenticated("An API key in an address ends up in logs: send a token in its place.")
        if _SUBPROTOCOL in offered:
            token = next((each for each in offered if each != _SUBPROTOCOL), "")
        if token and "authorization" not in headers:
            headers["authorization"] = f"Bearer {token}"
        return headers, query

    async def accept(self) -> None:
        chosen = _SUBPROTOCOL if _SUBPROTOCOL in self._scope["subprotocols"] else None
        self._accepted = True
        await self._to({"type": "websocket.accept", "subprotocol": chosen, "headers": encoded(self._headers())})

    async def receive(self) -> bytes | str:
        message = await self._receive()
        if message["type"] == "websocket.disconnect":
            raise ClientGone("The client hung up.")
        text: str | None = message.get("text")
        return bytes(message["bytes"]) if text is None else text

    async def send(self, body: dict[str, Any]) -> None:
        text = json_body(body).content.decode()
        await self._to({"type": "websocket.send", "text": text})

    async def close(self, code: int) -> None:
        with contextlib.suppress(ClientGone):
            await self._to({"type": "websocket.close", "code": code})

    async def refuse(self, error: VoxgateError) -> None:
        """Before the upgrade as a response (the extension `websocket.http.response`), and after it as nothing
        more than an end."""
        if self._accepted:
            await self.close(INTERNAL_ERROR)
            return
        response = error_response(error)
        headers = encoded(response.headers | self._headers())
        with contextlib.suppress(ClientGone):
            await self._to({"type": "websocket.http.response.start", "status": response.status, "headers": headers})
            await self._to({"type": "websocket.http.response.body", "body": response.body})

    def _headers(self) -> dict[str, str]:
        return self.told | {"x-request-id": self.id}

    async def _to(self, message: MutableMapping[str, Any]) -> None:
        try:
            await self._send(message)
        except OSError as error:
            raise ClientGone("The client hung up.") from error
