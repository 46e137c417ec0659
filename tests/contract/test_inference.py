"""The inference service alone, with Whisper, and a gateway in front of it."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from conftest import DATA, Server, inference_service, start_server, stop_server, wait_until_ready
from customers import OPENAI, envelope, wav
from fakes import whisper_model
from fakes.inference import Inference
from prometheus import scraped

SPEECH = DATA / "b-slt.mp3"
VERBOSE: dict[str, Any] = {
    "response_format": "verbose_json",
    "timestamp_granularities[]": ["word", "segment"],
    "temperature": "0.2",
}


@pytest.fixture(scope="module")
def inference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment = whisper_model.service(tiny_model)
    with inference_service(tmp_path_factory.mktemp("inference"), **environment) as server:
        yield server


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with two models, and memory for one."""
    other = whisper_model.build(tmp_path_factory.mktemp("other") / "b", seed=1)
    environment = whisper_model.service(tiny_model) | {"VOXGATE_WHISPER_MEMORY": "0.0001"}
    environment["VOXGATE_WHISPER_MODEL"] = f"first={tiny_model}, second={other}"
    with inference_service(tmp_path_factory.mktemp("two"), **environment) as server:
        yield server


def metrics(server: Server) -> dict[str, float]:
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return scraped(answer.text)


def until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def ask(server: Server, file: Path | bytes = SPEECH, **headers: str) -> httpx.Response:
    audio = file.read_bytes() if isinstance(file, Path) else file
    headers = {f"x-voxgate-{name}": value for name, value in headers.items()}
    with httpx.Client(base_url=server.url, headers=headers, timeout=120) as client:
        return client.post(OPENAI, data={"model": "default", "language": "en"}, files={"file": audio})


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


# --- readiness ---------------------------------------------------------------------------------


def test_it_lives_at_once_and_is_ready_when_it_has_decoded_something(tiny_model: Path, tmp_path: Path) -> None:
    # It finds out itself which size of a batch is the fastest, as the other services here need not.
    environment = whisper_model.service(tiny_model) | {"VOXGATE_WHISPER_BATCH": "0"}
    process, server = start_server(tmp_path, "inference", **environment)
    try:
        early = httpx.get(f"{server.url}/health/ready")
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        assert (early.status_code, envelope(early)["code"]) == (503, "overloaded")
        assert int(early.headers["retry-after"]) >= 1
        before = metrics(server)
        # Who comes before it is ready waits for it.
        assert server.transcribe(SPEECH, model="default").status_code == 200
        assert httpx.get(f"{server.url}/health/ready").json() == {"status": "ready"}
        after = metrics(server)
    finally:
        stop_server(process)
    assert (before["voxgate_ready"], before["voxgate_windows_per_second"]) == (0, 0)
    assert after["voxgate_ready"] == 1
    assert after["voxgate_windows_per_second"] > 0


def _cut_short(model: Path) -> None:
    weights = model / "model.bin"
    weights.write_bytes(weights.read_bytes()[:5000])


def _empty(model: Path) -> None:
    for file in model.iterdir():
        file.unlink()


def _no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def _bad_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("no tokenizer", encoding="utf-8")


