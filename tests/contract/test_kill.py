"""A server that is killed at any moment, under load: what was answered is paid for, once, and the rest is not."""

from __future__ import annotations

import contextlib
import itertools
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from conftest import Server, start_server, stop_server
from customers import COST, Customer, Office, microdollars, send, wav
from fakes.inference import Inference

pytestmark = pytest.mark.usefixtures("untraced")

KILLS = 20
CLIENTS = 6
AUDIO = wav(3.1)


@pytest.fixture
def upstream() -> Iterator[Inference]:
    with Inference() as upstream:
        upstream.delay = 0.01
        yield upstream


class Load:
    """Customers who ask without a pause, each time under a new `Idempotency-Key`, until the server is
    gone. `asked` are all keys, `answers` what came back under them."""

    def __init__(self, customer: Customer) -> None:
        self.customer = customer
        self.asked: list[str] = []
        self.answers: dict[str, httpx.Response] = {}
        self._numbers = itertools.count(1)

    def start(self, server: Server) -> list[threading.Thread]:
        threads = [threading.Thread(target=self._ask, args=(server,)) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        return threads

    def ask(self, client: httpx.Client, key: str) -> httpx.Response:
        client.headers["idempotency-key"] = key
        return send(client, audio=AUDIO)

    def _ask(self, server: Server) -> None:
        with httpx.Client(base_url=server.url, headers=self.customer.headers, timeout=30, verify=False) as client:
            while True:
                key = f"order {next(self._numbers)}"
                self.asked.append(key)
                try:
                    self.answers[key] = self.ask(client, key)
                except httpx.TransportError:
                    return


@contextlib.contextmanager
def killed_in_the_end(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def charges(office: Office, customer: Customer) -> list[str]:
    """The requests that were charged."""
    records = office.tell("usage", customer.account, "--requests")
    assert {record["cost_microdollars"] for record in records} <= {0, COST}
    return [record["request_id"] for record in records if record["cost_microdollars"]]


def test_twenty_kills_under_load_charge_each_answer_once_and_nothing_else(tmp_path: Path, upstream: Inference) -> None:
    credit = 10**9
    moments = random.Random(7)
    office = Office(tmp_path)
    customer = office.open(credit=credit)
    load = Load(customer)
    held_when_killed = 0
    for _ in range(KILLS):
        process, server = start_server(tmp_path, VOXGATE_INFERENCE_URL=upstream.url)
        with killed_in_the_end(process):
            # Whatever the last one left goes at the start of the next, without anybody's doing.
            deadline = time.monotonic() + 10
            while office.money(customer.account)[1]:
                assert time.monotonic() < deadline
            threads = load.start(server)
            time.sleep(moments.uniform(0.05, 0.3))
        for thread in threads:
            thread.join()
        held_when_killed += office.money(customer.account)[1] > 0

    process, server = start_server(tmp_path, VOXGATE_INFERENCE_URL=upstream.url)
    try:
        swept = office.run("sweep")
        assert swept.returncode == 0, swept.stderr
        audit = office.run("audit")
        assert audit.returncode == 0, audit.stdout
        balance, held = office.money(customer.account)
        assert held == 0
        assert {answer.status_code for answer in load.answers.values()} == {200}

        charged = charges(office, customer)
        assert len(charged) == len(set(charged))
        assert credit - balance == len(charged) * COST
        answered = [answer.headers["x-request-id"] for answer in load.answers.values()]
        assert set(answered) <= set(charged)
        unanswered = [key for key in load.asked if key not in load.answers]
        assert len(unanswered) <= KILLS * CLIENTS

        with httpx.Client(base_url=server.url, headers=customer.headers, timeout=30) as client:
            again = {key: load.ask(client, key) for key in unanswered}
            assert {answer.status_code for answer in again.values()} == {200}
            replayed = [key for key, answer in again.items() if answer.headers.get("idempotency-replayed") == "true"]
            # Who was charged and got no answer can have it; who can have it was charged.
            assert len(charged) == len(answered) + len(replayed)
            for key in replayed:
                assert microdollars(again[key].headers["x-voxgate-cost"]) == 0
            # The answers that did arrive are there still, the same ones.
            for key in moments.sample(sorted(load.answers), 20):
                replay = load.ask(client, key)
                assert replay.headers["idempotency-replayed"] == "true"
                assert replay.content == load.answers[key].content
        assert office.money(customer.account) == (credit - len(load.asked) * COST, 0)
        assert len(charges(office, customer)) == len(load.asked)
        assert office.run("audit").returncode == 0
    finally:
        stop_server(process)
    print(f"{len(answered)} answered, {len(unanswered)} cut off, of them {len(replayed)} charged")
    print(f"{held_when_killed} of {KILLS} kills left credit held")
    assert held_when_killed > 0


def test_a_command_gives_back_what_a_killed_server_held(tmp_path: Path, upstream: Inference) -> None:
    office = Office(tmp_path)
    customer = office.open(credit=1_000_000)
    process, server = start_server(tmp_path, VOXGATE_INFERENCE_URL=upstream.url)
    with upstream.held():
        load = Load(customer)
        with killed_in_the_end(process):
            threads = load.start(server)
            for _ in range(CLIENTS):
                upstream.wait_for_request()
            assert office.money(customer.account) == (1_000_000, CLIENTS * COST)
            # As long as its process lives, what it holds is its own.
            assert office.tell("sweep") == {"holds": 0, "amount": 0, "slots": 0}
        for thread in threads:
            thread.join()
    assert office.run("audit").returncode == 0
    assert office.tell("sweep") == {"holds": CLIENTS, "amount": CLIENTS * COST, "slots": CLIENTS}
    assert office.tell("sweep") == {"holds": 0, "amount": 0, "slots": 0}
    assert office.money(customer.account) == (1_000_000, 0)
    assert charges(office, customer) == []
    assert office.run("audit").returncode == 0


def test_a_server_that_is_told_to_stop_finishes_what_runs(tmp_path: Path, upstream: Inference) -> None:
    office = Office(tmp_path)
    customer = office.open(credit=1_000_000)
    upstream.delay = 0.5
    process, server = start_server(tmp_path, VOXGATE_INFERENCE_URL=upstream.url)
    answers: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=server.url, headers=customer.headers, timeout=30) as client:
            answers.append(send(client, audio=AUDIO))

    thread = threading.Thread(target=ask)
    with upstream.held():
        thread.start()
        upstream.wait_for_request()
        process.terminate()
    thread.join()
    stop_server(process)
    assert [answer.status_code for answer in answers] == [200]
    assert office.money(customer.account) == (1_000_000 - COST, 0)
