"""The processes around the gateways that are measured: `python -m tests.bench.peers NAME`.

`upstream` is a recognizer that answers as soon as it has all of a request, `streaming EVENTS` one that tells its
answer in so many, all at once, and `bare` the gateway's host without the meter; they print their address.
`flood RATE SECONDS KIND` asks with API keys that do not exist, and prints how many refusals a second it got.
`steady URL KEY UPLOADS SIZE RATE` uploads so many files of so many bytes at once, each at so many bytes a second, and
`tiny URL KEY SIZE` one byte by byte.
"""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import socket
import sys
import time
from collections.abc import Generator

from voxgate.accounts import keys

from .uploads import BOUNDARY, PATH, form

CONNECTIONS = 4
BUFFER = 256 * 1024
LINE = 1024
TURNS = 100  # a second, in each of which all who are slow send their share
TRANSCRIPT = json.dumps(
    {
        "task": "transcribe",
        "language": "english",
        "duration": 3.03,
        "text": "the weather is nice today and we are going to the park",
        "segments": [{"id": 0, "start": 0.0, "end": 3.03, "text": "the weather is nice today"}],
    }
).encode()
ANSWER = (
    f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(TRANSCRIPT)}\r\n\r\n".encode()
    + TRANSCRIPT
)


def main() -> None:
    name, *arguments = sys.argv[1:]
    if name == "upstream":
        asyncio.run(_upstream(ANSWER))
    elif name == "streaming":
        asyncio.run(_upstream(_stream(int(arguments[0]))))
    elif name == "bare":
        _bare()
    elif name == "steady":
        url, key, *numbers = arguments
        _steady(url, key, *map(int, numbers))
    elif name == "tiny":
        url, key, size = arguments
        _tiny(url, key, int(size))
    else:
        url, rate, seconds, kind = arguments
        asyncio.run(_flood(url, float(rate), float(seconds), kind))


async def _upstream(answer: bytes) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: _Upstream(answer), "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


class _Upstream(asyncio.BufferedProtocol):
    """Reads a body to its end and keeps none of it: what this costs is in every figure."""

    _transport: asyncio.Transport

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._buffer = memoryview(bytearray(BUFFER))
        self._text = bytearray()
        self._parser = self._requests()
        self._wanted = next(self._parser)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        at = 0
        while True:
            if isinstance(self._wanted, int):
                step = min(self._wanted, nbytes - at)
                at += step
                self._wanted -= step
                if self._wanted:
                    return
                self._wanted = self._parser.send(b"")
            elif at == nbytes:
                return
            else:
                end = min(at + LINE, nbytes)
                self._text += self._buffer[at:end]
                text, found, rest = self._text.partition(self._wanted)
                at = end - len(rest) if found else end
                if found:
                    self._text.clear()
                    self._wanted = self._parser.send(bytes(text))

    def _requests(self) -> Generator[int | bytes, bytes, None]:
        """Asks for so many bytes, which are dropped, or for the text up to a delimiter."""
        while True:
            head = (yield b"\r\n\r\n").lower()
            if b"\r\ntransfer-encoding: chunked" in head:
                while size := int((yield b"\r\n").partition(b";")[0], 16):
                    yield size + 2
                while (yield b"\r\n"):
                    pass  # trailers
            else:
                yield _length(head)
            self._transport.write(self._answer)
            if b"\r\nconnection: close" in head:
                self._transport.close()


