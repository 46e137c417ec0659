"""One contract suite against both hosts: uvicorn on a socket, and the Lambda handler on events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import DATA, ROOT, Server
from customers import Office
from fakes.api_gateway import ApiGateway, Context
from make_events import events
from voxgate.accounts.sqlite import SqliteStore
from voxgate.hosts.gateway import build_application
from voxgate.hosts.lambda_rest import Handler, build_handler
from voxgate.settings import Settings
from voxgate.wiring import build_gateway

SPEECH = DATA / "a-mp3-cbr.mp3"  # a second
TEXT = "please send the letter"
OPENAI, STATS, ROUTER = "/v1/audio/transcriptions", "/v1/stt/transcribe", "/audio/transcriptions"
LITELLM = "/litellm/v1/audio/transcriptions"
CONTRACTS = [OPENAI, STATS, ROUTER, LITELLM]
IDS = ["openai", "stats", "router", "litellm"]


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Handler, str]]:
    """The Lambda function's handler and a key that it accepts."""
    directory = tmp_path_factory.mktemp("lambda")
    loop = asyncio.new_event_loop()
    key = Office(directory).open().key
    settings = Settings(engine_workers=1, data_dir=directory, spool_dir=directory / "spool")
    gateway = build_gateway(settings, SqliteStore(directory / "voxgate.sqlite"))
    yield build_handler(build_application(gateway), loop), key
    loop.run_until_complete(gateway.close())
    loop.close()


@pytest.fixture(params=["asgi", "lambda"])
def client(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    transport: httpx.BaseTransport | None = None
    if request.param == "asgi":
        server: Server = request.getfixturevalue("server")
        base_url, key = server.url, server.key
    else:
        handler, key = request.getfixturevalue("function")
        base_url, transport = "https://api.example.com", ApiGateway(handler)
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=base_url, headers=headers, transport=transport, timeout=60) as client:
        yield client


def send(client: httpx.Client, path: str, *, audio: Any = None, **fields: Any) -> httpx.Response:
    name, model = ("audio", "model_id") if path == STATS else ("file", "model")
    content = SPEECH.read_bytes() if audio is None else audio
    return client.post(path, data={model: "whisper-1"} | fields, files={name: ("speech.mp3", content)})


def error(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    envelope = response.json()["error"]
    assert envelope.keys() == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return {"status": response.status_code, **envelope}


def test_openai_json_has_text_and_usage(client: httpx.Client) -> None:
    response = send(client, OPENAI)
    assert response.json() == {"text": TEXT, "usage": {"type": "duration", "seconds": 1.011}}
    assert response.headers["x-voxgate-provider"] == "embedded"
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("granularities", "segments", "words"),
    [([], True, False), (["segment"], True, False), (["word"], False, True), (["word", "segment"], True, True)],
)
def test_granularities_choose_segments_and_words(
    client: httpx.Client, granularities: list[str], segments: bool, words: bool
) -> None:
    fields = {"response_format": "verbose_json", "timestamp_granularities[]": granularities}
    body = send(client, OPENAI, **fields).json()
    assert body["task"] == "transcribe"
    assert body["language"] == "english"
    assert ("segments" in body, "words" in body) == (segments, words)


@pytest.mark.parametrize(
    ("response_format", "content_type", "start"),
    [
        ("text", "text/plain; charset=utf-8", "please send"),
        ("srt", "application/x-subrip; charset=utf-8", "1\n00:00:00,0"),
        ("vtt", "text/vtt; charset=utf-8", "WEBVTT\n\n00:00:00.0"),
    ],
)
@pytest.mark.parametrize("path", [OPENAI, ROUTER, LITELLM], ids=["openai", "router", "litellm"])
def test_plain_formats_are_plain_bodies(
    client: httpx.Client, path: str, response_format: str, content_type: str, start: str
) -> None:
    response = send(client, path, response_format=response_format)
    assert response.headers["content-type"] == content_type
    assert response.text.startswith(start)


def test_a_models_catalogue_entry_says_how_its_language_is_printed(client: httpx.Client) -> None:
    body = send(client, OPENAI, model="lmp-stt-20241013", response_format="verbose_json").json()
    assert body["language"] == "en"


