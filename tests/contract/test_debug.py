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
from fakes.upstreams import KEY, TEXT, DeepgramUpstream, OpenAIUpstream, Script, Upstream, delta, done, sse
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
        streaming = OFFER.format("openai").replace("[models.openai]", "[models.gpt]")
        lines.append(streaming.replace(" }]", ', response_format = "json", streaming = true }]'))
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


def streamed(place: Place, customer: Customer | None = None, **fields: Any) -> tuple[dict[str, Any], str]:
    """What the end of a stream shows, and all of the stream."""
    server, office, _ = place
    who = customer or office.open(scopes=DEBUG)
    with httpx.Client(base_url=server.url, headers=who.headers, timeout=30) as client:
        response = send(client, LITELLM, model="gpt", stream="true", **fields)
    *_, end = response.text.removesuffix("\n\n").split("\n\n")
    found: dict[str, Any] = json.loads(end.removeprefix("data: "))["extra_fields"]
    return found, response.text


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


def test_at_the_end_of_a_stream_its_events_are_shown(place: Place) -> None:
    told = [delta("Tell"), {"type": "ping"}, delta(" me"), done("Tell me", usage=None)]
    place[2]["openai"].will(sse(*told))
    seen, _ = streamed(place, prompt="names")
    request = seen["raw_request"]
    assert (request["method"], request["url"]) == ("POST", place[2]["openai"].url + "/v1/audio/transcriptions")
    assert ["stream", "true"] in request["form"]
    size = (DATA / "b-slt.mp3").stat().st_size
    assert request["audio"] == {"name": "audio.mp3", "content_type": "audio/mpeg", "bytes": size}
    assert seen["raw_response"] == told


def test_of_a_long_stream_the_first_events_are_shown(place: Place) -> None:
    told = [*[delta(f" word-{n}") for n in range(3000)], delta("x" * 10_000), done("x")]
    place[2]["openai"].will(sse(*told))
    *shown, last = streamed(place)[0]["raw_response"]
    assert shown == told[: len(shown)]
    assert last == {"left_out": len(told) - len(shown)}
    assert 60_000 < sum(len(json.dumps(event)) for event in shown) <= 64 * 1024


def test_a_stream_shows_nobody_the_providers_key_and_others_nothing(place: Place) -> None:
    script = sse({"type": "echo", "authorization": f"Bearer {KEY}", KEY: [KEY]}, delta("a"), done("a"))
    place[2]["openai"].will(script, script)
    seen, whole = streamed(place, prompt=f"my {KEY}")
    assert KEY not in whole
    assert seen["raw_response"][0]["authorization"] == "Bearer [removed]"
    seen, _ = streamed(place, place[1].open())
    assert {"raw_request", "raw_response"}.isdisjoint(seen)


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
