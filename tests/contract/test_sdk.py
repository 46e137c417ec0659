"""OpenAI's own SDKs, for Python and for Node, pointed at this server by base URL and key alone."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from conftest import DATA, Server

pytestmark = pytest.mark.usefixtures("untraced")

CLIENTS = Path(__file__).parent / "clients"
AUDIO = DATA / "a-mp3-cbr.mp3"  # a second
TEXT = "please send the letter"
TOO_LARGE = 26_214_401
# Recorded from OpenAI: which of the two a granularity brings along.
GRANULARITIES: dict[str, tuple[list[str] | None, bool, bool]] = {
    "none": (None, True, False),
    "segment": (["segment"], True, False),
    "word": (["word"], False, True),
    "both": (["word", "segment"], True, True),
    "both, turned round": (["segment", "word"], True, True),
}

Call = Callable[..., Any]


def sentences(count: int) -> tuple[str, bytes]:
    """The same one, so many times, with a second of silence between."""
    file = io.BytesIO()
    with wave.open(str(DATA / "a-wav-s16.wav")) as one, wave.open(file, "wb") as all_of_them:
        all_of_them.setparams(one.getparams())
        said, pause = one.readframes(one.getnframes()), bytes(2 * one.getframerate())
        all_of_them.writeframes(pause.join([said] * count))
    return "sentences.wav", file.getvalue()


def base_url(server: Server) -> str:
    return f"{server.url}/v1"


@pytest.fixture(params=["sync", "async"])
def create(request: pytest.FixtureRequest, server: Server) -> Call:
    """`client.audio.transcriptions.create` of the one client or the other; the key may be replaced."""
    defaults: dict[str, Any] = {"model": "whisper-1", "file": AUDIO}

    def with_sync(*, api_key: str = server.key, **parameters: Any) -> Any:
        with openai.OpenAI(api_key=api_key, base_url=base_url(server)) as client:
            return client.audio.transcriptions.create(**(defaults | parameters))

    def with_async(*, api_key: str = server.key, **parameters: Any) -> Any:
        async def call() -> Any:
            async with openai.AsyncOpenAI(api_key=api_key, base_url=base_url(server)) as client:
                return await client.audio.transcriptions.create(**(defaults | parameters))

        return asyncio.run(call())

    return with_sync if request.param == "sync" else with_async


@pytest.fixture(scope="module")
def too_large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WAV file, one byte larger than a file may be."""
    path = tmp_path_factory.mktemp("large") / "large.wav"
    with path.open("wb") as file:
        file.write((DATA / "a-wav-s16.wav").read_bytes())
        file.truncate(TOO_LARGE)
    return path


def check_json(result: Any) -> None:
    assert isinstance(result, openai.types.audio.Transcription)
    assert result.text == TEXT


def check_verbose_json(result: Any) -> None:
    assert isinstance(result, openai.types.audio.TranscriptionVerbose)
    assert result.text == TEXT
    assert result.language == "english"
    assert result.duration == pytest.approx(1.01, abs=0.05)
    assert result.segments
    assert result.segments[0].text.strip() == TEXT
    assert result.usage is not None
    assert result.usage.seconds == result.duration


def check_text(result: Any) -> None:
    assert isinstance(result, str)
    assert result.rstrip("\n") == TEXT


def check_srt(result: Any) -> None:
    assert isinstance(result, str)
    number, times, *lines = result.splitlines()
    assert number == "1"
    assert times.startswith("00:00:00,")
    assert " --> 00:00:0" in times
    assert lines == [TEXT]


def check_vtt(result: Any) -> None:
    assert isinstance(result, str)
    header, blank, times, *lines = result.splitlines()
    assert (header, blank) == ("WEBVTT", "")
    assert times.startswith("00:00:00.")
    assert lines == [TEXT]


FORMATS: dict[str, Callable[[Any], None]] = {
    "json": check_json,
    "text": check_text,
    "srt": check_srt,
    "verbose_json": check_verbose_json,
    "vtt": check_vtt,
}


@pytest.mark.parametrize("response_format", FORMATS)
def test_each_response_format_comes_back_as_the_sdk_types_it(create: Call, response_format: str) -> None:
    FORMATS[response_format](create(response_format=response_format))


def test_the_response_format_is_json_unless_another_is_asked_for(create: Call) -> None:
    check_json(create())


@pytest.mark.parametrize(("asked", "has_segments", "has_words"), list(GRANULARITIES.values()), ids=list(GRANULARITIES))
def test_granularities_bring_what_openai_gives_for_them(
    create: Call, asked: list[str] | None, has_segments: bool, has_words: bool
) -> None:
    given = {} if asked is None else {"timestamp_granularities": asked}
    result = create(response_format="verbose_json", **given)
    assert (result.segments is not None) is has_segments
    assert (result.words is not None) is has_words


def test_words_have_times_in_order_within_the_recording(create: Call) -> None:
    result = create(response_format="verbose_json", timestamp_granularities=["word"])
    assert " ".join(word.word for word in result.words) == TEXT
    times = [time for word in result.words for time in (word.start, word.end)]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] <= result.duration


