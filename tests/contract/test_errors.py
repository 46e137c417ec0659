"""The table of errors, on every contract and both hosts, raw and through OpenAI's SDK."""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
import openai
import pytest

from conftest import DATA
from customers import CONTRACTS, HOSTS, LITELLM, OPENAI, STATS, WINDOWS, Customer, Host, House, envelope, send, wav
from voxgate.accounts import RateLimits, Scope, keys

LIMIT = 26_214_400
OPENED = 1_000_000  # micro-dollars, of all who are not short of them
NOTHING = contextlib.nullcontext()


@dataclass(frozen=True)
class Case:
    """`who` is given the house, once; `during` holds while the request is made."""

    who: Callable[[House], Customer]
    status: int
    code: str
    type: str
    message: str
    form: dict[str, Any] = field(default_factory=dict)
    param: str | None = None
    during: Callable[[House, Customer], AbstractContextManager[None]] = lambda house, customer: NOTHING
    authenticated: bool = True


def customer(house: House) -> Customer:
    return house.office.open()


def stranger(key: str) -> Callable[[House], Customer]:
    return lambda house: Customer("", key, "")


def revoked(house: House) -> Customer:
    made = house.office.open()
    assert house.office.run("keys", "revoke", made.key_id).returncode == 0
    return made


def expired(house: House) -> Customer:
    today = dt.datetime.now(dt.UTC).date()
    return house.office.keys_create(house.office.open().account, "--expires", today.isoformat())


def suspended(house: House) -> Customer:
    made = house.office.open()
    house.office.suspend(made)
    return made


def in_debt_of_audio(house: House) -> Customer:
    """Three seconds where one a minute is allowed: what a full bucket lets in and is long in paying off."""
    made = house.office.open(limits=RateLimits(audio_seconds_per_minute=1), credit=OPENED + 310)
    assert house.request("asgi", made).status_code == 200
    return made


@contextlib.contextmanager
def asked_already(house: House, customer: Customer) -> Iterator[None]:
    house.get("asgi", customer, "/v1/models")
    yield


def uploading(house: House, customer: Customer) -> AbstractContextManager[None]:
    return house.uploading(customer)


def failing(house: House, customer: Customer) -> AbstractContextManager[None]:
    return house.upstream.failing()