def test_stats_body(client: httpx.Client) -> None:
    body = send(client, STATS, model_id="deepgram-nova-3").json()
    assert body.keys() == {"text", "duration", "language", "confidence", "words", "model"}
    assert (body["text"], body["language"], body["model"]) == (TEXT, "en", "deepgram-nova-3")
    assert 0 < body["confidence"] <= 1
    assert [word["word"] for word in body["words"]] == TEXT.split()
    assert all(word.keys() == {"word", "start", "end", "confidence"} for word in body["words"])


def test_router_body(client: httpx.Client) -> None:
    response = send(client, ROUTER, model="whisper-large-v3", eu_native="true", beam_size="5")
    body = response.json()
    assert body.keys() == {"id", "object", "created", "provider", "model", "text", "language", "segments"}
    assert (body["object"], body["provider"], body["model"]) == ("audio.transcription", "embedded", "whisper-large-v3")
    assert body["id"] == response.headers["x-request-id"]
    assert "x-voxgate-ignored-params" not in response.headers


def test_litellm_body(client: httpx.Client) -> None:
    body = send(client, LITELLM, timestamp_granularities="word", fallbacks="whisper-large-v3").json()
    assert body.keys() >= {"text", "task", "language", "duration", "segments", "words", "usage", "extra_fields"}
    assert body["extra_fields"]["provider"] == "embedded"
    assert body["extra_fields"]["model_requested"] == "whisper-1"
    assert body["language"] == "en"


def test_unknown_fields_are_named_in_a_header(client: httpx.Client) -> None:
    response = send(client, OPENAI, **{"beam_size": "5", "weird\r\nname": "x"})
    assert response.status_code == 200
    assert response.headers["x-voxgate-ignored-params"].startswith("beam_size, weird")


@pytest.mark.parametrize("path", CONTRACTS, ids=IDS)
@pytest.mark.parametrize(
    "header", ["", "Bearer", "Basic abc", "vg_123", "Bearer vg_123", f"Bearer {'x' * 4000}", "Bearer \xe9"]
)
def test_a_missing_or_wrong_key_is_401(client: httpx.Client, path: str, header: str) -> None:
    response = client.post(path, headers=[(b"authorization", header.encode("latin-1"))], files={"file": b"RIFF"})
    assert (error(response)["status"], error(response)["code"]) == (401, "unauthenticated")
    assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("path", CONTRACTS, ids=IDS)
def test_an_unknown_model_is_404(client: httpx.Client, path: str) -> None:
    name = "model_id" if path == STATS else "model"
    assert error(send(client, path, **{name: "whisper-9"})) | {"message": ""} == {
        "status": 404,
        "type": "invalid_request_error",
        "param": name,
        "code": "model_not_found",
        "message": "",
    }


@pytest.mark.parametrize("path", CONTRACTS, ids=IDS)
def test_what_is_no_audio_is_400_and_names_the_field(client: httpx.Client, path: str) -> None:
    refusal = error(send(client, path, audio=(DATA / "not-pdf.pdf").read_bytes()))
    assert (refusal["status"], refusal["code"]) == (400, "invalid_input")
    assert refusal["param"] == ("audio" if path == STATS else "file")
    assert "PDF" in refusal["message"]


@pytest.mark.parametrize("path", CONTRACTS, ids=IDS)
def test_a_language_that_no_engine_speaks_is_400(client: httpx.Client, path: str) -> None:
    refusal = error(send(client, path, language="es"))
    assert (refusal["status"], refusal["param"]) == (400, "language")


@pytest.mark.parametrize("language", ["en", "en-US", "eng", "English", "EN_gb"])
def test_a_language_may_be_a_code_a_tag_or_a_name(client: httpx.Client, language: str) -> None:
    assert send(client, OPENAI, language=language).json()["text"] == TEXT


