"""What a live session costs and holds, and what is left when somebody dies on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from conftest import Server, start_server, stop_server
from customers import SPEECH, Customer, Office, microdollars, send, wav
from fakes.live import (
    BLOCK,
    RATE,
    Heard,
    Live,
    LiveInference,
    Message,
    Refusal,
    blocks,
    catalogue,
    refusal,
    until,
    words,
)
from fakes.upstreams import KEY
from voxgate.accounts import RateLimits, UsageRecord
from voxgate.accounts.sqlite import SqliteStore

CREDIT = 1_000_000
SECOND = 100  # micro-dollars, at 6,000 a minute
ONE_AT_ONCE = RateLimits(concurrent_requests=1)
MIB = 1024 * 1024
CHEAP = """
[providers.cheap]
kind = "inference"
base_url = "{url}"
[models.cheap]
deployments = [{{ provider = "cheap", upstream_model = "up-1", price_per_minute = "0.001" }}]
"""


@dataclass
class Place:
    """A gateway before a recognizer that hears what it is told to. Each test has a model of its own there."""

    server: Server
    recognizer: LiveInference
    office: Office
    number: int = 0

    @property
    def model(self) -> str:
        return f"m{self.number}"

    def live(self, customer: Customer, **how: Any) -> Live:
        return Live(self.server.url, customer, **({"model_id": self.model} | how))

    def refusal(self, customer: Customer) -> Refusal:
        return refusal(self.server.url, customer, model_id=self.model)

    def records(self, customer: Customer) -> list[UsageRecord]:
        return records(self.office, customer)

    def settled(self, customer: Customer, credit: int = CREDIT) -> int:
        """What was spent, as soon as nothing is held."""
        until(lambda: not self.office.money(customer.account)[1])
        return credit - self.office.money(customer.account)[0]

    def audited(self) -> None:
        audit = self.office.run("audit")
        assert audit.returncode == 0, audit.stdout


def records(office: Office, customer: Customer) -> list[UsageRecord]:
    async def work() -> list[UsageRecord]:
        store = SqliteStore(office.data_dir / "voxgate.sqlite")
        try:
            return await store.records(customer.account, 0.0, time.time() + 60)
        finally:
            await store.close()

    return asyncio.run(work())


@contextlib.contextmanager
def killed_in_the_end(directory: Path, command: str = "serve", **environment: str) -> Iterator[Server]:
    process, server = start_server(directory, command, **environment)
    try:
        yield server
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("live-money")
    with LiveInference() as recognizer:
        catalog = directory / "catalog.toml"
        catalog.write_text(catalogue(recognizer.url, "inference") + CHEAP.format(url=recognizer.url), encoding="utf-8")
        process, server = start_server(directory, VOXGATE_CATALOG=str(catalog), UPSTREAM_KEY=KEY)
        yield Place(server, recognizer, Office(directory))
        stop_server(process)


@pytest.fixture(autouse=True)
def as_it_is(place: Place) -> Iterator[None]:
    place.number += 1
    yield
    place.recognizer.forget()


def cost(seconds: float, price: int = 6000) -> int:
    return math.ceil(price * math.ceil(round(seconds * 10, 4)) / 600)


def amounts(end: Message) -> tuple[float, int]:
    """What a last message says is billed, and what it costs."""
    return end["usage"]["seconds"], microdollars(end["cost"])


# --- Who waits, while the others are tried ----------------------------------------------------------


class Pings(logging.Handler):
    """Counts what the library says that it received."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith("< PING")


@dataclass(frozen=True)
class Waited:
    customer: Customer
    messages: list[Message]
    code: int | None
    pings: int


