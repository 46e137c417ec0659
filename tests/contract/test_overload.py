"""Three times as many requests as there is time for, and a recognizer that is killed in the middle of its work."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
import wave
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from conftest import DATA, Server, inference_service, start_server, stop_server, wait_until_ready
from customers import COST, OPENAI, SPEECH, Customer, Office
from fakes import whisper_model
from fakes.inference import Inference
from fakes.live import Live
from overload import Load, Upload, capacity, overload
from prometheus import scraped
from voxgate.audio.decode import decode

pytestmark = pytest.mark.usefixtures("untraced")

SECONDS = 10.0  # the bench takes a minute
TIMES = 3.0
CLIENTS = 8
SIZE = 4  # of a batch
MANY = 64  # recordings, as many as there may be live sessions
# What the service promises, and how much less is allowed here, where other tests run beside it.
GOODPUT, REFUSED = 0.9, 0.05
LESS, SLOWER = 0.65, 10


@pytest.fixture(scope="module")
def service(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment = whisper_model.service(tiny_model) | {"VOXGATE_WHISPER_BATCH": str(SIZE)}
    with inference_service(tmp_path_factory.mktemp("inference"), **environment) as server:
        yield server


@pytest.fixture(scope="module")
def upload() -> Upload:
    return Upload.of(SPEECH.read_bytes(), model="default", language="en")


@pytest.fixture(scope="module")
def most(service: Server, upload: Upload) -> float:
    """Requests a second."""
    return capacity(service, upload, 3.0)


@pytest.fixture(scope="module")
def load(service: Server, upload: Upload, most: float) -> Load:
    return overload(service, upload, most=most, times=TIMES, seconds=SECONDS)


def test_every_request_is_served_or_refused_or_told_that_it_was_too_late(load: Load) -> None:
    statuses = Counter(answer.status for answer in load.answers)
    assert statuses.keys() <= {200, 502, 503}
    assert statuses[200]
    assert statuses[503] > statuses[200]
    # Who is accepted is served, but for a few.
    assert statuses[502] <= (1 - GOODPUT * LESS) * (statuses[200] + statuses[502]), statuses


# Goodput is that share of the capacity which is neither idle nor decoded for nobody: a measure that does not ask how
# fast the machine was meanwhile. The bench has both.


def test_hardly_anything_is_decoded_in_vain(load: Load) -> None:
    assert len(load.served) >= GOODPUT * LESS * load.work.windows, (len(load.served), load.work)


def test_the_engine_is_kept_busy_with_full_batches(load: Load) -> None:
    assert load.work.decoding >= GOODPUT * LESS * load.seconds, (load.work, load.took)
    assert load.work.windows / load.work.batches >= GOODPUT * LESS * SIZE


def test_no_accepted_request_misses_its_deadline_by_more_than_a_batch(load: Load) -> None:
    assert load.latest <= 2 * load.work.batch_seconds + 0.5


def test_a_refusal_comes_at_once_and_says_when_to_come_back(load: Load) -> None:
    refused = load.of(503)
    assert sorted(answer.took for answer in refused)[len(refused) // 2] <= SLOWER * REFUSED
    assert all(answer.retry_after is not None and int(answer.retry_after) >= 1 for answer in refused)


def test_its_memory_does_not_grow(load: Load) -> None:
    assert load.grown <= 1.3  # it takes a busy machine longer to have what it needs; the bench is stricter


def test_afterwards_it_serves_as_before(load: Load, service: Server, upload: Upload) -> None:
    assert load.answers
    with httpx.Client(base_url=service.url, timeout=60) as client:
        answer = client.post(upload.path, headers=upload.headers, content=upload.content)
    assert answer.status_code == 200


def test_live_speech_gets_in_and_is_heard_before_all_that_waits(service: Server) -> None:
    """Live goes before recordings: however many of them wait, it has its place, and is heard first."""
    minute = spoken(60)
    with contextlib.ExitStack() as stack:
        for _ in range(MANY + 8):  # a few more, for those that are done meanwhile
            stack.enter_context(hanging(service, minute))
        deadline = time.monotonic() + 60
        while waiting(service) < MANY:
            assert time.monotonic() < deadline, waiting(service)
        with Live(service.url, None, model_id="default", language="en") as live:
            live.send(speech_of(SPEECH))
            live.close()
            assert any(live.finals)
        assert waiting(service) > MANY / 4
    deadline = time.monotonic() + 60
    while waiting(service):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def waiting(service: Server) -> float:
    return scraped(httpx.get(f"{service.url}/metrics").text)["voxgate_queue_requests"]


def speech_of(path: Path) -> bytes:
    return b"".join(decode(str(path), path.suffix[1:], max_seconds=60))


def spoken(seconds: int) -> bytes:
    """So much speech, as WAV."""
    once = speech_of(DATA / "long-slt.flac")
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((once * (seconds * 32_000 // len(once) + 1))[: seconds * 32_000])
    return out.getvalue()


@contextlib.contextmanager
def hanging(server: Server, audio: bytes) -> Iterator[None]:
    """A whole request whose answer nobody reads; at the end the client hangs up."""
    upload = Upload.of(audio, model="default", language="en")
    lines = [f"POST {upload.path} HTTP/1.1", "Host: voxgate", f"Content-Length: {len(upload.content)}"]
    lines += [f"{name}: {value}" for name, value in upload.headers.items()]
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=60) as client:
        client.sendall("\r\n".join([*lines, "", ""]).encode() + upload.content)
        yield


# --- Killed ---------------------------------------------------------------------------------------


class Customers:
    """They ask without a pause, until they are told to stop."""

    def __init__(self, server: Server, customer: Customer) -> None:
        self.answers: list[httpx.Response] = []
        self._server, self._customer = server, customer
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    def __enter__(self) -> Customers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int) -> None:
        """Until so many more were served."""
        wanted = self.served + more
        deadline = time.monotonic() + 60
        while self.served < wanted:
            assert time.monotonic() < deadline, Counter(answer.status_code for answer in self.answers)
            time.sleep(0.02)

    @property
    def served(self) -> int:
        return sum(answer.status_code == 200 for answer in tuple(self.answers))

    def _ask(self) -> None:
        headers = self._customer.headers
        form = {"model": "whisper-1", "language": "en"}
        speech = SPEECH.read_bytes()
        with httpx.Client(base_url=self._server.url, headers=headers, timeout=60, verify=False) as client:
            while not self._over.is_set():
                answer = client.post(OPENAI, data=form, files={"file": speech})
                self.answers.append(answer)
                if answer.status_code != 200:
                    time.sleep(0.1)


def settled(office: Office, customer: Customer, customers: Customers, credit: int) -> None:
    """Those who were answered have paid, nobody else has, and nothing is held."""
    deadline = time.monotonic() + 30
    while office.money(customer.account)[1]:
        assert time.monotonic() < deadline, "credit is held that nobody uses"
        time.sleep(0.05)
    assert office.money(customer.account) == (credit - customers.served * COST, 0)
    audit = office.run("audit")
    assert audit.returncode == 0, audit.stdout


def test_an_engine_that_is_killed_costs_nobody_anything(service: Server, tmp_path: Path) -> None:
    process, gateway = start_server(tmp_path, VOXGATE_INFERENCE_URL=service.url)
    office = Office(tmp_path)
    customer = office.open(credit=10**9)
    try:
        with Customers(gateway, customer) as customers:
            for _ in range(2):
                customers.wait_for(CLIENTS)
                (engine,) = psutil.Process(service.pid).children()
                engine.kill()
                wait_until_ready(service)
            customers.wait_for(CLIENTS)
        assert {answer.status_code for answer in customers.answers} <= {200, 502, 503}
        settled(office, customer, customers, 10**9)
    finally:
        stop_server(process)


def test_a_service_that_is_killed_is_502_and_costs_nobody_anything(tiny_model: Path, tmp_path: Path) -> None:
    environment = whisper_model.service(tiny_model)
    service, server = start_server(tmp_path / "inference", "inference", **environment)
    process, gateway = start_server(tmp_path / "gateway", VOXGATE_INFERENCE_URL=server.url)
    office = Office(gateway.data_dir)
    customer = office.open(credit=10**9)
    try:
        with Customers(gateway, customer) as customers:
            customers.wait_for(CLIENTS)
            (engine,) = psutil.Process(server.pid).children()
            service.kill()
            service.wait()
            until_failed(customers, CLIENTS)
        assert {answer.status_code for answer in customers.answers} == {200, 502}
        settled(office, customer, customers, 10**9)
        gone = time.monotonic() + 15
        while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < gone, "the engine goes on without its service"
            time.sleep(0.1)
    finally:
        stop_server(service)
        stop_server(process)


def until_failed(customers: Customers, number: int) -> None:
    deadline = time.monotonic() + 60
    while len(customers.answers) - customers.served < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


CATALOG = """
[providers.own]
kind = "inference"
base_url = "{own}"

