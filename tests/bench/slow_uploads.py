"""What slow uploads, and one in tiny writes, take from the server and from everybody else.

Whoever is slow is in a process of its own, and so is the provider, which drops what it is sent.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from conftest import ROOT, Server, start_server, stop_server
from customers import Office

from .metering import Client, peer
from .report import Cell, Goal, Report

MB = 1e6
MIB = 1024 * 1024
UPLOADS, SIZE, RATE = 32, 24 * MIB, 1_000_000  # bytes, and bytes a second of each
TINY = 25 * MIB
ALONE = 10.0  # seconds
PAUSE = 0.01  # seconds between the requests beside them
MOST_GROWTH = 64.0  # MB
MOST_SLOWER = 2.0
STEADY = f"{UPLOADS} of {SIZE // MIB} MiB at {RATE / MB:g} MB/s each"
BYTES = f"one of {TINY // MIB} MiB byte by byte"


def run() -> Report:
    report = Report(
        f"slow uploads: {STEADY}, {BYTES}",
        ("requests beside", "s", "requests", "median ms", "p95 ms", "max ms", "RSS MB", "VmHWM MB"),
    )
    with tempfile.TemporaryDirectory() as name, peer("upstream") as upstream:
        process, server = start_server(Path(name), VOXGATE_INFERENCE_URL=upstream)
        try:
            key = Office(Path(name)).open(credit=10**9).key
            with _slow("steady", server, key, 1, 2 * MIB, 10 * MIB):
                pass
            end = time.perf_counter() + ALONE
            alone = _beside(report, "none of them", server, key, lambda: time.perf_counter() < end)
            memory = _memory(server, "VmRSS")
            Path(f"/proc/{server.pid}/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew: proc(5)
            with _slow("steady", server, key, UPLOADS, SIZE, RATE) as steady, _slow("tiny", server, key, TINY) as tiny:
                both = _beside(report, "all of them", server, key, lambda: steady.poll() is None)
                left = _beside(report, "the one byte by byte", server, key, lambda: tiny.poll() is None)
            growth = _memory(server, "VmHWM") - memory
        finally:
            stop_server(process)
    report.goals.append(Goal(f"growth of the server's memory, under {MOST_GROWTH:g} MB", growth, growth < MOST_GROWTH))
    for what, median in (("all of them", both), ("the one byte by byte", left)):
        ratio = median / alone
        whom = f"a request's median beside {what} by that beside none, at most {MOST_SLOWER:g}"
        report.goals.append(Goal(whom, ratio, ratio <= MOST_SLOWER))
    return report


def _beside(report: Report, what: str, server: Server, key: str, go_on: Callable[[], bool]) -> float:
    """The median of small requests while it goes on, in milliseconds."""
    times, begun = [], time.perf_counter()
    with Client(server.url, key) as client:
        while go_on():
            times.append(client.ask())
            time.sleep(PAUSE)
    median = statistics.median(times)
    seconds, late = time.perf_counter() - begun, statistics.quantiles(times, n=20)[-1]
    memory: list[Cell] = [_memory(server, what) for what in ("VmRSS", "VmHWM")]
    report.rows.append((what, seconds, len(times), median, late, max(times), *memory))
    return median


def _memory(server: Server, what: str) -> float:
    """In MB; `VmRSS`, or `VmHWM` for the most it was."""
    lines = Path(f"/proc/{server.pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / MB


@contextlib.contextmanager
def _slow(kind: str, server: Server, key: str, *numbers: int) -> Iterator[subprocess.Popen[bytes]]:
    """One of `peers`, to whose end is waited."""
    arguments = [sys.executable, "-m", "tests.bench.peers", kind, server.url, key, *map(str, numbers)]
    with subprocess.Popen(arguments, cwd=ROOT) as process:
        try:
            yield process
            assert process.wait() == 0
        finally:
            process.kill()
