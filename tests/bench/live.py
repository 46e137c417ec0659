"""What the live socket adds, what a session takes, and how many the embedded recognizer keeps up with.

Sessions speak in real time, a tenth of a second at a time. What the gateway adds is measured against a recognizer
in a process of its own that answers at once: the same sessions through the gateway, and to the recognizer itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from conftest import DATA, Server, start_server, stop_server
from customers import Customer, Office
from voxgate.accounts import RateLimits
from voxgate.audio.decode import RATE, decode

from .report import Cell, Goal, Report

SESSIONS = 50
SECONDS = 20.0
PIECE = 0.1  # seconds
PARTIAL, FINAL = 0.5, 3.0  # seconds of audio, after which the recognizer in its own process says something
MOST_MS = 300.0
MOST_MB = 2.0
LEVELS = (1, 2, 4, 6, 8, 10, 12, 14, 16)
LEVEL_SECONDS = 16.0
MOST_BEHIND = 1000.0  # ms that the median final may be later than one session's
UTTERANCES = 8
PAUSE = 2.5  # seconds
PATH = "v1/stt/stream"
MB = 1e6


@dataclass
class Session:
    """What one client noted: when the audio up to a second was sent, and what came when."""

    sent: list[float] = field(default_factory=list)  # by tenths
    heard: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def lags(self, kind: str) -> list[float]:
        """Seconds from sending the audio to the message that ends with it."""
        told = [(at, said) for at, said in self.heard if said["type"] == kind]
        return [at - self.sent[min(round(said["end"] / PIECE), len(self.sent)) - 1] for at, said in told]


def run() -> Report:
    report = Report(
        f"live: sessions that speak in real time, ms; {SESSIONS} for {SECONDS:g} s before a trivial recognizer",
        ("what", "sessions", "messages", "median", "p95", "max", "MB a session", "CPU %"),
    )
    customer_limits = RateLimits(10**6, 10**6, 10**3)
    with recognizer() as url, tempfile.TemporaryDirectory() as directory:
        alone = asyncio.run(_speak(url, None, bytes(round(2 * RATE * SECONDS)), SESSIONS))
        report.rows.append(("partials of the recognizer itself", SESSIONS, *_figures(alone, "partial"), None, None))
        with _gateway(Path(directory), VOXGATE_INFERENCE_URL=url) as server:
            customer = Office(server.data_dir).open(credit=10**9, limits=customer_limits)
            partial = _beside(report, server, customer)
    with (
        tempfile.TemporaryDirectory() as directory,
        _gateway(Path(directory), VOXGATE_LIVE_WORKERS=str(max(LEVELS))) as server,
    ):
        customer = Office(server.data_dir).open(credit=10**9, limits=customer_limits)
        _delays(report, server, customer)
        most = _levels(report, server, customer)
    memory = report.rows[1][6]
    assert isinstance(memory, float)
    report.notes += [
        f"the embedded recognizer keeps up with {most} sessions that speak without a rest",
        "its CPU is that of the server and its processes, with their start, by one core",
    ]
    report.goals += [
        Goal(f"partials through the gateway, median, at most {MOST_MS:g} ms", partial, partial <= MOST_MS),
        Goal(f"memory of the gateway for each session, at most {MOST_MB:g} MB", memory, memory <= MOST_MB),
    ]
    return report


def _beside(report: Report, server: Server, customer: Customer) -> float:
    """The sessions through the gateway; the median of its partials in milliseconds."""
    asyncio.run(_speak(server.url, customer, bytes(2 * RATE), 5))  # the first loads what all need
    process = psutil.Process(server.pid)
    before, used, begun = process.memory_info().rss, sum(process.cpu_times()[:2]), time.perf_counter()

    async def work() -> tuple[list[Session], int]:
        speaking = asyncio.create_task(_speak(server.url, customer, bytes(round(2 * RATE * SECONDS)), SESSIONS))
        peak = before
        while not speaking.done():
            await asyncio.wait({speaking}, timeout=0.2)
            peak = max(peak, process.memory_info().rss)
        return speaking.result(), peak

    sessions, peak = asyncio.run(work())
    cpu = 100 * (sum(process.cpu_times()[:2]) - used) / (time.perf_counter() - begun)
    grown = (peak - before) / MB / SESSIONS
    figures = _figures(sessions, "partial")
    report.rows.append(("partials through the gateway", SESSIONS, *figures, grown, cpu))
    report.rows.append(("finals through the gateway", SESSIONS, *_figures(sessions, "final"), None, None))
    report.notes.append(f"RSS of the gateway: {before / MB:.0f} MB before, {peak / MB:.0f} MB with {SESSIONS} sessions")
    return float(figures[1] or 0.0)


def _delays(report: Report, server: Server, customer: Customer) -> None:
    """From the end of speech to its final: by the pause that is noticed, and by `finalize`."""
    speech = _samples("b-slt.mp3", "mp3")
    pause = bytes(round(2 * RATE * PAUSE))

    async def work(*, finalize: bool) -> list[float]:
        taken = []
        async with _session(server.url, customer) as socket:
            session = Session()
            reading = asyncio.create_task(_read(socket, session))
            for _ in range(UTTERANCES):
                said = len(session.heard)
                await _send(socket, session, speech)
                ended = time.perf_counter()
                if finalize:
                    await socket.send(json.dumps({"type": "finalize"}))
                await _send(socket, session, pause)
                finals = [at for at, message in session.heard[said:] if message["type"] == "final"]
                taken += [at - ended for at in finals[-1:]]
            await _close(socket, reading)
        return taken

    for name, finalize in (
        ("end of speech to final, by a pause", False),
        ("end of speech to final, by finalize", True),
    ):
        report.rows.append((name, 1, *_row(asyncio.run(work(finalize=finalize))), None, None))


def _levels(report: Report, server: Server, customer: Customer) -> int:
    """The most sessions whose finals come about as soon as one's alone."""
    speech = _samples("long-slt.flac", "flac")
    audio = (speech * 10)[: round(2 * RATE * LEVEL_SECONDS)]
    most, alone = 0, 0.0
    for count in LEVELS:
        process = psutil.Process(server.pid)
        begun = time.perf_counter()
        used = _cpu(process)
        sessions = asyncio.run(_speak(server.url, customer, audio, count))
        cpu = 100 * (_cpu(process) - used) / (time.perf_counter() - begun)
        figures = _figures(sessions, "final")
        report.rows.append(("finals of the embedded recognizer", count, *figures, None, cpu))
        median = float(figures[1] or 0.0)
        alone = alone or median
        if median > alone + MOST_BEHIND:
            break
        most = count
    return most


