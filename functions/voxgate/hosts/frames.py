"""WebSockets on a server's connection: RFC 6455's frames by `websockets`, which does no I/O, and ASGI's messages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, MutableMapping
from http import HTTPStatus
from typing import Any

from websockets.frames import DATA_OPCODES, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import OPEN, SEND_EOF, Protocol, Side

STALL_SECONDS = 60.0
_PING_SECONDS = 20.0
_LINGER_SECONDS = 10.0
_LINGER_BYTES = 72 * 1024 * 1024
_EARLY_BYTES = 64 * 1024  # that come before the handshake is answered
QUIET = logging.getLogger("voxgate.hosts.frames.quiet")  # at its usual level it tells of each connection
QUIET.setLevel(logging.WARNING)
Message = MutableMapping[str, Any]
App = Callable[..., Coroutine[Any, Any, None]]


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
    with the handshake. `left` is called once the connection is no more."""

    def __init__(self, accepting: Response, rest: bytes, *, most: int, left: Callable[[SocketProtocol], None]) -> None:
        self._accepting = accepting
        self._early = rest
        self._left = left
        self._frames = Protocol(Side.SERVER, state=OPEN, max_size=most, logger=QUIET)
        self._queue: asyncio.Queue[Message] = asyncio.Queue()
        self._parts: list[bytes] = []
        self._kind: Opcode | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._accepted = self._closing = self._lost = self._paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._lingered = 0  # bytes
        self._refusal: tuple[int, list[tuple[bytes, bytes]]] = (500, [])

    def begin(self, transport: asyncio.Transport, app: App, scope: Message) -> asyncio.Task[None]:
        self.transport = transport
        self._queue.put_nowait({"type": "websocket.connect"})
        task = asyncio.create_task(app(scope, self.receive, self.send))
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
            self._queue.put_nowait({"type": "websocket.receive", "bytes": data})
        else:
            try:
                self._queue.put_nowait({"type": "websocket.receive", "text": data.decode()})
            except UnicodeDecodeError:
                self._frames.fail(1007, "the text is no UTF-8")
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

    # What the application sees.

    async def receive(self) -> Message:
        message = await self._queue.get()
        if self._queue.empty() and self._accepted:
            self._resume()
        return message

    async def send(self, message: Message) -> None:
        """Raises `ConnectionError` where nobody is left."""
        await self._writable.wait()
        if self._lost or self._closing:
            raise ConnectionResetError("The client hung up.")
        match message["type"]:
            case "websocket.accept":
                self._accept(message)
            case "websocket.send":
                self._frames.send_text(message["text"].encode())
                self._flush()
            case "websocket.close":
                self._frames.send_close(message["code"])
                self._flush()
                self._disconnect()
            case "websocket.http.response.start":
                self._refusal = (message["status"], message["headers"])
            case "websocket.http.response.body":
                self._refuse(message["body"])

    def _accept(self, message: Message) -> None:
        for name, value in message["headers"]:
            self._accepting.headers[name.decode("latin-1")] = value.decode("latin-1")
        if message["subprotocol"]:
            self._accepting.headers["sec-websocket-protocol"] = message["subprotocol"]
        self.transport.write(self._accepting.serialize())
        self._accepted = True
        self._timer = asyncio.get_running_loop().call_later(_PING_SECONDS, self._ping)
        early, self._early = self._early, b""
        self._resume()
        if early:
            self.data_received(early)

    def _refuse(self, body: bytes) -> None:
        status, headers = self._refusal
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode()
        lines = [*headers, (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        self.transport.write(head + b"".join(b"%b: %b\r\n" % line for line in lines) + b"\r\n" + body)
        self._disconnect()
        self._half_close()

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
        closed = self._frames.close_rcvd
        self._queue.put_nowait({"type": "websocket.disconnect", "code": closed.code if closed else 1006})
        if self._timer is not None:
            self._timer.cancel()
        self._resume()
        if not self._lost:
            self._timer = asyncio.get_running_loop().call_later(_LINGER_SECONDS, self.transport.abort)

    def _leave(self) -> None:
        """The application is done."""
        if not self._closing:
            if self._accepted:
                self._frames.fail(1011)
                self._flush()
            self._disconnect()
            self._half_close()

    def _ping(self) -> None:
        """So that nobody on the way takes the connection for dead."""
        if not self._closing:
            self._frames.send_ping(b"")
            self._flush()
            self._timer = asyncio.get_running_loop().call_later(_PING_SECONDS, self._ping)
