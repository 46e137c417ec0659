"""Sizes at the limit, and refusals before a whole upload was sent: clients see the answer, not a reset."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import requests

from conftest import DATA, Server
from customers import Customer, Office
from voxgate.accounts import RateLimits, keys

CLIENTS = Path(__file__).parent / "clients"
LIMIT = 26_214_400
MIB = 1024 * 1024
PATH = "/v1/audio/transcriptions"
AT_ONCE = 5.0  # seconds, generous: it takes a few milliseconds


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any


Upload = Callable[[str, str, Path], Answer]


def by_curl(url: str, key: str, file: Path, *options: str) -> Answer:
    # Over 1 MB, curl asks with "Expect: 100-continue" and waits a second for the answer.
    form = ["-F", "model=whisper-1", "-F", f"file=@{file}"]
    done = subprocess.run(
        ["curl", "-sS", "-m", "60", "-w", "\n%{http_code}", "-H", f"Authorization: Bearer {key}", *form, *options, url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    body, _, status = done.stdout.rpartition("\n")
    return Answer(int(status), json.loads(body))


def by_curl_at_once(url: str, key: str, file: Path) -> Answer:
    return by_curl(url, key, file, "-H", "Expect:")


def by_requests(url: str, key: str, file: Path) -> Answer:
    with file.open("rb") as audio:
        answer = requests.post(
            url,
            headers={"authorization": f"Bearer {key}"},
            data={"model": "whisper-1"},
            files={"file": audio},
            timeout=60,
        )
    return Answer(answer.status_code, answer.json())


def by_httpx(url: str, key: str, file: Path) -> Answer:
    with file.open("rb") as audio:
        answer = httpx.post(
            url,
            headers={"authorization": f"Bearer {key}"},
            data={"model": "whisper-1"},
            files={"file": audio},
            timeout=60,
        )
    return Answer(answer.status_code, answer.json())


def by_openai(url: str, key: str, file: Path) -> Answer:
    base_url = url.removesuffix("/audio/transcriptions")
    with openai.OpenAI(api_key=key, base_url=base_url, max_retries=0, timeout=60) as client:
        try:
            answer = client.audio.transcriptions.with_raw_response.create(model="whisper-1", file=file)
        except openai.APIStatusError as error:
            return Answer(error.status_code, error.response.json())
    return Answer(answer.status_code, json.loads(answer.content))


UPLOADS: dict[str, Upload] = {
    "curl": by_curl,
    "curl without Expect": by_curl_at_once,
    "requests": by_requests,
    "httpx": by_httpx,
    "openai": by_openai,
}
every_client = pytest.mark.parametrize("upload", list(UPLOADS.values()), ids=list(UPLOADS))


def silence(path: Path, size: int) -> Path:
    """A WAV file of exactly `size` bytes, digital silence: 48 kHz, stereo, 32 bits, so 68 s at the limit."""
    rate, frame = 48_000, 8
    header = b"RIFF" + struct.pack("<I", size - 8) + b"WAVEfmt "
    header += struct.pack("<IHHIIHH", 16, 1, 2, rate, rate * frame, frame, 32) + b"data" + struct.pack("<I", size - 44)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    directory = tmp_path_factory.mktemp("uploads")
    return {size: silence(directory / f"{size}.wav", size) for size in (LIMIT, LIMIT + 1, 24 * MIB, 64 * MIB)}


@pytest.fixture(autouse=True)
def _serves_on(server: Server) -> Iterator[None]:
    """Whatever a test did, the server answers the next request, and leaves no upload behind."""
    yield
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.transcribe(DATA / "silence.flac").status_code == 200
    assert [path for path in (server.data_dir / "spool").rglob("*") if path.is_file()] == []


def check(answer: Answer, status: int, code: str) -> None:
    assert answer.status == status
    assert answer.body.keys() == {"error"}
    assert answer.body["error"].keys() == {"message", "type", "param", "code"}
    assert answer.body["error"]["code"] == code
    assert answer.body["error"]["message"]


# --- The limit --------------------------------------------------------------------------------


@every_client
def test_a_file_of_exactly_the_limit_is_transcribed(server: Server, files: dict[int, Path], upload: Upload) -> None:
    begun = time.monotonic()
    answer = upload(server.url + PATH, server.key, files[LIMIT])
    assert answer.status == 200
    assert answer.body["text"] == ""
    assert time.monotonic() - begun < 30


@every_client
def test_one_byte_more_is_too_large(server: Server, files: dict[int, Path], upload: Upload) -> None:
    answer = upload(server.url + PATH, server.key, files[LIMIT + 1])
    check(answer, 413, "invalid_input")
    assert answer.body["error"]["param"] == "file"
    assert str(LIMIT) in answer.body["error"]["message"]


@every_client
def test_64_mib_are_refused_with_an_answer_and_not_a_reset(
    server: Server, files: dict[int, Path], upload: Upload
) -> None:
    check(upload(server.url + PATH, server.key, files[64 * MIB]), 413, "invalid_input")


@pytest.mark.parametrize(
    "path", [PATH, "/v1/stt/transcribe", "/audio/transcriptions", "/litellm/v1/audio/transcriptions"]
)
def test_every_contract_has_the_same_limit(server: Server, files: dict[int, Path], path: str) -> None:
    audio, model = ("audio", "model_id") if path == "/v1/stt/transcribe" else ("file", "model")
    for size, status in ((LIMIT, 200), (LIMIT + 1, 413)):
        with files[size].open("rb") as file:
            answer = httpx.post(
                server.url + path, headers=server.auth, data={model: "whisper-1"}, files={audio: file}, timeout=60
            )
        assert answer.status_code == status
    assert answer.json()["error"]["param"] == audio


# --- Refusals in the middle of an upload ------------------------------------------------------


@every_client
def test_a_wrong_key_is_told_in_the_middle_of_a_large_upload(
    server: Server, files: dict[int, Path], upload: Upload
) -> None:
    check(upload(server.url + PATH, "vg_wrong", files[24 * MIB]), 401, "unauthenticated")


PATHLESS = {name: upload for name, upload in UPLOADS.items() if name != "openai"}
every_plain_client = pytest.mark.parametrize("upload", list(PATHLESS.values()), ids=list(PATHLESS))


@every_plain_client
def test_an_unknown_path_is_told_in_the_middle_of_a_large_upload(
    server: Server, files: dict[int, Path], upload: Upload
) -> None:
    check(upload(f"{server.url}/v2/audio/transcriptions", server.key, files[24 * MIB]), 404, "not_found")


@every_plain_client
def test_a_wrong_method_is_told_in_the_middle_of_a_large_upload(
    server: Server, files: dict[int, Path], upload: Upload
) -> None:
    check(upload(f"{server.url}/v1/models", server.key, files[24 * MIB]), 405, "method_not_allowed")


@pytest.mark.parametrize("content_type", ["application/json", "audio/wav", "multipart/form-data"])
@pytest.mark.parametrize("client", ["httpx", "requests"])
def test_a_body_that_is_no_form_is_told_in_the_middle_of_a_large_upload(
    server: Server, files: dict[int, Path], client: str, content_type: str
) -> None:
    url, content = server.url + PATH, files[24 * MIB].read_bytes()
    headers = server.auth | {"content-type": content_type}
    answer: httpx.Response | requests.Response
    if client == "httpx":
        answer = httpx.post(url, headers=headers, content=content, timeout=60)
    else:
        answer = requests.post(url, headers=headers, data=content, timeout=60)
    check(Answer(answer.status_code, answer.json()), 400, "invalid_input")


# --- Refusals of a customer, by the headers ---------------------------------------------------

DENIED = {401: "unauthenticated", 402: "insufficient_quota", 429: "rate_limited"}
each_denial = pytest.mark.parametrize("status", DENIED)


@pytest.fixture(scope="module")
def denied(server: Server) -> dict[int, Customer]:
    """Who gets which status: a stranger, one without credit, and one whose minute is used up."""
    office = Office(server.data_dir)
    return {
        401: Customer("", keys.generate(), ""),
        402: office.open(credit=0),
        429: office.open(limits=RateLimits(requests_per_minute=1)),
    }


@pytest.fixture
def who(server: Server, denied: dict[int, Customer], status: int) -> Customer:
    httpx.get(f"{server.url}/v1/models", headers=denied[status].headers)  # takes what the minute may have given back
    return denied[status]


@each_denial
@every_client
def test_a_denied_customer_sees_the_status_and_no_reset_at_24_mib(
    server: Server, files: dict[int, Path], who: Customer, status: int, upload: Upload
) -> None:
    check(upload(server.url + PATH, who.key, files[24 * MIB]), status, DENIED[status])


@each_denial
def test_a_denied_customer_sees_the_status_in_axios(
    server: Server, node: str, files: dict[int, Path], who: Customer, status: int
) -> None:
    outcome = by_node(server, node, who.key, "axios.mjs", str(files[24 * MIB]))
    check(Answer(outcome["status"], outcome["body"]), status, DENIED[status])


@each_denial
def test_a_denied_customer_sees_the_status_in_the_node_sdk(
    server: Server, node: str, files: dict[int, Path], who: Customer, status: int
) -> None:
    options = {"maxRetries": 0} if status == 429 else {}
    outcome = by_node(server, node, who.key, "sdk.mjs", str(files[24 * MIB]), "{}", json.dumps(options))
    names = {401: "AuthenticationError", 402: "APIError", 429: "RateLimitError"}
    error = outcome["error"]
    assert (error["name"], error["status"], error["code"]) == (names[status], status, DENIED[status])
    assert outcome["requests"] == 1


def by_node(server: Server, node: str, key: str, script: str, *arguments: str) -> Any:
    done = subprocess.run(
        [node, str(CLIENTS / script), *arguments],
        env=os.environ | {"VOXGATE_BASE_URL": server.url, "VOXGATE_API_KEY": key},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- Chunked, without a length ----------------------------------------------------------------


def form_pieces(audio: Path) -> Iterator[bytes]:
    yield b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
    yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    with audio.open("rb") as file:
        while piece := file.read(MIB):
            yield piece
    yield b"\r\n--b--\r\n"


FORM_HEADERS = {"content-type": "multipart/form-data; boundary=b"}


def chunked_by_httpx(server: Server, audio: Path) -> Answer:
    answer = httpx.post(server.url + PATH, headers=server.auth | FORM_HEADERS, content=form_pieces(audio), timeout=60)
    return Answer(answer.status_code, answer.json())


def chunked_by_requests(server: Server, audio: Path) -> Answer:
    answer = requests.post(server.url + PATH, headers=server.auth | FORM_HEADERS, data=form_pieces(audio), timeout=60)
    return Answer(answer.status_code, answer.json())


def chunked_by_curl(server: Server, audio: Path) -> Answer:
    return by_curl(server.url + PATH, server.key, audio, "-H", "Transfer-Encoding: chunked")


CHUNKED: dict[str, Callable[[Server, Path], Answer]] = {
    "httpx": chunked_by_httpx,
    "requests": chunked_by_requests,
    "curl": chunked_by_curl,
}


@pytest.mark.parametrize(
    ("size", "status"),
    [(LIMIT, 200), (LIMIT + 1, 413), (64 * MIB, 413)],
    ids=["the limit", "one byte more", "64 MiB"],
)
@pytest.mark.parametrize("send", list(CHUNKED.values()), ids=list(CHUNKED))
def test_a_chunked_upload_has_the_same_limit(
    server: Server, files: dict[int, Path], send: Callable[[Server, Path], Answer], size: int, status: int
) -> None:
    answer = send(server, files[size])
    if status == 200:
        assert answer.status == 200
    else:
        check(answer, 413, "invalid_input")


# --- On the wire ------------------------------------------------------------------------------


class Wire:
    """One connection, as bytes."""

    def __init__(self, server: Server) -> None:
        address = urlsplit(server.url)
        assert address.hostname is not None
        assert address.port is not None
        self.socket = socket.create_connection((address.hostname, address.port), timeout=30)
        self._received = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def head(self, key: str, *headers: str, method: str = "POST", path: str = PATH) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: voxgate", f"Authorization: Bearer {key}"]
        lines += ["Content-Type: multipart/form-data; boundary=b", *headers, "", ""]
        self.socket.sendall("\r\n".join(lines).encode())

    def status(self) -> tuple[int, dict[str, str]]:
        """The next status, an interim one too, and its headers."""
        while b"\r\n\r\n" not in self._received:
            self._more()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(first.split()[1]), headers

    def answer(self) -> Answer:
        """The next answer, which must be a final one."""
        status, headers = self.status()
        assert status >= 200
        while len(self._received) < int(headers["content-length"]):
            self._more()
        return Answer(status, json.loads(self._received[: int(headers["content-length"])]))

    def _more(self) -> None:
        received = self.socket.recv(65536)
        assert received, "the server hung up without an answer"
        self._received += received


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    with Wire(server) as wire:
        yield wire


@pytest.mark.parametrize("length", [10**9, 10**13], ids=["1 GB", "10 TB"])
@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)], ids=["headers alone", "with Expect"])
def test_a_declared_length_over_the_limit_is_refused_before_the_body(
    server: Server, wire: Wire, length: int, expect: tuple[str, ...]
) -> None:
    begun = time.monotonic()
    wire.head(server.key, f"Content-Length: {length}", *expect)
    check(wire.answer(), 413, "invalid_input")
    assert time.monotonic() - begun < AT_ONCE


REFUSED: dict[str, tuple[str, str, str, int, str]] = {
    "wrong key": ("vg_wrong", "POST", PATH, 401, "unauthenticated"),
    "unknown path": ("", "POST", "/v2/nothing", 404, "not_found"),
    "wrong method": ("", "PUT", PATH, 405, "method_not_allowed"),
}


@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)], ids=["headers alone", "with Expect"])
@pytest.mark.parametrize(("key", "method", "path", "status", "code"), list(REFUSED.values()), ids=list(REFUSED))
def test_a_refusal_by_the_headers_comes_before_the_body_and_instead_of_100_continue(
    server: Server, wire: Wire, key: str, method: str, path: str, status: int, code: str, expect: tuple[str, ...]
) -> None:
    begun = time.monotonic()
    wire.head(key or server.key, "Content-Length: 1000000", *expect, method=method, path=path)
    check(wire.answer(), status, code)
    assert time.monotonic() - begun < AT_ONCE


def test_a_right_key_is_told_to_continue_and_then_served(server: Server, wire: Wire) -> None:
    body = b"".join(form_pieces(DATA / "b-slt.mp3"))
    wire.head(server.key, f"Content-Length: {len(body)}", "Expect: 100-continue")
    assert wire.status()[0] == 100
    wire.socket.sendall(body)
    answer = wire.answer()
    assert answer.status == 200
    assert answer.body["text"] == "the weather is nice today and we are going to the park"


# RFC 9110, 10.1.1: a client that sends Expect need not wait for the answer.
@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)], ids=["headers alone", "with Expect"])
@pytest.mark.parametrize("size", [MIB, 24 * MIB], ids=["1 MiB", "24 MiB"])
@pytest.mark.parametrize("key", ["right", "wrong"])
def test_one_who_sends_everything_before_it_reads_gets_its_answer(
    server: Server, wire: Wire, tmp_path: Path, key: str, size: int, expect: tuple[str, ...]
) -> None:
    body = b"".join(form_pieces(silence(tmp_path / "audio.wav", size)))
    wire.head(server.key if key == "right" else "vg_wrong", f"Content-Length: {len(body)}", *expect)
    wire.socket.sendall(body)
    status, _ = wire.status()
    if status == 100:
        status, _ = wire.status()
    assert status == (200 if key == "right" else 401)


def test_a_large_upload_that_stops_in_the_middle_harms_nobody(server: Server, wire: Wire) -> None:
    wire.head(server.key, f"Content-Length: {24 * MIB}")
    wire.socket.sendall(b"".join(form_pieces(DATA / "silence.flac"))[:-8] + os.urandom(2 * MIB))


def test_a_connection_serves_again_after_a_refusal_whose_body_was_read(server: Server) -> None:
    with httpx.Client(headers=server.auth) as client:
        for _ in range(3):
            refused = client.post(server.url + PATH, data={"model": "whisper-1"}, files={"file": ("a", b"text")})
            assert refused.status_code == 400
            assert "connection" not in refused.headers
            served = client.post(
                server.url + PATH, data={"model": "whisper-1"}, files={"file": (DATA / "silence.flac").read_bytes()}
            )
            assert served.status_code == 200


@each_denial
@pytest.mark.parametrize(
    "path", [PATH, "/v1/stt/transcribe", "/audio/transcriptions", "/litellm/v1/audio/transcriptions"]
)
@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)], ids=["headers alone", "with Expect"])
def test_a_denial_comes_before_the_body_and_instead_of_100_continue(
    server: Server, wire: Wire, who: Customer, status: int, path: str, expect: tuple[str, ...]
) -> None:
    begun = time.monotonic()
    wire.head(who.key, f"Content-Length: {24 * MIB}", *expect, path=path)
    check(wire.answer(), status, DENIED[status])
    assert time.monotonic() - begun < AT_ONCE


@each_denial
def test_a_denial_by_the_headers_takes_hardly_longer_than_any_answer(
    server: Server, who: Customer, status: int
) -> None:
    """Both on a new connection, one after the other; 50 ms is what is promised."""
    health: list[float] = []
    denial: list[float] = []
    for _ in range(15):
        for times, key, method, path in ((health, "", "GET", "/health"), (denial, who.key, "POST", PATH)):
            begun = time.perf_counter()
            with Wire(server) as wire:
                wire.head(key, *([f"Content-Length: {24 * MIB}"] if key else []), method=method, path=path)
                assert wire.status()[0] == (status if key else 200)
                times.append(time.perf_counter() - begun)
    promised, usual = statistics.median(denial), statistics.median(health)
    print(f"{status}: {promised * 1000:.2f} ms by headers alone, at most {max(denial) * 1000:.2f}; ", end="")
    print(f"/health: {usual * 1000:.2f} ms")
    assert promised < 0.05 + usual
    assert max(denial) < AT_ONCE


@each_denial
def test_a_denied_customer_who_sends_everything_first_gets_the_answer(
    server: Server, wire: Wire, files: dict[int, Path], who: Customer, status: int
) -> None:
    body = b"".join(form_pieces(files[24 * MIB]))
    wire.head(who.key, f"Content-Length: {len(body)}")
    wire.socket.sendall(body)
    check(wire.answer(), status, DENIED[status])


@each_denial
def test_what_a_denied_customer_goes_on_sending_is_not_read_for_ever(
    server: Server, wire: Wire, who: Customer, status: int
) -> None:
    wire.head(who.key, f"Content-Length: {10**9}")
    check(wire.answer(), status, DENIED[status])
    sent = sent_until_the_connection_ends(wire, 400 * MIB)
    assert 24 * MIB <= sent < 400 * MIB  # as much as anybody may send, and not all that somebody can


def sent_until_the_connection_ends(wire: Wire, most: int) -> int:
    piece, sent = bytes(MIB), 0
    with contextlib.suppress(OSError):
        while sent < most:
            wire.socket.sendall(piece)
            sent += len(piece)
    return sent
