"""The cache that a request may ask for, translations, and who may see how the providers fare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import DATA, Server, start_server, stop_server
from customers import COST, LITELLM, OPENAI, ROUTER, STATS, Office
from fakes.inference import Inference

SPEECH = DATA / "b-slt.mp3"
HIT = COST // 10
CACHED = {"x-voxgate-cache": "read-write"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Inference, Office]]:
    directory = tmp_path_factory.mktemp("cache")
    with Inference() as upstream:
        process, server = start_server(directory, VOXGATE_INFERENCE_URL=upstream.url)
        yield server, upstream, Office(directory)
        stop_server(process)


def ask(
    server: Server,
    key: str,
    path: str = OPENAI,
    *,
    audio: bytes | None = None,
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> httpx.Response:
    part, model = ("audio", "model_id") if path == STATS else ("file", "model")
    content = SPEECH.read_bytes() if audio is None else audio
    return httpx.post(
        server.url + path,
        headers={"authorization": f"Bearer {key}"} | (CACHED if headers is None else headers),
        data={model: "whisper-1"} | fields,
        files={part: ("a.mp3", content)},
        timeout=30,
    )


Place = tuple[Server, Inference, Office]


def test_the_second_time_is_a_hit_at_a_tenth_of_the_price(place: Place) -> None:
    server, upstream, office = place
    customer, served = office.open(), upstream.served
    first, second = ask(server, customer.key), ask(server, customer.key)
    assert (first.headers["x-voxgate-attempts"], second.headers["x-voxgate-attempts"]) == ("1", "0")
    assert first.json() == second.json()
    assert upstream.served == served + 1
    assert second.headers["x-voxgate-cost"] == f"0.{HIT:06d}"
    assert office.money(customer.account) == (1_000_000 - COST - HIT, 0)


def test_a_hit_is_written_as_each_contract_and_format_wants_it(place: Place) -> None:
    server, upstream, office = place
    customer = office.open()
    text = ask(server, customer.key).json()["text"]
    served = upstream.served
    assert ask(server, customer.key, response_format="srt").text.splitlines()[2] == text
    body = ask(server, customer.key, LITELLM).json()
    assert body["text"] == text
    assert body["extra_fields"]["cache_debug"] | {"cache_id": ""} == {
        "cache_hit": True,
        "cache_id": "",
        "hit_type": "direct",
        "provider_used": "embedded",
        "model_used": "default",
    }
    assert upstream.served == served


@pytest.mark.parametrize(
    "other",
    [
        {"audio": (DATA / "a-mp3-cbr.mp3").read_bytes()},
        {"prompt": "names"},
        {"language": "en"},
        {"temperature": "0.5"},
        {"model": "whisper-large-v3"},
        {"path": ROUTER, "eu_native": "true"},
        {"response_format": "verbose_json", "timestamp_granularities[]": "word"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_makes_a_difference_is_no_hit(place: Place, other: dict[str, Any]) -> None:
    server, _, office = place
    customer = office.open()
    ask(server, customer.key)
    assert ask(server, customer.key, **other).headers["x-voxgate-attempts"] == "1"


def test_no_account_sees_what_another_asked(place: Place) -> None:
    server, _, office = place
    one, other = office.open(), office.open()
    first, second = ask(server, one.key), ask(server, other.key)
    assert second.headers["x-voxgate-attempts"] == "1"
    assert first.json()["text"] != second.json()["text"]


def test_without_the_header_nothing_is_kept_and_nothing_is_taken(place: Place) -> None:
    server, _, office = place
    customer = office.open()
    for headers in ({}, {}, CACHED, {}):
        assert ask(server, customer.key, headers=headers).headers["x-voxgate-attempts"] == "1"


def test_an_account_may_have_it_for_all_of_its_requests(place: Place) -> None:
    server, _, office = place
    office.tell("accounts", "create", "saver", "--credit", "1.00")
    office.tell("accounts", "change", "saver", "--cache-seconds", "3600")
    key = office.keys_create("saver").key

    def attempts(headers: dict[str, str]) -> str:
        return ask(server, key, headers=headers).headers["x-voxgate-attempts"]

    assert [attempts({}), attempts({}), attempts({"x-voxgate-cache": "off"})] == ["1", "0", "1"]
    assert office.tell("accounts", "show", "saver")["cache_seconds"] == 3600
    assert office.tell("accounts", "change", "saver", "--cache-seconds", "none")["cache_seconds"] is None
    other = office.keys_create("saver").key  # of the old one it is remembered for a moment
    assert ask(server, other, headers={}).headers["x-voxgate-attempts"] == "1"


@pytest.mark.parametrize("seconds", ["0", "-1", "x", "172801"])
def test_an_accounts_time_is_bounded(place: Place, seconds: str) -> None:
    office = place[2]
    refused = office.run("accounts", "change", "saver", "--cache-seconds", seconds)
    assert (refused.returncode, "--cache-seconds" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"x-voxgate-cache": "yes"}, "x-voxgate-cache"),
        (CACHED | {"x-voxgate-cache-ttl": "0"}, "x-voxgate-cache-ttl"),
        (CACHED | {"x-voxgate-cache-ttl": "soon"}, "x-voxgate-cache-ttl"),
        (CACHED | {"x-voxgate-cache-ttl": "172801"}, "x-voxgate-cache-ttl"),
    ],
)
def test_a_header_that_means_nothing_is_a_400(place: Place, headers: dict[str, str], param: str) -> None:
    server, _, office = place
    answer = ask(server, office.open().key, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_translation_says_so(place: Place) -> None:
    server, _, office = place
    customer = office.open()
    body = ask(server, customer.key, "/v1/audio/translations", headers={}, response_format="verbose_json").json()
    assert (body["task"], body["language"]) == ("translate", "english")
    assert office.money(customer.account) == (1_000_000 - COST, 0)


def test_what_does_not_translate_refuses_to(server: Server) -> None:
    answer = ask(server, server.key, "/v1/audio/translations", headers={})
    assert answer.status_code == 400
    assert "does not translate" in answer.json()["error"]["message"]


def test_only_an_admin_sees_how_the_providers_fare(place: Place) -> None:
    server, _, office = place
    customer = office.open()
    admin = office.keys_create(customer.account, "--scope", "admin")
    refused = httpx.get(f"{server.url}/v1/providers", headers=customer.headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
    (seen,) = httpx.get(f"{server.url}/v1/providers", headers=admin.headers).json()["data"]
    assert (seen["id"], seen["state"]) == ("embedded/default", "closed")
    assert seen["models"]["whisper-1"] == {"price_per_minute": "0.006"}
    assert seen["seconds_per_audio_second"] > 0


def test_the_command_line_lists_the_deployments(tmp_path: Path) -> None:
    rows = Office(tmp_path).tell("providers")
    assert {"deployment": "embedded/default", "model": "whisper-1"}.items() <= rows[0].items()
    assert {row["state"] for row in rows} == {"closed"}
