"""The live socket byte by byte: the handshakes, frames and closes of RFC 6455, and the ways in which a client ends."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from conftest import Server, start_server, stop_server
from customers import Customer, Office
from voxgate.accounts import RateLimits

PATH = "/v1/stt/stream"
TARGET = f"{PATH}?model_id=whisper-1"
NONCE, ACCEPT = "dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455, 1.3
CONT, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
LIMIT = 524_288
CREDIT = 1_000_000
PATIENCE = 90.0  # seconds that a busy machine may take for anything
KEEPALIVE = b'{"type": "keepalive"}'  # is answered with nothing
NONSENSE = b"hello"  # is answered with an error that is not fatal
END = b'{"type": "close"}'  # is answered with `done` and a close frame
MASK = bytes.fromhex("37fa213d")


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    reserved: int = 0,
    masked: bool = True,
    length: int | None = None,
    width: int | None = None,
) -> bytes:
    """A client's frame (RFC 6455, 5.2). `length` is what it claims in place of the payload's own, `width` the bytes
    that say so where it is not the fewest."""
    length = len(payload) if length is None else length
    if width is None:
        width = 0 if length < 126 else 2 if length < 2**16 else 8
    marked = {0: length, 2: 126, 8: 127}[width]
    head = bytes([fin << 7 | reserved << 4 | opcode, masked << 7 | marked]) + length.to_bytes(width or 1)[: width or 0]
    if not masked:
        return head + payload
    key = (MASK * (len(payload) // 4 + 1))[: len(payload)]
    return head + MASK + (int.from_bytes(payload) ^ int.from_bytes(key)).to_bytes(len(payload))


def close(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, code.to_bytes(2) + reason)


def handshake(
    customer: Customer,
    *more: str,
    changed: Mapping[str, str | None] | None = None,
    method: str = "GET",
    target: str = TARGET,
    version: str = "HTTP/1.1",
) -> bytes:
    """A request to upgrade, with `more` lines; `changed` replaces fields, and takes away those that are None."""
    fields: dict[str, str | None] = {
        "Host": "voxgate",
        "Authorization": f"Bearer {customer.key}",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": NONCE,
        "Sec-WebSocket-Version": "13",
    }
    said = [f"{name}: {value}" for name, value in (fields | dict(changed or {})).items() if value is not None]
    return "\r\n".join([f"{method} {target} {version}", *said, *more, "", ""]).encode()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """What a refusal says, in the envelope of all routes."""
        assert self.headers["content-type"] == "application/json"
        assert self.headers["x-request-id"].startswith("req_")
        assert int(self.headers["content-length"]) == len(self.body) > 0
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        return error


class Wire:
    """A client's end of a connection, which takes nothing but what RFC 6455 lets a server send."""

    def __init__(self, server: Server) -> None:
        address = urlsplit(server.url)
        self.socket = socket.create_connection((address.hostname or "", address.port or 0), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.session = ""
        self._received = b""
        self._events = 0

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *content: bytes) -> None:
        with contextlib.suppress(OSError):  # it was refused, and the answer says so
            self.socket.sendall(b"".join(content))

    def drip(self, content: bytes) -> None:
        for byte in content:
            self.send(bytes([byte]))
            time.sleep(0.0005)

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def answer(self) -> Answer:
        while b"\r\n\r\n" not in self._received:
            assert self._receive(), self._received
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        version, status = first.split()[:2]
        assert version == "HTTP/1.1"
        body = b"" if status == "101" else self._exactly(int(headers["content-length"]))
        return Answer(int(status), headers, body)

    def ready(self) -> None:
        event = self.event()
        assert event["type"] == "ready"
        self.session = event["session_id"]

    def frame(self) -> tuple[int, bytes]:
        """The next one that is no ping."""
        first, length = self._exactly(2)
        opcode = first & 0x0F
        assert first & 0xF0 == 0x80, "reserved bits, or a message in pieces, for which there is no reason"
        assert length < 128, "a server does not mask"
        assert opcode in (TEXT, CLOSE, PING, PONG)
        assert opcode == TEXT or length < 126
        if length == 126:
            length = int.from_bytes(self._exactly(2))
            assert length > 125
        elif length == 127:
            length = int.from_bytes(self._exactly(8))
            assert length > 0xFFFF
        payload = self._exactly(length)
        if opcode == PING:
            self.send(frame(PONG, payload))
            return self.frame()
        return opcode, payload

    def event(self) -> dict[str, Any]:
        opcode, payload = self.frame()
        assert opcode == TEXT, (opcode, payload)
        event: dict[str, Any] = json.loads(payload.decode("utf-8", "strict"))
        assert event["sequence"] == self._events
        self._events += 1
        return event

    def complaint(self) -> None:
        """An error that the session survives is next."""
        event = self.event()
        assert (event["type"], event["fatal"], event["error"]["code"]) == ("error", False, "invalid_input")

    def closed(self) -> int | None:
        """The code of the close frame that is next, and the last thing that comes."""
        opcode, payload = self.frame()
        assert opcode == CLOSE, (opcode, payload)
        assert len(payload) != 1
        payload[2:].decode("utf-8", "strict")
        self.send(frame(CLOSE, payload[:2]))
        assert self.ended()
        return int.from_bytes(payload[:2]) if payload else None

    def done(self) -> None:
        """Ask for the end, and get it in order."""
        self.send(frame(TEXT, END))
        self.ending()

    def ending(self) -> None:
        assert self.event()["type"] == "done"
        assert self.closed() == 1000

    def ended(self) -> bool:
        """Whether nothing more comes, once the server has closed."""
        self._receive()
        return not self._received

    def _exactly(self, size: int) -> bytes:
        while len(self._received) < size:
            assert self._receive(), f"the connection ended after {self._received!r}"
        content, self._received = self._received[:size], self._received[size:]
        return content

    def _receive(self) -> bool:
        try:
            content = self.socket.recv(65536)
        except ConnectionError:  # closed, with something of ours unread
            return False
        self._received += content
        return bool(content)


