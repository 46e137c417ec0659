"""What a request costs, what the headers say of it, and that every account of it says the same."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from conftest import DATA, RECORDINGS, Recording
from customers import (
    CONTRACTS,
    COST,
    HOSTS,
    OPENAI,
    ROUTER,
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

PRICES = {  # micro-dollars a minute, of the catalogue that ships
    "whisper-1": 6000,
    "whisper-large-v3": 3000,
    "whisper-large-v3-turbo": 1000,
    "lmp-stt-20241013": 3000,
    "deepgram-nova-3": 4300,
    "gpt-4o-transcribe": 6000,
    "gpt-transcribe": 4500,
}
TODAY = dt.datetime.now(dt.UTC).date().isoformat()
each_host = pytest.mark.parametrize("host", HOSTS)
each_contract = pytest.mark.parametrize("path", list(CONTRACTS.values()), ids=list(CONTRACTS))


def cost(seconds: float, price: int = 6000) -> int:
    """By the contract: the price for started tenths of a second, in whole micro-dollars, rounded up."""
    return math.ceil(price * math.ceil(round(seconds * 10, 4)) / 600)


def billed(response: httpx.Response) -> tuple[int, int]:
    """What it cost, and what is left."""
    assert response.status_code == 200, response.text
    return microdollars(response.headers["x-voxgate-cost"]), microdollars(response.headers["x-voxgate-balance"])


# --- Cost -------------------------------------------------------------------------------------


@each_contract
@each_host
def test_a_request_costs_what_is_announced_and_every_place_says_so(house: House, host: Host, path: str) -> None:
    customer = house.office.open(credit=1_000_000)
    assert billed(house.request(host, customer, path)) == (COST, 1_000_000 - COST)
    assert billed(house.request(host, customer, path)) == (COST, 1_000_000 - 2 * COST)
    left = 1_000_000 - 2 * COST
    balance = house.get(host, customer, "/v1/balance").json()
    amounts = [f"{name}_microdollars" for name in ("balance", "held", "free", "spent_this_month")]
    assert [balance[name] for name in amounts] == [left, 0, left, 2 * COST]
    assert [microdollars(balance[name.removesuffix("_microdollars")]) for name in amounts] == [left, 0, left, 2 * COST]
    assert (balance["object"], balance["currency"], balance["account"]) == ("balance", "usd", customer.account)
    shown = house.office.tell("accounts", "show", customer.account)
    assert (shown["balance_microdollars"], shown["held_microdollars"]) == (left, 0)
    assert shown["spent_this_month_microdollars"] == 2 * COST


@pytest.mark.parametrize("recording", [r for r in RECORDINGS if r.duration], ids=lambda r: r.file)
def test_every_kind_of_recording_is_billed_by_its_real_length(house: House, recording: Recording) -> None:
    response = house.request("asgi", house.rich, audio=recording.path.read_bytes())
    assert billed(response)[0] == cost(recording.duration)


@pytest.mark.parametrize(
    ("seconds", "tenths"), [(0.1, 1), (0.999, 10), (1.0, 10), (1.0005, 11), (1.1, 11), (60.0, 600)]
)
def test_a_started_tenth_of_a_second_is_billed_whole(house: House, seconds: float, tenths: int) -> None:
    assert billed(house.request("asgi", house.rich, audio=wav(seconds)))[0] == 10 * tenths


@pytest.mark.parametrize(("model", "price"), PRICES.items())
def test_each_model_has_its_price_and_a_part_of_a_microdollar_is_a_whole_one(
    house: House, model: str, price: int
) -> None:
    assert billed(house.request("asgi", house.rich, model=model))[0] == cost(3.03175, price)


def test_the_cost_is_never_rounded_down(house: House) -> None:
    assert billed(house.request("asgi", house.rich, model="whisper-large-v3-turbo"))[0] == 52  # of 51.7


@pytest.mark.parametrize("path", [path for path in CONTRACTS.values() if path != STATS])
@each_host
def test_every_format_costs_the_same(house: House, host: Host, path: str) -> None:
    costs = {
        response_format: billed(house.request(host, house.rich, path, response_format=response_format))[0]
        for response_format in ("json", "text", "srt", "vtt", "verbose_json")
    }
    assert set(costs.values()) == {COST}


def test_silence_costs_as_much_as_speech(house: House) -> None:
    silence = (DATA / "silence.flac").read_bytes()
    assert billed(house.request("asgi", house.rich, audio=silence))[0] == cost(2.0)


FAILURES: dict[str, tuple[int, dict[str, Any]]] = {
    "no audio": (400, {"audio": (DATA / "not-html.html").read_bytes()}),
    "empty": (400, {"audio": b""}),
    "container without sound": (400, {"audio": (DATA / "noaudio.mp4").read_bytes()}),
    "too short": (400, {"audio": (DATA / "a-wav-s16.wav").read_bytes()[:60]}),
    "bad field": (400, {"temperature": "warm"}),
    "no such model": (404, {"model": "whisper-9"}),
}


@pytest.mark.parametrize("failure", FAILURES)
@each_host
def test_what_fails_costs_nothing(house: House, host: Host, failure: str) -> None:
    status, form = FAILURES[failure]
    customer = house.office.open(credit=1_000_000)
    response = house.request(host, customer, **form)
    assert response.status_code == status
    assert not {"x-voxgate-cost", "x-voxgate-balance"} & response.headers.keys()
    assert house.office.money(customer.account) == (1_000_000, 0)


@pytest.mark.parametrize("status", [500, 503, 400, 404])
@each_contract
@each_host
def test_what_the_provider_fails_at_costs_nothing(house: House, host: Host, path: str, status: int) -> None:
    customer = house.office.open(credit=1_000_000)
    with house.upstream.failing(status):
        response = house.request(host, customer, path)
    assert response.status_code == (400 if status == 400 else 502)
    balance = house.get(host, customer, "/v1/balance").json()
    assert (balance["balance_microdollars"], balance["held_microdollars"]) == (1_000_000, 0)
    assert billed(house.request(host, customer, path)) == (COST, 1_000_000 - COST)


def test_who_hangs_up_pays_nothing_and_nothing_stays_held(house: House) -> None:
    customer = house.office.open(credit=1_000_000)
    with house.upstream.held():
        with house.client("asgi", customer.headers) as client:
            client.timeout = httpx.Timeout(5, read=0.5)
            with pytest.raises(httpx.ReadTimeout):
                send(client)
        house.upstream.wait_for_request()
        settled(house, customer)
    assert house.office.money(customer.account) == (1_000_000, 0)


def settled(house: House, customer: Customer) -> None:
    """Wait until nothing is held."""
    for _ in range(200):
        if not house.get("asgi", customer, "/v1/balance").json()["held_microdollars"]:
            return
    raise AssertionError("something stays held")


def test_while_a_request_runs_its_cost_is_held_and_not_yet_spent(house: House) -> None:
    customer = house.office.open(credit=1_000_000)
    with ThreadPoolExecutor(1) as pool:
        with house.upstream.held():
            running = pool.submit(house.request, "asgi", customer)
            house.upstream.wait_for_request()
            shown = house.office.tell("accounts", "show", customer.account)
            assert (shown["balance_microdollars"], shown["held_microdollars"]) == (1_000_000, COST)
            assert house.get("lambda", customer, "/v1/balance").json()["free_microdollars"] == 1_000_000 - COST
        assert billed(running.result()) == (COST, 1_000_000 - COST)
    assert house.office.money(customer.account) == (1_000_000 - COST, 0)


# --- Credit -----------------------------------------------------------------------------------


@each_contract
@each_host
def test_credit_is_spent_to_its_last_microdollar_and_not_below(house: House, host: Host, path: str) -> None:
    customer = house.office.open(credit=2 * COST + 2)
    assert [billed(house.request(host, customer, path))[1] for _ in range(2)] == [COST + 2, 2]
    served = house.upstream.served
    refused = house.request(host, customer, path)
    assert (refused.status_code, house.upstream.served) == (402, served)  # before the audio is sent anywhere
    message = envelope(refused)["message"]
    assert "$0.000002 is left" in message
    assert "needs $0.00031" in message
    # What is left suffices for a tenth of a second at the lowest price.
    assert billed(house.request(host, customer, path, audio=wav(0.1), model="whisper-large-v3-turbo")) == (2, 0)
    assert house.request(host, customer, path, audio=wav(0.1), model="whisper-large-v3-turbo").status_code == 402
    assert house.office.money(customer.account) == (0, 0)


def test_the_credit_of_running_requests_is_not_spent_twice(house: House) -> None:
    customer = house.office.open(credit=2 * COST)
    with ThreadPoolExecutor(2) as pool:
        with house.upstream.held():
            running = [pool.submit(house.request, "asgi", customer) for _ in range(2)]
            for _ in running:
                house.upstream.wait_for_request()
            refused = house.request("lambda", customer)
            assert refused.status_code == 402
            assert "$0.00062 more is held for requests that are running" in envelope(refused)["message"]
        assert [request.result().status_code for request in running] == [200, 200]
    assert house.office.money(customer.account) == (0, 0)


def test_of_racing_requests_exactly_those_that_the_credit_suffices_for_succeed(house: House) -> None:
    customer = house.office.open(credit=20 * COST + COST - 1)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: house.request("asgi", customer).status_code, range(60)))
    assert (answers.count(200), answers.count(402)) == (20, 40)
    assert house.office.money(customer.account) == (COST - 1, 0)


@each_host
def test_a_top_up_is_there_at_once(house: House, host: Host) -> None:
    customer = house.office.open(credit=0)
    assert house.request(host, customer).status_code == 402
    assert house.office.run("accounts", "credit", customer.account, "0.00031").returncode == 0
    assert billed(house.request(host, customer)) == (COST, 0)


def test_the_same_reference_credits_once_and_a_refund_comes_back(house: House) -> None:
    customer, office = house.office.open(credit=COST), house.office
    house.request("asgi", customer)
    for _ in range(2):
        assert office.run("accounts", "credit", customer.account, "5", "--reference", "invoice-7").returncode == 0
    assert office.money(customer.account) == (5_000_000, 0)
    assert office.run("accounts", "refund", customer.account, "0.00031", "--note", "twice").returncode == 0
    assert office.money(customer.account) == (5_000_310, 0)
    overdraft = office.run("accounts", "adjust", customer.account, "-5.000311")
    assert (overdraft.returncode, "$5.00031 is free" in overdraft.stderr) == (1, True)
    assert office.money(customer.account) == (5_000_310, 0)


@pytest.mark.parametrize("whose", ["account", "key"])
@each_host
def test_a_budget_ends_a_month_and_leaves_the_balance(house: House, host: Host, whose: str) -> None:
    budget = 2 * COST + 9
    customer = house.office.open(budget=budget if whose == "account" else None)
    if whose == "key":
        customer = house.office.key(customer.account, budget=budget)
    assert [house.request(host, customer).status_code for _ in range(3)] == [200, 200, 402]
    refused = envelope(house.request(host, customer))
    renewal = (dt.date.fromisoformat(TODAY).replace(day=1) + dt.timedelta(days=32)).replace(day=1)
    assert f"It renews on {renewal.isoformat()} (UTC)" in refused["message"]
    assert "$0.000009 of it is left" in refused["message"]
    assert ("by this key" in refused["message"]) == (whose == "key")
    assert house.office.money(customer.account) == (1_000_000 - 2 * COST, 0)
    assert house.get(host, customer, "/v1/balance").status_code == 200


def test_a_keys_budget_binds_no_other_key_and_a_raised_one_lets_in_again(house: House) -> None:
    office, other = house.office, house.office.open(budget=3 * COST)
    spent = office.key(other.account, budget=COST)
    assert [house.request("asgi", spent).status_code for _ in range(2)] == [200, 402]
    assert [house.request("asgi", other).status_code for _ in range(3)] == [200, 200, 402]
    assert office.run("accounts", "change", other.account, "--budget", "1.00").returncode == 0
    assert office.tell("accounts", "show", other.account)["budget_microdollars"] == 1_000_000


# --- Headers ----------------------------------------------------------------------------------


@each_host
def test_every_answer_to_a_known_customer_says_how_its_limits_stand(house: House, host: Host) -> None:
    customer = house.office.open(limits=RateLimits(requests_per_minute=100, audio_seconds_per_minute=600))
    remaining = []
    for path in ("/v1/models", "/v1/models/whisper-1", "/v1/usage", "/v1/balance", "/v1/models/whisper-9", OPENAI):
        response = house.request(host, customer) if path == OPENAI else house.get(host, customer, path)
        assert [window for window in WINDOWS if window not in response.headers] == []
        assert response.headers["x-ratelimit-limit-requests"] == "100"
        assert response.headers["x-ratelimit-limit-audio-seconds"] == "600"
        remaining.append(int(response.headers["x-ratelimit-remaining-requests"]))
    # A token comes back every 0.6 s.
    assert remaining[0] == 99
    assert 94 <= remaining[-1] <= 97
    assert 595 <= int(response.headers["x-ratelimit-remaining-audio-seconds"]) <= 597
    assert 0 < seconds(response.headers["x-ratelimit-reset-audio-seconds"]) <= 0.31
    assert 2.4 < seconds(response.headers["x-ratelimit-reset-requests"]) <= 3.6


def seconds(text: str) -> float:
    """`12ms`, `1.5s` or `6m0s`, as OpenAI writes it."""
    if text.endswith("ms"):
        return int(text.removesuffix("ms")) / 1000
    minutes, _, rest = text.removesuffix("s").rpartition("m")
    return 60 * int(minutes or 0) + float(rest)


def test_who_is_not_known_is_told_nothing_of_limits(house: House) -> None:
    with house.client("asgi") as client:
        responses = [client.get("/health"), client.get("/openapi.json"), client.get("/v1/models"), client.get("/x")]
    assert [response.status_code for response in responses] == [200, 200, 401, 404]
    for response in responses:
        assert not {*WINDOWS, "x-voxgate-balance"} & response.headers.keys()


@each_host
def test_only_what_is_billed_says_what_it_cost(house: House, host: Host) -> None:
    customer = house.office.open()
    answers = [house.get(host, customer, path) for path in ("/v1/models", "/v1/usage", "/v1/balance")]
    answers.append(house.request(host, customer, audio=b""))
    assert [{"x-voxgate-cost", "x-voxgate-balance"} & answer.headers.keys() for answer in answers] == [set()] * 4


# --- Usage ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def history(house: House) -> tuple[Customer, Customer]:
    """Two keys of one account, and what they did: 9 requests of two models, 2 of which failed, and
    one for a model that is not there."""
    one = house.office.open()
    other = house.office.key(one.account, name="other")
    for _ in range(3):
        house.request("asgi", one)
    for host in HOSTS:
        house.request(host, other, STATS, model="deepgram-nova-3")
    house.request("asgi", other, audio=wav(10))
    house.request("lambda", one, ROUTER, model="deepgram-nova-3")
    with house.upstream.failing():
        house.request("asgi", one)
    house.request("asgi", other, audio=b"no audio")
    house.request("asgi", other, model="whisper-9")
    return one, other


def rows(house: House, customer: Customer, **query: str) -> list[dict[str, Any]]:
    page = house.get("asgi", customer, "/v1/usage", **query)
    assert page.status_code == 200, page.text
    data: list[dict[str, Any]] = page.json()["data"]
    return data


def facts(row: dict[str, Any]) -> tuple[int, int, float, int]:
    assert microdollars(row["cost"]) == row["cost_microdollars"]
    return row["requests"], row["errors"], row["seconds"], row["cost_microdollars"]


WHISPER_ONE, WHISPER_OTHER = (4, 1, 9.3, 3 * COST), (2, 1, 10.0, 1000)
NOVA_ONE, NOVA_OTHER, NOBODY = (1, 0, 3.1, 223), (2, 0, 6.2, 446), (1, 1, 0.0, 0)


def added(*parts: tuple[int, int, float, int]) -> tuple[int, int, float, int]:
    requests, errors, lengths, costs = zip(*parts, strict=True)
    return sum(requests), sum(errors), round(sum(lengths), 1), sum(costs)


ALL = added(WHISPER_ONE, WHISPER_OTHER, NOVA_ONE, NOVA_OTHER, NOBODY)


@each_host
def test_usage_is_by_day_key_and_model(house: House, history: tuple[Customer, Customer], host: Host) -> None:
    one, other = history
    page = house.get(host, one, "/v1/usage").json()
    found = {(row["day"], row["key"], row["model"]): facts(row) for row in page["data"]}
    assert found == {
        (TODAY, one.key_id, "whisper-1"): WHISPER_ONE,
        (TODAY, one.key_id, "deepgram-nova-3"): NOVA_ONE,
        (TODAY, other.key_id, "whisper-1"): WHISPER_OTHER,
        (TODAY, other.key_id, "deepgram-nova-3"): NOVA_OTHER,
        (TODAY, other.key_id, ""): NOBODY,
    }
    assert facts(page["total"]) == ALL
    assert (page["object"], page["has_more"], page["next"]) == ("list", False, None)
    assert (page["since"], page["until"]) == (TODAY[:7] + "-01", TODAY)
    spent = house.get(host, one, "/v1/balance").json()["spent_this_month_microdollars"]
    assert spent == ALL[3]


def test_usage_is_grouped_as_asked(house: House, history: tuple[Customer, Customer]) -> None:
    one, other = history
    by_key = {row["key"]: facts(row) for row in rows(house, one, group_by="key")}
    assert by_key == {
        one.key_id: added(WHISPER_ONE, NOVA_ONE),
        other.key_id: added(WHISPER_OTHER, NOVA_OTHER, NOBODY),
    }
    by_model = {row["model"]: facts(row) for row in rows(house, one, group_by="model")}
    assert by_model["deepgram-nova-3"] == added(NOVA_ONE, NOVA_OTHER)
    assert by_model["whisper-1"] == added(WHISPER_ONE, WHISPER_OTHER)
    assert [facts(row) for row in rows(house, one, group_by="day")] == [ALL]
    assert [set(row) & {"day", "key", "model"} for row in rows(house, one, group_by="day")] == [{"day"}]
    assert {frozenset(row) & {"day", "key", "model"} for row in rows(house, one, group_by="model,day")} == {
        frozenset({"day", "model"})
    }


def test_usage_is_filtered_as_asked(house: House, history: tuple[Customer, Customer]) -> None:
    one, other = history
    assert {row["key"] for row in rows(house, one, key=other.key_id)} == {other.key_id}
    assert [facts(row) for row in rows(house, one, key=one.key_id, model="whisper-1")] == [WHISPER_ONE]
    only = house.get("asgi", one, "/v1/usage", model="deepgram-nova-3").json()
    assert facts(only["total"]) == added(NOVA_ONE, NOVA_OTHER)
    assert rows(house, one, key="key_of_nobody") == []
    tomorrow = (dt.date.fromisoformat(TODAY) + dt.timedelta(days=1)).isoformat()
    assert rows(house, one, since=tomorrow, until=tomorrow) == []
    nothing = house.get("asgi", one, "/v1/usage", since="2026-01-01", until="2026-01-31").json()
    assert (nothing["data"], facts(nothing["total"]), nothing["has_more"]) == ([], (0, 0, 0, 0), False)
    assert [facts(row) for row in rows(house, one, since=TODAY, until=TODAY, group_by="day")] == [ALL]


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 6])
@each_host
def test_pages_are_together_the_whole(house: House, history: tuple[Customer, Customer], host: Host, limit: int) -> None:
    one, _ = history
    whole = house.get(host, one, "/v1/usage").json()
    paged, query = [], {"limit": str(limit)}
    while True:
        page = house.get(host, one, "/v1/usage", **query).json()
        assert page["total"] == whole["total"]
        assert 1 <= len(page["data"]) <= limit
        paged += page["data"]
        assert page["has_more"] == (len(paged) < len(whole["data"])) == (page["next"] is not None)
        if not page["has_more"]:
            break
        query = query | {"after": page["next"]}
    assert paged == whole["data"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"since": "yesterday"}, "since"),
        ({"since": "2026-13-01"}, "since"),
        ({"until": "2026-02-30"}, "until"),
        ({"since": "2026-02-01", "until": "2026-01-01"}, "since"),
        ({"since": "2020-01-01", "until": "2026-01-01"}, "since"),
        ({"group_by": "week"}, "group_by"),
        ({"group_by": ""}, "group_by"),
        ({"group_by": "day;key"}, "group_by"),
        ({"limit": "0"}, "limit"),
        ({"limit": "1001"}, "limit"),
        ({"limit": "-1"}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"limit": "\u0663"}, "limit"),
        ({"limit": "9" * 5000}, "limit"),
        ({"after": "abc"}, "after"),
        ({"after": "!!!!"}, "after"),
        ({"after": "\xe9"}, "after"),
        ({"after": "YWJj"}, "after"),
        ({"after": "gICA"}, "after"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
@each_host
def test_a_parameter_that_means_nothing_is_400_and_named(
    house: House, host: Host, query: dict[str, str], param: str
) -> None:
    response = house.get(host, house.rich, "/v1/usage", **query)
    assert response.status_code == 400
    error = envelope(response)
    assert (error["code"], error["param"]) == ("invalid_input", param)
    assert [window for window in WINDOWS if window not in response.headers] == []


def test_one_customers_usage_is_not_anothers(house: House, history: tuple[Customer, Customer]) -> None:
    one, _ = history
    stranger = house.office.open()
    assert rows(house, stranger) == []
    assert rows(house, stranger, key=one.key_id) == []


def test_the_command_prints_what_the_api_says(house: House, history: tuple[Customer, Customer]) -> None:
    one, _ = history
    said = rows(house, one)
    assert house.office.tell("usage", one.account) == said
    assert house.office.tell("usage", one.account, "--by", "model") == rows(house, one, group_by="model")
    shown = house.office.run("usage", one.account, "--csv").stdout
    as_text = [{name: str(value) for name, value in row.items() if name != "cost_microdollars"} for row in said]
    assert list(csv.DictReader(io.StringIO(shown))) == as_text
    header, *lines = house.office.run("usage", one.account).stdout.splitlines()
    assert header.split() == ["day", "key", "model", "requests", "errors", "seconds", "cost"]
    assert sorted(line.split() for line in lines) == sorted([v for v in row.values() if v] for row in as_text)
    assert house.office.tell("usage", one.account, "--until", "2026-01-31") == []
    for wrong in (["--by", "week"], ["--since", "soon"]):
        assert house.office.run("usage", one.account, *wrong).returncode != 0


def test_each_request_has_a_record_and_no_word_of_what_was_said(
    house: House, history: tuple[Customer, Customer]
) -> None:
    one, other = history
    records = house.office.tell("usage", one.account, "--requests")
    assert len(records) == len({record["request_id"] for record in records}) == ALL[0]
    assert sum(record["cost_microdollars"] for record in records) == ALL[3]
    assert {record["key_id"] for record in records} == {one.key_id, other.key_id}
    assert {record["contract"] for record in records} == {"openai", "stats", "router"}
    assert sorted(record["status"] for record in records) == [200] * 7 + [400, 404, 502]
    served = [record for record in records if record["status"] == 200]
    assert {(r["provider"], r["deployment"], r["attempts"]) for r in served} == {("embedded", "default", 1)}
    assert all(0 < record["latency"] < 60 for record in records)
    assert {record["size"] for record in records} >= {(DATA / "b-slt.mp3").stat().st_size, len(wav(10))}
    everything = json.dumps(records) + house.office.run("usage", one.account, "--requests", "--csv").stdout
    assert house.upstream.text not in everything
    assert one.key not in everything
    failed = next(record for record in records if record["status"] == 502)
    assert (failed["cost_microdollars"], failed["attempts"], failed["model"]) == (0, 2, "whisper-1")


def test_a_refusal_for_want_of_credit_or_rate_is_no_usage(house: House) -> None:
    customer = house.office.open(credit=0)
    assert house.request("asgi", customer).status_code == 402
    assert house.office.tell("usage", customer.account) == []


def test_the_books_are_right_in_the_end(house: House) -> None:
    done = house.office.run("audit")
    assert (done.returncode, done.stderr) == (0, "")
