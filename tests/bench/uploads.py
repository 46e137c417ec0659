"""The clients of `gateways`, in a process of their own: `python -m tests.bench.uploads`.

The first line that comes in names the targets, each further one is a block of requests to one of
them; a line goes out for each block. All lines are JSON.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from urllib.parse import urlsplit

BOUNDARY = "----WebKitFormBoundary7MA4YWxkTrZu0gW"
PATH = "/v1/audio/transcriptions"
RATE, CHANNELS = 44_100, 2  # 24 MB of 16 bits are 136 seconds
TINY = 40_000  # bytes


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    url: str
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Block:
    """So many requests with `size` bytes of audio, by that many clients at once."""

    target: str
    size: int
    clients: int
    requests: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Each request's milliseconds, and the seconds of all together."""

    times: list[float]
    seconds: float


def main() -> None:
    lines = iter(sys.stdin.readline, "")
    targets = {target.name: target for target in (Target(**each) for each in json.loads(next(lines)))}
    lanes: dict[tuple[str, int], _Lane] = {}
    with ThreadPoolExecutor(64) as threads:
        for line in lines:
            block = Block(**json.loads(line))
            for number in range(block.clients):
                if (block.target, number) not in lanes:
                    lanes[block.target, number] = _Lane(targets[block.target])
            outcome = _run(block, [lanes[block.target, number] for number in range(block.clients)], threads)
            print(json.dumps(asdict(outcome)), flush=True)


def _run(block: Block, lanes: list[_Lane], threads: ThreadPoolExecutor) -> Outcome:
    body = form(block.size)
    left = iter(range(block.requests))  # whoever is done takes the next: they all end at about the same time
    together = threading.Barrier(len(lanes))

    def work(lane: _Lane) -> tuple[float, list[float], float]:
        together.wait()
        begun = time.perf_counter()
        times = [lane.ask(body) for _ in left]
        return begun, times, time.perf_counter()

    list(threads.map(_Lane.make_ready, lanes))
    parts = list(threads.map(work, lanes))
    times = [each for _, part, _ in parts for each in part]
    return Outcome(times, max(end for _, _, end in parts) - min(begun for begun, _, _ in parts))


class _Lane:
    """One connection that stays open; what is sent was made before."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._address = urlsplit(target.url)
        self._socket: socket.socket | None = None

    def make_ready(self) -> None:
        """Ask once: a gateway hangs up on whoever was idle for a while, and its own provider on it."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            if self._socket is not None:
                self.ask(form(TINY))
                return
        self._connect()
        self.ask(form(TINY))

    def ask(self, body: bytes) -> float:
        """Milliseconds."""
        assert self._socket is not None
        head = self._head(len(body))
        begun = time.perf_counter()
        sent = self._socket.sendmsg([head, body])
        if sent < len(head) + len(body):
            self._socket.sendall(memoryview(body)[max(sent - len(head), 0) :])
        response = http.client.HTTPResponse(self._socket, method="POST")
        response.begin()
        answer = response.read()
        took = (time.perf_counter() - begun) * 1000
        if response.status != 200 or b'"the weather is nice' not in answer:
            raise RuntimeError(f"{self._target.name} answers {response.status}: {answer[:1000]!r}")
        if response.will_close:
            self._connect()
        return took

    def _connect(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = socket.create_connection((self._address.hostname or "", self._address.port or 80), timeout=120)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _head(self, length: int) -> bytes:
        headers = {
            "host": self._address.netloc,
            "content-type": f"multipart/form-data; boundary={BOUNDARY}",
            "content-length": str(length),
            **self._target.headers,
        }
        lines = [f"POST {self._address.path}{PATH} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode()


@cache
def form(size: int) -> bytes:
    parts = {"model": "whisper-1", "response_format": "verbose_json"}
    start = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
    fields = "".join(f'{start}"{name}"\r\n\r\n{value}\r\n' for name, value in parts.items())
    file = f'{start}"file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    return (fields + file).encode() + b"".join(_wav(size)) + f"\r\n--{BOUNDARY}--\r\n".encode()


def _wav(size: int) -> Iterator[bytes]:
    """A file of `size` bytes: silence, 16-bit stereo."""
    data, frame = size - 44, 2 * CHANNELS
    yield struct.pack("<4sI4s4sIHH", b"RIFF", size - 8, b"WAVE", b"fmt ", 16, 1, CHANNELS)
    yield struct.pack("<IIHH4sI", RATE, RATE * frame, frame, 16, b"data", data)
    yield bytes(data)


if __name__ == "__main__":
    main()