@dataclass(frozen=True)
class Place:
    server: Server
    office: Office

    def wire(self) -> Wire:
        return Wire(self.server)

    def connect(self, customer: Customer, *more: str, **request: Any) -> tuple[Wire, Answer]:
        """A session; where its customer or the recognizer is still busy with the one before, as soon as it can be."""
        deadline = time.monotonic() + PATIENCE
        while True:
            wire = self.wire()
            wire.send(handshake(customer, *more, **request))
            answer = wire.answer()
            if answer.status == 101:
                wire.ready()
                return wire, answer
            wire.socket.close()
            assert answer.status in (429, 503), answer
            assert time.monotonic() < deadline, answer
            time.sleep(0.1)

    def open(self, customer: Customer) -> Wire:
        return self.connect(customer)[0]

    def ask(self, *content: bytes) -> Answer:
        """The answer to what is no session, after which the connection closes."""
        with self.wire() as wire:
            wire.send(*content)
            answer = wire.answer()
            assert answer.status != 101
            assert wire.ended()
            return answer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    process, server = start_server(tmp_path_factory.mktemp("rfc6455"))
    yield Place(server, Office(server.data_dir))
    stop_server(process)


@pytest.fixture
def customer(place: Place) -> Customer:
    """Who may have one session at a time."""
    return place.office.open(credit=CREDIT, limits=RateLimits(concurrent_requests=1))


@pytest.fixture(autouse=True)
def as_it_was(place: Place, customer: Customer) -> Iterator[None]:
    """After each test the server answers, has nobody's credit, and was surprised by nothing."""
    log = Path(place.server.data_dir / "log")
    before = log.stat().st_size
    yield
    assert httpx.get(f"{place.server.url}/health", timeout=PATIENCE).status_code == 200
    deadline = time.monotonic() + PATIENCE
    while place.office.money(customer.account) != (CREDIT, 0):
        assert time.monotonic() < deadline, place.office.money(customer.account)
        time.sleep(0.05)
    with log.open(encoding="utf-8") as lines:
        lines.seek(before)
        said = lines.read()
    assert "Traceback" not in said, said
    assert "ERROR" not in said, said
    assert customer.key not in said