NOT_PDF = (DATA / "not-pdf.pdf").read_bytes()
RENEWS = (dt.datetime.now(dt.UTC).date().replace(day=1) + dt.timedelta(days=32)).replace(day=1).isoformat()
BAD: tuple[int, str, str] = (400, "invalid_input", "invalid_request_error")
UNKNOWN: tuple[int, str, str] = (401, "unauthenticated", "authentication_error")
POOR: tuple[int, str, str] = (402, "insufficient_quota", "insufficient_quota")
LIMITED: tuple[int, str, str] = (429, "rate_limited", "rate_limit_error")
CASES: dict[str, Case] = {
    "no audio": Case(customer, *BAD, message="PDF", form={"audio": NOT_PDF}, param="file"),
    "empty audio": Case(customer, *BAD, message="empty", form={"audio": b""}, param="file"),
    "bad value": Case(customer, *BAD, message="Klingon", form={"language": "Klingon"}, param="language"),
    "key cut off": Case(stranger("vg_wrong"), *UNKNOWN, message="cut off", authenticated=False),
    "key mistyped": Case(stranger(keys.generate()[:-1] + "!"), *UNKNOWN, message="mistyped", authenticated=False),
    "key unknown": Case(stranger(keys.generate()), *UNKNOWN, message="Incorrect", authenticated=False),
    "key revoked": Case(revoked, *UNKNOWN, message="Incorrect", authenticated=False),
    "key expired": Case(expired, *UNKNOWN, message="Incorrect", authenticated=False),
    "no credit": Case(lambda house: house.office.open(credit=0), *POOR, message=r"\$0\.00 is left"),
    "too little credit": Case(
        lambda house: house.office.open(credit=309), *POOR, message=r"\$0\.000309 is left.* needs \$0\.00031\b"
    ),
    "account's budget": Case(
        lambda house: house.office.open(budget=309), *POOR, message=rf"budget of \$0\.000309 .*renews on {RENEWS} "
    ),
    "key's budget": Case(
        lambda house: house.office.keys_create(house.office.open().account, "--budget", "0.0003"),
        *POOR,
        message=rf"budget of \$0\.0003 .*by this key.*renews on {RENEWS} ",
    ),
    "account suspended": Case(suspended, 403, "account_suspended", "permission_error", message="suspended"),
    "scope": Case(
        lambda house: house.office.keys_create(house.office.open().account, "--scope", "usage"),
        *(403, "permission_denied", "permission_error"),
        message="scope 'transcribe'",
    ),
    "model not allowed": Case(
        lambda house: house.office.keys_create(house.office.open().account, "--model", "whisper-large-v3"),
        *(403, "model_not_allowed", "permission_error"),
        message="'whisper-1'",
        param="model",
    ),
    "no such model": Case(
        customer, 404, "model_not_found", "invalid_request_error", "whisper-9", {"model": "whisper-9"}, "model"
    ),
    "too large": Case(
        customer,
        *(413, "invalid_input", "invalid_request_error"),
        message=str(LIMIT),
        form={"audio": wav(1) + bytes(LIMIT - 8043)},
        param="file",
    ),
    "requests a minute, key": Case(
        lambda house: house.office.keys_create(house.office.open().account, "--requests-per-minute", "1"),
        *LIMITED,
        message="1 requests a minute .*by this key",
        during=asked_already,
    ),
    "requests a minute, account": Case(
        lambda house: house.office.open(limits=RateLimits(requests_per_minute=1)),
        *LIMITED,
        message="1 requests a minute",
        during=asked_already,
    ),
    "audio seconds a minute, account": Case(in_debt_of_audio, *LIMITED, message="1 seconds of audio a minute"),
    "at once, key": Case(
        lambda house: house.office.keys_create(house.office.open().account, "--concurrent-requests", "1"),
        *LIMITED,
        message="1 requests run already.*by this key",
        during=uploading,
    ),
    "at once, account": Case(
        lambda house: house.office.open(limits=RateLimits(concurrent_requests=1)),
        *LIMITED,
        message="1 requests run already",
        during=uploading,
    ),
    "every provider fails": Case(
        customer, 502, "provider_unavailable", "server_error", "embedded: transient", during=failing
    ),
}
EXCEPTIONS: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    402: openai.APIStatusError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    413: openai.APIStatusError,
    429: openai.RateLimitError,
    502: openai.InternalServerError,
}
each_case = pytest.mark.parametrize("name", CASES)
each_host = pytest.mark.parametrize("host", HOSTS)
each_contract = pytest.mark.parametrize("path", list(CONTRACTS.values()), ids=list(CONTRACTS))
# Of those whose contract an SDK of OpenAI's speaks.
each_base = pytest.mark.parametrize(
    "base", ["/v1", "", "/litellm/v1"], ids=[name for name in CONTRACTS if name != "stats"]
)


@pytest.fixture(scope="module")
def customers(house: House) -> dict[str, Customer]:
    made = {name: case.who(house) for name, case in CASES.items()}
    time.sleep(2.1)  # a server relies on what it has read of a key for two seconds
    return made


@each_case
@each_contract
@each_host
def test_each_refusal_has_its_status_and_its_envelope(
    house: House, customers: dict[str, Customer], host: Host, path: str, name: str
) -> None:
    case, customer = CASES[name], customers[name]
    with case.during(house, customer):
        response = house.request(host, customer, path, **case.form)
    assert response.status_code == case.status
    error = envelope(response)
    assert (error["code"], error["type"]) == (case.code, case.type)
    assert re.search(case.message, error["message"])
    own = {"file": "audio", "model": "model_id"} if path == STATS else {}
    assert error["param"] == own.get(case.param or "", case.param)
    assert case.status != 401 or response.headers["www-authenticate"].startswith("Bearer")
    assert ("retry-after" in response.headers) == ("retry-after-ms" in response.headers) == (case.status == 429)
    assert response.headers.get("x-should-retry") == ("false" if case.status == 402 else None)
    assert not {"x-voxgate-cost", "x-voxgate-balance"} & response.headers.keys()