# What is wrong, and what the log says of it.
BROKEN: dict[str, tuple[Callable[[Path], object], dict[str, str], str]] = {
    "no such directory": (shutil.rmtree, {}, "is no directory"),
    "another directory": (_empty, {}, "has no config.json"),
    "weights cut short": (_cut_short, {}, "The Whisper model cannot be loaded"),
    "no tokenizer": (_no_tokenizer, {}, "tokenizer.json"),
    "bad tokenizer": (_bad_tokenizer, {}, "The Whisper model cannot be loaded"),
    "compute type": (lambda _: None, {"VOXGATE_WHISPER_COMPUTE_TYPE": "nonsense"}, "nonsense"),
    "no GPU": (lambda _: None, {"VOXGATE_WHISPER_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}, "DEVICE=cpu"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_model_that_cannot_be_loaded_is_said_by_the_log_by_readiness_and_by_requests(
    what: str, tiny_model: Path, tmp_path: Path
) -> None:
    damage, environment, said = BROKEN[what]
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    damage(model)
    # Without its tokenizer one would be looked for in the hub, and no test asks there.
    environment = {"HF_HUB_OFFLINE": "1", "VOXGATE_WHISPER_MODEL": str(model), **environment}
    process, server = start_server(tmp_path / "service", "inference", **environment)
    try:
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 502)
        ready = httpx.get(f"{server.url}/health/ready")
        response = server.transcribe(SPEECH, model="default")
        live = httpx.get(f"{server.url}/health/live")
        assert metrics(server)["voxgate_ready"] == 0
    finally:
        stop_server(process)
    assert "could not be loaded" in envelope(ready)["message"]
    assert (response.status_code, envelope(response)["code"]) == (502, "provider_unavailable")
    assert str(tmp_path) not in response.text
    assert live.status_code == 200
    log = (server.data_dir / "log").read_text(encoding="utf-8")
    assert said in log
    assert "Traceback" not in log


def test_a_model_that_is_there_again_is_loaded_without_anybody_asking(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    with inference_service(tmp_path / "service", **whisper_model.service(model)) as server:
        model.rename(tmp_path / "away")
        engine(server).kill()
        until(lambda: "does not start" in (server.data_dir / "log").read_text(encoding="utf-8"))
        (tmp_path / "away").rename(model)
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 200, seconds=20)


def test_an_engine_that_is_killed_is_started_again(tiny_model: Path, tmp_path: Path) -> None:
    with inference_service(tmp_path, **whisper_model.service(tiny_model)) as server:
        for _ in range(2):
            engine(server).kill()
            until(lambda: httpx.get(f"{server.url}/health/ready").status_code != 200)
            wait_until_ready(server)
            assert ask(server).status_code == 200
        assert metrics(server)["voxgate_queue_requests"] == 0


def engine(server: Server) -> psutil.Process:
    (found,) = psutil.Process(server.pid).children()
    return found


# --- metrics -----------------------------------------------------------------------------------


def test_metrics_are_prometheus_text_that_counts_what_was_done(inference: Server) -> None:
    before = metrics(inference)
    for _ in range(3):
        assert ask(inference).status_code == 200
    until(lambda: metrics(inference)["voxgate_batch_size_sum"] >= before.get("voxgate_batch_size_sum", 0) + 3)
    after = metrics(inference)
    assert after["voxgate_ready"] == 1
    assert after["voxgate_queue_requests"] == after["voxgate_queue_audio_seconds"] == 0
    assert after["voxgate_windows_per_second"] > 0
    assert after["voxgate_real_time_factor"] > 0
    assert after['voxgate_model_loaded{model="tiny-random"}'] == 1
    for stage in ("preparing", "waiting", "decoding"):
        name = f'voxgate_stage_seconds_total{{stage="{stage}"}}'
        assert after[name] > before[name]
    bounds = [name for name in after if name.startswith("voxgate_batch_size_bucket")]
    assert bounds[-1] == 'voxgate_batch_size_bucket{le="+Inf"}'
    assert bounds == [name for name in before if name.startswith("voxgate_batch_size_bucket")], "what was not seen yet"


def test_the_seconds_that_are_counted_are_those_of_the_audio(inference: Server) -> None:
    def heard() -> float:
        return metrics(inference)["voxgate_audio_seconds_total"]

    assert ask(inference).status_code == 200
    time.sleep(1.5)  # until what was before this has been reported
    before = heard()
    for _ in range(4):
        assert ask(inference).status_code == 200
    until(lambda: heard() > before)
    time.sleep(1.5)
    spoken = 4 * 3.03
    assert 0.5 * spoken <= heard() - before <= 1.1 * spoken


def test_what_waits_is_in_the_metrics_by_requests_and_by_seconds(inference: Server) -> None:
    speech = SPEECH.read_bytes()
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(hanging(inference, speech))
        until(lambda: metrics(inference)["voxgate_queue_requests"] >= 2)
        now = metrics(inference)
        assert now["voxgate_queue_audio_seconds"] == pytest.approx(3.032 * now["voxgate_queue_requests"], abs=3.1)
    until(lambda: metrics(inference)["voxgate_queue_requests"] == 0)
    until(lambda: metrics(inference)["voxgate_queue_audio_seconds"] == 0)


@contextlib.contextmanager
def hanging(server: Server, audio: bytes, **headers: str) -> Iterator[socket.socket]:
    """A whole request whose answer nobody reads; at the end the client hangs up."""
    form = httpx.Request("POST", server.url, data={"model": "default", "language": "en"}, files={"file": audio})
    with wire(server, length=len(form.read()), type_=form.headers["content-type"], **headers) as client:
        client.sendall(form.content)
        yield client


@contextlib.contextmanager
def wire(server: Server, *, length: int, type_: str, **headers: str) -> Iterator[socket.socket]:
    """A connection on which the head of an upload was sent."""
    lines = [f"POST {OPENAI} HTTP/1.1", "Host: voxgate", f"Content-Type: {type_}", f"Content-Length: {length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=60) as client:
        client.sendall("\r\n".join([*lines, "", ""]).encode())
        yield client


# --- several models ----------------------------------------------------------------------------


def test_models_are_listed_in_their_order_and_asked_for_by_name(two: Server) -> None:
    listed = httpx.get(f"{two.url}/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["first", "second"]
    assert httpx.get(f"{two.url}/v1/models/second").json()["id"] == "second"
    missing = httpx.get(f"{two.url}/v1/models/third")
    assert (missing.status_code, envelope(missing)["code"]) == (404, "model_not_found")
    unknown = two.transcribe(SPEECH, model="third")
    assert (unknown.status_code, envelope(unknown)["param"]) == (404, "model")


@pytest.mark.parametrize("order", [("many", "english"), ("english", "many")])
def test_each_model_is_asked_for_what_it_can_itself(order: tuple[str, str], tiny_model: Path, tmp_path: Path) -> None:
    where = {"many": tiny_model, "english": whisper_model.build(tmp_path / "en", multilingual=False)}
    models = {"VOXGATE_WHISPER_MODEL": ",".join(f"{name}={where[name]}" for name in order)}
    with inference_service(tmp_path / "service", **whisper_model.service(tiny_model) | models) as server:
        assert server.transcribe(SPEECH, model="many", language="fr").status_code == 200
        assert server.transcribe(SPEECH, "/v1/audio/translations", model="many").status_code == 200
        refused = server.transcribe(SPEECH, model="english", language="fr")
        assert (refused.status_code, envelope(refused)["param"]) == (400, "language")
        assert server.transcribe(SPEECH, "/v1/audio/translations", model="english").status_code == 400


def test_each_model_hears_in_its_own_way_though_there_is_memory_for_one(two: Server) -> None:
    def said(model: str) -> list[int]:
        answer = two.transcribe(SPEECH, model=model, language="en", **VERBOSE | {"temperature": "0"})
        assert answer.status_code == 200, answer.text
        return [token for segment in answer.json()["segments"] for token in segment["tokens"]]

    first, second = said("first"), said("second")
    assert first
    assert second
    assert first != second
    for model, tokens in {"default": first, "second": second, "first": first}.items():
        assert said(model) == tokens
        other = "first" if model == "second" else "second"
        until(functools.partial(unloaded, two, other), seconds=10)


def unloaded(server: Server, model: str) -> bool:
    return metrics(server).get(f'voxgate_model_loaded{{model="{model}"}}') == 0


# --- deadlines and priorities -------------------------------------------------------------------


@pytest.mark.parametrize("value", ["30", "3600.5", "1e3"])
def test_a_deadline_that_can_be_met_changes_nothing(inference: Server, value: str) -> None:
    assert ask(inference, deadline=value).status_code == 200


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "soon", "1,5", ""])
def test_a_deadline_that_is_none_is_refused(inference: Server, value: str) -> None:
    refusal = ask(inference, deadline=value)
    assert (refusal.status_code, envelope(refusal)["param"]) == (400, "x-voxgate-deadline")


@pytest.mark.parametrize("value", ["interactive", "batch"])
def test_a_priority_changes_nothing_where_nobody_waits(inference: Server, value: str) -> None:
    assert ask(inference, priority=value).status_code == 200


@pytest.mark.parametrize("value", ["live", "Batch", "0", "high", ""])
def test_a_priority_that_is_none_is_refused(inference: Server, value: str) -> None:
    refusal = ask(inference, priority=value)
    assert (refusal.status_code, envelope(refusal)["param"]) == (400, "x-voxgate-priority")


def test_bad_headers_are_refused_by_the_other_engine_too(server: Server) -> None:
    for name, value in {"x-voxgate-deadline": "soon", "x-voxgate-priority": "high"}.items():
        form: dict[str, Any] = {"data": {"model": "whisper-1"}, "files": {"file": SPEECH.read_bytes()}}
        refusal = httpx.post(server.url + OPENAI, headers=server.auth | {name: value}, timeout=60, **form)
        assert (refusal.status_code, envelope(refusal)["param"]) == (400, name)


def test_what_cannot_be_in_time_is_refused_before_its_body(inference: Server) -> None:
    head = {"Expect": "100-continue", "x_voxgate_deadline": "0.0001"}
    with wire(inference, length=20_000_000, type_="multipart/form-data; boundary=b", **head) as client:
        answer = b""
        while b"\r\n\r\n" not in answer:
            more = client.recv(10_000)
            assert more
            answer += more
    status, _, rest = answer.partition(b"\r\n")
    assert status.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: " in rest.lower()


def test_a_recording_that_is_too_long_for_its_deadline_is_refused_at_once(inference: Server) -> None:
    windows = 120  # of half a minute
    speed = metrics(inference)["voxgate_windows_per_second"]
    patience = windows / speed / 4
    begun = time.monotonic()
    refusal = ask(inference, wav(30.0 * windows, rate=4000), deadline=f"{patience:.3f}")
    assert "needs" in envelope(refusal)["message"]
    assert time.monotonic() - begun < patience
    assert (refusal.status_code, envelope(refusal)["code"]) == (503, "overloaded")
    assert int(refusal.headers["retry-after"]) >= 1
    assert metrics(inference)["voxgate_queue_requests"] == 0


def test_who_is_in_a_hurry_does_not_spoil_the_service_for_others(inference: Server, gateway: Server) -> None:
    """However many ask for what cannot be done in time, the next one is served."""
    for _ in range(12):
        form: dict[str, Any] = {
            "data": {"model": "whisper-1", "language": "en"},
            "files": {"file": SPEECH.read_bytes()},
        }
        hurried = httpx.post(
            gateway.url + OPENAI, headers=gateway.auth | {"x-voxgate-deadline": "0.01"}, timeout=60, **form
        )
        assert hurried.status_code in (502, 503), hurried.text
    served = gateway.transcribe(SPEECH, language="en")
    assert (served.status_code, served.headers["x-voxgate-attempts"]) == (200, "1")


# --- behind a gateway ---------------------------------------------------------------------------


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
