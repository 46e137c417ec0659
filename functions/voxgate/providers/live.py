"""Live speech at a provider's WebSocket: one client that knows no protocol, around wires that do no I/O."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import httpx
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK, InvalidStatus, WebSocketException

from voxgate import __version__
from voxgate.audio.decode import BYTES_PER_SECOND
from voxgate.errors import FailureClass, Overloaded, ProviderError
from voxgate.model import Heard
from voxgate.providers import Ask
from voxgate.providers.http import MALFORMED, Timeouts, WireRequest, failure_of, json_of, placed, retry_after

_MOST_MESSAGE = 1024 * 1024
_MOST_WAITING = 16  # messages
_PING_SECONDS = 20.0
_DEAD_SECONDS = 60.0  # who has so much to do that it does not read is as good as gone
_QUIET_SECONDS = 4.0  # without audio; Deepgram hangs up after ten
_LOOK_SECONDS = 1.0


class LiveWire(Protocol):
    """One protocol. `commands` are its messages for `finalize`, `keepalive` and `close`. `parse` raises
    `ProviderError`, or what `MALFORMED` lists."""

    commands: Mapping[str, str]

    def build(self, ask: Ask, api_key: str) -> WireRequest: ...

    def parse(self, body: dict[str, Any]) -> Heard | None: ...


class _Connect(connect_):
    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc  # a key goes where the catalogue says, and nowhere else


async def connect(
    wire: LiveWire, request: WireRequest, base_url: str, *, timeouts: Timeouts, tls: ssl.SSLContext | bool
) -> LiveSocket:
    """Raises `ProviderError`, or `Overloaded` where it has no room."""
    url = httpx.URL(base_url.rstrip("/") + "/" + request.path).copy_merge_params(request.query)
    secure = url.scheme == "https"
    try:
        connection = await _Connect(
            str(url.copy_with(scheme="wss" if secure else "ws")),
            additional_headers=request.headers,
            user_agent_header=f"voxgate/{__version__}",
            ssl=tls if secure else None,
            compression=None,
            proxy=None,
            open_timeout=timeouts.connect + min(timeouts.first_byte, timeouts.connect),
            ping_interval=_PING_SECONDS,
            ping_timeout=_DEAD_SECONDS,
            close_timeout=1.0,
            max_size=_MOST_MESSAGE,
            max_queue=_MOST_WAITING,
            logger=_quiet,
        )
    except InvalidStatus as error:
        status, wait = error.response.status_code, retry_after(error.response.headers)
        if status == 503 and wait is not None:
            raise Overloaded("The recognizer has no room for live speech; try again.", retry_after=wait) from error
        failure = failure_of(status)
        if failure is FailureClass.CALLER_FAULT:
            failure = FailureClass.UNSUPPORTED  # it is about what we asked for
        message = f"The provider answered {status} to the upgrade."
        raise ProviderError(failure, message, status=status, retry_after=wait) from error
    except (OSError, TimeoutError, WebSocketException, EOFError) as error:
        raise ProviderError(FailureClass.TRANSIENT, f"The connection failed: {type(error).__name__}.") from error
    return LiveSocket(connection, wire)


_quiet = logging.getLogger("voxgate.providers.live.frames")  # whose debugging shows what is said
_quiet.setLevel(logging.WARNING)


class LiveSocket:
    """Implements `LiveEngine`."""

    def __init__(self, connection: ClientConnection, wire: LiveWire) -> None:
        self._connection = connection
        self._wire = wire
        self._fed = 0  # bytes
        self._sent = time.monotonic()
        self._ending = False
        self._staying = asyncio.create_task(self._stay())

    async def feed(self, pcm: bytes) -> None:
        self._fed += len(pcm)
        await self._send(pcm)

    async def finalize(self) -> None:
        await self._command("finalize")

    async def end(self) -> None:
        self._ending = True
        await self._command("close")

    async def heard(self) -> AsyncIterator[Heard]:
        try:
            async for message in self._connection:
                body = json_of(message if isinstance(message, bytes) else message.encode())
                heard = self._wire.parse(body)
                if heard is not None:
                    yield Heard(placed(heard.segment, self._fed / BYTES_PER_SECOND), heard.final)
        except ConnectionClosed as error:
            raise _lost(error) from error
        except MALFORMED as error:
            raise ProviderError(FailureClass.TRANSIENT, "The provider's message is malformed.") from error
        # The iteration ends in silence with 1000 and with 1001, which is somebody who goes away.
        if not self._ending or self._connection.close_code != 1000:
            raise ProviderError(FailureClass.TRANSIENT, "The provider has hung up.")

    async def aclose(self) -> None:
        self._staying.cancel()
        await self._connection.close()

    async def _stay(self) -> None:
        while not self._ending:
            await asyncio.sleep(_LOOK_SECONDS)
            if time.monotonic() - self._sent >= _QUIET_SECONDS:
                try:
                    await self._command("keepalive")
                except ProviderError:
                    return  # whoever listens knows

    async def _command(self, name: str) -> None:
        await self._send(json.dumps({"type": self._wire.commands[name]}))

    async def _send(self, message: bytes | str) -> None:
        self._sent = time.monotonic()
        try:
            await self._connection.send(message)
        except ConnectionClosedOK:
            if not self._ending:
                raise ProviderError(FailureClass.TRANSIENT, "The provider has hung up.") from None
        except ConnectionClosed as error:
            raise _lost(error) from error


def _lost(error: ConnectionClosed) -> ProviderError:
    code = error.rcvd.code if error.rcvd else 1006
    return ProviderError(FailureClass.TRANSIENT, f"The connection was lost ({code}).", status=None)
