"""Both ends of the live socket: a client that holds all that it reads against `docs/asyncapi.yaml`, and two
recognizers on real sockets, ours and Deepgram's, that hear what the audio itself says.

Speech of `blocks` says its words by the value of its samples, half a second each, so that what was heard twice,
moved or left out can be told from the text and its times.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from jsonschema import Draft7Validator  # type: ignore[import-untyped, unused-ignore]
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Request, Response
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import Server as SocketServer
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol

from conftest import documented
from customers import Customer
from fakes.upstreams import KEY

STREAM = "/v1/stt/stream"
BLOCK = 0.5  # seconds
RATE = 16_000  # samples a second, of two bytes
PATIENCE = 60.0  # seconds; only what hangs takes so long
Message = dict[str, Any]

# --- The client -------------------------------------------------------------------------------------

_DOCUMENT = documented()
_SENT = ("ready", "partial", "final", "done", "error", "fatal")
_SCHEMAS = {
    name: Draft7Validator({"$ref": f"#/components/schemas/{name}", "components": _DOCUMENT["components"]})
    for name in _SENT
}


def blocks(first: int, last: int) -> bytes:
    """The words of these numbers, one after the other, as `pcm_s16le` of 16 kHz."""
    return b"".join(struct.pack("<h", number * 100) * round(RATE * BLOCK) for number in range(first, last + 1))


def catalogue(url: str, kind: str, number: int = 100) -> str:
    """Models `m0`, `m1` and so on at 0.006 dollars a minute, each at a provider of its own, `p0`, `p1` and so on,
    so that what one has of a bad name is not the others'. The last one's key is wrong."""
    lines = []
    for each in range(number):
        lines += [f"[providers.p{each}]", f'kind = "{kind}"', f'base_url = "{url}/p{each}"']
        lines += ['api_key = "env:WRONG_KEY"' if each == number - 1 else 'api_key = "env:UPSTREAM_KEY"']
        offer = f'provider = "p{each}", upstream_model = "up-1", price_per_minute = "0.006"'
        lines += [f"[models.m{each}]", f"deployments = [{{ {offer} }}]"]
    return "\n".join(lines)


def words(first: int, last: int) -> list[str]:
    return [f"word{number}" for number in range(first, last + 1)]


def pieces(audio: bytes, size: int) -> list[bytes]:
    return [audio[at : at + size] for at in range(0, len(audio), size)]


def until(true: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def address(base_url: str, **query: Any) -> str:
    given = {name: value for name, value in query.items() if value is not None}
    return f"ws{base_url.removeprefix('http')}{STREAM}?{urlencode(given, quote_via=quote)}"


@dataclass(frozen=True)
class Refusal:
    """What came in place of the upgrade."""

    status: int
    error: dict[str, Any]
    headers: Headers


def refusal(base_url: str, customer: Customer | None, **how: Any) -> Refusal:
    """The answer to one who must not get in."""
    try:
        with Live(base_url, customer, **how) as live:
            raise AssertionError(live.read())
    except InvalidStatus as refused:
        response = refused.response
    body = json.loads(response.body)
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    return Refusal(response.status_code, body["error"], response.headers)


class Live:
    """One session. What it reads is kept in `messages`, each held against its schema and, unless the recognizer
    `lies`, its times against those before. A context manager. `receive` bounds what the kernel takes of it before
    anybody reads, and then nobody does but by `read`."""

    def __init__(
        self,
        base_url: str,
        customer: Customer | None,
        *,
        headers: dict[str, str] | None = None,
        subprotocols: Iterable[str] = (),
        compression: str | None = None,
        receive: int = 0,
        lies: bool = False,
        model_id: str | None = "whisper-1",
        **query: Any,
    ) -> None:
        self.messages: list[Message] = []
        self.code: int | None = None
        self._lies = lies
        self._stack = contextlib.ExitStack()
        known = customer.headers if customer is not None else {}
        place = urlsplit(base_url)
        wire = socket.socket()
        if receive:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        wire.connect((place.hostname, place.port))
        self.connection: ClientConnection = self._stack.enter_context(
            connect(
                address(base_url, model_id=model_id, **query),
                sock=wire,
                additional_headers=known | (headers or {}),
                subprotocols=[Subprotocol(name) for name in subprotocols] or None,
                compression=compression,
                proxy=None,
                open_timeout=PATIENCE,
                ping_interval=None,
                close_timeout=PATIENCE,
                max_size=None,
                max_queue=1 if receive else None,
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.code is None:
            self.hang_up()
        self._stack.close()

    def send(self, audio: bytes, size: int = 100_000) -> None:
        for piece in pieces(audio, size):
            self.connection.send(piece)

    def tell(self, kind: str) -> None:
        self.connection.send(json.dumps({"type": kind}))

    def hang_up(self, *, reset: bool = False) -> None:
        """Without a word."""
        if reset:
            with contextlib.suppress(OSError):
                self.connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            self.connection.socket.shutdown(socket.SHUT_RDWR)

    def read(self, timeout: float = PATIENCE) -> Message:
        """The next message. Raises `ConnectionClosed` after the last."""
        try:
            text = self.connection.recv(timeout)
        except ConnectionClosed as closed:
            self.code = 1006 if closed.rcvd is None else closed.rcvd.code
            raise
        assert isinstance(text, str)
        message: Message = json.loads(text, parse_constant=_no_number)
        self._check(message)
        self.messages.append(message)
        return message

    def wait(self, kind: str) -> Message:
        """The next message of that kind."""
        while (message := self.read())["type"] != kind:
            pass
        return message

    def listen(self) -> Message:
        """The next word of what was heard."""
        while (message := self.read())["type"] not in ("partial", "final"):
            pass
        return message

    def rest(self) -> Message:
        """The last message, after which the server closed."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                self.read()
        return self.messages[-1]

    def close(self) -> Message:
        """End in order: what is said at the end."""
        self.tell("close")
        done = self.rest()
        assert (done["type"], self.code) == ("done", 1000), (done, self.code)
        return done

    def of(self, kind: str) -> list[Message]:
        return [message for message in self.messages if message["type"] == kind]

    @property
    def finals(self) -> list[str]:
        return [message["text"] for message in self.of("final")]

    def _check(self, message: Message) -> None:
        kind = "fatal" if message.get("fatal") is True else message["type"]
        assert kind in _SENT, message
        assert [error.message for error in _SCHEMAS[kind].iter_errors(message)] == [], message
        assert message["sequence"] == len(self.messages)
        assert (kind == "ready") == (not self.messages)
        assert not any(before["type"] == "done" or before.get("fatal") for before in self.messages)
        if kind in ("partial", "final") and not self._lies:
            self._check_times(message)
        if kind == "done":
            assert message["text"].split() == " ".join(self.finals).split()
        if kind in ("done", "fatal"):
            ends = [heard["end"] for heard in self.of("final")]
            assert max(ends, default=0.0) <= message["duration"] + 0.001
            assert message["usage"]["seconds"] <= message["duration"] + 0.1001

    def _check_times(self, message: Message) -> None:
        said = max((final["end"] for final in self.of("final")), default=0.0)
        assert said <= message["start"] <= message["end"], (said, message)
        at = message["start"]
        for word in message.get("words") or ():
            assert at <= word["start"] <= word["end"] <= message["end"], message
            at = word["start"]


