"""Uploads that are too many or too slow, by raw sockets, since no client library is so patient."""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from conftest import DATA, ROOT, Server, start_server, stop_server
from customers import send
from fakes.inference import Inference
from voxgate.hosts import asgi

pytestmark = pytest.mark.usefixtures("untraced")

AUDIO = (DATA / "b-slt.mp3").read_bytes()
BOUNDARY = "b0undary"
HEAD = (
    f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
    f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="a.mp3"\r\n\r\n'
).encode()
BODY = HEAD + AUDIO + f"\r\n--{BOUNDARY}--\r\n".encode()


class Line:
    """One connection that sends what and when it is told."""

    def __init__(self, server: Server, *, chunked: bool = False) -> None:
        parts = urlsplit(server.url)
        self.socket = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60)
        how = "transfer-encoding: chunked" if chunked else f"content-length: {len(BODY)}"
        self.socket.sendall(
            f"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {server.key}\r\n"
            f"content-type: multipart/form-data; boundary={BOUNDARY}\r\n{how}\r\n\r\n".encode()
        )

    def answer(self) -> tuple[int, dict[str, str], Any]:
        file = self.socket.makefile("rb")
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = file.read(int(headers["content-length"]))
        file.close()
        return status, headers, json.loads(body)

    def close(self) -> None:
        self.socket.close()


@contextlib.contextmanager
def serving(directory: Path, **environment: str) -> Iterator[Server]:
    with Inference() as upstream:
        process, server = start_server(directory, VOXGATE_INFERENCE_URL=upstream.url, **environment)
        try:
            yield server
        finally:
            stop_server(process)


def test_one_upload_too_many_is_told_to_come_back_before_it_is_sent(tmp_path: Path) -> None:
    with serving(tmp_path, VOXGATE_UPLOADS_AT_ONCE="2") as server:
        slow = [Line(server) for _ in range(2)]
        for line in slow:
            line.socket.sendall(HEAD)
        time.sleep(0.3)
        third = Line(server)
        status, headers, body = third.answer()
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "overloaded", "1")
        third.close()
        for line in slow:
            line.socket.sendall(BODY[len(HEAD) :])
            assert line.answer()[0] == 200
            line.close()
        again = Line(server)
        again.socket.sendall(BODY)
        assert again.answer()[0] == 200
        again.close()


def test_who_hangs_up_or_is_refused_leaves_the_place_to_the_next(tmp_path: Path) -> None:
    with serving(tmp_path, VOXGATE_UPLOADS_AT_ONCE="1") as server:
        for number in range(6):
            line = Line(server)
            line.socket.sendall(HEAD if number % 2 else b"--nonsense\r\n" + BODY[12:])
            if number % 2 == 0:
                assert line.answer()[0] == 400
            line.close()
            time.sleep(0.1)
        line = Line(server)
        line.socket.sendall(BODY)
        assert line.answer()[0] == 200
        line.close()


def memory(server: Server, what: str) -> float:
    """In MB; `VmRSS`, or `VmHWM` for the most it was."""
    lines = Path(f"/proc/{server.pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the most memory is Linux's to tell")
def test_slow_uploads_take_little_memory_and_nobody_elses_time(tmp_path: Path) -> None:
    def slow(server: Server, kind: str, *numbers: int) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-m", "tests.bench.peers", kind, server.url, server.key, *map(str, numbers)]
        return subprocess.Popen(arguments, cwd=ROOT)

    def median(client: httpx.Client, go_on: Callable[[], bool]) -> float:
        times = []
        while go_on():
            begun = time.perf_counter()
            assert send(client).status_code == 200
            times.append(time.perf_counter() - begun)
            time.sleep(0.01)
        return statistics.median(times)

    with (
        serving(tmp_path, VOXGATE_REQUESTS_PER_MINUTE="0") as server,
        httpx.Client(base_url=server.url, headers=server.auth, timeout=30) as client,
    ):
        assert slow(server, "steady", 2, 1_000_000, 10_000_000).wait() == 0
        end = time.monotonic() + 1.5
        alone = median(client, lambda: time.monotonic() < end)
        before = memory(server, "VmRSS")
        Path(f"/proc/{server.pid}/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew: proc(5)
        every = [slow(server, "steady", 16, 3 * 1024 * 1024, 1_000_000), slow(server, "tiny", 256 * 1024)]
        beside = median(client, lambda: any(each.poll() is None for each in every))
        assert [each.wait() for each in every] == [0, 0]
        growth = memory(server, "VmHWM") - before
    assert growth < 12
    assert beside < 2 * alone + 0.02  # of a machine that has other things to do, too


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_byte_by_byte_is_given_up(tmp_path: Path, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a short window; the server reads it from its module, so it runs in this process."""
    import asyncio

    import uvicorn

    from voxgate.accounts.sqlite import SqliteStore
    from voxgate.admin import local_key
    from voxgate.hosts.gateway import build_application
    from voxgate.hosts.serve import bind, url
    from voxgate.settings import Settings
    from voxgate.wiring import build_gateway

    monkeypatch.setattr(asgi, "_FLOOR_SECONDS", 0.5)
    with Inference() as upstream:
        settings = Settings(data_dir=tmp_path, spool_dir=tmp_path / "spool", slowest_upload=1000)
        store = SqliteStore(tmp_path / "voxgate.sqlite")
        key, _ = asyncio.run(local_key(settings, store))
        gateway = build_gateway(settings, store, {"VOXGATE_INFERENCE_URL": upstream.url})
        app = asgi.AsgiApp(
            build_application(gateway), start=gateway.start, stop=gateway.close, slowest_upload=settings.slowest_upload
        )
        listening = bind("127.0.0.1", 0)
        running = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="error", ws="none"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            server = Server(url(listening), key, 0, tmp_path)
            line = Line(server, chunked=chunked)
            with contextlib.suppress(OSError):
                for byte in BODY[:200]:
                    line.socket.sendall(b"1\r\n%c\r\n" % byte if chunked else bytes([byte]))
                    time.sleep(0.01)
            status, _, body = line.answer()
            assert (status, body["error"]["code"]) == (408, "request_timeout")
            assert "slower than 1000 bytes a second" in body["error"]["message"]
            line.close()
            quick = Line(server)
            for start in range(0, len(BODY), 4000):
                quick.socket.sendall(BODY[start : start + 4000])
                time.sleep(0.2)
            assert quick.answer()[0] == 200
            quick.close()
        finally:
            running.should_exit = True
            thread.join()
            listening.close()
