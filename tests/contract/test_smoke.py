"""`voxgate smoke` says yes to a gateway that works, and names each thing that does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from conftest import Server


def smoke(url: str, key: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "voxgate", "smoke", "--base-url", url, "--api-key", key, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("suffix", ["", "/v1", "/"])
def test_a_gateway_that_works_passes_every_step(server: Server, suffix: str) -> None:
    done = smoke(server.url + suffix, server.key)
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines), done.stderr) == (0, 10, "")
    assert all(line.startswith("ok ") for line in lines)


def test_a_wrong_key_fails_what_needs_one(server: Server) -> None:
    done = smoke(server.url, "vg_wrong")
    passed = [line.partition("ms")[2].strip() for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert (done.returncode, passed) == (1, ["it answers", "a wrong key is refused", "an unknown path is refused"])
    assert "401 instead of 200" in done.stderr


def test_a_model_that_is_not_there_is_named(server: Server) -> None:
    done = smoke(server.url, server.key, "--model", "nobody-has-it")
    assert done.returncode == 1
    assert "model_not_found" in done.stderr


@pytest.fixture
def page() -> Iterator[str]:
    """Some other web server, which answers everything with 200 and a page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.send_header("content-length", "6")
            self.end_headers()
            self.wfile.write(b"<html>")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        thread = Thread(target=other.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{other.server_address[1]}"
        other.shutdown()
        thread.join()


def test_another_service_is_not_taken_for_one(page: str) -> None:
    done = smoke(page, "vg_key")
    assert done.returncode == 1
    assert done.stdout.count("FAILED") >= 6


def test_nobody_there_is_a_failure_and_no_traceback() -> None:
    done = smoke("http://127.0.0.1:9", "vg_key")
    assert (done.returncode, done.stdout.count("FAILED")) == (1, 10)
    assert "ConnectError" in done.stderr
    assert "Traceback" not in done.stderr