def _no_number(text: str) -> float:
    raise AssertionError(text)


# --- What both recognizers do -----------------------------------------------------------------------


@dataclass
class Heard:
    """One connection as the recognizer has it: what it was asked, what came, and how far it has told of it."""

    connection: ServerConnection
    query: dict[str, str]
    audio: bytearray = field(default_factory=bytearray)
    texts: list[Message] = field(default_factory=list)
    told: int = 0  # bytes
    finals: list[str] = field(default_factory=list)
    sequence: Iterator[int] = field(default_factory=itertools.count)
    patience: float = 9.0  # seconds; a little less than Deepgram's ten, for what takes its time on the way
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def seconds(self) -> float:
        return len(self.audio) / (2 * RATE)

    def total(self) -> float:
        """The seconds of audio that had come when the connection ended."""
        assert self.over.wait(PATIENCE)
        return self.seconds

    @property
    def headers(self) -> Headers:
        assert self.connection.request is not None
        return self.connection.request.headers

    def asked(self, kind: str) -> int:
        return sum(text.get("type") == kind for text in self.texts)

    def send(self, message: Message | str | bytes) -> None:
        with contextlib.suppress(ConnectionClosed):  # what came before that is still to be read
            self.connection.send(message if isinstance(message, str | bytes) else json.dumps(message))

    def drop(self) -> None:
        """Break the connection without a word."""
        with contextlib.suppress(OSError):
            self.connection.socket.shutdown(socket.SHUT_RDWR)


