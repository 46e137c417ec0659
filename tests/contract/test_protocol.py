"""Bytes that are hardly HTTP: each gets an answer in the envelope or a closed connection, soon."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from conftest import DATA, Server

AUTH = "Authorization: Bearer {key}\r\n"


def exchange(server: Server, *pieces: bytes) -> tuple[int, dict[str, str], bytes]:
    """The status, the headers and the body of the first answer; what is not taken is not sent."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80), timeout=20) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
        except OSError:
            pass  # refused while it was sending
        received = b""
        while b"\r\n\r\n" not in received:
            data = client.recv(65536)
            assert data, received
            received += data
        head, _, body = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        while len(body) < int(headers["content-length"]):
            body += client.recv(65536)
    return int(first.split()[1]), headers, body


@pytest.mark.parametrize(
    "request_",
    [
        b"hello\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"POST /v1/stt/transcribe HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/stt/transcribe HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/stt/transcribe HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /health HTTP/1.1\r\nna me: value\r\n\r\n",
    ],
)
def test_what_is_no_http_is_a_400_in_the_envelope(server: Server, request_: bytes) -> None:
    status, headers, body = exchange(server, request_)
    assert status == 400
    assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}
    assert headers["x-request-id"].startswith("req_")


def test_endless_headers_are_refused_before_they_end(server: Server) -> None:
    status, _, body = exchange(server, b"GET /health HTTP/1.1\r\nX: ", *([b"a" * 65536] * 400))
    assert (status, json.loads(body)["error"]["code"]) == (431, "invalid_input")


def test_long_headers_that_clients_really_send_are_taken(server: Server) -> None:
    assert httpx.get(f"{server.url}/health", headers={"cookie": "a" * 30_000}).status_code == 200


def test_a_list_of_a_million_values_is_refused_and_holds_nobody_up(server: Server) -> None:
    values = json.dumps(["a"] * 250_000)
    fields: dict[str, Any] = {"timestamp_granularities[]": [values] * 4}
    response = server.transcribe(DATA / "a-flac.flac", **fields)
    assert response.status_code == 400
    assert response.elapsed.total_seconds() < 5


def test_a_form_is_bounded_as_a_whole(server: Server) -> None:
    """More bytes than any form may have, behind the form's end and in parts that nobody asked for."""
    form = httpx.Request("POST", server.url, data={"model": "whisper-1"}, files={"file": ("a.flac", b"fLaC")})
    head = f"POST /v1/audio/transcriptions HTTP/1.1\r\n{AUTH.format(key=server.key)}Transfer-Encoding: chunked\r\n"
    head += f"Content-Type: {form.headers['content-type']}\r\n\r\n"
    body = form.read()
    pieces = [b"%x\r\n%s\r\n" % (len(body), body), *([b"100000\r\n" + b" " * 2**20 + b"\r\n"] * 40), b"0\r\n\r\n"]
    assert exchange(server, head.encode(), *pieces)[0] == 413
    files = [(f"other{number}", ("a.wav", b"a" * 12 * 2**20)) for number in range(4)]
    response = httpx.post(
        f"{server.url}/v1/audio/transcriptions",
        headers=server.auth,
        data={"model": "whisper-1"},
        files=[*files, ("file", ("a.flac", b"fLaC"))],
    )
    assert response.status_code == 413


def test_the_live_socket_says_what_it_is(server: Server) -> None:
    response = httpx.get(f"{server.url}/v1/stt/stream", headers=server.auth)
    assert (response.status_code, response.json()["error"]["code"]) == (426, "upgrade_required")
    assert response.headers["upgrade"] == "websocket"
