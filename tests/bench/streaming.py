"""How soon a stream's first event comes, and how many events a second the server relays."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from conftest import DATA, start_server, stop_server
from customers import OPENAI, Customer, Office

from .busy import speech
from .metering import peer
from .report import Goal, Report

AUDIO = DATA / "b-slt.mp3"  # 3.03 s
PAIRS, WARM = 200, 20
MOST_ADDED = 4.0  # ms
# Clients, and how often each of them asks.
CLIENTS = {1: 20, 8: 5, 64: 2}
EVENTS = 2000  # of a stream
SPEECH = 120.0  # seconds
ROUNDS = 3
MOST_OF_WHOLE = 0.25


def run() -> Report:
    report = Report("streaming: the first event, and events a second", ("what", "streams", "figure", "unit"))
    with tempfile.TemporaryDirectory() as name:
        _first(report, Path(name) / "first")
        _rates(report, Path(name) / "rates")
        _recognized(report, Path(name) / "recognized")
    return report


# The first event of a provider that streams: through the gateway and directly, by turns.


def _first(report: Report, directory: Path) -> None:
    with peer("streaming", "5") as upstream:
        process, server = start_server(directory, VOXGATE_INFERENCE_URL=upstream)
        try:
            customer = Office(directory).open(credit=10**9)
            asked = [_request(url, customer, AUDIO.read_bytes()) for url in (upstream, server.url)]
            times = [[asyncio.run(_ask(request)).first for request in asked] for _ in range(WARM + PAIRS)][WARM:]
        finally:
            stop_server(process)
    direct, relayed = (statistics.median(each) * 1000 for each in zip(*times, strict=True))
    report.rows += [("first event, directly", PAIRS, direct, "ms"), ("first event, relayed", PAIRS, relayed, "ms")]
    added = statistics.median(own - free for free, own in times) * 1000
    what = f"added to the time of the first event, the median of pairs, at most {MOST_ADDED:g} ms"
    report.goals.append(Goal(what, added, added <= MOST_ADDED))


# Events that are there all at once, so that all of the time is the gateway's and the client's.


def _rates(report: Report, directory: Path) -> None:
    with peer("streaming", str(EVENTS)) as upstream:
        process, server = start_server(directory, VOXGATE_INFERENCE_URL=upstream)
        try:
            request = _request(server.url, Office(directory).open(credit=10**9), AUDIO.read_bytes())
            asyncio.run(_many(request, 2, 1))
            for clients, times in CLIENTS.items():
                begun = time.perf_counter()
                events = asyncio.run(_many(request, clients, times))
                rate = events / (time.perf_counter() - begun)
                report.rows.append((f"{clients} client{'s' * (clients > 1)}", clients * times, rate, "events/s"))
        finally:
            stop_server(process)


async def _many(request: _Request, clients: int, times: int) -> int:
    async def client() -> int:
        return sum([(await _ask(request)).events for _ in range(times)])

    told = sum(await asyncio.gather(*(client() for _ in range(clients))))
    assert told == clients * times * (EVENTS + 1)
    return told


# The embedded recognizer.


def _recognized(report: Report, directory: Path) -> None:
    process, server = start_server(directory)
    try:
        customer = Office(directory).open(credit=10**9)
        asyncio.run(_ask(_request(server.url, customer, AUDIO.read_bytes())))
        request = _request(server.url, customer, speech(SPEECH))
        rounds = [asyncio.run(_ask(request)) for _ in range(ROUNDS)]
    finally:
        stop_server(process)
    first, whole = (statistics.median(times) for times in zip(*((r.first, r.whole) for r in rounds), strict=True))
    of = f"{SPEECH:g} s of speech, recognized here"
    report.rows += [(f"first delta of {of}", ROUNDS, first, "s"), (f"all of {of}", ROUNDS, whole, "s")]
    share = statistics.median(each.first / each.whole for each in rounds)
    what = f"the first delta's time by that of the whole, at most {MOST_OF_WHOLE:g}"
    report.goals.append(Goal(what, share, share <= MOST_OF_WHOLE))


# A client that does little with what it reads.


_Request = tuple[str, int, bytes]


def _request(url: str, customer: Customer, audio: bytes) -> _Request:
    headers = customer.headers | {"connection": "close"}
    form = {"model": "whisper-1", "stream": "true"}
    request = httpx.Request("POST", url + OPENAI, headers=headers, data=form, files={"file": ("audio", audio)})
    lines = [f"POST {OPENAI} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items()), "", ""]
    address = urlsplit(url)
    return address.hostname or "", address.port or 0, "\r\n".join(lines).encode() + request.read()


class _Reader(asyncio.Protocol):
    """Counts the events of one answer. `first` and `whole` are seconds since it was asked for."""

    def __init__(self) -> None:
        self.events = 0
        self.first = self.whole = 0.0
        self.ended = asyncio.get_running_loop().create_future()
        self._last = b""
        self._begun = time.perf_counter()

    def data_received(self, data: bytes) -> None:
        events = (self._last + data).count(b"\n\n")  # an end that came in two pieces, too
        self._last = data[-1:]
        if events and not self.events:
            self.first = time.perf_counter() - self._begun
        self.events += events

    def connection_lost(self, exc: Exception | None) -> None:
        self.whole = time.perf_counter() - self._begun
        self.ended.set_result(None)


async def _ask(request: _Request) -> _Reader:
    host, port, content = request
    transport, reader = await asyncio.get_running_loop().create_connection(_Reader, host, port)
    transport.write(content)
    await reader.ended
    return reader