def test_segments_are_the_sentences_between_the_pauses(create: Call) -> None:
    result = create(file=sentences(3), response_format="verbose_json")
    assert [segment.id for segment in result.segments] == [0, 1, 2]
    times = [time for segment in result.segments for time in (segment.start, segment.end)]
    assert times == sorted(times)
    # A client that joins the segments gets the text, as it does from OpenAI.
    assert "".join(segment.text for segment in result.segments).strip() == result.text


def test_sentences_are_kept_apart_in_the_text(create: Call) -> None:
    assert create(file=sentences(3)).text == f"{TEXT} {TEXT} {TEXT}"


OPTIONS: dict[str, dict[str, Any]] = {
    "temperature 0": {"temperature": 0},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 1": {"temperature": 1},
    "prompt": {"prompt": "Weather, parks and Größe: an umlaut too."},
    "language": {"language": "en"},
    "chunking_strategy auto": {"chunking_strategy": "auto"},
    "stream false": {"stream": False},
    "all at once": {"temperature": 0.2, "prompt": "Parks", "language": "en", "response_format": "json"},
}


@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
def test_optional_parameters_are_taken(create: Call, options: dict[str, Any]) -> None:
    assert create(**options).text == TEXT


FILES: dict[str, Callable[[], Any]] = {
    "path": lambda: AUDIO,
    "bytes without a name": AUDIO.read_bytes,
    "name and bytes": lambda: ("audio.mp3", AUDIO.read_bytes()),
    "name, bytes and type": lambda: ("audio.bin", AUDIO.read_bytes(), "application/octet-stream"),
}


@pytest.mark.parametrize("file", list(FILES.values()), ids=list(FILES))
def test_the_file_may_be_given_in_every_way_the_sdk_knows(create: Call, file: Callable[[], Any]) -> None:
    assert create(file=file()).text == TEXT


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "temperature over 1": ({"temperature": 1.5}, "temperature"),
    "temperature below 0": ({"temperature": -0.1}, "temperature"),
    "temperature is no number": ({"extra_body": {"temperature": "warm"}}, "temperature"),
    "response_format unknown": ({"extra_body": {"response_format": "docx"}}, "response_format"),
    "not audio": ({"file": ("audio.mp3", b"These are words, and no sound.")}, "file"),
    "file empty": ({"file": ("audio.mp3", b"")}, "file"),
    "too short": ({"file": ("audio.wav", (DATA / "a-wav-s16.wav").read_bytes()[:60])}, "file"),
    "granularity with json": ({"timestamp_granularities": ["word"]}, "timestamp_granularities[]"),
    "granularity unknown": (
        {"response_format": "verbose_json", "timestamp_granularities": ["sentence"]},
        "timestamp_granularities",
    ),
    "language unknown": ({"language": "Klingon"}, "language"),
    "language not spoken here": ({"language": "es"}, "language"),
    "model empty": ({"model": ""}, "model"),
}