def _stream(events: int) -> bytes:
    """Server-sent events, whose last is the end."""
    told: list[dict[str, object]] = [
        {"type": "transcript.text.delta", "delta": f" word-{n}", "end": 3.03 * (n + 1) / events} for n in range(events)
    ]
    text = "".join(str(each["delta"]) for each in told).strip()
    told.append({"type": "transcript.text.done", "text": text, "usage": {"type": "duration", "seconds": 3.03}})
    body = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in told)
    head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _bare() -> None:
    """What `voxgate serve` does, with another gate: all that differs is the meter."""
    from voxgate.hosts.asgi import AsgiApp
    from voxgate.hosts.gateway import build_application
    from voxgate.hosts.serve import bind, run, url
    from voxgate.metering import Unmetered
    from voxgate.multipart import Limits
    from voxgate.settings import Settings
    from voxgate.transcribe import Transcriber
    from voxgate.wiring import build_gateway, build_store

    settings = Settings.from_environment()
    built = build_gateway(settings, build_store(settings))
    transcriber = Transcriber(
        catalog=built.catalog,
        providers=built.providers,
        gate=Unmetered(),
        health=built.health,
        outages=None,
        staging=None,
        cache=None,
        spool_dir=built.spool_dir,
        limits=Limits(),
        max_audio_seconds=settings.max_audio_seconds,
        provider_timeout=settings.provider_timeout,
        request_timeout=settings.request_timeout,
    )
    gateway = dataclasses.replace(built, transcriber=transcriber)
    listening = bind("127.0.0.1", 0)

    async def start() -> None:
        await gateway.start()
        print(url(listening), flush=True)

    run(
        AsgiApp(build_application(gateway), start=start, stop=gateway.close),
        listening,
        drain_seconds=settings.drain_seconds,
    )


async def _flood(url: str, rate: float, seconds: float, kind: str) -> None:
    """Each key once: `wrong` ones have to be looked up, `mistyped` ones are told by their checksum."""
    host, _, port = url.removeprefix("http://").partition(":")
    share = int(rate * seconds) // CONNECTIONS
    sent = [[keys.generate() for _ in range(share)] for _ in range(CONNECTIONS)]
    print("begins", flush=True)
    begun = time.perf_counter()

    async def ask(lane: int) -> int:
        reader, writer = await asyncio.open_connection(host, int(port))
        refused = 0
        for number, key in enumerate(sent[lane]):
            shown = key if kind == "wrong" else key[:-6] + "000000"
            due = begun + (number * CONNECTIONS + lane) / rate
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            writer.write(
                f"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {shown}\r\n"
                "content-length: 0\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            refused += head.startswith(b"HTTP/1.1 401 ")
            await reader.readexactly(_length(head))
        writer.close()
        return refused

    refused = sum(await asyncio.gather(*map(ask, range(CONNECTIONS))))
    print(refused / (time.perf_counter() - begun))


def _steady(url: str, key: str, uploads: int, size: int, rate: int) -> None:
    content, share = memoryview(form(size)), rate // TURNS
    lines = [_line(url, key, len(content)) for _ in range(uploads)]
    begun = time.perf_counter()
    for turn, at in enumerate(range(0, len(content), share)):
        time.sleep(max(begun + turn / TURNS - time.perf_counter(), 0))
        for line in lines:
            line.sendall(content[at : at + share])
    for line in lines:
        _answered(line)


def _tiny(url: str, key: str, size: int) -> None:
    content = form(size)
    line = _line(url, key, len(content))
    for at in range(len(content)):
        line.send(content[at : at + 1])
    _answered(line)


def _line(url: str, key: str, length: int) -> socket.socket:
    """An upload that has begun."""
    host, _, port = url.removeprefix("http://").partition(":")
    line = socket.create_connection((host, int(port)), timeout=300)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = [f"POST {PATH} HTTP/1.1", f"host: {host}", f"authorization: Bearer {key}", f"content-length: {length}"]
    kind = f"content-type: multipart/form-data; boundary={BOUNDARY}"
    line.sendall("\r\n".join([*head, kind, "", ""]).encode())
    return line


def _answered(line: socket.socket) -> None:
    response = http.client.HTTPResponse(line, method="POST")
    response.begin()
    body = response.read()
    assert response.status == 200, body
    line.close()


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0


if __name__ == "__main__":
    main()
