"""What the meter costs: beside the same host without it, in DynamoDB calls, and under wrong keys."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import boto3
from moto import mock_aws

from conftest import DATA, ROOT, start_server, stop_server
from fakes.store import create_table
from voxgate.accounts import Bounds, Entry, EntryKind, Hold, Key, RateLimits, Store, Ticket, UsageRecord, keys
from voxgate.accounts.credentials import Authenticator
from voxgate.accounts.dynamodb import DynamoStore
from voxgate.accounts.sqlite import SqliteStore
from voxgate.metering import Meter, Reply
from voxgate.staging.local import LocalStaging

from .report import Goal, Report

AUDIO = DATA / "b-slt.mp3"  # 3.03 s
HOSTS = 4  # of either kind, one after the other: a process has its own luck with memory
PAIRS = 150
WARM = 30
MOST_ADDED = 3.0  # ms
CYCLES = 20
MOST_CALLS = 3
CLIENTS = (1, 8, 64)
BATCH = 256
ROUNDS = 9
FLOOD = 300  # wrong keys a second
SEGMENT = 1.0  # seconds
SEGMENTS = 12
MOST_SLOWER = 1.2
# An account and a key that both have every limit: what is looked at is the most there is to look at.
LIMITS = RateLimits(10_000_000, 100_000_000, 100_000)
# Buckets that a request's cost does not leave full at once, as it does those above.
SLOW = RateLimits(600, 3600, 100)
MONEY = 10**12


def run() -> Report:
    report = Report("metering: what it costs", ("what", "figure", "quartile", "to", "unit", "bound"))
    with tempfile.TemporaryDirectory() as name, peer("upstream") as upstream:
        pairs: dict[str, list[tuple[float, float]]] = {}
        for number in range(HOSTS):
            directory = Path(name) / str(number)
            with _metered(directory / "metered", upstream) as (url, key):
                with _bare(directory / "bare", upstream) as bare:
                    _compare(pairs, bare, url, key)
                if number == HOSTS - 1:
                    _added(report, pairs)
                    _flooded(report, url, key)
        _rates(report, Path(name) / "rates")
    _calls(report)
    return report


@contextlib.contextmanager
def _metered(directory: Path, upstream: str) -> Iterator[tuple[str, str]]:
    """A `voxgate serve`, and a customer's key."""
    process, server = start_server(directory, VOXGATE_INFERENCE_URL=upstream)
    try:
        yield server.url, asyncio.run(customer(SqliteStore(directory / "voxgate.sqlite")))
    finally:
        stop_server(process)


def _bare(directory: Path, upstream: str) -> contextlib.AbstractContextManager[str]:
    return peer(
        "bare",
        VOXGATE_INFERENCE_URL=upstream,
        VOXGATE_DATA_DIR=str(directory),
        VOXGATE_SPOOL_DIR=str(directory / "spool"),
    )


async def customer(store: Store, limits: RateLimits = LIMITS) -> str:
    """The key of a new account."""
    account = await _account(store, limits)
    key, shown = Key(id="key_bench", account_id=account, created=int(time.time()), limits=limits), keys.generate()
    await store.create_key(key, keys.digest(shown))
    await store.close()
    return shown


async def _account(store: Store, limits: RateLimits = LIMITS) -> str:
    account = await store.create_account("customer", limits=limits)
    await store.post(Entry(account.id, EntryKind.TOP_UP, MONEY, time.time(), "bench"))
    return account.id


# Beside the same host without the meter, request by request.


def _compare(pairs: dict[str, list[tuple[float, float]]], bare: str, metered: str, key: str) -> None:
    """The hosts strictly take turns: one that is asked twice in a row has a warm cache the second time."""
    with Client(bare, key) as free, Client(metered, key) as billed:
        ways: dict[str, Callable[[], float]] = {
            "metered": billed.ask,
            "metered, with an Idempotency-Key": lambda: billed.ask(idempotent=True),
        }
        for number in range(WARM + PAIRS):
            for name, ask in ways.items():
                pair = free.ask(), ask()
                if number >= WARM:
                    pairs.setdefault(name, []).append(pair)


def _added(report: Report, pairs: dict[str, list[tuple[float, float]]]) -> None:
    without = [free for each in pairs.values() for free, _ in each]
    report.rows.append(("a request without the meter", *_middle(without), "ms", None))
    for name, each in pairs.items():
        report.rows.append((f"a request {name}", *_middle([own for _, own in each]), "ms", None))
        median, low, high = _middle([own - free for free, own in each])
        report.rows.append(("  added to one without", median, low, high, "ms", MOST_ADDED))
        what = f"{name}: added to a request, the median of {len(each)} pairs, at most {MOST_ADDED:g} ms"
        report.goals.append(Goal(what, median, median <= MOST_ADDED))