@pytest.mark.parametrize(("parameters", "param"), list(BAD_REQUESTS.values()), ids=list(BAD_REQUESTS))
def test_a_bad_request_names_its_field(create: Call, parameters: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(**parameters)
    error = caught.value
    assert (error.status_code, error.code, error.type) == (400, "invalid_input", "invalid_request_error")
    assert error.param is not None
    assert error.param.removesuffix("[]") == param.removesuffix("[]")
    assert isinstance(error.body, dict)
    assert error.body["message"]
    assert error.body["message"] in error.message


def test_a_wrong_key_is_an_authentication_error(create: Call) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        create(api_key="vg_wrong")
    error = caught.value
    assert (error.status_code, error.code, error.type) == (401, "unauthenticated", "authentication_error")
    assert "API key" in error.message


def test_an_unknown_model_is_not_found(create: Call) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        create(model="whisper-9000")
    error = caught.value
    assert (error.code, error.param, error.type) == ("model_not_found", "model", "invalid_request_error")
    assert "whisper-9000" in error.message


def check_too_large(error: openai.APIStatusError) -> None:
    assert error.status_code == 413
    assert (error.code, error.param, error.type) == ("invalid_input", "file", "invalid_request_error")
    assert "26214400" in error.message


@pytest.mark.parametrize("options", [{"max_retries": 0}, {}], ids=["no retries", "default retries"])
def test_a_file_over_the_limit_is_refused_once_with_413(
    server: Server, too_large: Path, options: dict[str, Any]
) -> None:
    sent: list[httpx.Request] = []
    with (
        openai.DefaultHttpxClient(event_hooks={"request": [sent.append]}) as http,
        openai.OpenAI(api_key=server.key, base_url=base_url(server), http_client=http, **options) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.audio.transcriptions.create(model="whisper-1", file=too_large)
    check_too_large(caught.value)
    assert len(sent) == 1


def test_a_file_over_the_limit_is_refused_to_the_async_client_too(create: Call, too_large: Path) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        create(file=too_large)
    check_too_large(caught.value)


def test_models_are_listed_and_retrieved(server: Server) -> None:
    with openai.OpenAI(api_key=server.key, base_url=base_url(server)) as client:
        listed = {model.id for model in client.models.list()}
        assert {"whisper-1", "whisper-large-v3", "deepgram-nova-3", "lmp-stt-20241013"} <= listed
        model = client.models.retrieve("whisper-1")
        assert (model.id, model.object) == ("whisper-1", "model")
        assert isinstance(model.created, int)
        assert model.owned_by
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("whisper-9000")
        assert caught.value.code == "model_not_found"


def test_models_are_listed_by_the_async_client(server: Server) -> None:
    async def listed() -> set[str]:
        async with openai.AsyncOpenAI(api_key=server.key, base_url=base_url(server)) as client:
            return {model.id async for model in client.models.list()}

    assert "whisper-1" in asyncio.run(listed())


# --- Node -------------------------------------------------------------------------------------


@pytest.fixture
def run_node(node: str, server: Server) -> Call:
    """Run a script of `clients/`, and read the JSON it prints."""

    def run(script: str, *arguments: str, key: str = server.key) -> Any:
        done = subprocess.run(
            [node, str(CLIENTS / script), *arguments],
            env=os.environ | {"VOXGATE_BASE_URL": server.url, "VOXGATE_API_KEY": key},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


NODE_TEXTS: dict[str, Callable[[Any], str]] = {
    "json": lambda result: str(result["text"]),
    "text": lambda result: str(result).rstrip("\n"),
    "srt": lambda result: str(result).splitlines()[2],
    "verbose_json": lambda result: str(result["segments"][0]["text"]).strip(),
    "vtt": lambda result: str(result).splitlines()[3],
}


@pytest.mark.parametrize("response_format", NODE_TEXTS)
def test_node_gets_each_response_format(run_node: Call, response_format: str) -> None:
    outcome = run_node("sdk.mjs", str(AUDIO), json.dumps({"response_format": response_format}))
    assert NODE_TEXTS[response_format](outcome["result"]) == TEXT


@pytest.mark.parametrize(("asked", "has_segments", "has_words"), list(GRANULARITIES.values()), ids=list(GRANULARITIES))
def test_node_gets_the_granularities_it_asks_for(
    run_node: Call, asked: list[str] | None, has_segments: bool, has_words: bool
) -> None:
    given = {} if asked is None else {"timestamp_granularities": asked}
    outcome = run_node("sdk.mjs", str(AUDIO), json.dumps({"response_format": "verbose_json"} | given))
    assert ("segments" in outcome["result"], "words" in outcome["result"]) == (has_segments, has_words)


NODE_ERRORS: dict[str, tuple[dict[str, Any], tuple[str, int, str, str | None, str]]] = {
    "bad temperature": (
        {"temperature": 2},
        ("BadRequestError", 400, "invalid_input", "temperature", "invalid_request_error"),
    ),
    "bad response_format": (
        {"response_format": "docx"},
        ("BadRequestError", 400, "invalid_input", "response_format", "invalid_request_error"),
    ),
    "unknown model": (
        {"model": "whisper-9000"},
        ("NotFoundError", 404, "model_not_found", "model", "invalid_request_error"),
    ),
}


@pytest.mark.parametrize(("parameters", "expected"), list(NODE_ERRORS.values()), ids=list(NODE_ERRORS))
def test_node_raises_the_error_of_the_status(
    run_node: Call, parameters: dict[str, Any], expected: tuple[str, int, str, str | None, str]
) -> None:
    error = run_node("sdk.mjs", str(AUDIO), json.dumps(parameters))["error"]
    assert (error["name"], error["status"], error["code"], error["param"], error["type"]) == expected
    assert error["message"]


def test_node_is_told_what_a_file_is_that_is_not_audio(run_node: Call) -> None:
    error = run_node("sdk.mjs", str(DATA / "not-pdf.pdf"))["error"]
    assert (error["name"], error["param"]) == ("BadRequestError", "file")
    assert "PDF" in error["message"]


def test_node_with_a_wrong_key_gets_an_authentication_error(run_node: Call) -> None:
    error = run_node("sdk.mjs", str(AUDIO), key="vg_wrong")["error"]
    assert (error["name"], error["code"]) == ("AuthenticationError", "unauthenticated")


@pytest.mark.parametrize("options", [{"maxRetries": 0}, {}], ids=["no retries", "default retries"])
def test_node_sends_a_file_over_the_limit_once_and_gets_413(
    run_node: Call, too_large: Path, options: dict[str, Any]
) -> None:
    outcome = run_node("sdk.mjs", str(too_large), "{}", json.dumps(options))
    assert outcome["error"]["status"] == 413
    assert (outcome["error"]["code"], outcome["error"]["param"]) == ("invalid_input", "file")
    assert outcome["requests"] == 1


def test_node_lists_and_retrieves_models(run_node: Call) -> None:
    models = run_node("models.mjs", "whisper-1")
    assert "whisper-1" in models["listed"]
    assert models["retrieved"]["id"] == "whisper-1"