class Recognizer:
    """`script` is asked about each message before the recognizer does anything with it: what it answers True to is
    left alone. With `refuses` there is that status in place of an upgrade, while `deaf` nothing is read, and a
    `silent` one says nothing. A context manager."""

    def __init__(self) -> None:
        self.sessions: list[Heard] = []
        self.script: Callable[[Heard, str | bytes], object] | None = None
        self.refuses: int | None = None
        self.silent = False
        self._ears = threading.Event()
        self._ears.set()
        self._server: SocketServer = serve(
            self._handle,
            "127.0.0.1",
            0,
            process_request=self._requested,
            compression=None,
            ping_interval=None,
            open_timeout=PATIENCE,
            close_timeout=1,
            max_size=None,
            max_queue=4,
        )
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.url = f"http://127.0.0.1:{self._server.socket.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hear()
        for session in self.sessions:
            session.drop()
        self._server.shutdown()
        self._thread.join()

    def forget(self) -> None:
        """Behave again, and know of nothing."""
        self.sessions.clear()
        self.script, self.refuses, self.silent = None, None, False
        self.hear()

    def deafen(self) -> None:
        self._ears.clear()

    def hear(self) -> None:
        self._ears.set()

    def session(self, number: int = 0) -> Heard:
        """The connection of that number, as soon as there is one."""
        until(lambda: len(self.sessions) > number)
        return self.sessions[number]

    # What each kind does in its own words.

    def greet(self, heard: Heard) -> None: ...

    def tell(self, heard: Heard, text: str, start: float, end: float) -> None: ...

    def take(self, heard: Heard, message: Message) -> None: ...

    def answer(self, status: int) -> Message:
        raise NotImplementedError

    def refuse(self, request: Request) -> int | None:
        """The status in place of an upgrade."""
        return self.refuses

    def say(self, heard: Heard, *, rest: bool = False) -> None:
        """Tell the words that are whole, and with `rest` the last one as far as it came."""
        block = round(2 * RATE * BLOCK)
        while len(heard.audio) - heard.told >= (2 if rest else block):
            end = min(len(heard.audio), heard.told + block)
            middle = (heard.told + end) // 4 * 2
            number = round(struct.unpack_from("<h", heard.audio, middle)[0] / 100)
            start, heard.told = heard.told, end
            self.tell(heard, f"word{number}" if number else "", start / (2 * RATE), end / (2 * RATE))

    def _requested(self, connection: ServerConnection, request: Request) -> Response | None:
        status = self.refuse(request)
        if status is None:
            return None
        response = connection.respond(status, json.dumps(self.answer(status)))  # type: ignore[arg-type, unused-ignore]
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        if status in (429, 503):
            response.headers["Retry-After"] = "7"
        return response

    def _handle(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        heard = Heard(connection, dict(parse_qsl(urlsplit(connection.request.path).query, keep_blank_values=True)))
        self.sessions.append(heard)
        try:
            self._listen(heard)
        except ConnectionClosed:
            heard.over.set()

    def _listen(self, heard: Heard) -> None:
        self.greet(heard)
        while True:
            assert self._ears.wait(PATIENCE)
            try:
                self._hear(heard, heard.connection.recv(heard.patience))
            except TimeoutError:
                self.bored(heard)

    def _hear(self, heard: Heard, message: str | bytes) -> None:
        if isinstance(message, bytes):
            heard.audio += message
        else:
            heard.texts.append(json.loads(message))
        if self.silent or (self.script is not None and self.script(heard, message)):
            return
        if isinstance(message, bytes):
            self.say(heard)
        else:
            self.take(heard, heard.texts[-1])

    def bored(self, heard: Heard) -> None:
        """Nothing came for as long as its patience is."""


# --- Ours -------------------------------------------------------------------------------------------


class LiveInference(Recognizer):
    """What `voxgate inference` speaks. Each word is an utterance, with one partial before its final."""

    def greet(self, heard: Heard) -> None:
        given = heard.query
        self._send(
            heard,
            "ready",
            session_id="req_fake",
            model=given["model_id"],
            provider="embedded",
            language="en",
            encoding=given.get("encoding", "pcm_s16le"),
            sample_rate=int(given.get("sample_rate", "16000")),
            channels=int(given.get("channels", "1")),
            interim_results=given.get("interim_results", "true") == "true",
            ignored=[],
        )

    def tell(self, heard: Heard, text: str, start: float, end: float) -> None:
        if not text:
            return
        if heard.query.get("interim_results", "true") == "true":
            self._send(heard, "partial", text=text[:4], start=start, end=(start + end) / 2)
        heard.finals.append(text)
        word = {"word": text, "start": start, "end": end, "confidence": 0.5}
        self._send(heard, "final", text=text, start=start, end=end, words=[word], confidence=0.5)

    def take(self, heard: Heard, message: Message) -> None:
        if message["type"] in ("finalize", "close"):
            self.say(heard, rest=True)
        if message["type"] == "close":
            self.end(heard, 1000)

    def end(self, heard: Heard, code: int) -> None:
        usage = {"type": "duration", "seconds": heard.seconds}
        self._send(heard, "done", text=" ".join(heard.finals), duration=heard.seconds, usage=usage, cost="0.00")
        heard.connection.close(code)

    def answer(self, status: int) -> Message:
        code = {429: "rate_limited", 503: "overloaded"}.get(status, "internal_error")
        error = {"message": "private words", "type": "server_error", "param": None, "code": code}
        return {"error": error}

    def _send(self, heard: Heard, kind: str, **fields: Any) -> None:
        heard.send({"type": kind, "sequence": next(heard.sequence), **fields})


# --- Deepgram's -------------------------------------------------------------------------------------


class LiveDeepgram(Recognizer):
    """https://developers.deepgram.com/reference/speech-to-text/listen-streaming: each word is an utterance, of an
    interim result and a last one; silence is a result without text. It closes after ten seconds without audio and
    without a `KeepAlive`, as https://developers.deepgram.com/docs/audio-keep-alive says."""

    def refuse(self, request: Request) -> int | None:
        if self.refuses is not None:
            return self.refuses
        if request.headers.get("authorization") != f"Token {KEY}":
            return 401
        query = dict(parse_qsl(urlsplit(request.path).query))
        given = (query.get("encoding"), query.get("sample_rate"), query.get("channels", "1"))
        known = urlsplit(request.path).path.endswith("/v1/listen") and given == ("linear16", str(RATE), "1")
        return None if known and query.get("model") else 400

    def answer(self, status: int) -> Message:
        known = {401: ("INVALID_AUTH", "Invalid credentials."), 429: ("TOO_MANY_REQUESTS", "Too many requests.")}
        code, message = known.get(status, ("Bad Request", "private words"))
        return {"err_code": code, "err_msg": message, "request_id": "2479c8c8"}

    def tell(self, heard: Heard, text: str, start: float, end: float) -> None:
        if text and heard.query.get("interim_results") == "true":
            heard.send({"type": "SpeechStarted", "channel": [0, 1], "timestamp": start})
            heard.send(self.result(text[:4], start, (start + end) / 2, last=False))
        heard.send(self.result(text, start, end))

    def result(self, text: str, start: float, end: float, *, last: bool = True, over: bool = True) -> Message:
        spoken: list[Message] = [
            {"word": each, "start": start, "end": end, "confidence": 0.75, "punctuated_word": each.capitalize()}
            for each in text.split()
        ]
        said = " ".join(word["punctuated_word"] for word in spoken)
        return {
            "type": "Results",
            "channel_index": [0, 1],
            "duration": end - start,
            "start": start,
            "is_final": last,
            "speech_final": last and over,
            "channel": {"alternatives": [{"transcript": said, "confidence": 0.75 if text else 0.0, "words": spoken}]},
            "metadata": {"request_id": "2479c8c8", "model_uuid": "30089e05"},
            "from_finalize": False,
        }

    def take(self, heard: Heard, message: Message) -> None:
        if message["type"] == "Finalize":
            at = len(heard.audio) / (2 * RATE)
            self.say(heard, rest=True)
            heard.send(self.result("", at, at) | {"from_finalize": True})
        elif message["type"] == "CloseStream":
            self.say(heard, rest=True)
            self.end(heard)

    def end(self, heard: Heard) -> None:
        about = {"request_id": "2479c8c8", "sha256": "154e", "created": "2026-02-06T19:56:16.180Z", "channels": 1}
        heard.send({"type": "Metadata", "transaction_key": "deprecated", "duration": heard.seconds, **about})
        heard.connection.close(1000)

    def bored(self, heard: Heard) -> None:
        heard.connection.close(1011, "NET-0001")