@pytest.mark.parametrize("path", [STATS, ROUTER])
def test_streaming_is_refused_by_name_where_a_contract_has_none(client: httpx.Client, path: str) -> None:
    refusal = error(send(client, path, stream="true"))
    assert (refusal["status"], refusal["param"]) == (400, "stream")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"include[]": "logprobs"}, "include[]"),
        ({"response_format": "diarized_json"}, "response_format"),
        ({"known_speaker_names[]": ["a"]}, "known_speaker_names[]"),
        ({"known_speaker_references[]": ["data:audio/wav;base64,AAAA"]}, "known_speaker_references[]"),
        ({"keywords[]": ["voxgate"]}, "keywords"),
        ({"languages[]": ["en", "fr"]}, "languages"),
        ({"chunking_strategy": '{"type": "server_vad"}'}, "chunking_strategy"),
        ({"chunking_strategy[type]": "server_vad"}, "chunking_strategy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_newer_parameter_that_nothing_can_honour_is_400(
    client: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    refusal = error(send(client, OPENAI, **fields))
    assert (refusal["status"], refusal["param"]) == (400, param)


def test_a_filter_that_leaves_no_provider_is_404(client: httpx.Client) -> None:
    assert error(send(client, ROUTER, allowed_providers='["ovh","scaleway"]'))["code"] == "model_not_found"
    assert error(send(client, STATS, provider_id="deepgram"))["code"] == "model_not_found"
    assert send(client, ROUTER, **{"allowed_providers[]": ["ovh", "embedded"]}).json()["text"] == TEXT


def test_models_are_listed_and_shown_in_openais_shape(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert {"whisper-1", "whisper-large-v3", "lmp-stt-20241013", "deepgram-nova-3"} <= {m["id"] for m in listed["data"]}
    for name in ("whisper-1", "nova-3", "embedded/whisper-1"):
        assert client.get(f"/v1/models/{name}").json()["id"] == name
    assert error(client.get("/v1/models/whisper-9"))["code"] == "model_not_found"


def test_wrong_paths_and_methods_are_in_the_envelope(client: httpx.Client) -> None:
    assert error(client.get("/v1/nothing"))["status"] == 404
    assert error(client.get("/v1/models/"))["status"] == 404
    refused = client.delete(OPENAI)
    assert (error(refused)["status"], refused.headers["allow"]) == (405, "POST")
    assert client.head("/health").status_code == 200


def test_health_and_the_description_need_no_key(client: httpx.Client) -> None:
    del client.headers["authorization"]
    assert client.get("/health").json()["status"] == "ok"
    assert set(CONTRACTS) <= client.get("/openapi.json").json()["paths"].keys()


# What only the Lambda host has to do.


def test_a_body_that_api_gateway_took_for_text_tells_the_operator(function: tuple[Handler, str]) -> None:
    handler, key = function
    transport = ApiGateway(handler, binary=False)
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url="https://api.example.com", headers=headers, transport=transport) as client:
        refusal = error(send(client, OPENAI))
    assert refusal["status"] == 400
    assert "binary media types" in refusal["message"]


def test_running_out_of_the_functions_time_is_an_answer(function: tuple[Handler, str]) -> None:
    handler, key = function
    transport = ApiGateway(handler, context=Context(milliseconds=1))
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url="https://api.example.com", headers=headers, transport=transport) as client:
        assert error(send(client, OPENAI))["code"] == "provider_unavailable"
        after = send(httpx.Client(base_url=client.base_url, headers=headers, transport=ApiGateway(handler)), OPENAI)
    assert after.json()["text"] == TEXT


@pytest.mark.parametrize("name", sorted(events()))
def test_the_events_in_the_repository_are_current_and_run(
    function: tuple[Handler, str], name: str, tmp_path: Path
) -> None:
    text = (ROOT / "events" / f"{name}.json").read_text(encoding="utf-8")
    assert json.loads(text) == events()[name]
    handler, key = function
    answer = handler(json.loads(text.replace("${VOXGATE_API_KEY}", key)), Context())
    expected = {
        "error-no-key": 401,
        "error-wrong-key": 401,
        "error-unknown-model": 404,
        "error-wrong-path": 404,
        "error-wrong-method": 405,
    }
    assert answer["statusCode"] == expected.get(name, 400 if name.startswith("error") else 200)


def test_voxgate_invoke_runs_an_event_and_prints_the_answer(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "voxgate",
        "invoke",
        str(ROOT / "events/openai-srt.json"),
        "--data-dir",
        str(tmp_path),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VOXGATE_")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    answer = json.loads(done.stdout)
    assert answer["statusCode"] == 200
    assert TEXT in answer["body"]
    key = (tmp_path / "api-key").read_text(encoding="ascii").strip()
    assert key not in done.stdout + done.stderr
    assert TEXT not in done.stderr
    with contextlib.suppress(FileNotFoundError):
        assert not list((tmp_path / "spool").iterdir())
