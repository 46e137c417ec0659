"""The live socket: what a session is told by its handshake, and how it ends."""

from __future__ import annotations

import contextlib
import logging
import time
from asyncio import Event
from typing import Any
from urllib.parse import parse_qsl

from websockets.datastructures import Headers

from voxgate.accounts import keys
from voxgate.dialects import live as dialect
from voxgate.errors import ClientGone, NotFound, Unauthenticated, VoxgateError
from voxgate.formats import json_body
from voxgate.hosts.frames import SocketProtocol
from voxgate.hosts.http import count, error_response, request_id
from voxgate.live import INTERNAL_ERROR, Live, Socket
from voxgate.metrics import Metrics

logger = logging.getLogger("voxgate")

_SUBPROTOCOL = "voxgate.key"  # after which a browser's key or token comes


class Sockets:
    def __init__(self, live: Live, metrics: Metrics) -> None:
        self._live = live
        self._metrics = metrics
        self.restart = Event()

    async def __call__(self, connection: SocketProtocol, path: str, query: str, headers: Headers) -> None:
        """One session; `path` is decoded, `query` is not."""
        told = {"x-request-id": request_id()}
        begun, code, closed = time.perf_counter(), "", INTERNAL_ERROR
        try:
            closed = await self._serve(connection, path, query, headers, told)
        except VoxgateError as error:
            code = error.code
            await _refuse(connection, error, told)
        except Exception:  # the entry point: the client gets the envelope, the log the traceback
            logger.exception("session %s failed", told["x-request-id"])
            code = VoxgateError.code
            await _refuse(connection, VoxgateError(f"Something went wrong here; quote {told['x-request-id']}."), told)
        seconds = time.perf_counter() - begun
        count(self._metrics, dialect.NAME, code, seconds)
        logger.info("%s %s after %.1f s %s", dialect.PATH, code or closed, seconds, told["x-request-id"])

    async def _serve(
        self, connection: SocketProtocol, path: str, query: str, headers: Headers, told: dict[str, str]
    ) -> int:
        if path != dialect.PATH:
            raise NotFound(f"There is no socket at {path[:200]}.")
        presented, asked, chosen = _presented(headers, query)

        async def send(body: dict[str, Any]) -> None:
            await connection.send(json_body(body).content)

        async with self._live.session(told["x-request-id"], presented, asked, told) as session:
            await connection.accept(told | chosen)
            code = await session.run(Socket(connection.receive, send), self.restart)
            with contextlib.suppress(ClientGone):
                await connection.close(code)
        return code


async def _refuse(connection: SocketProtocol, error: VoxgateError, told: dict[str, str]) -> None:
    response = error_response(error)
    response.headers.update(told)
    with contextlib.suppress(ClientGone):
        await connection.refuse(response)


def _presented(headers: Headers, query: str) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """The headers, with the key or token among them that came in another way; the query; and the header that
    names the subprotocol, if one was chosen."""
    presented = dict(headers.raw_items())
    presented.pop("idempotency-key", None)  # no session is had again
    asked = dict(parse_qsl(query, keep_blank_values=True))
    token, chosen = asked.pop("token", ""), {}
    if token.startswith(keys.KEY):
        raise Unauthenticated("An API key in an address ends up in logs: send a token in its place.")
    offered = [each.strip() for each in ",".join(headers.get_all("sec-websocket-protocol")).split(",")]
    if _SUBPROTOCOL in offered:
        token = next((each for each in offered if each not in (_SUBPROTOCOL, "")), "")
        chosen = {"sec-websocket-protocol": _SUBPROTOCOL}
    if token and "authorization" not in presented:
        presented["authorization"] = f"Bearer {token}"
    return presented, asked, chosen
