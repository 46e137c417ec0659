"""The engine's processes: bounded, replaced when they die, stopped when nobody waits for them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import io
import json
import select
import socket
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from conftest import DATA, Server, start_server, stop_server
from fakes.live import Live
from voxgate.audio.decode import decode

SPEECH = DATA / "a-mp3-cbr.mp3"  # "Please send the letter."
LONG = DATA / "long-slt.flac"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A gateway with one engine and room for one waiting request."""
    environment = {"VOXGATE_ENGINE_WORKERS": "1", "VOXGATE_ENGINE_QUEUE": "1"}
    process, server = start_server(tmp_path_factory.mktemp("small"), **environment)
    yield server
    stop_server(process)


@pytest.fixture(scope="module")
def long_speech() -> bytes:
    """A minute of speech as WAV: ten seconds of work for the embedded engine, and more on a busy machine."""
    return speech(11)


def speech(times: int) -> bytes:
    """Three sentences, so many times, as WAV."""
    samples = b"".join(decode(str(LONG), "flac", max_seconds=60))
    out = io.BytesIO()
    with wave.open(out, "wb") as wav:
        wav.setparams((1, 2, 16_000, 0, "NONE", ""))
        wav.writeframes(samples * times)
    return out.getvalue()


def engines(server: Server) -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process(server.pid).children()
        if process.status() != psutil.STATUS_ZOMBIE and "voxgate.engines.worker" in " ".join(process.cmdline())
    ]


def busy(server: Server) -> bool:
    """Whether an engine is computing, by the processor time that it takes."""
    before = sum(p.cpu_times().user for p in engines(server))
    time.sleep(0.3)
    return bool(sum(p.cpu_times().user for p in engines(server)) - before > 0.15)


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@contextlib.contextmanager
def hanging_upload(server: Server, audio: bytes) -> Iterator[socket.socket]:
    """A whole request on a raw socket whose answer nobody reads."""
    request = httpx.Request(
        "POST", f"{server.url}/v1/audio/transcriptions", data={"model": "whisper-1"}, files={"file": ("a.wav", audio)}
    )
    head = f"POST {request.url.path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.key}\r\n"
    for name in ("content-type", "content-length"):
        head += f"{name}: {request.headers[name]}\r\n"
    with socket.create_connection((request.url.host, request.url.port or 80)) as client:
        client.sendall(head.encode() + b"\r\n" + request.read())
        yield client


def test_health_answers_while_every_engine_is_busy(server: Server, long_speech: bytes) -> None:
    with hanging_upload(server, long_speech), hanging_upload(server, long_speech), httpx.Client() as client:
        wait_for(lambda: busy(server))
        taken = []
        for _ in range(50):
            begun = time.perf_counter()
            assert client.get(f"{server.url}/health").status_code == 200
            taken.append(time.perf_counter() - begun)
    # The median, since one slow answer of fifty on a shared machine says nothing of the server.
    assert sorted(taken)[25] < 0.05


def test_a_client_that_hangs_up_stops_its_engine(small: Server, long_speech: bytes) -> None:
    (engine,) = engines(small)
    with hanging_upload(small, long_speech):
        wait_for(lambda: busy(small))
    wait_for(lambda: not busy(small), seconds=5)
    assert small.transcribe(SPEECH).json()["text"] == "please send the letter"
    assert engines(small)[0].pid == engine.pid or not engine.is_running()


def test_a_full_queue_is_503_with_retry_after(small: Server, long_speech: bytes) -> None:
    with hanging_upload(small, long_speech):
        wait_for(lambda: busy(small))
        # One of them takes the only place, whichever comes first, and the other is answered at once.
        with hanging_upload(small, long_speech) as one, hanging_upload(small, long_speech) as other:
            (refused, *more), _, _ = select.select([one, other], [], [], 60)
            with http.client.HTTPResponse(refused, method="POST") as refusal:
                refusal.begin()
                body = json.loads(refusal.read())
    assert not more
    assert refusal.status == 503
    assert body["error"]["code"] == "overloaded"
    assert int(refusal.headers["retry-after"]) >= 1
    wait_for(lambda: not busy(small), seconds=10)
    assert small.transcribe(SPEECH).status_code == 200


def test_an_engine_that_dies_is_replaced_and_its_request_answered(small: Server) -> None:
    assert small.transcribe(SPEECH).status_code == 200
    (engine,) = engines(small)
    before = engine.cpu_times().user
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(small.transcribe, ("long.wav", speech(2)))
        wait_for(lambda: engine.cpu_times().user - before > 0.15)  # of the two seconds that it takes
        engine.kill()
        response = answer.result(60)
    assert response.status_code == 200
    assert response.headers["x-voxgate-attempts"] == "2"
    assert small.transcribe(SPEECH).status_code == 200


def test_an_engine_that_dies_idle_costs_no_request(small: Server) -> None:
    (engine,) = engines(small)
    engine.kill()
    wait_for(lambda: engine not in psutil.Process(small.pid).children(), seconds=10)
    assert small.transcribe(SPEECH).status_code == 200


def test_no_file_of_an_upload_is_left_behind(small: Server, long_speech: bytes) -> None:
    wait_for(lambda: not busy(small))
    assert small.transcribe(SPEECH).status_code == 200
    (spool,) = (small.data_dir / "spool").iterdir()
    wait_for(lambda: not list(spool.iterdir()))


def test_engines_end_with_a_server_that_is_killed(tmp_path: Path, long_speech: bytes) -> None:
    process, server = start_server(tmp_path, VOXGATE_ENGINE_WORKERS="1")
    with hanging_upload(server, long_speech):
        wait_for(lambda: busy(server))
        (engine,) = engines(server)
        process.kill()
        process.wait()
        wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, seconds=15)
    stop_server(process)
    again, server = start_server(tmp_path, VOXGATE_ENGINE_WORKERS="1")
    spools = list((tmp_path / "spool").iterdir())
    stop_server(again)
    assert len(spools) == 1, "the killed server's spool is swept by the next one"


def test_an_engine_that_dies_while_somebody_speaks_is_replaced_and_hears_it_again(small: Server) -> None:
    spoken = b"".join(decode(str(LONG), "flac", max_seconds=60))
    expected = small.transcribe(LONG).json()["text"].split()[:3]
    before = {engine.pid for engine in engines(small)}
    killed = False
    with Live(small.url, None, headers=small.auth) as live:
        for number, at in enumerate(range(0, len(spoken), 3200)):
            live.send(spoken[at : at + 3200])
            time.sleep(0.02)  # and goes on while there is no engine
            for engine in engines(small) if number >= 20 and not killed else ():
                if engine.pid not in before:
                    engine.kill()
                    killed = True
        done = live.close()
    assert killed
    assert done["text"].split()[:3] == expected
