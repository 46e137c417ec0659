"""`Idempotency-Key`: whoever asks again gets the first answer and pays once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from conftest import DATA
from customers import (
    CONTRACTS,
    COST,
    HOSTS,
    OPENAI,
    ROUTER,
    SPEECH,
    STATS,
    WINDOWS,
    Customer,
    Host,
    House,
    envelope,
    microdollars,
    send,
    wav,
)
from voxgate.accounts import RateLimits

KEY = {"Idempotency-Key": "order 4711/a"}
each_host = pytest.mark.parametrize("host", HOSTS)
each_contract = pytest.mark.parametrize("path", list(CONTRACTS.values()), ids=list(CONTRACTS))


def check_replay(first: httpx.Response, again: httpx.Response) -> None:
    assert (first.status_code, again.status_code) == (200, 200)
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert again.content == first.content
    for name in ("content-type", "x-voxgate-provider", "x-voxgate-ignored-params"):
        assert again.headers.get(name) == first.headers.get(name)
    assert microdollars(again.headers["x-voxgate-cost"]) == 0
    assert [window for window in WINDOWS if window not in again.headers] == []


def check_conflict(response: httpx.Response, *, running: bool) -> None:
    assert response.status_code == 409
    error = envelope(response)
    assert (error["code"], error["type"]) == ("idempotency_conflict", "invalid_request_error")
    assert error["param"] == "Idempotency-Key"
    assert ("retry-after" in response.headers) == running
    assert response.headers.get("x-should-retry") == (None if running else "false")
    assert "x-voxgate-cost" not in response.headers
    assert [window for window in WINDOWS if window not in response.headers] == []


@each_contract
@each_host
def test_the_same_request_again_is_the_same_answer_and_costs_nothing(house: House, host: Host, path: str) -> None:
    customer = house.office.open(credit=2 * COST)
    first = house.request(host, customer, path, KEY, beam_size="5")
    served = house.upstream.served
    for _ in range(3):
        again = house.request(host, customer, path, KEY, beam_size="5")
        check_replay(first, again)
        assert microdollars(again.headers["x-voxgate-balance"]) == COST
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert house.upstream.served == served
    assert house.office.money(customer.account) == (COST, 0)


@pytest.mark.parametrize("response_format", ["text", "srt", "vtt", "verbose_json"])
@each_host
def test_every_format_is_had_again_as_it_was(house: House, host: Host, response_format: str) -> None:
    customer = house.office.open()
    form = {"response_format": response_format}
    check_replay(*(house.request(host, customer, OPENAI, KEY, **form) for _ in range(2)))


def test_the_two_hosts_replay_each_others_answers(house: House) -> None:
    customer = house.office.open(credit=COST)
    check_replay(house.request("lambda", customer, headers=KEY), house.request("asgi", customer, headers=KEY))
    other = house.office.open(credit=COST)
    check_replay(house.request("asgi", other, headers=KEY), house.request("lambda", other, headers=KEY))


def form(boundary: str, *parts: tuple[str, bytes]) -> tuple[dict[str, str], bytes]:
    """A form with this boundary and the parts in this order."""
    lines = []
    for name, content in parts:
        file = '; filename="a.mp3"' if name == "file" else ""
        lines.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode())
        lines.append(content + b"\r\n")
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    return headers, b"".join([*lines, f"--{boundary}--\r\n".encode()])


@each_host
def test_boundary_order_and_transfer_do_not_make_another_request(house: House, host: Host) -> None:
    customer = house.office.open(credit=COST)
    audio, model, language = ("file", SPEECH.read_bytes()), ("model", b"whisper-1"), ("language", b"en")
    forms = [form("one", audio, model, language), form("another", language, audio, model)]
    with house.client(host, customer.headers | KEY) as client:
        answers = [client.post(OPENAI, headers=headers, content=content) for headers, content in forms]
        headers, content = forms[0]
        answers.append(client.post(OPENAI, headers=headers, content=iter([content[:500], content[500:]])))
    check_replay(answers[0], answers[1])
    check_replay(answers[0], answers[2])


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "a field more": (OPENAI, {"language": "en"}),
    "a field's other value": (OPENAI, {"response_format": "text"}),
    "an unknown field": (OPENAI, {"beam_size": "5"}),
    "another model": (OPENAI, {"model": "whisper-large-v3"}),
    "other audio": (OPENAI, {"audio": wav(3.1)}),
    "audio with a byte more": (OPENAI, {"audio": SPEECH.read_bytes() + b"\0"}),
    "another contract": (ROUTER, {}),
    "a contract with other names": (STATS, {}),
}


@pytest.mark.parametrize("other", OTHERS)
@each_host
def test_another_request_under_the_key_is_a_conflict_for_good(house: House, host: Host, other: str) -> None:
    path, form = OTHERS[other]
    customer = house.office.open()
    base = {"response_format": "json"} if other == "a field's other value" else {}
    first = house.request(host, customer, OPENAI, KEY, **base)
    check_conflict(house.request(host, customer, path, KEY, **(base | form)), running=False)
    check_replay(first, house.request(host, customer, OPENAI, KEY, **base))
    assert house.office.money(customer.account) == (1_000_000 - COST, 0)


def test_keys_that_differ_and_no_key_at_all_are_new_requests(house: House) -> None:
    customer = house.office.open()
    headers: list[dict[str, str]] = [{}, {}, KEY, {"idempotency-key": "order 4711/A"}, {"idempotency-key": "-" * 255}]
    answers = [house.request("asgi", customer, headers=given) for given in headers]
    assert len({answer.content for answer in answers}) == len(headers)
    assert house.office.money(customer.account) == (1_000_000 - len(headers) * COST, 0)


@each_host
def test_two_accounts_with_the_same_key_do_not_meet(house: House, host: Host) -> None:
    customers = [house.office.open(credit=COST) for _ in range(2)]
    answers = [house.request(host, customer, headers=KEY) for customer in customers]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content != answers[1].content
    for customer, first in zip(customers, answers, strict=True):
        check_replay(first, house.request(host, customer, headers=KEY))


@each_host
def test_an_accounts_keys_share_its_answers(house: House, host: Host) -> None:
    one = house.office.open(credit=COST)
    other = house.office.key(one.account)
    check_replay(house.request(host, one, headers=KEY), house.request(host, other, headers=KEY))


@each_contract
@each_host
def test_an_answer_that_was_paid_for_is_had_again_without_credit(house: House, host: Host, path: str) -> None:
    customer = house.office.open(credit=COST)
    first = house.request(host, customer, path, KEY)
    assert microdollars(first.headers["x-voxgate-balance"]) == 0
    check_replay(first, house.request(host, customer, path, KEY))
    other = house.request(host, customer, path, {"Idempotency-Key": "another"})
    assert (other.status_code, envelope(other)["code"]) == (402, "insufficient_quota")
    check_conflict(house.request(host, customer, path, KEY, audio=wav(1)), running=False)


@pytest.mark.parametrize("whose", ["account", "key"])
def test_an_answer_that_was_paid_for_is_had_again_with_the_budget_spent(house: House, whose: str) -> None:
    customer = house.office.open(budget=COST if whose == "account" else None)
    if whose == "key":
        customer = house.office.key(customer.account, budget=COST)
    first = house.request("asgi", customer, headers=KEY)
    assert house.request("asgi", customer).status_code == 402
    check_replay(first, house.request("asgi", customer, headers=KEY))


def test_an_answer_is_had_again_with_the_audio_of_the_minute_used_up(house: House) -> None:
    customer = house.office.open(limits=RateLimits(audio_seconds_per_minute=1))
    first = house.request("asgi", customer, headers=KEY)
    assert house.request("asgi", customer).status_code == 429
    check_replay(first, house.request("asgi", customer, headers=KEY))


# --- In flight --------------------------------------------------------------------------------


@pytest.mark.parametrize("second", HOSTS)
@pytest.mark.parametrize("first", HOSTS)
def test_one_in_flight_is_a_conflict_that_waiting_ends(house: House, first: Host, second: Host) -> None:
    if (first, second) == ("lambda", "lambda"):
        pytest.skip("one execution environment serves one request at a time")
    customer = house.office.open(credit=2 * COST)
    with ThreadPoolExecutor(1) as pool:
        with house.upstream.held():
            running = pool.submit(house.request, first, customer, headers=KEY)
            house.upstream.wait_for_request()
            refused = house.request(second, customer, headers=KEY)
            check_conflict(refused, running=True)
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            check_conflict(house.request(second, customer, headers=KEY, language="en"), running=False)
        answer = running.result()
    check_replay(answer, house.request(second, customer, headers=KEY))
    assert house.office.money(customer.account) == (COST, 0)


def test_one_in_flight_is_a_conflict_with_all_the_credit_held_too(house: House) -> None:
    customer = house.office.open(credit=COST)
    with ThreadPoolExecutor(1) as pool:
        with house.upstream.held():
            running = pool.submit(house.request, "asgi", customer, headers=KEY)
            house.upstream.wait_for_request()
            check_conflict(house.request("asgi", customer, headers=KEY), running=True)
        check_replay(running.result(), house.request("asgi", customer, headers=KEY))


def test_the_sdk_waits_by_itself_for_the_answer_of_one_in_flight(house: House) -> None:
    customer = house.office.open(credit=2 * COST)
    statuses: list[int] = []

    def seen(response: httpx.Response) -> None:
        statuses.append(response.status_code)
        if response.status_code == 409:
            house.upstream.release()

    with ThreadPoolExecutor(1) as pool, house.upstream.held():
        running = pool.submit(house.request, "asgi", customer, headers=KEY)
        house.upstream.wait_for_request()
        with (
            openai.DefaultHttpxClient(event_hooks={"response": [seen]}) as http,
            openai.OpenAI(api_key=customer.key, base_url=f"{house.server.url}/v1", http_client=http) as client,
        ):
            again = client.audio.transcriptions.with_raw_response.create(
                model="whisper-1", file=("speech.mp3", SPEECH.read_bytes()), extra_headers=KEY
            )
        assert again.headers["idempotency-replayed"] == "true"
        assert again.content == running.result().content
    assert statuses == [409, 200]


def test_the_sdk_asks_once_where_the_key_is_anothers_request(house: House) -> None:
    customer = house.office.open()
    house.request("asgi", customer, headers=KEY)
    asked: list[httpx.Request] = []
    with (
        openai.DefaultHttpxClient(event_hooks={"request": [asked.append]}) as http,
        openai.OpenAI(api_key=customer.key, base_url=f"{house.server.url}/v1", http_client=http) as client,
        pytest.raises(openai.ConflictError) as caught,
    ):
        client.audio.transcriptions.create(model="whisper-1", file=("a.wav", wav(1)), extra_headers=KEY)
    assert (caught.value.code, caught.value.param) == ("idempotency_conflict", "Idempotency-Key")
    assert len(asked) == 1


def test_of_fifty_at_once_one_is_charged_and_the_others_wait_or_replay(house: House) -> None:
    customer = house.office.open()
    house.upstream.delay = 0.3
    try:
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda _: house.request("asgi", customer, headers=KEY), range(50)))
    finally:
        house.upstream.delay = 0
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 409}
    charged = [a for a in answers if a.status_code == 200 and "idempotency-replayed" not in a.headers]
    assert [microdollars(answer.headers["x-voxgate-cost"]) for answer in charged] == [COST]
    assert {answer.content for answer in answers if answer.status_code == 200} == {charged[0].content}
    for answer in answers:
        if answer.status_code == 409:
            check_conflict(answer, running=True)
    assert house.office.money(customer.account) == (1_000_000 - COST, 0)


# --- What fails -------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 500, 503])
@each_contract
@each_host
def test_a_failed_request_does_not_use_up_its_key(house: House, host: Host, path: str, status: int) -> None:
    customer = house.office.open(credit=COST)
    with house.upstream.failing(status):
        assert house.request(host, customer, path, KEY).status_code == (400 if status == 400 else 502)
    first = house.request(host, customer, path, KEY)
    check_replay(first, house.request(host, customer, path, KEY))


@each_host
def test_a_refused_request_does_not_use_up_its_key(house: House, host: Host) -> None:
    customer = house.office.open(credit=COST)
    refused: list[dict[str, Any]] = [
        {"audio": (DATA / "not-pdf.pdf").read_bytes()},
        {"audio": wav(10)},
        {"model": "whisper-9"},
        {"language": "Klingon"},
    ]
    answers = [house.request(host, customer, headers=KEY, **form).status_code for form in refused]
    assert answers == [400, 402, 404, 400]
    check_replay(*(house.request(host, customer, headers=KEY) for _ in range(2)))


def test_one_who_hung_up_may_ask_again_under_the_key(house: House) -> None:
    customer = house.office.open(credit=COST)
    with house.upstream.held(), house.client("asgi", customer.headers | KEY) as client:
        client.timeout = httpx.Timeout(5, read=0.3)
        with pytest.raises(httpx.ReadTimeout):
            send(client)
        client.close()
        # Before there is an answer, or it would be paid for and kept.
        deadline = time.monotonic() + 10
        while house.office.money(customer.account)[1]:
            assert time.monotonic() < deadline
    check_replay(*eventually(house, customer))


def eventually(house: House, customer: Customer) -> list[httpx.Response]:
    """The first answer once the lost request is gone, and the one after it."""
    for _ in range(100):
        answer = house.request("asgi", customer, headers=KEY)
        if answer.status_code != 409:
            return [answer, house.request("asgi", customer, headers=KEY)]
    raise AssertionError("the key stays in use")


VALUES = {
    "empty": b"",
    "long": b"a" * 256,
    "latin": b"caf\xe9",
    "utf": "schl\u00fcssel".encode(),
    "tab": b"a\tb",
}


def with_value(house: House, host: Host, path: str, value: bytes) -> httpx.Response:
    headers = [(b"authorization", f"Bearer {house.rich.key}".encode()), (b"idempotency-key", value)]
    field, model = ("audio", "model_id") if path == STATS else ("file", "model")
    with house.client(host) as client:
        return client.post(path, headers=headers, data={model: "whisper-1"}, files={field: SPEECH.read_bytes()})


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@each_contract
@each_host
def test_a_key_that_is_none_is_400(house: House, host: Host, path: str, value: bytes) -> None:
    response = with_value(house, host, path, value)
    assert response.status_code == 400
    error = envelope(response)
    assert (error["code"], error["param"]) == ("invalid_input", "Idempotency-Key")


@each_host
def test_the_refusal_of_a_key_that_is_none_says_how_the_limits_stand(house: House, host: Host) -> None:
    response = with_value(house, host, OPENAI, b"")
    assert response.status_code == 400
    assert [window for window in WINDOWS if window not in response.headers] == []


# --- Long answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [50_000, 1_500_000])
@each_contract
@each_host
def test_a_long_answer_is_had_again_byte_for_byte(house: House, host: Host, path: str, length: int) -> None:
    customer = house.office.open(credit=COST)
    short, house.upstream.text = house.upstream.text, "\u00e4\n" + "\u00f6" * (length // 2)
    try:
        first = house.request(host, customer, path, KEY)
    finally:
        house.upstream.text = short
    assert len(first.content) > length * 0.99
    check_replay(first, house.request(host, customer, path, KEY))
    staged = list((house.office.data_dir / "staging" / "results" / customer.account).glob("*"))
    assert len(staged) == (length > 262_144)
    assert all(path.stat().st_mode & 0o077 == 0 for path in staged)