def test_byte_by_byte(place: Place, customer: Customer) -> None:
    with place.wire() as wire:
        wire.drip(handshake(customer))
        assert wire.answer().status == 101
        wire.ready()
        wire.drip(frame(PING, b"still there?"))
        assert wire.frame() == (PONG, b"still there?")
        wire.drip(frame(TEXT, NONSENSE * 40))
        wire.complaint()
        wire.drip(frame(TEXT, END))
        wire.ending()


# --- Handshakes -------------------------------------------------------------------------------------

TAKEN: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "plain": ({}, []),
    "as Firefox says it": ({"Connection": "keep-alive, Upgrade"}, ["Origin: null", "Pragma: no-cache"]),
    "two Connection lines": ({"Connection": "keep-alive"}, ["Connection: Upgrade"]),
    "two Connection lines, turned round": ({}, ["Connection: keep-alive"]),
    "other cases": ({"Connection": "upgrade", "Upgrade": "WebSocket"}, []),
    "permessage-deflate": ({}, ["Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"]),
    "an unknown extension": ({}, ["Sec-WebSocket-Extensions: foo; bar=1, permessage-deflate"]),
    "an unknown subprotocol": ({}, ["Sec-WebSocket-Protocol: chat, superchat"]),
    "many headers": ({}, [f"X-Header-{number}: value" for number in range(100)]),
    "a cookie": ({}, ["Cookie: " + "a" * 6000]),
}


@pytest.mark.parametrize(("changed", "more"), list(TAKEN.values()), ids=list(TAKEN))
def test_a_handshake_is_answered_with_its_key_and_with_nothing_that_was_not_agreed(
    place: Place, customer: Customer, changed: dict[str, str | None], more: list[str]
) -> None:
    wire, answer = place.connect(customer, *more, changed=changed)
    with wire:
        assert answer.headers["sec-websocket-accept"] == ACCEPT
        assert answer.headers["upgrade"].lower() == "websocket"
        assert answer.headers["connection"].lower() == "upgrade"
        assert not answer.headers.keys() & {"sec-websocket-extensions", "sec-websocket-protocol", "content-length"}
        assert answer.headers["x-request-id"] == wire.session
        wire.done()


KEY_LINES = {
    "in one line": ["voxgate.key, {key}"],
    "in one line without a blank": ["voxgate.key,{key}"],
    "in two lines": ["voxgate.key", "{key}"],
}


@pytest.mark.parametrize("lines", list(KEY_LINES.values()), ids=list(KEY_LINES))
def test_a_key_comes_as_a_subprotocol_and_is_not_sent_back(place: Place, customer: Customer, lines: list[str]) -> None:
    said = [f"Sec-WebSocket-Protocol: {line.format(key=customer.key)}" for line in lines]
    wire, answer = place.connect(customer, *said, changed={"Authorization": None})
    with wire:
        assert answer.headers["sec-websocket-protocol"] == "voxgate.key"
        wire.done()


def test_a_connection_may_have_served_other_requests_before(place: Place, customer: Customer) -> None:
    with place.wire() as wire:
        for _ in range(2):
            wire.send(b"GET /health HTTP/1.1\r\nHost: voxgate\r\n\r\n")
            assert wire.answer().status == 200
        wire.send(handshake(customer))
        assert wire.answer().status == 101
        wire.ready()
        wire.done()


def test_a_token_in_the_query_is_in_no_log(place: Place, customer: Customer) -> None:
    response = httpx.post(f"{place.server.url}/v1/stt/tokens", headers=customer.headers, timeout=PATIENCE)
    token = response.json()["token"]
    wire, _ = place.connect(customer, target=f"{TARGET}&token={token}", changed={"Authorization": None})
    with wire:
        wire.done()
    assert token not in (place.server.data_dir / "log").read_text(encoding="utf-8")


def test_a_target_may_be_a_whole_address(place: Place, customer: Customer) -> None:
    """RFC 6455, 4.2.1; RFC 9112, 3.2.2: a server MUST accept it."""
    place.connect(customer, target=f"http://voxgate{TARGET}")[0].__exit__()