class Client:
    """One connection that stays open; `ask` sends the recording and returns the milliseconds."""

    def __init__(self, url: str, key: str) -> None:
        address = urlsplit(url)
        self._connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        boundary = "----WebKitFormBoundary7MA4YWxkTrZu0gW"
        start = f"--{boundary}\r\nContent-Disposition: form-data; name="
        head = f'{start}"model"\r\n\r\nwhisper-1\r\n{start}"file"; filename="a.mp3"\r\n\r\n'.encode()
        self._body = head + AUDIO.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        self._headers = {
            "authorization": f"Bearer {key}",
            "content-type": f"multipart/form-data; boundary={boundary}",
        }

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, *, idempotent: bool = False) -> float:
        headers = self._headers | ({"idempotency-key": secrets.token_hex(8)} if idempotent else {})
        begun = time.perf_counter()
        self._connection.request("POST", "/v1/audio/transcriptions", self._body, headers)
        response = self._connection.getresponse()
        body = response.read()
        took = (time.perf_counter() - begun) * 1000
        assert response.status == 200, body
        return took


# One customer beside many wrong keys, in segments that take turns.


def _flooded(report: Report, url: str, key: str) -> None:
    kinds = ["", "mistyped", "wrong"]
    medians: dict[str, list[float]] = {kind: [] for kind in kinds}
    refused: dict[str, list[float]] = {kind: [] for kind in kinds}
    with Client(url, key) as customer:
        for number in range(SEGMENTS):
            for kind in turned(kinds, number):
                median, rate = _segment(customer, url, kind)
                medians[kind].append(median)
                refused[kind].append(rate)
    report.rows.append(("the customer's request, nobody else there", *_middle(medians[""]), "ms", None))
    slower: dict[str, float] = {}
    for kind, what in (("mistyped", "no look-up"), ("wrong", "each looked up")):
        ratios = [beside / alone for beside, alone in zip(medians[kind], medians[""], strict=True)]
        slower[kind], low, high = _middle(ratios)
        report.rows.append((f"beside {FLOOD} {kind} keys/s ({what})", *_middle(medians[kind]), "ms", None))
        bound = MOST_SLOWER if kind == "wrong" else None
        report.rows.append(("  by the request with nobody else there", slower[kind], low, high, "", bound))
    rate = statistics.median(refused["wrong"])
    report.notes.append(f"wrong keys that were really refused: {rate:.0f} a second")
    what = f"the customer beside {FLOOD} wrong keys/s by the customer alone, at most {MOST_SLOWER:g}"
    report.goals.append(Goal(what, slower["wrong"], slower["wrong"] <= MOST_SLOWER and rate >= 0.95 * FLOOD))


def _segment(customer: Client, url: str, kind: str) -> tuple[float, float]:
    """The customer's median while it lasts, and the refusals a second."""
    if not kind:
        return _median_for(customer, SEGMENT), 0.0
    arguments = [sys.executable, "-m", "tests.bench.peers", "flood", url, str(FLOOD), str(SEGMENT + 0.4), kind]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as flood:
        assert flood.stdout is not None
        flood.stdout.readline()  # its keys are made, and it begins
        time.sleep(0.2)
        median = _median_for(customer, SEGMENT)
        rate = float(flood.stdout.read())
    assert flood.returncode == 0
    return median, rate


def _median_for(customer: Client, seconds: float) -> float:
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(customer.ask())
    return statistics.median(times)


# The store by itself.


def _rates(report: Report, directory: Path) -> None:
    """In rounds, all of them in each: the file is the same and grows for all alike."""
    store = SqliteStore(directory / "voxgate.sqlite")
    account = asyncio.run(_account(store))
    ways: dict[str, Callable[[bool], float]] = {
        f"{clients} client{'s' * (clients > 1)}": partial(_in_one_loop, store, account, clients) for clients in CLIENTS
    }
    ways[f"{CLIENTS[-1]} threads, a loop each"] = partial(_in_threads, store, account, CLIENTS[-1])
    rates: dict[tuple[bool, str], list[float]] = {(whole, name): [] for whole in (True, False) for name in ways}
    for number in range(ROUNDS + 1):
        for (whole, name), each in rates.items():
            rate = ways[name](whole)
            if number:
                each.append(rate)
    for (whole, name), each in rates.items():
        what = "admit, hold and settle" if whole else "hold alone"
        report.rows.append((f"SQLite, {what}, {name}", *_middle(each), "1/s", None))
    asyncio.run(store.close())


