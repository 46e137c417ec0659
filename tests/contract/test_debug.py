"""What was sent to a provider and what it answered, for keys that may see that, and for no others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import DATA, Server, start_server, stop_server
from customers import LITELLM, Customer, Office, send
from fakes.upstreams import KEY, TEXT, DeepgramUpstream, OpenAIUpstream, Script, Upstream
from voxgate.accounts import Scope

DEBUG = frozenset({Scope.TRANSCRIBE, Scope.DEBUG})
OFFER = '[models.{0}]\ndeployments = [{{ provider = "{0}", upstream_model = "up-1", price_per_minute = "0.001" }}]'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Office, dict[str, Upstream]]]:
    directory = tmp_path_factory.mktemp("debug")
    with OpenAIUpstream() as openai, DeepgramUpstream() as deepgram:
        upstreams: dict[str, Upstream] = {"openai": openai, "deepgram": deepgram}
        lines = []
        for name, upstream in upstreams.items():
            lines += [f"[providers.{name}]", f'kind = "{name}"', f'base_url = "{upstream.base_url}"']
            lines += ['api_key = "env:UPSTREAM_KEY"', OFFER.format(name)]
        catalog = directory / "catalog.toml"
        catalog.write_text("\n".join(lines), encoding="utf-8")
        process, server = start_server(directory, VOXGATE_CATALOG=str(catalog), UPSTREAM_KEY=KEY)
        yield server, Office(directory), upstreams
        stop_server(process)


Place = tuple[Server, Office, dict[str, Upstream]]


def extra(place: Place, model: str = "openai", customer: Customer | None = None, **fields: Any) -> dict[str, Any]:
    server, office, _ = place
    return asked(server, customer or office.open(scopes=DEBUG), model=model, **fields)


def asked(server: Server, customer: Customer, **fields: Any) -> dict[str, Any]:
    with httpx.Client(base_url=server.url, headers=customer.headers, timeout=30) as client:
        response = send(client, LITELLM, **fields)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["extra_fields"]
    return found


def test_a_key_with_the_scope_sees_what_was_sent_and_said(place: Place) -> None:
    seen = extra(place, prompt="names")
    request = seen["raw_request"]
    assert (request["method"], request["url"]) == ("POST", place[2]["openai"].url + "/v1/audio/transcriptions")
    assert ["model", "up-1"] in request["form"]
    assert ["prompt", "names"] in request["form"]
    size = (DATA / "b-slt.mp3").stat().st_size
    assert request["audio"] == {"name": "audio.mp3", "content_type": "audio/mpeg", "bytes": size}
    assert seen["raw_response"]["text"] == TEXT


def test_a_query_is_shown_too(place: Place) -> None:
    seen = extra(place, "deepgram")
    assert ["model", "up-1"] in seen["raw_request"]["query"]
    assert "channels" in seen["raw_response"]["results"]


@pytest.mark.parametrize("scopes", [{Scope.TRANSCRIBE}, {Scope.ADMIN}, {Scope.TRANSCRIBE, Scope.ADMIN, Scope.USAGE}])
def test_nobody_else_does(place: Place, scopes: set[Scope]) -> None:
    seen = extra(place, customer=place[1].open(scopes=frozenset(scopes)))
    assert {"raw_request", "raw_response"}.isdisjoint(seen)


def test_the_providers_key_is_in_none_of_it(place: Place) -> None:
    body = json.dumps({"text": TEXT, "echo": {"authorization": f"Bearer {KEY}"}, KEY: [KEY]}).encode()
    place[2]["openai"].will(Script(body=body))
    seen = extra(place, prompt=f"my {KEY}")
    assert KEY not in json.dumps(seen)
    assert "[removed]" in json.dumps(seen["raw_response"])


def test_the_command_line_gives_the_scope(place: Place) -> None:
    _, office, _ = place
    office.tell("accounts", "create", "curious", "--credit", "1.00")
    customer = office.keys_create("curious", "--scope", "transcribe", "--scope", "debug")
    assert extra(place, customer=customer)["raw_response"]["text"] == TEXT


def test_an_embedded_engine_is_sent_nothing(tmp_path: Path) -> None:
    process, server = start_server(tmp_path)
    try:
        seen = asked(server, Office(tmp_path).open(scopes=DEBUG))
    finally:
        stop_server(process)
    assert (seen["raw_request"], seen["raw_response"]) == (None, None)