[providers.other]
kind = "inference"
base_url = "{other}"

[models.whisper-1]
deployments = [
  {{ provider = "own", upstream_model = "default", price_per_minute = "0.006" }},
  {{ provider = "other", upstream_model = "default", price_per_minute = "0.006" }},
]
"""


def test_who_has_another_provider_falls_back_to_it(tiny_model: Path, tmp_path: Path) -> None:
    environment = whisper_model.service(tiny_model)
    service, server = start_server(tmp_path / "inference", "inference", **environment)
    with Inference() as other:
        catalog = tmp_path / "catalog.toml"
        catalog.write_text(CATALOG.format(own=server.url, other=other.url), encoding="utf-8")
        process, gateway = start_server(tmp_path / "gateway", VOXGATE_CATALOG=str(catalog))
        office = Office(gateway.data_dir)
        customer = office.open(credit=10**9)
        try:
            with Customers(gateway, customer) as customers:
                customers.wait_for(CLIENTS)
                service.kill()
                service.wait()
                customers.wait_for(2 * CLIENTS)
            assert {answer.status_code for answer in customers.answers} == {200}
            by = Counter(answer.headers["x-voxgate-provider"] for answer in customers.answers)
            assert by["own"]
            assert by["other"]
            settled(office, customer, customers, 10**9)
        finally:
            stop_server(service)
            stop_server(process)
