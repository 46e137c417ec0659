"""The inference service alone, with Whisper, and a gateway in front of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import DATA, Server, start_server, stop_server
from fakes import whisper_model
from fakes.inference import Inference

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
    assert response.headers["x-voxgate-attempts"] == "1"
    stats = gateway.transcribe(SPEECH, "/v1/stt/transcribe", language="es").json()
    assert stats["language"] == "es"
    assert 0 <= stats["confidence"] <= 1
    litellm = gateway.transcribe(SPEECH, "/litellm/v1/audio/transcriptions", language="es").json()
    extra = litellm["extra_fields"]
    assert (extra["provider"], extra["model_requested"], extra["model_deployment"]) == (
        "embedded",
        "whisper-1",
        "default",
    )
    assert litellm["usage"]["seconds"] == pytest.approx(litellm["duration"])


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


def test_a_gateway_without_its_inference_service_says_502_and_what_each_attempt_came_to(tmp_path: Path) -> None:
    process, server = start_server(tmp_path, VOXGATE_INFERENCE_URL="http://127.0.0.1:9")
    try:
        response = server.transcribe(SPEECH)
    finally:
        stop_server(process)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (502, "provider_unavailable")
    assert "(embedded: transient; embedded: transient)" in error["message"]
    assert "127.0.0.1" not in error["message"]


# --- a catalogue of one's own ------------------------------------------------------------------

CATALOG = """
[providers.small]
kind = "inference"
base_url = "{url}"

[providers.other]
kind = "inference"
base_url = "{url}"

[providers.paid]
kind = "openai"
base_url = "https://paid.example/v1"
api_key = "env:PAID_KEY_OF_THIS_TEST"

[models.whisper-1]
deployments = [
  {{ provider = "small", upstream_model = "s", price_per_minute = "0.006", max_seconds = 1, languages = ["en"] }},
  {{ provider = "paid", upstream_model = "p", price_per_minute = "0.001" }},
]

[models.both]
deployments = [
  {{ provider = "small", upstream_model = "s", price_per_minute = "0.001", max_seconds = 1, languages = ["en"] }},
  {{ provider = "other", upstream_model = "o", price_per_minute = "0.006", words = false }},
]

[models.paid-only]
deployments = [{{ provider = "paid", upstream_model = "p", price_per_minute = "0.001" }}]
"""
PATHS = ["/v1/audio/transcriptions", "/v1/stt/transcribe", "/audio/transcriptions", "/litellm/v1/audio/transcriptions"]


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A gateway whose catalogue has limits, and a provider without its key."""
    directory = tmp_path_factory.mktemp("limited")
    with Inference() as upstream:
        (directory / "catalog.toml").write_text(CATALOG.format(url=upstream.url), encoding="utf-8")
        process, server = start_server(directory, VOXGATE_CATALOG=str(directory / "catalog.toml"))
        yield server
        stop_server(process)


def test_a_provider_without_its_key_is_said_once_and_its_models_are_not_there(limited: Server) -> None:
    log = (limited.data_dir / "log").read_text(encoding="utf-8")
    assert log.count("PAID_KEY_OF_THIS_TEST") == 1
    listed = httpx.get(f"{limited.url}/v1/models", headers=limited.auth).json()["data"]
    assert [model["id"] for model in listed] == ["whisper-1", "both"]
    missing = limited.transcribe(SPEECH, model="paid-only")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_what_one_deployment_cannot_take_the_next_one_serves(limited: Server) -> None:
    served = limited.transcribe(SPEECH, model="both")
    assert (served.status_code, served.headers["x-voxgate-provider"]) == (200, "other")
    assert served.headers["x-voxgate-attempts"] == "1"


@pytest.mark.parametrize("path", PATHS)
def test_audio_that_is_too_long_for_all_is_refused_by_the_contracts_own_field(limited: Server, path: str) -> None:
    refusal = limited.transcribe(SPEECH, path)
    assert refusal.status_code == 400
    error = refusal.json()["error"]
    assert "longer than 1 seconds" in error["message"]
    assert error["param"] == ("audio" if "stt" in path else "file")


@pytest.mark.parametrize("path", PATHS)
def test_a_language_that_nobody_declares_is_refused_by_its_field(limited: Server, path: str) -> None:
    refusal = limited.transcribe(SPEECH, path, language="fr")
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "language")


def test_a_provider_id_is_not_served_by_another(limited: Server) -> None:
    refusal = limited.transcribe(SPEECH, "/v1/stt/transcribe", model_id="both", provider_id="small")
    assert refusal.status_code == 404
    assert "other: not the provider_id" in refusal.json()["error"]["message"]
    served = limited.transcribe(SPEECH, "/v1/stt/transcribe", model_id="both", provider_id="other")
    assert served.headers["x-voxgate-provider"] == "other"


def test_a_bad_catalogue_is_refused_at_start_by_file_key_and_reason(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(CATALOG.format(url="http://127.0.0.1:9").replace("max_seconds = 1,", "max_secnds = 1,"), "utf-8")
    command = [sys.executable, "-m", "voxgate", "serve", "--port", "0", "--data-dir", str(tmp_path / "data")]
    done = subprocess.run(
        command,
        env=os.environ | {"VOXGATE_CATALOG": str(file)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert f"{file}: models.whisper-1.deployments[0].max_secnds: is not a known key" in done.stderr
    assert "Traceback" not in done.stderr