REFUSED: dict[str, tuple[dict[str, Any], set[int]]] = {
    "no Sec-WebSocket-Key": ({"changed": {"Sec-WebSocket-Key": None}}, {400}),
    "an empty Sec-WebSocket-Key": ({"changed": {"Sec-WebSocket-Key": ""}}, {400}),
    "a key of 15 bytes": ({"changed": {"Sec-WebSocket-Key": "MDEyMzQ1Njc4OTAxMjM0"}}, {400}),
    "a key that is no base64": ({"changed": {"Sec-WebSocket-Key": "not base64 at all!!!"}}, {400}),
    "a key that is no ASCII": ({"changed": {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jé=="}}, {400}),
    "no version": ({"changed": {"Sec-WebSocket-Version": None}}, {400, 426}),
    "version 12": ({"changed": {"Sec-WebSocket-Version": "12"}}, {426}),
    "version 0": ({"changed": {"Sec-WebSocket-Version": "0"}}, {426}),
    "a version that is no number": ({"changed": {"Sec-WebSocket-Version": "thirteen"}}, {400, 426}),
    "POST": ({"method": "POST"}, {405}),
    "another path": ({"target": "/v1/stt/nothing?model_id=whisper-1"}, {404}),
    "another path, which is none": ({"target": "/%00%ff?model_id=whisper-1"}, {404}),
    "no credential": ({"changed": {"Authorization": None}}, {401}),
    "an unknown key": ({"changed": {"Authorization": "Bearer vg_wrong"}}, {401}),
    "no model": ({"target": PATH}, {400}),
    "an unknown model": ({"target": f"{PATH}?model_id=whisper-9000"}, {404}),
    "a bad parameter": ({"target": f"{TARGET}&sample_rate=1"}, {400}),
    "the token of nobody": ({"target": f"{TARGET}&token=vt_wrong", "changed": {"Authorization": None}}, {401}),
}


@pytest.mark.parametrize(("request_", "statuses"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_is_refused_is_told_in_the_envelope_and_the_connection_closes(
    place: Place, customer: Customer, request_: dict[str, Any], statuses: set[int]
) -> None:
    answer = place.ask(handshake(customer, **request_))
    assert answer.status in statuses
    assert answer.error["code"]
    assert answer.headers["connection"].lower() == "close"
    if answer.status == 426:
        assert answer.headers["sec-websocket-version"] == "13"
        assert (answer.headers["upgrade"], answer.error["code"]) == ("websocket", "upgrade_required")
    if answer.status == 405:
        assert (answer.headers["allow"], answer.error["code"]) == ("GET", "method_not_allowed")


def test_two_keys_are_refused(place: Place, customer: Customer) -> None:
    answer = place.ask(handshake(customer, f"Sec-WebSocket-Key: {NONCE}"))
    assert (answer.status, answer.error["code"]) == (400, "invalid_input")


NO_UPGRADE: dict[str, dict[str, Any]] = {
    "no Connection": {"changed": {"Connection": None}},
    "Connection is something else": {"changed": {"Connection": "keep-alive"}},
    "no Upgrade": {"changed": {"Upgrade": None}},
    "Upgrade is something else": {"changed": {"Upgrade": "h2c"}},
    "HTTP/1.0, which has no upgrades": {"version": "HTTP/1.0"},  # RFC 9110, 7.8
}


@pytest.mark.parametrize("request_", list(NO_UPGRADE.values()), ids=list(NO_UPGRADE))
def test_a_request_that_asks_for_no_websocket_is_told_to(
    place: Place, customer: Customer, request_: dict[str, Any]
) -> None:
    with place.wire() as wire:
        wire.send(handshake(customer, **request_))
        answer = wire.answer()
    assert (answer.status, answer.headers["upgrade"].lower()) == (426, "websocket")  # RFC 9110, 15.5.22
    assert answer.error["code"]


@pytest.mark.parametrize("body", [b"", b'{"expires_in": 5}'], ids=["without a body", "with one"])
def test_an_offer_of_http_2_is_ignored_and_the_connection_goes_on(
    place: Place, customer: Customer, body: bytes
) -> None:
    """As `curl --http2` asks."""
    lines = ["Host: voxgate", f"Authorization: Bearer {customer.key}", f"Content-Length: {len(body)}"]
    lines += ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"]
    method, path = ("POST", "/v1/stt/tokens") if body else ("GET", "/health")
    request = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode() + body
    with place.wire() as wire:
        for _ in range(2):
            wire.send(request)
            answer = wire.answer()
            assert answer.status == 200
            assert json.loads(answer.body).get("expires_in", 5) == 5


def test_other_routes_are_no_sockets(place: Place, customer: Customer) -> None:
    for path in ("/health", "/v1/models", "/v1/audio/transcriptions"):
        with place.wire() as wire:
            wire.send(handshake(customer, target=path))
            assert wire.answer().status in (200, 400, 404, 405, 426)


def test_a_refusal_is_not_followed_by_what_was_sent_with_it(place: Place, customer: Customer) -> None:
    request = handshake(customer, changed={"Authorization": "Bearer vg_wrong"})
    assert place.ask(request, frame(TEXT, NONSENSE), b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").status == 401


def test_frames_in_the_packet_of_the_handshake_are_not_lost(place: Place, customer: Customer) -> None:
    with place.wire() as wire:
        # The second ends in a packet of its own.
        wire.send(handshake(customer), frame(TEXT, NONSENSE), frame(PING, b"early"), frame(TEXT, END)[:9])
        assert wire.answer().status == 101
        came = [wire.frame() for _ in range(3)]
        came.remove((PONG, b"early"))  # which is at any place among the messages
        assert [json.loads(payload)["type"] for _, payload in came] == ["ready", "error"]
        wire.send(frame(TEXT, END)[9:])
        assert json.loads(wire.frame()[1])["type"] == "done"
        assert wire.closed() == 1000


@pytest.mark.parametrize("chunked", [False, True])
def test_the_body_of_a_handshake_is_no_frame(place: Place, customer: Customer, chunked: bool) -> None:
    body = frame(TEXT, NONSENSE)
    said, sent = f"Content-Length: {len(body)}", body
    if chunked:
        said, sent = "Transfer-Encoding: chunked", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with place.wire() as wire:
        wire.send(handshake(customer, said), sent)
        answer = wire.answer()
        if answer.status == 101:
            wire.ready()
            wire.done()
        else:
            assert answer.status == 400
            assert answer.error["code"] == "invalid_input"
            assert wire.ended()


LONG: dict[str, dict[str, Any]] = {
    "a query of 20,000 bytes": {"target": f"{TARGET}&note={'a' * 20_000}"},
    "a thousand parameters": {"target": TARGET + "&note=a" * 1000},
    "a cookie of 30,000 bytes": {"changed": {"Cookie": "a" * 30_000}},
    "200 headers": {"changed": {f"X-Header-{number}": "value" for number in range(200)}},
}


@pytest.mark.parametrize("request_", list(LONG.values()), ids=list(LONG))
def test_a_long_handshake_is_taken_or_refused_but_answered(
    place: Place, customer: Customer, request_: dict[str, Any]
) -> None:
    with place.wire() as wire:
        wire.send(handshake(customer, **request_))
        answer = wire.answer()
        if answer.status == 101:
            wire.ready()
            wire.done()
        else:
            assert answer.status in (400, 414, 431)
            assert answer.error["code"] == "invalid_input"
            assert wire.ended()


@pytest.mark.parametrize("where", ["Cookie: ", "Sec-WebSocket-Protocol: ", "Sec-WebSocket-Extensions: "])
def test_a_hundred_kilobytes_of_headers_are_refused(place: Place, customer: Customer, where: str) -> None:
    answer = place.ask(handshake(customer, where + "a" * 100_000))
    assert (answer.status, answer.error["code"]) == (431, "invalid_input")


# --- Messages ---------------------------------------------------------------------------------------


def test_a_message_may_come_in_pieces_with_pings_between_them(place: Place, customer: Customer) -> None:
    with place.open(customer) as wire:
        wire.send(frame(TEXT, END[:5], fin=False), frame(PING, b"first"))
        assert wire.frame() == (PONG, b"first")
        wire.send(frame(CONT, fin=False), frame(CONT, END[5:9], fin=False), frame(PONG, b"unasked"))
        wire.send(frame(PING), frame(PING, b"p" * 125))
        assert wire.frame() == (PONG, b"")
        assert wire.frame() == (PONG, b"p" * 125)
        wire.send(frame(CONT, END[9:], fin=False), frame(CONT))
        wire.ending()


def test_each_byte_may_be_a_frame(place: Place, customer: Customer) -> None:
    with place.open(customer) as wire:
        *first, last = [END[place : place + 1] for place in range(len(END))]
        frames = [frame(CONT if number else TEXT, byte, fin=False) for number, byte in enumerate(first)]
        wire.send(*frames, frame(CONT, last))
        wire.ending()


def test_each_ping_has_its_pong_in_order(place: Place, customer: Customer) -> None:
    with place.open(customer) as wire:
        payloads = [b"%d" % number for number in range(200)]
        wire.send(*(frame(PING, payload) for payload in payloads))
        assert [wire.frame() for _ in payloads] == [(PONG, payload) for payload in payloads]
        wire.done()


def test_text_may_be_split_within_a_character(place: Place, customer: Customer) -> None:
    with place.open(customer) as wire:
        text = json.dumps({"type": "größer 🎙"}, ensure_ascii=False).encode()
        cuts = [12, 13, 18, 20, 21]
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert any(_broken(piece) for piece in pieces)
        frames = [frame(CONT if number else TEXT, piece, fin=False) for number, piece in enumerate(pieces)]
        wire.send(*frames, frame(CONT))
        wire.complaint()  # of the type, and not of the text
        wire.done()


def _broken(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return True
    return False


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, LIMIT])
def test_a_message_may_have_any_size_up_to_the_limit(place: Place, customer: Customer, size: int) -> None:
    with place.open(customer) as wire:
        wire.send(frame(TEXT, b"a" * size))
        wire.complaint()
        pieces = [b"a" * min(LIMIT // 8, size - start) for start in range(0, size, LIMIT // 8)]
        wire.send(frame(TEXT, fin=False), *(frame(CONT, piece, fin=False) for piece in pieces), frame(CONT))
        wire.complaint()
        wire.done()


@pytest.mark.parametrize(("size", "width"), [(5, 2), (125, 8), (126, 8), (65_535, 8)])
def test_a_length_in_more_bytes_than_it_needs_is_taken_or_refused_but_not_misread(
    place: Place, customer: Customer, size: int, width: int
) -> None:
    """RFC 6455, 5.2, forbids the client to send it, and does not say what it is answered with."""
    with place.open(customer) as wire:
        wire.send(frame(TEXT, b"a" * size, width=width))
        opcode, payload = wire.frame()
        if opcode == CLOSE:
            assert int.from_bytes(payload[:2]) == 1002
        else:
            assert json.loads(payload)["fatal"] is False
            wire.send(frame(PING, b"in step"))
            assert wire.frame() == (PONG, b"in step")


# --- What ends the connection -----------------------------------------------------------------------

OPEN = frame(TEXT, b'{"type":', fin=False)
BROKEN: dict[str, tuple[bytes, int]] = {
    "a frame without a mask": (frame(TEXT, KEEPALIVE, masked=False), 1002),
    "a ping without a mask": (frame(PING, b"p", masked=False), 1002),
    "a close without a mask": (frame(CLOSE, b"\x03\xe8", masked=False), 1002),
    "the first reserved bit": (frame(TEXT, KEEPALIVE, reserved=4), 1002),
    "the second reserved bit": (frame(TEXT, KEEPALIVE, reserved=2), 1002),
    "the third reserved bit": (frame(BINARY, reserved=1), 1002),
    "a reserved bit in a ping": (frame(PING, reserved=4), 1002),
    "a reserved bit in a close": (frame(CLOSE, b"\x03\xe8", reserved=7), 1002),
    "a reserved bit in a continuation": (OPEN + frame(CONT, b"1}", reserved=4), 1002),
    **{f"opcode {opcode}": (frame(opcode), 1002) for opcode in (*range(3, 8), *range(11, 16))},
    "a ping of 126 bytes": (frame(PING, b"p" * 126), 1002),
    "a pong of 126 bytes": (frame(PONG, b"p" * 126), 1002),
    "a close of 126 bytes": (close(1000, b"r" * 124), 1002),
    "a ping in pieces": (frame(PING, b"p", fin=False) + frame(CONT, b"q"), 1002),
    "a close in pieces": (frame(CLOSE, b"\x03", fin=False) + frame(CONT, b"\xe8"), 1002),
    "a continuation of nothing": (frame(CONT, KEEPALIVE), 1002),
    "a continuation of nothing, and not its last": (frame(CONT, KEEPALIVE, fin=False), 1002),
    "a continuation of what was whole": (frame(TEXT, KEEPALIVE) + frame(CONT, b"a"), 1002),
    "a text within a message": (OPEN + frame(TEXT, KEEPALIVE), 1002),
    "a text within a message of no bytes yet": (frame(TEXT, fin=False) + frame(TEXT, KEEPALIVE), 1002),
    "audio within a message": (OPEN + frame(BINARY, bytes(320)), 1002),
    "text that is no UTF-8": (frame(TEXT, b"\xff"), 1007),
    "an overlong form": (frame(TEXT, b'{"type": "\xc0\xaf"}'), 1007),
    "a surrogate": (frame(TEXT, b'{"type": "\xed\xa0\x80"}'), 1007),
    "past the last character": (frame(TEXT, b'{"type": "\xf4\x90\x80\x80"}'), 1007),
    "bad UTF-8 over two frames": (frame(TEXT, b"\xce\xba\xe1", fin=False) + frame(CONT, b"\xc0"), 1007),
    "a character cut off": (frame(TEXT, b'{"type": "\xe2\x82'), 1007),
    "a character cut off by the last frame": (frame(TEXT, b"a", fin=False) + frame(CONT, b"\xe2\x82"), 1007),
    "a character cut off before an empty frame": (frame(TEXT, b"\xe2\x82", fin=False) + frame(CONT), 1007),
    "a message of one byte too many": (frame(TEXT, b"a" * (LIMIT + 1)), 1009),
    "audio of one byte too many": (frame(BINARY, bytes(LIMIT + 1)), 1009),
    # Nothing follows the header: the server does not wait for it.
    "one byte too many announced": (frame(BINARY, length=LIMIT + 1), 1009),
    "2^63 - 1 bytes announced": (frame(BINARY, length=2**63 - 1), 1009),
    "too many in pieces": (
        frame(TEXT, b"a" * (LIMIT // 8), fin=False)
        + frame(CONT, b"a" * (LIMIT // 8), fin=False) * 7
        + frame(CONT, b"a"),
        1009,
    ),
    "too many in pieces, the last announced": (
        frame(TEXT, b"a" * (LIMIT - 1), fin=False) + frame(CONT, length=2, fin=False),
        1009,
    ),
    "too many in pieces of one byte": (
        frame(TEXT, b"a" * (LIMIT - 2), fin=False) + frame(CONT, b"a", fin=False) * 3,
        1009,
    ),
}


@pytest.mark.parametrize(("content", "code"), list(BROKEN.values()), ids=list(BROKEN))
def test_what_breaks_the_protocol_is_closed_at_once(
    place: Place, customer: Customer, content: bytes, code: int
) -> None:
    with place.open(customer) as wire:
        wire.send(content)
        assert wire.closed() == code


@pytest.mark.parametrize("length", [2**63, 2**64 - 1])
def test_a_length_whose_first_bit_is_set_is_both_broken_and_too_long(
    place: Place, customer: Customer, length: int
) -> None:
    with place.open(customer) as wire:
        wire.send(frame(BINARY, length=length))
        assert wire.closed() in (1002, 1009)


def test_what_comes_before_the_broken_frame_is_still_heard(place: Place, customer: Customer) -> None:
    with place.open(customer) as wire:
        wire.send(frame(TEXT, NONSENSE))
        wire.complaint()
        wire.send(frame(3), frame(TEXT, NONSENSE), frame(PING))
        assert wire.closed() == 1002


def test_who_sends_far_too_much_is_told_so_and_not_cut_off(place: Place, customer: Customer) -> None:
    """RFC 6455, 7.1.1: closed with something unread, TCP would reset the connection, and the client would often
    see that in place of the 1009."""
    with place.open(customer) as wire:
        wire.socket.sendall(frame(BINARY, bytes(8 * 2**20)))
        assert wire.closed() == 1009


# --- Closing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3999, 4000, 4999])
def test_a_close_is_answered_with_its_code(place: Place, customer: Customer, code: int) -> None:
    with place.open(customer) as wire:
        wire.send(close(code, "für heute".encode()))
        assert wire.closed() == code


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65_535])
def test_a_close_with_a_code_that_nobody_may_send_is_a_protocol_error(
    place: Place, customer: Customer, code: int
) -> None:
    with place.open(customer) as wire:
        wire.send(close(code))
        assert wire.closed() == 1002


CLOSES: dict[str, tuple[bytes, set[int | None]]] = {
    "an empty one": (frame(CLOSE), {None, 1000}),
    "of one byte": (frame(CLOSE, b"\x03"), {1002}),
    "with a reason that is no UTF-8": (close(1000, b"\xce\xba\xe1\xbd\xb9\xcf\x83\xed\xa0\x80"), {1007}),
    "with half a character": (close(1000, b"\xe2\x82"), {1007}),
    "with the longest reason": (close(1000, b"r" * 123), {1000}),
    # Which RFC 6455, 5.4, allows, and after which the message can never be whole.
    "within a message": (OPEN + close(1001), {1001, 1002}),
}


@pytest.mark.parametrize(("content", "codes"), list(CLOSES.values()), ids=list(CLOSES))
def test_closes(place: Place, customer: Customer, content: bytes, codes: set[int | None]) -> None:
    with place.open(customer) as wire:
        wire.send(content)
        assert wire.closed() in codes


def test_what_follows_a_close_frame_is_ignored(place: Place, customer: Customer) -> None:
    with place.open(customer) as wire:
        wire.send(close(1000), frame(TEXT, NONSENSE), frame(PING, b"?"), close(1001), frame(3), b"\xff" * 100)
        assert wire.closed() == 1000


def test_what_follows_the_end_is_ignored(place: Place, customer: Customer) -> None:
    with place.open(customer) as wire:
        wire.send(frame(TEXT, END), frame(TEXT, NONSENSE), frame(BINARY, bytes(3200)))
        wire.ending()


# --- Clients that go away ---------------------------------------------------------------------------


def _half_close(wire: Wire) -> None:
    wire.socket.shutdown(socket.SHUT_WR)
    assert wire.ended()


WAYS: dict[str, Callable[[Wire], None]] = {
    "reset": Wire.reset,
    "hung up": lambda wire: wire.socket.close(),
    "its sending side closed": _half_close,
    "in a header": lambda wire: wire.send(frame(BINARY, bytes(320))[:3]),
    "in a frame": lambda wire: wire.send(frame(BINARY, bytes(320))[:100]),
    "in a message": lambda wire: wire.send(OPEN),
    "after its close frame": lambda wire: wire.send(close(1000)),
    "after its last message": lambda wire: wire.send(frame(TEXT, END)),
}


@pytest.mark.parametrize("way", list(WAYS.values()), ids=list(WAYS))
def test_a_client_that_goes_leaves_its_place(place: Place, customer: Customer, way: Callable[[Wire], None]) -> None:
    with place.open(customer) as wire:
        way(wire)
    with place.open(customer) as wire:
        wire.done()


def test_clients_that_go_before_they_are_answered_leave_nothing(place: Place, customer: Customer) -> None:
    request = handshake(customer)
    for cut in (10, len(request) - 2, len(request), len(request)):
        wire = place.wire()
        wire.send(request[:cut])
        wire.reset()
    with place.open(customer) as wire:
        wire.done()


def test_who_is_reset_with_audio_on_the_way_pays_for_no_more_than_that(place: Place) -> None:
    customer = place.office.open(credit=CREDIT, limits=RateLimits(concurrent_requests=1))
    wire = place.open(customer)
    wire.send(*[frame(BINARY, bytes(3200))] * 10)  # a second
    wire.reset()
    with place.open(customer) as wire:
        wire.done()
    balance, held = place.office.money(customer.account)
    assert held == 0
    assert CREDIT - 100 <= balance <= CREDIT
