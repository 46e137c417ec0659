"""How much the server's memory grows while uploads come in, and how fast they do.

Its resident set is sampled every few milliseconds, the recognizer's processes apart from it.
"""

from __future__ import annotations

import http.client
import struct
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from conftest import Server, start_server, stop_server

from .report import Cell, Goal, Report

MB = 1e6
MIB = 1024 * 1024
CLIENTS = 8
SIZE = 24 * MIB
TARGET = 40.0  # MB
PAUSE = 0.003
ROUNDS = 20  # of the last form: what is kept from round to round shows only so
BOUNDARY = "----WebKitFormBoundary7MA4YWxkTrZu0gW"
PATH = "/v1/audio/transcriptions"


def run() -> Report:
    report = Report(
        f"memory: {CLIENTS} uploads of {SIZE // MIB} MiB at once",
        ("form", "status", "s", "MB/s", "RSS before", "growth MB", "after MB", "engines' growth MB"),
    )
    silence = _wav(SIZE, 192_000)
    forms = {
        "the model's name is missing": _form(silence, model=""),
        "the audio is cut off": _form(_wav(2 * SIZE, 192_000)[: len(silence)]),
        "not audio": _form(b"\x89PNG" + bytes(SIZE - 4)),
        "silence, recognized": _form(silence),
    }
    for number in range(2, ROUNDS + 1):
        forms[f"silence, round {number}"] = forms["silence, recognized"]
    with tempfile.TemporaryDirectory() as directory:
        process, server = start_server(Path(directory))
        try:
            for form in (_form(_wav(MIB // 8, 16_000)), _form(_wav(2 * MIB, 16_000), model=""), _form(b"no audio")):
                for _ in range(3):
                    _send(server, form)
            warm = psutil.Process(server.pid).memory_info().rss
            growths, peaks = [], []
            for name, form in forms.items():
                row, growth, peak = _measure(server, form)
                report.rows.append((name, *row))
                growths.append(growth)
                peaks.append((peak - warm) / MB)
            for what, figures in (("largest growth of one round", growths), ("peak above the warm server", peaks)):
                report.goals.append(Goal(f"{what}, at most {TARGET:g} MB", max(figures), max(figures) <= TARGET))
            over = sum(figure > TARGET for figure in peaks)
            report.notes.append(f"{over} of {len(peaks)} rounds peak more than {TARGET:g} MB above the warm server")
        finally:
            stop_server(process)
    return report


def _measure(server: Server, form: bytes) -> tuple[tuple[Cell, ...], float, int]:
    with _Sampler(server.pid) as sampler, ThreadPoolExecutor(CLIENTS) as clients:
        begun = time.perf_counter()
        statuses = set(clients.map(lambda _: _send(server, form), range(CLIENTS)))
        seconds = time.perf_counter() - begun
    growth = (sampler.peak - sampler.before) / MB
    rate = CLIENTS * len(form) / seconds / MB
    status = " ".join(str(status) for status in sorted(statuses))
    after = (sampler.now - sampler.before) / MB
    engines = (sampler.engines_peak - sampler.engines_before) / MB
    return (status, seconds, rate, sampler.before / MB, growth, after, engines), growth, sampler.peak


class _Sampler:
    """The resident set of a process, in bytes, and of its children together."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._children = self._process.children(recursive=True)
        self.before = self.peak = self.now = self._process.memory_info().rss
        self.engines_before = self.engines_peak = self._engines()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(PAUSE):
            self.now = self._process.memory_info().rss
            self.peak = max(self.peak, self.now)
            self.engines_peak = max(self.engines_peak, self._engines())

    def _engines(self) -> int:
        return sum(child.memory_info().rss for child in self._children)


def _send(server: Server, form: bytes) -> int:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=300)
    try:
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        connection.request("POST", PATH, form, {**server.auth, "content-type": kind})
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def _form(audio: bytes, model: str = "whisper-1") -> bytes:
    """The audio first: what is wrong with the form shows only when it has all been received."""
    start = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
    file = f'{start}"file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'.encode() + audio + b"\r\n"
    field = f'{start}"model"\r\n\r\n{model}\r\n'.encode() if model else b""
    return file + field + f"--{BOUNDARY}--\r\n".encode()


def _wav(size: int, rate: int) -> bytes:
    """`size` bytes of silence, 32-bit stereo."""
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", size + 36, b"WAVE", b"fmt ", 16, 1, 2, rate, rate * 8, 8, 32, b"data", size
    )
    return head + bytes(size)