def _in_one_loop(store: Store, account: str, clients: int, whole: bool) -> float:
    async def rate() -> float:
        begun = time.perf_counter()
        holds = await asyncio.gather(*(_work(store, account, BATCH // clients, whole) for _ in range(clients)))
        seconds = time.perf_counter() - begun
        await _release(store, holds)
        return BATCH / seconds

    return asyncio.run(rate())


def _in_threads(store: Store, account: str, clients: int, whole: bool) -> float:
    ready = threading.Barrier(clients + 1)

    async def work() -> list[Hold]:
        ready.wait()
        return await _work(store, account, BATCH // clients, whole)

    with ThreadPoolExecutor(clients) as threads:
        jobs = [threads.submit(asyncio.run, work()) for _ in range(clients)]
        ready.wait()
        begun = time.perf_counter()
        holds = [job.result() for job in jobs]
        seconds = time.perf_counter() - begun
    asyncio.run(_release(store, holds))
    return BATCH / seconds


async def _work(store: Store, account: str, count: int, whole: bool) -> list[Hold]:
    """The holds that are still open: of a whole cycle none."""
    left = []
    for _ in range(count):
        ticket = _ticket(account)
        if whole:
            await store.admit(ticket, lease=600)
        hold = await store.hold(ticket, 500, tenths=31, lease=600)
        assert isinstance(hold, Hold)
        if whole:
            record = UsageRecord(ticket.request_id, account, ticket.key_id, time.time(), "openai", 200, 0.1, cost=303)
            await store.settle(hold, 303, record)
        else:
            left.append(hold)
    return left


async def _release(store: Store, holds: Sequence[list[Hold]]) -> None:
    for hold in (hold for each in holds for hold in each):
        await store.release(hold)


def _ticket(account: str) -> Ticket:
    bounds = (Bounds(account, LIMITS), Bounds("key_bench", LIMITS))
    return Ticket(f"req_{secrets.token_hex(12)}", account, "key_bench", bounds)


# DynamoDB, counted where botocore sends.


def _calls(report: Report) -> None:
    named = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "eu-central-1"}
    before = dict(os.environ)
    os.environ.update(named)
    try:
        with mock_aws(), tempfile.TemporaryDirectory() as directory:
            asyncio.run(_count(report, Path(directory)))
    finally:
        os.environ.clear()
        os.environ.update(before)


async def _count(report: Report, directory: Path) -> None:
    client = boto3.client("dynamodb")
    create_table(client, "bench")
    sent: list[str] = []
    # Emitted for each request that goes out, so for one that is sent again, too.
    client.meta.events.register("request-created.dynamodb", lambda operation_name, **_: sent.append(operation_name))
    key = await customer(DynamoStore("bench", client=client), SLOW)
    staging = LocalStaging(directory)
    stores = [DynamoStore("bench", client=client) for _ in range(2)]
    meters = [
        Meter(
            authenticate=Authenticator(store, account_limits=SLOW, key_limits=SLOW),
            store=store,
            staging=staging,
            lease=600,
        )
        for store in stores
    ]

    async def cycles(meters: Sequence[Meter], *, idempotent: bool) -> list[list[str]]:
        calls = []
        for number in range(CYCLES):
            sent.clear()
            await _request(meters[number % len(meters)], key, idempotent)
            calls.append(sent.copy())
        return calls

    counted = {
        "the key's first request of its day": (await cycles(meters[:1], idempotent=False))[:1],
        "warm": await cycles(meters[:1], idempotent=False),
        "warm, with an Idempotency-Key": await cycles(meters[:1], idempotent=True),
    }
    await _request(meters[1], key, False)
    counted["warm, two processes by turns"] = await cycles(meters, idempotent=False)
    for name, calls in counted.items():
        numbers = [float(len(each)) for each in calls]
        most = max(numbers)
        bound = MOST_CALLS if name in ("warm", "warm, with an Idempotency-Key") else None
        report.rows.append((f"DynamoDB, {name}", most, min(numbers), most, "calls", bound))
        operations, _ = Counter(map(tuple, calls)).most_common(1)[0]
        report.notes.append(f"DynamoDB, {name}: {', '.join(operations)}")
        if bound is not None:
            what = f"DynamoDB calls of one request, {name}, the most of {CYCLES}, at most {MOST_CALLS}"
            report.goals.append(Goal(what, most, most <= MOST_CALLS))
    for store in stores:
        await store.close()
    await staging.close()


async def _request(meter: Meter, key: str, idempotent: bool) -> None:
    headers = {"authorization": f"Bearer {key}"}
    if idempotent:
        headers["idempotency-key"] = secrets.token_hex(8)
    request = meter.request(f"req_{secrets.token_hex(12)}", "openai", headers, "", {})
    async with request as tab:
        await tab.hold(500, tenths=31, fingerprint="f")
        await tab.settle(303, Reply({"content-type": "application/json"}, b'{"text": "the weather is nice"}'))


@contextlib.contextmanager
def peer(name: str, *arguments: str, **environment: str) -> Iterator[str]:
    """One of `peers`, by its address."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("VOXGATE_")}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.peers", name, *arguments],
            cwd=ROOT,
            env=clean | environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                log.seek(0)
                raise RuntimeError(f"{name} does not start: {log.read()}")
            yield url
        finally:
            stop_server(process)


def turned(names: list[str], number: int) -> list[str]:
    """Each of them goes first in its turn."""
    start = number % len(names)
    return names[start:] + names[:start]


def _middle(figures: list[float]) -> tuple[float, float, float]:
    """The median and the quartiles."""
    low, median, high = statistics.quantiles(figures, n=4)
    return median, low, high