@pytest.fixture(scope="module", autouse=True)
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Waited]]]:
    """Two sessions on a server of their own that come to nothing for half a minute: one says so, one does not."""
    directory = tmp_path_factory.mktemp("live-waiting")
    with LiveInference() as recognizer, ThreadPoolExecutor(3) as pool:
        process, server = start_server(directory, VOXGATE_INFERENCE_URL=recognizer.url)
        office = Office(directory)

        def idle() -> Waited:
            customer, pings = office.open(), Pings()
            with Live(server.url, customer) as live:
                log = logging.getLogger(f"pings.{id(pings)}")
                log.propagate = False
                log.setLevel(logging.DEBUG)
                log.addHandler(pings)
                live.connection.protocol.logger, live.connection.protocol.debug = log, True
                live.send(blocks(1, 2))
                live.rest()
            until(lambda: not office.money(customer.account)[1])
            spent = CREDIT - office.money(customer.account)[0]
            assert spent == SECOND
            return Waited(customer, live.messages, live.code, pings.count)

        def patient() -> Waited:
            customer = office.open()
            with Live(server.url, customer) as live:
                live.send(blocks(1, 2))
                for _ in range(4):
                    with contextlib.suppress(TimeoutError):
                        while True:
                            live.read(timeout=8.5)
                    live.tell("keepalive")
                live.send(blocks(3, 4))
                live.close()
            return Waited(customer, live.messages, live.code, 0)

        yield {"idle": pool.submit(idle), "patient": pool.submit(patient)}
        pool.shutdown()
        stop_server(process)


# --- What it costs ----------------------------------------------------------------------------------


def test_a_session_costs_what_the_same_audio_costs_as_a_file(place: Place) -> None:
    customer = place.office.open()
    with place.live(customer) as live:
        live.send(blocks(1, 6) + b"\0\0" * 508)
        done = live.close()
    assert live.finals == words(1, 6)
    assert done["duration"] == pytest.approx(3.03175, abs=0.001)
    assert amounts(done) == (3.1, cost(3.03175)) == (3.1, 310)
    assert microdollars(done["balance"]) == CREDIT - 310
    assert place.office.money(customer.account) == (CREDIT - 310, 0)
    (record,) = place.records(customer)
    assert (record.seconds, record.cost, record.model, record.status) == (3.1, 310, place.model, 200)
    assert record.request_id == live.messages[0]["session_id"]
    assert record.provider == live.messages[0]["provider"]
    usage = httpx.get(f"{place.server.url}/v1/usage", headers=customer.headers).json()["total"]
    assert (usage["requests"], usage["errors"], usage["seconds"], usage["cost_microdollars"]) == (1, 0, 3.1, 310)


