"""The live socket from JavaScript: Node with the package ws, and a page in a browser."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import httpx
import pytest

from conftest import DATA, Server, start_server, stop_server, word_errors
from customers import SPEECH, Customer, Office

CLIENTS = Path(__file__).parent / "clients"
SHORT = DATA / "a-wav-s16.wav"
CREDIT = 1_000_000
PATIENCE = 180.0  # seconds that a busy machine may take for anything
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = [
    "--headless",
    "--no-sandbox",  # which wants rights that a container has not
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--autoplay-policy=no-user-gesture-required",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    process, server = start_server(tmp_path_factory.mktemp("live"), VOXGATE_ENGINE_WORKERS="1")
    yield server
    stop_server(process)


@pytest.fixture(scope="module")
def office(server: Server) -> Office:
    return Office(server.data_dir)


@pytest.fixture
def customer(office: Office) -> Customer:
    return office.open(credit=CREDIT)


@pytest.fixture(scope="module")
def text(server: Server) -> str:
    """What the other endpoint hears."""
    response = server.transcribe(SPEECH)
    assert response.status_code == 200
    return str(response.json()["text"])


def decoded(path: Path) -> bytes:
    with av.open(str(path)) as media:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=16_000)
        frames = [made for frame in media.decode(audio=0) for made in resampler.resample(frame)]
        frames += resampler.resample(None)
    return b"".join(frame.to_ndarray().tobytes() for frame in frames)


@pytest.fixture(scope="module")
def samples() -> bytes:
    return decoded(SPEECH)


def check_session(outcome: dict[str, Any], text: str, most_errors: float) -> dict[str, Any]:
    """One that went well, heard as it should be; returns its `done`."""
    assert "error" not in outcome, outcome
    events = outcome["events"]
    kinds = [event["type"] for event in events]
    assert (kinds[:1], kinds[-1:]) == (["ready"], ["done"]), outcome
    assert set(kinds[1:-1]) <= {"partial", "final"}
    assert [event["sequence"] for event in events] == list(range(len(events)))
    assert outcome["code"] == 1000
    assert outcome["extensions"] == ""
    finals = " ".join(event["text"] for event in events if event["type"] == "final")
    assert word_errors(text, finals) <= most_errors, finals
    done: dict[str, Any] = events[-1]
    assert done["text"] == finals
    return done


def check_paid(office: Office, customer: Customer, done: dict[str, Any], cost: int) -> None:
    assert office.money(customer.account) == (CREDIT - cost, 0)
    assert round(float(done["cost"]) * 1_000_000) == cost
    assert round(float(done["balance"]) * 1_000_000) == CREDIT - cost


# --- Node -------------------------------------------------------------------------------------------


def run_node(node: str, server: Server, key: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [node, "live.mjs", *arguments],
        cwd=CLIENTS,
        env=os.environ | {"VOXGATE_BASE_URL": server.url, "VOXGATE_API_KEY": key},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


@pytest.mark.parametrize(("how", "protocol"), [("header", ""), ("subprotocol", "voxgate.key")])
def test_node_hears_what_the_upload_says(
    node: str, server: Server, office: Office, tmp_path: Path, how: str, protocol: str
) -> None:
    customer, samples = office.open(credit=CREDIT), decoded(SHORT)
    (tmp_path / "speech.pcm").write_bytes(samples)
    text = str(server.transcribe(SHORT).json()["text"])
    outcome = run_node(node, server, customer.key, str(tmp_path / "speech.pcm"), how)
    done = check_session(outcome, text, 0.05)
    assert outcome["protocol"] == protocol
    assert done["duration"] == pytest.approx(len(samples) / 32_000, abs=0.001)
    check_paid(office, customer, done, 110)


@pytest.mark.parametrize("how", ["header", "subprotocol"])
def test_node_reads_why_it_is_refused(node: str, server: Server, tmp_path: Path, how: str) -> None:
    refused = run_node(node, server, "vg_wrong", os.devnull, how)["refused"]
    assert refused["status"] == 401
    assert refused["headers"]["x-request-id"].startswith("req_")
    assert json.loads(refused["body"])["error"]["code"] == "unauthenticated"


# --- A browser --------------------------------------------------------------------------------------


class Site:
    """The server of a page: it has the key, and the page has a token that this gets for it. A context manager."""

    def __init__(self, server: Server, customer: Customer, samples: bytes) -> None:
        self.outcomes: queue.Queue[dict[str, Any]] = queue.Queue()
        self.tokens: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/":
                    self.answer("text/html", (CLIENTS / "live.html").read_bytes())
                elif path == "/speech":
                    self.answer("audio/mpeg", SPEECH.read_bytes())
                elif path == "/samples":
                    self.answer("application/octet-stream", samples)
                elif path == "/token":
                    self.answer("application/json", site.token(server, customer))
                else:
                    self.send_error(404)

            def do_POST(self) -> None:
                outcome = self.rfile.read(int(self.headers["content-length"]))
                self.answer("text/plain", b"")
                site.outcomes.put(json.loads(outcome))

            def answer(self, kind: str, content: bytes) -> None:
                self.send_response(200)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://localhost:{self._server.server_address[1]}/"

    def __enter__(self) -> Site:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def token(self, server: Server, customer: Customer) -> bytes:
        response = httpx.post(f"{server.url}/v1/stt/tokens", headers=customer.headers, timeout=PATIENCE)
        self.tokens.append(response.json()["token"])
        return json.dumps({"url": server.url.replace("http", "ws", 1), "token": self.tokens[-1]}).encode()


@contextlib.contextmanager
def browsing(address: str, profile: Path) -> Iterator[None]:
    """A browser of its own, with its helpers in one process group, until the end of the block."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("There is neither Chromium nor Chrome here, which this test runs a page in.")
    with (profile.parent / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            [found, *OPTIONS, f"--user-data-dir={profile}", address],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# MediaRecorder's Opus is not what was recorded, and its clock is the machine's: most of the words.
@pytest.mark.parametrize(("run", "most_errors"), [("pcm", 0.05), ("opus", 0.4)])
def test_a_page_is_heard_with_a_token(
    server: Server,
    office: Office,
    customer: Customer,
    text: str,
    samples: bytes,
    tmp_path: Path,
    run: str,
    most_errors: float,
) -> None:
    with Site(server, customer, samples) as site, browsing(f"{site.url}?run={run}", tmp_path / "profile"):
        outcome = site.outcomes.get(timeout=PATIENCE)
    done = check_session(outcome, text, most_errors)
    assert outcome["wasClean"]
    assert outcome["protocol"] == "voxgate.key"
    duration = done["usage"]["seconds"]
    if run == "pcm":
        assert duration == 3.1
    else:
        assert 2.0 <= duration <= 30.0
    check_paid(office, customer, done, round(duration * 100))
    log = (server.data_dir / "log").read_text(encoding="utf-8")
    assert "Traceback" not in log
    assert site.tokens[0] not in log
    assert customer.key not in log