@each_case
@each_base
@each_host
def test_each_refusal_is_the_sdks_own_exception(
    house: House, customers: dict[str, Customer], host: Host, base: str, name: str
) -> None:
    case, customer = CASES[name], customers[name]
    form = {"model": "whisper-1"} | case.form
    file = ("speech.mp3", form.pop("audio", wav(3.1)))
    asked: list[httpx.Request] = []
    with (
        httpx.Client(transport=house.transport(host), event_hooks={"request": [asked.append]}, timeout=60) as http,
        openai.OpenAI(
            api_key=customer.key,
            base_url=house.url(host) + base,
            http_client=cast(Any, http),
            # What helps nothing to ask again is asked once although the SDK may ask three times.
            max_retries=2 if case.status in (400, 401, 402, 403, 404, 413) else 0,
        ) as client,
        case.during(house, customer),
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.audio.transcriptions.create(file=file, **form)
    error = caught.value
    assert type(error) is EXCEPTIONS[case.status]
    assert (error.status_code, error.code, error.type, error.param) == (case.status, case.code, case.type, case.param)
    assert re.search(case.message, error.message)
    assert len(asked) == 1


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.authenticated])
@each_host
def test_a_refusal_of_a_known_customer_says_how_its_limits_stand(
    house: House, customers: dict[str, Customer], host: Host, name: str
) -> None:
    case, customer = CASES[name], customers[name]
    with case.during(house, customer):
        response = house.request(host, customer, **case.form)
    assert response.status_code == case.status
    assert [window for window in WINDOWS if window not in response.headers] == []


def test_no_refusal_has_spent_or_kept_anything(house: House, customers: dict[str, Customer]) -> None:
    """Runs after all of the above."""
    listed = {account["id"]: account for account in house.office.tell("accounts", "list")}
    known = {name: listed[customer.account] for name, customer in customers.items() if customer.account}
    expected = {name: {"no credit": 0, "too little credit": 309}.get(name, OPENED) for name in known}
    assert {name: account["balance_microdollars"] for name, account in known.items()} == expected
    assert {name for name, account in known.items() if account["held_microdollars"]} == set()


@pytest.mark.parametrize("scheme", ["", "Bearer", "Basic dm94Z2F0ZTo=", "Token {key}", "{key}"])
@each_contract
@each_host
def test_a_key_that_is_missing_or_not_a_bearers_is_401(house: House, host: Host, path: str, scheme: str) -> None:
    header = scheme.format(key=house.server.key).encode()
    with house.client(host) as client:
        responses = [client.post(path, headers=[(b"authorization", header)]), client.post(path)]
    for response in responses:
        assert (response.status_code, envelope(response)["code"]) == (401, "unauthenticated")


@each_contract
@each_host
def test_only_litellms_contract_takes_the_key_as_x_api_key(house: House, host: Host, path: str) -> None:
    customer = house.office.open()
    with house.client(host, {"x-api-key": customer.key}) as client:
        response = send(client, path)
    assert response.status_code == (200 if path == LITELLM else 401)


@pytest.mark.parametrize("wrong", ["vg_wrong", keys.generate()], ids=["mistyped", "unknown"])
def test_a_wrong_x_api_key_is_401(house: House, wrong: str) -> None:
    with house.client("asgi", {"x-api-key": wrong}) as client:
        assert envelope(send(client, LITELLM))["code"] == "unauthenticated"