@pytest.mark.parametrize(
    ("model", "samples", "price"),
    [("", 1, 10), ("", 1600, 10), ("", 1601, 20), ("cheap", 48_508, 52)],  # of 51.7
)
def test_it_is_rounded_once_and_up(place: Place, model: str, samples: int, price: int) -> None:
    customer = place.office.open()
    with place.live(customer, model_id=model or place.model) as live:
        for _ in range(3):
            live.send(b"\0\0" * (samples // 3))
        live.send(b"\0\0" * (samples - samples // 3 * 3))
        done = live.close()
    assert microdollars(done["cost"]) == price
    assert place.settled(customer) == price


def test_no_audio_is_free_and_still_a_request(place: Place) -> None:
    customer = place.office.open()
    with place.live(customer) as live:
        done = live.close()
    assert (done["text"], done["duration"], amounts(done)) == ("", 0, (0, 0))
    assert microdollars(done["balance"]) == CREDIT
    assert place.office.money(customer.account) == (CREDIT, 0)
    (record,) = place.records(customer)
    assert (record.seconds, record.cost) == (0.0, 0)


def test_credit_is_set_aside_a_few_seconds_at_a_time(place: Place) -> None:
    customer = place.office.open()
    with place.live(customer) as live:
        for seconds in (1, 6, 12):
            heard = place.recognizer.session()
            live.send(blocks(1, 1) * round((seconds - heard.seconds) / BLOCK))
            until(lambda heard=heard, seconds=seconds: heard.seconds == seconds)  # type: ignore[misc]
            balance, held = place.office.money(customer.account)
            assert balance == CREDIT
            assert seconds * SECOND <= held <= (seconds + 10) * SECOND
        live.close()
    assert place.settled(customer) == 12 * SECOND
    assert len(place.records(customer)) == 1


# --- When it ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("credit", "tenths"), [(200, 20), (205, 20), (225, 22), (730, 73)])
def test_credit_that_ends_pays_for_all_that_it_can_and_its_finals_come_first(
    place: Place, credit: int, tenths: int
) -> None:
    customer = place.office.open(credit=credit)
    with place.live(customer) as live:
        live.send(blocks(1, 20))
        last = live.rest()
    assert live.code == 1000
    assert (last["type"], last["fatal"], last["error"]["code"]) == ("error", True, "insufficient_quota")
    assert live.finals == words(1, math.ceil(tenths / 5))
    assert amounts(last) == (tenths / 10, tenths * 10)
    assert last["duration"] >= tenths / 10
    assert place.recognizer.session().total() == pytest.approx(tenths / 10)
    assert place.office.money(customer.account) == (credit - tenths * 10, 0)
    (record,) = place.records(customer)
    assert (record.seconds, record.cost) == (tenths / 10, tenths * 10)


def test_credit_that_is_just_enough_ends_nothing(place: Place) -> None:
    customer = place.office.open(credit=600)
    with place.live(customer) as live:
        live.send(blocks(1, 12))
        done = live.close()
    assert live.finals == words(1, 12)
    assert (amounts(done), microdollars(done["balance"])) == ((6.0, 600), 0)
    refused = place.refusal(customer)
    assert (refused.status, refused.error["code"]) == (402, "insufficient_quota")
    assert len(place.recognizer.sessions) == 1


@pytest.mark.parametrize("whose", ["account", "key"])
def test_a_budget_ends_as_credit_does(place: Place, whose: str) -> None:
    customer = place.office.open(budget=150 if whose == "account" else None)
    if whose == "key":
        customer = place.office.key(customer.account, budget=150)
    with place.live(customer) as live:
        live.send(blocks(1, 8))
        last = live.rest()
    assert (live.code, last["error"]["code"], last["fatal"]) == (1000, "insufficient_quota", True)
    assert live.finals == words(1, 3)
    assert amounts(last) == (1.5, 150)
    assert place.office.money(customer.account) == (CREDIT - 150, 0)
    assert place.refusal(customer).status == 402


def test_credit_added_meanwhile_is_used(place: Place) -> None:
    customer = place.office.open(credit=500)
    with place.live(customer) as live:
        live.send(blocks(1, 6))
        while len(live.finals) < 6:
            live.read()
        assert place.office.run("accounts", "credit", customer.account, "1.00").returncode == 0
        live.send(blocks(7, 14))
        done = live.close()
    assert live.finals == words(1, 14)
    assert amounts(done) == (7.0, 700)


def test_sessions_at_once_never_spend_what_is_not_there(place: Place) -> None:
    credit = 900
    customer = place.office.open(credit=credit)

    statuses = []

    def one(_: int) -> int:
        try:
            with place.live(customer) as live:
                with contextlib.suppress(ConnectionClosed):
                    live.send(blocks(1, 10))
                    live.tell("close")
                return microdollars(live.rest()["cost"])
        except InvalidStatus as refused:
            statuses.append(refused.response.status_code)
            return 0

    with ThreadPoolExecutor(4) as pool:
        costs = list(pool.map(one, range(4)))
    assert set(statuses) <= {402}
    balance, held = place.office.money(customer.account)
    assert (balance, held) == (credit - sum(costs), 0)
    assert 0 <= balance < credit
    assert sum(record.cost for record in place.records(customer)) == sum(costs)


def test_the_limit_on_audio_seconds_ends_a_session(place: Place) -> None:
    customer = place.office.open(limits=RateLimits(audio_seconds_per_minute=12))
    begun = time.monotonic()
    with place.live(customer) as live:
        live.send(blocks(1, 1) * 60)
        last = live.rest()
        took = time.monotonic() - begun
    assert (live.code, last["error"]["code"], last["fatal"]) == (4429, "rate_limited", True)
    heard = place.recognizer.session().total()
    assert 5 <= heard <= 12 + took * 12 / 60 + 0.1
    seconds, charged = amounts(last)
    assert (round(seconds * 10), charged) == (math.ceil(round(heard * 10, 4)), cost(heard))
    assert place.office.money(customer.account) == (CREDIT - cost(heard), 0)


def test_a_session_that_is_too_long_ends_and_what_was_heard_is_charged(place: Place, tmp_path: Path) -> None:
    office = Office(tmp_path)
    most = 10.0
    with killed_in_the_end(
        tmp_path, VOXGATE_INFERENCE_URL=place.recognizer.url, VOXGATE_MAX_AUDIO_SECONDS=str(most)
    ) as server:
        customer = office.open()
        with Live(server.url, customer) as live:
            live.send(blocks(1, 30))
            last = live.rest()
        assert (live.code, last["error"]["code"], last["fatal"]) == (4408, "request_timeout", True)
        seconds, charged = amounts(last)
        heard = place.recognizer.session().total()
        assert heard <= most
        assert (round(seconds * 10), charged) == (math.ceil(round(heard * 10, 4)), cost(heard))
        assert office.money(customer.account) == (CREDIT - charged, 0)


@pytest.mark.parametrize("whose", ["account", "key"])
def test_a_session_has_one_place_among_the_concurrent_requests(place: Place, whose: str) -> None:
    customer = place.office.open(limits=ONE_AT_ONCE if whose == "account" else None)
    if whose == "key":
        customer = place.office.key(customer.account, limits=ONE_AT_ONCE)
    with place.live(customer) as live:
        assert live.read()["type"] == "ready"
        refused = place.refusal(customer)
        assert (refused.status, refused.error["code"]) == (429, "rate_limited")
        assert int(refused.headers["retry-after"]) >= 1
        with httpx.Client(base_url=place.server.url, headers=customer.headers) as client:
            assert send(client, audio=wav(0.1), model=place.model).status_code == 429
        live.close()
    with place.live(customer) as live:
        live.close()
    assert place.settled(customer) == 0


# --- Who hangs up, dies or does not listen ----------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "FIN", "RST"])
def test_who_hangs_up_pays_for_what_was_heard(place: Place, how: str) -> None:
    customer = place.office.open(limits=ONE_AT_ONCE)
    with place.live(customer) as live:
        live.send(blocks(1, 3))
        while live.finals != words(1, 3):
            live.read()
        if how == "close":
            live.connection.close()
        else:
            live.hang_up(reset=how == "RST")
        until(lambda: bool(place.records(customer)))
    assert place.recognizer.session().total() == 1.5
    assert place.settled(customer) == 150
    (record,) = place.records(customer)
    assert (record.seconds, record.cost) == (1.5, 150)
    with place.live(customer) as live:  # its place is free
        live.close()


def test_who_hangs_up_at_any_moment_leaves_nothing(place: Place) -> None:
    moments = random.Random(7)
    customer = place.office.open(limits=RateLimits(concurrent_requests=1))
    process = psutil.Process(place.server.pid)
    sent = [0.0]

    def one() -> None:
        with place.live(customer) as live:
            for number in range(moments.randrange(6)):
                live.send(blocks(number + 1, number + 1), moments.choice([640, 1001, 16_000]))
                sent[0] += BLOCK
            if moments.random() < 0.3:
                live.tell("close")
            time.sleep(moments.uniform(0, 0.03))
            live.hang_up(reset=moments.random() < 0.5)

    def left() -> tuple[int, int]:
        return process.num_fds(), process.num_threads()

    for number in range(1, 26):
        one()
        until(lambda number=number: len(place.records(customer)) == number)  # type: ignore[misc]
        if number == 1:
            before = left()
    spent = place.settled(customer)
    assert spent == sum(record.cost for record in place.records(customer))
    assert sum(cost(heard.total()) for heard in place.recognizer.sessions) <= spent <= sent[0] * SECOND
    until(lambda: left()[0] <= before[0] + 2)
    assert left()[1] <= before[1] + 8  # of a pool that grows by itself
    place.audited()


def test_a_killed_gateway_leaves_what_a_sweep_gives_back(place: Place, tmp_path: Path) -> None:
    office = Office(tmp_path)
    customer = office.open(limits=ONE_AT_ONCE)
    with contextlib.ExitStack() as stack:
        with killed_in_the_end(tmp_path, VOXGATE_INFERENCE_URL=place.recognizer.url) as server:
            live = stack.enter_context(Live(server.url, customer))
            live.send(blocks(1, 24))
            until(lambda: place.recognizer.session().seconds == 12)
            assert office.money(customer.account)[1] >= 12 * SECOND
            assert office.tell("sweep") == {"holds": 0, "amount": 0, "slots": 0}
        live.rest()
        assert live.code == 1006
    held = office.money(customer.account)[1]
    assert office.run("audit").returncode == 0
    swept = office.tell("sweep")
    assert (swept["holds"] >= 1, swept["amount"], swept["slots"]) == (True, held, 1)
    assert office.tell("sweep") == {"holds": 0, "amount": 0, "slots": 0}
    assert office.money(customer.account) == (CREDIT, 0)
    assert sum(record.cost for record in records(office, customer)) == 0
    assert office.run("audit").returncode == 0


def test_a_killed_recognizer_is_an_error_and_what_it_heard_is_paid(tmp_path: Path) -> None:
    office = Office(tmp_path)
    with contextlib.ExitStack() as stack:
        inference = stack.enter_context(
            killed_in_the_end(tmp_path / "inference", "inference", VOXGATE_ENGINE_WORKERS="1")
        )
        patience = {"VOXGATE_PROVIDER_CONNECT_TIMEOUT": "30"}  # an engine takes its time on a busy machine
        server = stack.enter_context(killed_in_the_end(tmp_path, VOXGATE_INFERENCE_URL=inference.url, **patience))
        customer = office.open(limits=ONE_AT_ONCE)
        recognizer = psutil.Process(inference.pid)
        with Live(server.url, customer, encoding="opus") as live:
            live.send((SPEECH.parent / "d-slt.opus").read_bytes(), 1000)
            live.listen()
            workers = recognizer.children(recursive=True)
            recognizer.kill()
            last = live.rest()
        assert (live.code, last["error"]["code"], last["fatal"]) == (4502, "provider_unavailable", True)
        seconds, charged = amounts(last)
        assert seconds <= 2.4
        assert charged == cost(seconds)
        until(lambda: office.money(customer.account) == (CREDIT - charged, 0))
        assert [(record.seconds, record.cost) for record in records(office, customer)] == [(seconds, charged)]
        refused = refusal(server.url, customer)
        assert (refused.status, refused.error["code"]) == (502, "provider_unavailable")
        assert office.money(customer.account) == (CREDIT - charged, 0)
        until(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers))
    assert office.run("audit").returncode == 0


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_recognizer_that_lets_nobody_in_is_told_of_before_the_upgrade(place: Place, status: int) -> None:
    place.recognizer.refuses = status
    customer = place.office.open(limits=ONE_AT_ONCE)
    for _ in range(2):
        refused = place.refusal(customer)
        code = {429: "rate_limited", 502: "provider_unavailable", 503: "overloaded"}[refused.status]
        assert refused.error["code"] == code
        assert "private words" not in refused.error["message"]
    assert place.office.money(customer.account) == (CREDIT, 0)


# --- A recognizer that is lost ----------------------------------------------------------------------


def lost(place: Place, live: Live, heard: Heard, seconds: float) -> None:
    """Break the connection as soon as all of it came and all that it says was told."""
    until(lambda: heard.seconds == seconds)
    while len(live.finals) < int(seconds / BLOCK):
        live.read()
    heard.drop()


def test_a_lost_recognizer_hears_again_what_came_after_the_last_final(place: Place) -> None:
    customer = place.office.open()
    with place.live(customer) as live:
        speech = blocks(1, 8)
        live.send(speech[: 7 * RATE // 2])  # 1.75 s
        lost(place, live, place.recognizer.session(), 1.75)
        live.send(speech[7 * RATE // 2 :])
        done = live.close()
    assert live.finals == words(1, 8)
    assert [(final["start"], final["end"]) for final in live.of("final")] == [(n / 2, n / 2 + 0.5) for n in range(8)]
    times = [(word["start"], word["end"]) for final in live.of("final") for word in final["words"]]
    assert times == [(n / 2, n / 2 + 0.5) for n in range(8)]
    for partial in live.of("partial"):
        assert partial["start"] * 2 == int(partial["start"] * 2)
    first, second = place.recognizer.sessions
    assert first.audio == speech[: 7 * RATE // 2]
    assert second.audio == speech[3 * RATE :]  # from 1.5 s
    assert first.query == second.query
    assert amounts(done) == (4.0, 400)
    assert done["duration"] == pytest.approx(4.0)
    assert place.settled(customer) == 400


@pytest.mark.parametrize("moment", ["before any audio", "after the end of the audio", "after a final"])
def test_it_may_be_lost_at_any_moment(place: Place, moment: str) -> None:
    customer = place.office.open()
    place.recognizer.script = _lost_at_close if moment == "after the end of the audio" else None
    with place.live(customer) as live:
        live.wait("ready")
        if moment == "before any audio":
            lost(place, live, place.recognizer.session(), 0)
        live.send(blocks(1, 2))
        if moment == "after a final":
            lost(place, live, place.recognizer.session(), 1.0)
            live.send(blocks(3, 3) + b"\x90\x01" * 800)  # and a bit of the fourth
        else:
            live.send(blocks(3, 3) + b"\x90\x01" * 800)
        done = live.close()
    assert live.finals == words(1, 4)
    assert len(place.recognizer.sessions) == 2
    assert amounts(done) == (1.6, 160)


def _lost_at_close(heard: Heard, message: str | bytes) -> bool:
    if isinstance(message, str) and heard.asked("close") and len(heard.audio) == 2 * RATE * 1.55:
        heard.drop()
        return True
    return False


def test_one_that_is_told_to_stop_is_opened_again_elsewhere(place: Place) -> None:
    customer = place.office.open()
    with place.live(customer) as live:
        live.send(blocks(1, 3) + b"\x90\x01" * 800)
        heard = place.recognizer.session()
        until(lambda: heard.seconds == 1.55)
        place.recognizer.say(heard, rest=True)
        place.recognizer.end(heard, 1012)
        live.send(blocks(5, 6))
        done = live.close()
    assert live.finals == words(1, 6)
    assert amounts(done) == (2.6, 260)
    assert bytes(place.recognizer.session(1).audio) == blocks(5, 6)


def test_a_finalize_that_was_lost_is_said_again(place: Place) -> None:
    def script(heard: Heard, message: str | bytes) -> bool:
        if isinstance(message, str) and heard is place.recognizer.sessions[0]:
            heard.drop()
            return True
        return False

    place.recognizer.script = script
    with place.live(place.office.open()) as live:
        live.send(blocks(1, 1) + b"\xc8\x00" * 800)  # and a bit of the second
        live.tell("finalize")
        while len(live.finals) < 2:
            live.read()
        assert live.finals == words(1, 2)
        live.close()


def test_the_second_loss_is_an_error_and_what_was_heard_is_charged_once(place: Place) -> None:
    customer = place.office.open(limits=ONE_AT_ONCE)
    with place.live(customer) as live:
        live.send(blocks(1, 3))
        lost(place, live, place.recognizer.session(), 1.5)
        live.send(blocks(4, 5))
        again = place.recognizer.session(1)
        until(lambda: again.seconds == 1.0)
        while len(live.finals) < 5:
            live.read()
        again.drop()
        last = live.rest()
    assert (live.code, last["error"]["code"], last["fatal"]) == (4502, "provider_unavailable", True)
    assert live.finals == words(1, 5)
    assert len(place.recognizer.sessions) == 2
    assert amounts(last) == (2.5, 250)
    assert place.office.money(customer.account) == (CREDIT - 250, 0)
    with place.live(customer) as live:
        live.close()


def test_one_that_is_lost_again_while_it_hears_again_is_lost_for_good(place: Place) -> None:
    def script(heard: Heard, message: str | bytes) -> bool:
        if heard is place.recognizer.sessions[0]:
            return False
        heard.drop()
        return True

    place.recognizer.script = script
    customer = place.office.open()
    with place.live(customer) as live:
        live.send(blocks(1, 2) + blocks(3, 3)[:3200])
        lost(place, live, place.recognizer.session(), 1.1)
        last = live.rest()
    assert (live.code, last["error"]["code"], last["fatal"]) == (4502, "provider_unavailable", True)
    assert live.finals == words(1, 2)
    assert len(place.recognizer.sessions) == 2
    assert place.settled(customer) == amounts(last)[1]


def test_a_lost_recognizer_is_charged_up_to_its_last_final(place: Place) -> None:
    customer = place.office.open()
    with place.live(customer) as live:
        live.send(blocks(1, 3) + blocks(4, 4)[:3200])
        heard = place.recognizer.session()
        place.recognizer.refuses = 500
        lost(place, live, heard, 1.6)
        last = live.rest()
    assert live.finals == words(1, 3)
    assert (last["duration"], *amounts(last)) == (1.6, 1.5, 150)
    assert place.settled(customer) == 150


@pytest.mark.parametrize("status", [401, 429, 500, 503])
def test_one_that_cannot_be_opened_again_is_lost_for_good(place: Place, status: int) -> None:
    customer = place.office.open()
    with place.live(customer) as live:
        live.send(blocks(1, 2))
        place.recognizer.refuses = status
        lost(place, live, place.recognizer.session(), 1.0)
        last = live.rest()
    assert (live.code, last["error"]["code"], last["fatal"]) == (4502, "provider_unavailable", True)
    assert "private words" not in last["error"]["message"]
    assert amounts(last) == (1.0, 100)
    assert place.settled(customer) == 100


@pytest.mark.parametrize("broken", ["no json", "[]", '{"type": "final"}', '{"type": "final", "text": 7}', b"\xff"])
def test_a_recognizer_that_talks_nonsense_is_lost(place: Place, broken: str | bytes) -> None:
    def script(heard: Heard, message: str | bytes) -> bool:
        if isinstance(message, bytes):
            heard.send(broken)
        return False

    place.recognizer.script = script
    customer = place.office.open()
    with place.live(customer) as live:
        live.send(blocks(1, 1))
        last = live.rest()
    assert (live.code, last["error"]["code"]) == (4502, "provider_unavailable")
    assert "json" not in last["error"]["message"].lower()
    assert place.settled(customer) == amounts(last)[1]


# --- How fast, and how much -------------------------------------------------------------------------


def test_audio_may_come_faster_than_it_was_spoken_up_to_a_bound(place: Place) -> None:
    customer = place.office.open()
    begun = time.monotonic()
    with place.live(customer, encoding="mulaw", sample_rate=8000) as live:
        live.send(b"\xff" * 8000 * 50)
        live.tell("close")
        heard = place.recognizer.session()
        while heard.connection.state.name == "OPEN" and not heard.asked("close"):
            seconds = heard.seconds  # before the time is taken
            assert seconds <= 30 + 16 * (time.monotonic() - begun) + 0.5
            time.sleep(0.05)
        done = live.rest()
    assert time.monotonic() - begun >= (50 - 30) / 16 - 0.1
    assert done["duration"] == pytest.approx(50)
    assert place.settled(customer) == 50 * SECOND


def test_who_does_not_read_takes_no_memory(place: Place) -> None:
    """The recognizer says far more than the connections hold, to one who reads nothing of it."""
    said, stop = [0], threading.Event()

    def script(heard: Heard, message: str | bytes) -> bool:
        if isinstance(message, str):
            return False
        while said[0] < 400 * MIB and not stop.is_set():
            heard.send(
                {"type": "partial", "sequence": next(heard.sequence), "text": "x" * 60_000, "start": 0.0, "end": 0.1}
            )
            said[0] += 60_000
        return True

    place.recognizer.script = script
    process = psutil.Process(place.server.pid)
    customer = place.office.open(limits=ONE_AT_ONCE)
    before = process.memory_info().rss
    with place.live(customer, receive=4096) as live:
        live.send(blocks(1, 1))
        told, most = -1, before
        while said[0] != told:  # until it gets nothing more off, or all of it
            told = said[0]
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                most = max(most, process.memory_info().rss)
                time.sleep(0.02)
        stop.set()
        assert most - before < 48 * MIB, f"{(most - before) // MIB} MiB"
        # What goes on reads on.
        live.tell("close")
        done = live.rest()
        assert (done["type"], live.code) == ("done", 1000)
    assert place.settled(customer) == 50


def test_a_recognizer_that_does_not_read_takes_no_memory(place: Place) -> None:
    place.recognizer.script = lambda heard, message: place.recognizer.deafen()
    process = psutil.Process(place.server.pid)
    customer = place.office.open()
    with place.live(customer, encoding="pcm_f32le", sample_rate=48_000, channels=8) as live:
        before, most = process.memory_info().rss, 0
        live.send(b"\0" * 32)
        until(lambda: len(place.recognizer.sessions) > 0)
        sent = threading.Event()

        def pour() -> None:
            with contextlib.suppress(ConnectionClosed, OSError):
                for _ in range(300):
                    live.send(b"\0" * 500_000, 500_000)
            sent.set()

        thread = threading.Thread(target=pour)
        thread.start()
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and not sent.is_set():
            most = max(most, process.memory_info().rss)
            time.sleep(0.02)
        live.hang_up(reset=True)
        thread.join()
    assert most - before < 64 * MIB, f"{(most - before) // MIB} MiB"
    place.settled(customer)  # whatever the recognizer does


# --- Half a minute later ----------------------------------------------------------------------------


def test_who_sends_nothing_for_half_a_minute_is_closed_and_was_pinged(waiting: dict[str, Future[Waited]]) -> None:
    idle = waiting["idle"].result(90)
    last = idle.messages[-1]
    assert (idle.code, last["error"]["code"], last["fatal"]) == (4408, "request_timeout", True)
    assert [message["text"] for message in idle.messages if message["type"] == "final"] == words(1, 2)
    assert amounts(last) == (1.0, 100)
    assert idle.pings >= 1


def test_who_says_that_it_stays_may_stay(waiting: dict[str, Future[Waited]]) -> None:
    patient = waiting["patient"].result(90)
    assert patient.code == 1000
    assert patient.messages[-1]["text"].split() == words(1, 4)
    assert amounts(patient.messages[-1]) == (2.0, 200)


def test_the_ledger_is_right_in_the_end(place: Place) -> None:
    place.audited()
    assert place.office.tell("sweep") == {"holds": 0, "amount": 0, "slots": 0}
