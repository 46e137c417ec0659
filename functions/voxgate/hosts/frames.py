"""WebSockets on a server's connection: RFC 6455's frames are by `websockets`, which does no I/O."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any

from websockets.frames import DATA_OPCODES, CloseCode, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import OPEN, SEND_EOF, Protocol, Side

from voxgate.errors import ClientGone
from voxgate.hosts import http

STALL_SECONDS = 60.0
_PING_SECONDS = 20.0
_LINGER_SECONDS = 10.0
_LINGER_BYTES = 72 * 1024 * 1024
_EARLY_BYTES = 64 * 1024  # that come before the handshake is answered
QUIET = logging.getLogger("voxgate.hosts.frames.quiet")  # at its usual level it tells of each connection
QUIET.setLevel(logging.WARNING)


def last_response(response: http.Response) -> bytes:
    """It on the wire, where the connection ends with it."""
    status = HTTPStatus(response.status)
    headers = response.headers | {"content-length": str(len(response.body)), "connection": "close"}
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + response.body


class Impatient(asyncio.Protocol):
    """Ends the connection of who does not read: closed in order, it would wait for ever for that."""

    transport: asyncio.Transport
    _stalled: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        self._stalled = asyncio.get_running_loop().call_later(STALL_SECONDS, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)


class SocketProtocol(Impatient):
    """One WebSocket, from its handshake on, whose answer `accepting` is where the application accepts. `rest` came
    with the handshake. `left` is called once the connection is no more. Who receives or sends where nobody is left
    gets a `ClientGone`."""

    def __init__(self, accepting: Response, rest: bytes, *, most: int, left: Callable[[SocketProtocol], None]) -> None:
        self._accepting = accepting
        self._early = rest
        self._left = left
        self._frames = Protocol(Side.SERVER, state=OPEN, max_size=most, logger=QUIET)
        self._queue: asyncio.Queue[bytes | str | None] = asyncio.Queue()
        self._parts: list[bytes] = []
        self._kind: Opcode | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._accepted = self._closing = self._lost = self._paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._lingered = 0  # bytes

    def begin(self, transport: asyncio.Transport, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self.transport = transport
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._leave())
        return task

    def shutdown(self) -> None:
        """The server ends: the application says farewell itself."""

    # What comes.

    def data_received(self, data: bytes) -> None:
        if not self._accepted:
            self._early += data
            if len(self._early) > _EARLY_BYTES:
                self._pause()
            return
        if self._closing:  # what is unread when a connection is closed would reset it, and lose what was said
            self._lingered += len(data)
            if self._lingered > _LINGER_BYTES:
                self.transport.abort()
        if self._frames.parser_exc is None:
            self._frames.receive_data(data)
            for event in self._frames.events_received():
                if isinstance(event, Frame):
                    self._frame(event)
            self._flush()
        if self._frames.close_sent is not None:
            self._disconnect()

    def eof_received(self) -> bool:
        self._disconnect()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost = True
        self._writable.set()
        self._disconnect()
        if self._timer is not None:
            self._timer.cancel()
        self._left(self)

    def pause_writing(self) -> None:
        self._writable.clear()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._writable.set()
        super().resume_writing()

    def _frame(self, frame: Frame) -> None:
        if frame.opcode not in (*DATA_OPCODES, Opcode.CONT) or self._closing:
            return
        self._kind = self._kind if frame.opcode is Opcode.CONT else frame.opcode
        self._parts.append(bytes(frame.data))
        if not frame.fin:
            return
        data, self._parts = b"".join(self._parts), []
        if self._kind is Opcode.BINARY:
            self._queue.put_nowait(data)
        else:
            try:
                self._queue.put_nowait(data.decode())
            except UnicodeDecodeError:
                self._frames.fail(CloseCode.INVALID_DATA, "the text is no UTF-8")
                return
        self._pause()

    def _pause(self) -> None:
        """Until the application has taken what there is."""
        if not self._paused and not self._closing:
            self._paused = True
            self.transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and not self._lost:
            self._paused = False
            self.transport.resume_reading()

    # What the application does.

    async def accept(self, headers: Mapping[str, str]) -> None:
        await self._room()
        self._accepting.headers.update(headers)
        self.transport.write(self._accepting.serialize())
        self._accepted = True
        self._timer = asyncio.get_running_loop().call_later(_PING_SECONDS, self._ping)
        early, self._early = self._early, b""
        self._resume()
        if early:
            self.data_received(early)

    async def receive(self) -> bytes | str:
        message = await self._queue.get()
        if self._queue.empty() and self._accepted:
            self._resume()
        if message is None:
            raise ClientGone("The client hung up.")
        return message

    async def send(self, text: bytes) -> None:
        await self._room()
        self._frames.send_text(text)
        self._flush()

    async def close(self, code: int) -> None:
        await self._room()
        self._frames.send_close(code)
        self._flush()
        self._disconnect()

    async def refuse(self, response: http.Response) -> None:
        """In place of `accept`; after it this is nothing more than an end."""
        if self._accepted:
            await self.close(CloseCode.INTERNAL_ERROR)
            return
        await self._room()
        self.transport.write(last_response(response))
        self._disconnect()
        self._half_close()

    async def _room(self) -> None:
        """Until more may be written."""
        await self._writable.wait()
        if self._lost or self._closing:
            raise ClientGone("The client hung up.")

    # Ends.

    def _flush(self) -> None:
        for data in self._frames.data_to_send():
            if data == SEND_EOF:
                self._half_close()  # the client closes; if we did, what it still sends would lose it our last word
            elif not self.transport.is_closing():
                self.transport.write(data)

    def _half_close(self) -> None:
        if not self.transport.is_closing() and self.transport.can_write_eof():
            self.transport.write_eof()

    def _disconnect(self) -> None:
        """Nothing more comes from the client, though it may have more to send."""
        if self._closing:
            return
        self._closing = True
        self._parts = []
        self._queue.put_nowait(None)
        if self._timer is not None:
            self._timer.cancel()
        self._resume()
        if not self._lost:
            self._timer = asyncio.get_running_loop().call_later(_LINGER_SECONDS, self.transport.abort)

    def _leave(self) -> None:
        """The application is done."""
        if not self._closing:
            if self._accepted:
                self._frames.fail(CloseCode.INTERNAL_ERROR)
                self._flush()
            self._disconnect()
            self._half_close()

    def _ping(self) -> None:
        """So that nobody on the way takes the connection for dead."""
        if not self._closing:
            self._frames.send_ping(b"")
            self._flush()
            self._timer = asyncio.get_running_loop().call_later(_PING_SECONDS, self._ping)
