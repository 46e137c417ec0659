"""Rates and concurrency: who obeys `Retry-After` gets in, and who has no key holds up nobody."""

from __future__ import annotations

import contextlib
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest

from conftest import Server, start_server, stop_server
from customers import HOSTS, OPENAI, Customer, Host, House, Office, envelope, send, wav
from voxgate.accounts import RateLimits, keys

each_host = pytest.mark.parametrize("host", HOSTS)
RATE = 60  # a minute, so one each second, which is long for a busy machine, too


def used_up(house: House, host: Host, customer: Customer) -> httpx.Response:
    """The first refusal after as many requests as the customer gets."""
    with house.client(host, customer.headers) as client:
        for _ in range(2 * RATE):
            response = client.get("/v1/models")
            if response.status_code != 200:
                return response
    raise AssertionError("no limit")


def waits(response: httpx.Response) -> tuple[int, int]:
    """`Retry-After` in whole seconds, and `retry-after-ms`, which the first one is rounded up of."""
    assert response.status_code == 429
    assert envelope(response)["code"] == "rate_limited"
    assert "x-should-retry" not in response.headers
    seconds, milliseconds = int(response.headers["retry-after"]), int(response.headers["retry-after-ms"])
    assert milliseconds >= 1
    assert seconds == math.ceil(milliseconds / 1000)
    return seconds, milliseconds


@pytest.mark.parametrize("whose", ["account", "key"])
@each_host
def test_a_client_that_obeys_retry_after_ms_gets_in_on_each_next_try(house: House, host: Host, whose: str) -> None:
    customer = house.office.open(limits=RateLimits(RATE) if whose == "account" else None)
    if whose == "key":
        customer = house.office.keys_create(customer.account, "--requests-per-minute", str(RATE))
    refused = used_up(house, host, customer)
    with house.client(host, customer.headers) as client:
        for _ in range(3):
            _, milliseconds = waits(refused)
            assert milliseconds <= 1000
            time.sleep(milliseconds / 1000)
            assert send(client).status_code == 200
            refused = send(client)


@each_host
def test_a_client_that_obeys_retry_after_gets_in_on_its_next_try(house: House, host: Host) -> None:
    customer = house.office.open(limits=RateLimits(61))
    seconds, _ = waits(used_up(house, host, customer))
    time.sleep(seconds)
    assert house.request(host, customer).status_code == 200


