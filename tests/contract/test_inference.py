"""The inference service alone, with Whisper, and a gateway in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import DATA, Server, start_server, stop_server
from fakes import whisper_model

SPEECH = DATA / "b-slt.mp3"
VERBOSE: dict[str, Any] = {
    "response_format": "verbose_json",
    "timestamp_granularities[]": ["word", "segment"],
    "temperature": "0.2",
}


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = whisper_model.build(tmp_path_factory.mktemp("models") / "tiny-random")
    directory = tmp_path_factory.mktemp("inference")
    process, server = start_server(directory, "inference", VOXGATE_WHISPER_MODEL=str(model))
    with httpx.Client(base_url=server.url) as client:
        while client.get("/health/ready").status_code != 200:
            pass
    yield server
    stop_server(process)


@pytest.fixture(scope="module")
def gateway(inference: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    process, server = start_server(tmp_path_factory.mktemp("gateway"), VOXGATE_INFERENCE_URL=inference.url)
    yield server
    stop_server(process)


def test_liveness_readiness_and_models(inference: Server) -> None:
    assert httpx.get(f"{inference.url}/health/live").json()["status"] == "ok"
    assert httpx.get(f"{inference.url}/health/ready").json() == {"status": "ready"}
    assert [m["id"] for m in httpx.get(f"{inference.url}/v1/models").json()["data"]] == ["tiny-random"]


def test_whisper_gives_all_that_it_knows_of_a_segment(inference: Server) -> None:
    body = inference.transcribe(SPEECH, model="tiny-random", language="en", **VERBOSE).json()
    assert body["language"] == "english"
    assert body["segments"]
    for segment in body["segments"]:
        assert 0 <= segment["start"] <= segment["end"] <= body["duration"] + 0.001
        assert segment["tokens"]
        assert segment["temperature"] == 0.2
        for number in ("avg_logprob", "compression_ratio", "no_speech_prob", "seek"):
            assert isinstance(segment[number], int | float)
    assert all(0 <= word["confidence"] <= 1 for word in body["words"])


@pytest.mark.parametrize("name", ["silence.flac", "noise.ogg", "tone.flac", "hum.flac"])
def test_whisper_invents_nothing_where_nobody_speaks(inference: Server, name: str) -> None:
    body = inference.transcribe(DATA / name, model="default", **VERBOSE).json()
    assert (body["text"], body["segments"], body["language"]) == ("", [], None)


def test_whisper_says_which_languages_it_speaks(inference: Server) -> None:
    refusal = inference.transcribe(SPEECH, model="default", language="sw")
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "language")
    assert "cantonese" not in refusal.text


def test_a_gateway_passes_everything_through_it(gateway: Server) -> None:
    response = gateway.transcribe(SPEECH, language="es", **VERBOSE)
    assert response.status_code == 200
    assert response.json()["language"] == "spanish"
    assert response.json()["segments"]
    assert response.headers["x-voxgate-provider"] == "embedded"
    stats = gateway.transcribe(SPEECH, "/v1/stt/transcribe", language="es").json()
    assert stats["language"] == "es"
    assert 0 <= stats["confidence"] <= 1


def test_a_refusal_of_the_inference_service_reaches_the_client(gateway: Server) -> None:
    refusal = gateway.transcribe(SPEECH, language="sw")
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "language")


def test_a_model_that_cannot_be_loaded_is_said_by_readiness_and_by_requests(tmp_path: Path) -> None:
    process, server = start_server(tmp_path, "inference", VOXGATE_WHISPER_MODEL=str(tmp_path / "missing"))
    try:
        response = server.transcribe(SPEECH, model="default")
        ready = httpx.get(f"{server.url}/health/ready")
    finally:
        stop_server(process)
    assert (response.status_code, response.json()["error"]["code"]) == (502, "provider_unavailable")
    assert "could not be loaded" in ready.json()["error"]["message"]


def test_a_gateway_without_its_inference_service_says_502(tmp_path: Path) -> None:
    process, server = start_server(tmp_path, VOXGATE_INFERENCE_URL="http://127.0.0.1:9")
    try:
        response = server.transcribe(SPEECH)
    finally:
        stop_server(process)
    assert (response.status_code, response.json()["error"]["code"]) == (502, "provider_unavailable")