def _cpu(process: psutil.Process) -> float:
    """Seconds, of it and of its engines, also of those that have ended."""
    spent = float(sum(process.cpu_times()[:4]))
    for engine in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            spent += sum(engine.cpu_times()[:2])
    return spent


async def _speak(base_url: str, customer: Customer | None, audio: bytes, count: int) -> list[Session]:
    """That audio to so many sessions, which begin one after the other within a second."""

    async def one(number: int) -> Session:
        session = Session()
        async with _session(base_url, customer) as socket:
            reading = asyncio.create_task(_read(socket, session))
            ready.release()
            await going.wait()
            await asyncio.sleep(number / count)
            await _send(socket, session, audio)
            await _close(socket, reading)
        return session

    ready, going = asyncio.Semaphore(0), asyncio.Event()
    sessions = [asyncio.create_task(one(number)) for number in range(count)]
    for _ in range(count):
        await ready.acquire()
    going.set()
    return list(await asyncio.gather(*sessions))


@contextlib.asynccontextmanager
async def _session(base_url: str, customer: Customer | None) -> AsyncIterator[ClientConnection]:
    address = f"{base_url.replace('http', 'ws', 1)}/{PATH}?model_id=whisper-1"
    headers = customer.headers if customer else None
    async with connect(address, additional_headers=headers, compression=None, proxy=None, open_timeout=120) as socket:
        assert json.loads(await socket.recv())["type"] == "ready"
        yield socket


async def _send(socket: ClientConnection, session: Session, audio: bytes) -> None:
    size = round(2 * RATE * PIECE)
    begun = time.perf_counter()
    for number, at in enumerate(range(0, len(audio), size)):
        await asyncio.sleep(begun + number * PIECE - time.perf_counter())
        session.sent.append(time.perf_counter())
        await socket.send(audio[at : at + size])


async def _read(socket: ClientConnection, session: Session) -> None:
    async for text in socket:
        message = json.loads(text)
        assert message["type"] != "error", message
        session.heard.append((time.perf_counter(), message))


async def _close(socket: ClientConnection, reading: asyncio.Task[None]) -> None:
    await socket.send(json.dumps({"type": "close"}))
    await reading


def _samples(name: str, container: str) -> bytes:
    """In whole tenths of a second."""
    pcm = b"".join(decode(str(DATA / name), container, max_seconds=60))
    size = round(2 * RATE * PIECE)
    return pcm + bytes(-len(pcm) % size)


def _figures(sessions: Sequence[Session], kind: str) -> tuple[Cell, ...]:
    return _row([lag for session in sessions for lag in session.lags(kind)])


def _row(seconds: list[float]) -> tuple[Cell, ...]:
    taken = [each * 1000 for each in seconds]
    return len(taken), statistics.median(taken), statistics.quantiles(taken, n=100, method="inclusive")[94], max(taken)


@contextmanager
def _gateway(directory: Path, **environment: str) -> Iterator[Server]:
    process, server = start_server(directory, **environment)
    try:
        yield server
    finally:
        stop_server(process)


# The recognizer that answers at once.


@contextmanager
def recognizer() -> Iterator[str]:
    """Its address."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_recognize, args=(its,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{mine.recv()}"
    finally:
        process.kill()
        process.join()


def _recognize(told: Connection) -> None:
    async def work() -> None:
        async with serve(_hear, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
            told.send(next(iter(server.sockets)).getsockname()[1])
            await server.serve_forever()

    asyncio.run(work())


async def _hear(socket: ServerConnection) -> None:
    """A partial for each half second of audio and a final for each three, and what is left at the end."""
    number = 0

    async def tell(kind: str, **said: Any) -> None:
        nonlocal number
        await socket.send(json.dumps({"type": kind, "sequence": number, **said}))
        number += 1

    async def final(end: float) -> None:
        word = {"word": "word", "start": begun, "end": end, "confidence": 0.9}
        await tell("final", text="word", start=begun, end=end, words=[word], confidence=0.9)

    heard, begun, shown = 0.0, 0.0, 0.0
    with contextlib.suppress(ConnectionClosed):
        await tell("ready", session_id="bench", model="bench", provider="bench", language=None)
        async for message in socket:
            if isinstance(message, str):
                if json.loads(message)["type"] == "close":
                    break
                continue
            heard += len(message) / (2 * RATE)
            if heard >= begun + FINAL - 1e-6:
                await final(heard)
                begun = shown = heard
            elif heard >= shown + PARTIAL - 1e-6:
                shown = heard
                await tell("partial", text="word", start=begun, end=heard)
        await tell("done", text="", duration=heard, usage={"type": "duration", "seconds": heard}, cost="0.00")