@pytest.mark.parametrize("whose", ["account", "key"])
@each_host
def test_audio_seconds_a_minute_are_limited_and_come_back(house: House, host: Host, whose: str) -> None:
    limits = RateLimits(audio_seconds_per_minute=240)
    customer = house.office.open(limits=limits if whose == "account" else None)
    if whose == "key":
        customer = house.office.keys_create(customer.account, "--audio-seconds-per-minute", "240")
    assert house.request(host, customer, audio=wav(239, rate=1000)).status_code == 200
    refused = house.request(host, customer, audio=wav(6))
    seconds, milliseconds = waits(refused)
    assert "240 seconds of audio a minute" in envelope(refused)["message"]
    assert milliseconds <= 1250
    assert house.get(host, customer, "/v1/models").status_code == 200
    time.sleep(milliseconds / 1000)
    assert house.request(host, customer, audio=wav(6)).status_code == 200
    assert seconds == -(-milliseconds // 1000)


def test_no_more_get_in_than_the_bucket_holds_and_what_comes_back(house: House) -> None:
    customer = house.office.open(limits=RateLimits(RATE))
    begun = time.monotonic()
    served = 0
    with house.client("asgi", customer.headers) as client:
        while time.monotonic() - begun < 3.3 or served < RATE:
            if client.get("/v1/models").status_code == 200:
                served += 1
            else:
                time.sleep(0.01)
    took = time.monotonic() - begun
    assert RATE <= served <= RATE + took * RATE / 60


def test_a_limit_holds_across_connections_keys_and_hosts(house: House) -> None:
    one = house.office.open(limits=RateLimits(RATE))
    other = house.office.key(one.account)
    with ThreadPoolExecutor(8) as pool:
        begun = time.monotonic()
        answers = list(
            pool.map(lambda n: house.get("asgi", (one, other)[n % 2], "/v1/models").status_code, range(2 * RATE))
        )
        took = time.monotonic() - begun
    assert set(answers) == {200, 429}
    assert RATE <= answers.count(200) <= RATE + took * RATE / 60
    waits(house.get("lambda", one, "/v1/models"))


def test_a_keys_own_limit_leaves_the_accounts_other_keys_alone(house: House) -> None:
    free = house.office.open()
    tied = house.office.key(free.account, limits=RateLimits(1))
    assert [house.request("asgi", tied).status_code for _ in range(2)] == [200, 429]
    assert house.request("asgi", free).status_code == 200


@pytest.mark.parametrize(("host", "whose"), [("asgi", "account"), ("lambda", "key")])
def test_uploads_that_run_hold_their_places_until_they_end(house: House, host: Host, whose: str) -> None:
    limits = RateLimits(concurrent_requests=2)
    customer = house.office.open(limits=limits if whose == "account" else None)
    if whose == "key":
        customer = house.office.keys_create(customer.account, "--concurrent-requests", "2")
    with contextlib.ExitStack() as uploads:
        uploads.enter_context(house.uploading(customer))
        assert house.request(host, customer).status_code == 200
        uploads.enter_context(house.uploading(customer))
        refused = house.request(host, customer)
        seconds, _ = waits(refused)
        assert "2 requests run already" in envelope(refused)["message"]
        assert house.get(host, customer, "/v1/balance").status_code == 200
    time.sleep(seconds)
    assert house.request(host, customer).status_code == 200


def test_requests_that_run_at_the_provider_hold_their_places(house: House) -> None:
    customer = house.office.open(limits=RateLimits(concurrent_requests=3))
    with ThreadPoolExecutor(3) as pool:
        with house.upstream.held():
            running = [pool.submit(house.request, "asgi", customer) for _ in range(3)]
            for _ in running:
                house.upstream.wait_for_request()
            refused = house.request("lambda", customer)
            waits(refused)
        assert [request.result().status_code for request in running] == [200] * 3
    assert house.request("asgi", customer).status_code == 200


def test_every_way_of_ending_gives_the_place_back(house: House) -> None:
    customer = house.office.open(limits=RateLimits(concurrent_requests=1), credit=2 * 310)
    for form, status in (
        ({"audio": b""}, 400),
        ({"audio": wav(600, rate=1000)}, 402),
        ({"model": "x"}, 404),
        ({}, 200),
    ):
        assert (form, house.request("asgi", customer, **form).status_code) == (form, status)
    with house.upstream.failing():
        assert house.request("asgi", customer).status_code == 502
    with house.uploading(customer):
        pass
    deadline = time.monotonic() + 5
    while (status := house.request("asgi", customer).status_code) == 429:
        assert time.monotonic() < deadline
    assert status == 200


@pytest.mark.parametrize("base", ["/v1", "", "/litellm/v1"], ids=["openai", "router", "litellm"])
@each_host
def test_the_sdk_gets_in_by_itself_after_a_429(house: House, host: Host, base: str) -> None:
    customer = house.office.open(limits=RateLimits(RATE))
    statuses: list[int] = []
    with (
        httpx.Client(
            transport=house.transport(host),
            event_hooks={"response": [lambda response: statuses.append(response.status_code)]},
        ) as http,
        openai.OpenAI(
            api_key=customer.key, base_url=house.url(host) + base, http_client=cast(Any, http), max_retries=1
        ) as client,
    ):
        waits(used_up(house, host, customer))
        heard = client.audio.transcriptions.create(model="whisper-1", file=("speech.wav", wav(1)))
    assert house.upstream.text in heard.text
    assert statuses == [429, 200]


def test_defaults_of_the_settings_hold_where_nothing_else_is_said(house: House, tmp_path: Path) -> None:
    process, server = start_server(
        tmp_path,
        VOXGATE_INFERENCE_URL=house.upstream.url,
        VOXGATE_REQUESTS_PER_MINUTE="7",
        VOXGATE_AUDIO_SECONDS_PER_MINUTE="70",
        VOXGATE_KEY_REQUESTS_PER_MINUTE="5",
    )
    try:
        office = Office(tmp_path)
        plain, own = office.open(), office.open(limits=RateLimits(3, 30))
        free = office.key(plain.account, limits=RateLimits(2))
        found = [
            [
                httpx.get(f"{server.url}/v1/models", headers=who.headers).headers[f"x-ratelimit-limit-{name}"]
                for name in ("requests", "audio-seconds")
            ]
            for who in (plain, own, free)
        ]
    finally:
        stop_server(process)
    assert found == [["5", "70"], ["3", "30"], ["2", "70"]]


def test_the_place_of_a_killed_server_is_free_after_it(house: House, tmp_path: Path) -> None:
    process, server = start_server(tmp_path, VOXGATE_INFERENCE_URL=house.upstream.url)
    office = Office(tmp_path)
    customer = office.open(limits=RateLimits(concurrent_requests=1))
    killed = House(server, house.handler, house.upstream, office, customer)
    with killed.uploading(customer):
        waits(killed.request("asgi", customer))
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()
    process, server = start_server(tmp_path, VOXGATE_INFERENCE_URL=house.upstream.url)
    try:
        deadline = time.monotonic() + 5
        alive = House(server, house.handler, house.upstream, office, customer)
        while (status := alive.request("asgi", customer).status_code) == 429:
            assert time.monotonic() < deadline
    finally:
        stop_server(process)
    assert status == 200


# --- Wrong keys -------------------------------------------------------------------------------

GUESSER = """
import http.client, sys, time
host, port, rate, *keys = sys.argv[1:]
connection = http.client.HTTPConnection(host, int(port), timeout=30)
begun, number, statuses = time.monotonic(), 0, set()
while True:
    key = keys[number % len(keys)]
    connection.request("POST", "/v1/audio/transcriptions", headers={"authorization": "Bearer " + key})
    answer = connection.getresponse()
    answer.read()
    statuses.add(answer.status)
    number += 1
    print(number, *statuses, flush=True)
    time.sleep(max(begun + number / float(rate) - time.monotonic(), 0))
"""


@contextlib.contextmanager
def guessing(server: Server, guesses: list[str], rate: int) -> Iterator[list[int]]:
    """Somebody who tries these keys until the end of the block; afterwards how many, and what was answered."""
    url = httpx.URL(server.url)
    command = [sys.executable, "-c", GUESSER, url.host, str(url.port), str(rate), *guesses]
    said: list[int] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield said
        finally:
            process.terminate()
        # Its end may have come in the middle of a line.
        whole = [line for line in process.stdout.read().splitlines() if " " in line]
        said += map(int, whole[-1].split())


def median(client: httpx.Client, seconds: float) -> float:
    times = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        begun = time.perf_counter()
        assert send(client).status_code == 200
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


@pytest.mark.parametrize("kind", ["mistyped", "unknown", "unknown, never the same"])
def test_a_flood_of_wrong_keys_is_refused_while_a_customer_is_served(house: House, kind: str) -> None:
    """How much it holds the customer up is measured by the benches."""
    guesses = {
        "mistyped": [keys.generate()[:-1] + "!" for _ in range(100)],
        "unknown": [keys.generate() for _ in range(20)],
        "unknown, never the same": [keys.generate() for _ in range(900)],
    }[kind]
    with house.client("asgi", house.rich.headers) as client, guessing(house.server, guesses, 300) as said:
        for _ in range(20):
            assert send(client).status_code == 200
    number, *statuses = said
    assert (number > 0, statuses) == (True, [401])


def test_a_wrong_key_takes_as_long_whether_it_is_known_or_not(house: House) -> None:
    """A revoked key's answer and a never given one's, each looked up for the first time."""
    revoked = [house.office.open(revoked=1) for _ in range(40)]
    never = [Customer("", keys.generate(), "") for _ in range(40)]
    times: dict[bool, list[float]] = {True: [], False: []}
    with house.client("asgi") as client:
        client.get("/health")
        for pair in zip(revoked, never, strict=True):
            for known, customer in zip((True, False), pair, strict=True):
                begun = time.perf_counter()
                assert client.post(OPENAI, headers=customer.headers).status_code == 401
                times[known].append(time.perf_counter() - begun)
    medians = [statistics.median(times[known]) for known in (True, False)]
    print(f"revoked {medians[0] * 1000:.2f} ms, never given {medians[1] * 1000:.2f} ms")
    assert max(medians) < 2 * min(medians)