@each_host
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/whisper-1", "/v1/usage", "/v1/balance"])
def test_what_is_only_read_needs_a_key_too(house: House, customers: dict[str, Customer], host: Host, path: str) -> None:
    expected = {"key unknown": 401, "key revoked": 401, "key expired": 401, "account suspended": 403}
    for name, status in expected.items():
        response = house.get(host, customers[name], path)
        assert (response.status_code, envelope(response)["code"]) == (status, CASES[name].code)


@each_host
def test_a_key_for_transcribing_alone_reads_no_accounts(house: House, host: Host) -> None:
    only = house.office.open(scopes=frozenset({Scope.TRANSCRIBE}))
    assert house.request(host, only).status_code == 200
    for path in ("/v1/usage", "/v1/balance"):
        response = house.get(host, only, path)
        assert (response.status_code, envelope(response)["code"]) == (403, "permission_denied")
    admin = house.office.open(scopes=frozenset({Scope.ADMIN}))
    assert house.request(host, admin).status_code == 200
    assert house.get(host, admin, "/v1/balance").status_code == 200


@each_host
def test_a_key_sees_and_uses_the_models_of_its_list_by_any_of_their_names(house: House, host: Host) -> None:
    office = house.office
    only = office.keys_create(office.open().account, "--model", "nova-3", "--model", "whisper-1")
    listed = {model["id"] for model in house.get(host, only, "/v1/models").json()["data"]}
    assert listed == {"whisper-1", "deepgram-nova-3"}
    for model, status in {"nova-3": 200, "deepgram-nova-3": 200, "whisper-1": 200, "whisper-large-v3": 403}.items():
        assert (model, house.request(host, only, model=model).status_code) == (model, status)
    assert house.get(host, only, "/v1/models/nova-3").status_code == 200
    assert house.get(host, only, "/v1/models/whisper-large-v3").status_code == 404


@each_host
def test_a_model_by_its_provider_is_no_way_around_a_keys_list(house: House, host: Host) -> None:
    only = house.office.open(models=("whisper-large-v3",))
    assert house.request(host, only, model="embedded/whisper-1").status_code == 403
    assert house.request(host, only, model="embedded/whisper-large-v3").status_code == 200


def test_a_suspended_account_is_served_again_when_that_ends(house: House) -> None:
    customer = suspended(house)
    assert [house.request(host, customer).status_code for host in HOSTS] == [403, 403]
    assert house.office.run("accounts", "resume", customer.account).returncode == 0
    time.sleep(2.1)
    assert [house.request(host, customer).status_code for host in HOSTS] == [200, 200]


def test_a_revoked_key_ends_everywhere_and_the_accounts_other_keys_do_not(house: House) -> None:
    one = house.office.open()
    other = house.office.key(one.account)
    assert [house.request(host, one).status_code for host in HOSTS] == [200, 200]
    assert house.office.run("keys", "revoke", one.key_id).returncode == 0
    deadline = time.monotonic() + 60
    while [house.request(host, one).status_code for host in HOSTS] != [401, 401]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert [house.request(host, other).status_code for host in HOSTS] == [200, 200]


@each_host
def test_a_rotated_key_gives_its_rights_to_the_new_one(house: House, host: Host) -> None:
    old = house.office.open(models=("whisper-1",))
    fresh = house.office.tell("keys", "rotate", old.key_id, "--yes")
    new = Customer(old.account, fresh["key"], fresh["id"])
    assert house.request(host, old).status_code == 401
    assert house.request(host, new).status_code == 200
    assert house.request(host, new, model="whisper-large-v3").status_code == 403


def test_the_sdk_asks_once_where_credit_is_out(house: House) -> None:
    asked: list[httpx.Request] = []
    customer = house.office.open(credit=0)
    with (
        openai.DefaultHttpxClient(event_hooks={"request": [asked.append]}) as http,
        openai.OpenAI(api_key=customer.key, base_url=f"{house.server.url}/v1", http_client=http) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.audio.transcriptions.create(model="whisper-1", file=("speech.wav", wav(1)))
    assert (caught.value.status_code, caught.value.code) == (402, "insufficient_quota")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert [request.url.path for request in asked] == [OPENAI]
