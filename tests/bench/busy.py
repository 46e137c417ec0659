"""How quickly the server answers while its engine works."""

from __future__ import annotations

import http.client
import io
import statistics
import tempfile
import threading
import time
import wave
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from conftest import DATA, Server, start_server, stop_server
from voxgate.audio.decode import RATE, decode

from .report import Cell, Goal, Report

CLIENTS = 4
SECONDS = 60.0
IDLE = 5.0
PAUSE = 0.01
TARGET = 50.0  # ms


def run() -> Report:
    report = Report(
        f"busy: GET /health beside {CLIENTS} transcriptions of {SECONDS:g} s of speech, ms",
        ("state", "requests", "median", "p95", "p99", "max"),
    )
    recording = speech(SECONDS)
    with tempfile.TemporaryDirectory() as directory:
        process, server = start_server(Path(directory))
        try:
            server.transcribe(DATA / "long-slt.flac").raise_for_status()
            over = threading.Event()
            threading.Timer(IDLE, over.set).start()
            report.rows.append(("idle", *_figures(_health(server, over))))
            over = threading.Event()
            with ThreadPoolExecutor(CLIENTS) as clients:
                begun = time.perf_counter()
                work = [clients.submit(_transcribe, server, recording) for _ in range(CLIENTS)]
                left = threading.Semaphore(CLIENTS - 1)

                def finished(_: Future[None]) -> None:
                    if not left.acquire(blocking=False):
                        over.set()

                for each in work:
                    each.add_done_callback(finished)
                latencies = _health(server, over)
                for each in work:
                    each.result()
                seconds = time.perf_counter() - begun
        finally:
            stop_server(process)
    report.rows.append(("recognizing", *_figures(latencies)))
    report.notes.append(f"{CLIENTS * SECONDS:g} s of speech recognized in {seconds:.1f} s")
    slowest = max(latencies)
    report.goals.append(
        Goal(f"the slowest answer while recognizing, at most {TARGET:g} ms", slowest, slowest <= TARGET)
    )
    return report


def _transcribe(server: Server, recording: bytes) -> None:
    response = server.transcribe(("speech.wav", recording))
    response.raise_for_status()


def _health(server: Server, over: threading.Event) -> list[float]:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    latencies = []
    while not over.wait(PAUSE):
        begun = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        latencies.append((time.perf_counter() - begun) * 1000)
    connection.close()
    return latencies


def _figures(latencies: list[float]) -> tuple[Cell, ...]:
    parts = statistics.quantiles(latencies, n=100)
    return len(latencies), statistics.median(latencies), parts[94], parts[98], max(latencies)


def speech(seconds: float) -> bytes:
    """A WAV file of three sentences, as often as they fit."""
    once = b"".join(decode(str(DATA / "long-slt.flac"), "flac", max_seconds=60))
    samples = once * (int(seconds * RATE * 2) // len(once) + 1)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(samples[: int(seconds * RATE) * 2])
    return file.getvalue()
