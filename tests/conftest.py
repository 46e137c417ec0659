"""A real server on a socket, real recordings, and the measure they are held against."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from coverage import Coverage

# Threads that wait for each other by spinning take seconds on a machine that has other tests to run.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"


@contextmanager
def trusting_nobody() -> Iterator[None]:
    """Those who certify others are not read, by clients here and in processes that begin here: that takes each client
    25 ms, and nobody who is asked has a certificate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_DIR", str(DATA))
        patch.delenv("SSL_CERT_FILE", raising=False)
        yield


@contextmanager
def untraced() -> Iterator[None]:
    """Nothing is measured for coverage, here and in processes that begin here: that makes Python half as fast."""
    tracing = Coverage.current()
    with pytest.MonkeyPatch.context() as patch:
        if tracing is not None:
            patch.setenv("COVERAGE_PROCESS_CONFIG", "")
            tracing.stop()
        try:
            yield
        finally:
            if tracing is not None:
                tracing.start()


@pytest.fixture(scope="module", name="untraced")
def untraced_fixture() -> Iterator[None]:
    """For tests of load, for those that run little of the library, and for those that run what others do."""
    with untraced():
        yield


@dataclass(frozen=True)
class Recording:
    """One line of `tests/data/manifest.json`."""

    file: str
    text: str
    duration: float
    lossless: bool

    @property
    def path(self) -> Path:
        return DATA / self.file


@cache
def documented() -> dict[str, Any]:
    """`docs/asyncapi.yaml`, read with C."""
    document: dict[str, Any] = yaml.load((ROOT / "docs" / "asyncapi.yaml").read_bytes(), yaml.CSafeLoader)
    return document


def _manifest() -> tuple[list[Recording], list[tuple[Path, str]]]:
    manifest = json.loads((DATA / "manifest.json").read_text(encoding="utf-8"))
    recordings = [
        Recording(entry["file"], entry["text"], entry["duration"], entry["lossless"]) for entry in manifest["files"]
    ]
    return recordings, [(DATA / entry["file"], entry["what"]) for entry in manifest["not_audio"]]


RECORDINGS, NOT_AUDIO = _manifest()


def word_errors(truth: str, heard: str) -> float:
    """The word error rate: edits that make `heard` of `truth`, by the words of `truth`."""
    reference, words = truth.split(), heard.lower().split()
    row = list(range(len(words) + 1))
    for number, expected in enumerate(reference, start=1):
        diagonal, row[0] = row[0], number
        for column, word in enumerate(words, start=1):
            diagonal, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, diagonal + (expected != word)),
            )
    return row[-1] / max(len(reference), 1)


@dataclass(frozen=True)
class Server:
    """A `voxgate serve` (or `inference`) process."""

    url: str
    key: str
    pid: int
    data_dir: Path

    @property
    def auth(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def transcribe(
        self, file: Path | tuple[str, bytes], path: str = "/v1/audio/transcriptions", **data: object
    ) -> httpx.Response:
        """One request with httpx; the audio's field and the model's follow from the contract's path."""
        audio, model = ("audio", "model_id") if path == "/v1/stt/transcribe" else ("file", "model")
        name, content = (file.name, file.read_bytes()) if isinstance(file, Path) else file
        form = {model: "whisper-1"} | data
        return httpx.post(self.url + path, headers=self.auth, data=form, files={audio: (name, content)}, timeout=120)


def start_server(data_dir: Path, command: str = "serve", **environment: str) -> tuple[subprocess.Popen[str], Server]:
    """Start `voxgate COMMAND` on a free port and wait until it says where."""
    arguments = [sys.executable, "-m", "voxgate", command, "--port", "0"]
    if command == "serve":
        arguments += ["--data-dir", str(data_dir)]
    data_dir.mkdir(parents=True, exist_ok=True)
    log = (data_dir / "log").open("w", encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VOXGATE_")}
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=clean | {"VOXGATE_SPOOL_DIR": str(data_dir / "spool")} | environment,
    )
    log.close()
    assert process.stdout is not None
    key = ""
    for line in process.stdout:
        if " listens at " in line:
            url = line.split(" listens at ")[1].strip()
            if command == "inference":
                break
        if line.startswith("API key"):
            key = (data_dir / "api-key").read_text(encoding="ascii").strip()
            break
    else:
        stop_server(process)
        raise AssertionError((data_dir / "log").read_text(encoding="utf-8"))
    deadline = time.monotonic() + 30
    while httpx.get(f"{url}/health").status_code != 200:
        assert time.monotonic() < deadline
    return process, Server(url, key, process.pid, data_dir)


def stop_server(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(30)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def inference_service(directory: Path, **environment: str) -> Iterator[Server]:
    """`voxgate inference`, once it is ready."""
    process, server = start_server(directory, "inference", **environment)
    try:
        wait_until_ready(server)
        yield server
    finally:
        stop_server(process)


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + 120
    with httpx.Client(base_url=server.url) as client:
        while client.get("/health/ready").status_code != 200:
            assert time.monotonic() < deadline, (server.data_dir / "log").read_text(encoding="utf-8")
            time.sleep(0.05)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The gateway with its embedded recognizer, as `voxgate serve` runs it."""
    process, server = start_server(tmp_path_factory.mktemp("server"))
    yield server
    stop_server(process)
