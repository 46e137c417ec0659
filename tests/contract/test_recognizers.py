"""One contract, whoever hears: pocketsphinx and Whisper, each alone as `voxgate inference` and behind a gateway."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import socket
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import srt
import webvtt

from conftest import DATA, RECORDINGS, Server, inference_service, start_server, stop_server, word_errors
from customers import OPENAI, Customer, Office, envelope
from fakes import whisper_model
from fakes.live import Live
from prometheus import scraped
from voxgate.audio.decode import decode

pytestmark = pytest.mark.usefixtures("untraced")

SPEECH = DATA / "a-mp3-cbr.mp3"  # a second
TEXT = "please send the letter"
COST = 110  # micro-dollars: 11 started tenths of a second, at 6,000 a minute
LONG = DATA / "long-slt.flac"  # three sentences
AT_ONCE = 8
PATIENCE = 60.0  # seconds; only what hangs takes so long
MINUTES = 40  # of speech, for which both take much longer than to notice that nobody waits
WHISPER_ENGINE, SPHINX_ENGINE = "whisper", "pocketsphinx"


@dataclass(frozen=True)
class Recognizer:
    """`server` is who is asked, and `service` the inference service itself. With an `office` it is a gateway."""

    engine: str
    server: Server
    service: Server
    model: str
    office: Office | None = None

    @property
    def customer(self) -> Customer | None:
        return Customer("local", self.server.key, "") if self.office else None

    def ask(self, audio: Path | bytes = SPEECH, path: str = OPENAI, **fields: Any) -> httpx.Response:
        content = audio.read_bytes() if isinstance(audio, Path) else audio
        form = {"model": self.model, "language": "en"} | fields
        return self.server.transcribe(("speech", content), path, **form)

    def hears(self, text: str) -> bool:
        """Whether that is what was said in `SPEECH`. Of a model that was never taught anything, it is some text."""
        return text == TEXT if self.engine == SPHINX_ENGINE else bool(text)

    def metrics(self) -> dict[str, float]:
        return scraped(httpx.get(f"{self.service.url}/metrics").text)


@pytest.fixture(scope="module")
def services(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    whisper = whisper_model.service(tiny_model)
    with (
        inference_service(tmp_path_factory.mktemp("sphinx"), VOXGATE_ENGINE_WORKERS="2") as sphinx,
        inference_service(tmp_path_factory.mktemp("whisper"), **whisper) as batching,
    ):
        yield {SPHINX_ENGINE: sphinx, WHISPER_ENGINE: batching}


@pytest.fixture(scope="module")
def gateways(services: dict[str, Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    with contextlib.ExitStack() as stack:
        found = {}
        for engine, service in services.items():
            process, server = start_server(tmp_path_factory.mktemp("gateway"), VOXGATE_INFERENCE_URL=service.url)
            stack.callback(stop_server, process)
            found[engine] = server
        yield found


@pytest.fixture(
    scope="module",
    params=list(itertools.product((SPHINX_ENGINE, WHISPER_ENGINE), ("alone", "behind a gateway"))),
    ids=", ".join,
)
def recognizer(request: pytest.FixtureRequest, services: dict[str, Server], gateways: dict[str, Server]) -> Recognizer:
    engine, where = request.param
    service = services[engine]
    if where == "alone":
        return Recognizer(engine, service, service, "default")
    gateway = gateways[engine]
    return Recognizer(engine, gateway, service, "whisper-1", Office(gateway.data_dir))


@pytest.fixture(scope="module")
def endless() -> bytes:
    """Speech as WAV, of 8 bits and 8,000 samples a second."""
    once = b"".join(decode(str(LONG), "flac", max_seconds=60))
    narrow = bytes((byte + 128) & 255 for byte in once[1::4])  # the upper half of each second sample
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(narrow * (MINUTES * 60 * 8000 // len(narrow)))
    return out.getvalue()


# --- formats -----------------------------------------------------------------------------------


def test_json_is_the_text_and_what_is_billed(recognizer: Recognizer) -> None:
    answer = recognizer.ask()
    assert answer.status_code == 200
    body = answer.json()
    assert body.keys() == {"text", "usage"}
    assert recognizer.hears(body["text"])
    assert body["usage"] == {"type": "duration", "seconds": pytest.approx(1.01, abs=0.01)}
    assert answer.headers["x-voxgate-provider"] == "embedded"
    assert answer.headers["x-voxgate-attempts"] == "1"


def test_verbose_json_has_segments_and_words_in_their_order_and_inside_the_audio(recognizer: Recognizer) -> None:
    wanted: dict[str, Any] = {"response_format": "verbose_json", "timestamp_granularities[]": ["word", "segment"]}
    answer = recognizer.ask(**wanted)
    body = answer.json()
    assert (body["task"], body["language"]) == ("transcribe", "english")
    assert body["segments"]
    assert body["words"]
    for name in ("segments", "words"):
        at = 0.0
        for each in body[name]:
            assert at <= each["start"] <= each["end"] <= body["duration"] + 0.001
            at = each["start"]
    assert "".join(segment["text"] for segment in body["segments"]).strip() == body["text"]
    assert recognizer.hears(body["text"])
    if recognizer.engine == SPHINX_ENGINE:
        assert [word["word"] for word in body["words"]] == TEXT.split()
    # Only between our own machines.
    assert ("confidence" in body["words"][0]) == (recognizer.office is None)


def test_segments_come_without_words_unless_these_are_asked_for(recognizer: Recognizer) -> None:
    body = recognizer.ask(response_format="verbose_json").json()
    assert body["segments"]
    assert "words" not in body


def test_text_srt_and_vtt_say_what_json_says(recognizer: Recognizer) -> None:
    answers = {form: recognizer.ask(response_format=form) for form in ("json", "text", "srt", "vtt")}
    assert {answer.status_code for answer in answers.values()} == {200}
    text = answers["json"].json()["text"]
    assert answers["text"].headers["content-type"].startswith("text/plain")
    assert answers["text"].text.strip() == text
    cues = list(srt.parse(answers["srt"].text))
    assert [cue.index for cue in cues] == list(range(1, len(cues) + 1))
    captions = webvtt.from_buffer(io.StringIO(answers["vtt"].text)).captions
    assert len(captions) == len(cues) >= 1
    ends = [moment.total_seconds() for cue in cues for moment in (cue.start, cue.end)]
    assert ends == sorted(ends)
    if recognizer.engine == SPHINX_ENGINE:
        assert " ".join(cue.content for cue in cues) == " ".join(caption.text for caption in captions) == TEXT


# --- streams -----------------------------------------------------------------------------------


def test_a_stream_is_told_in_pieces_that_are_the_whole(recognizer: Recognizer) -> None:
    events = streamed(recognizer.ask(LONG, stream="true"))
    *deltas, done = events
    assert done["type"] == "transcript.text.done"
    assert {delta["type"] for delta in deltas} == {"transcript.text.delta"}
    assert "".join(delta["delta"] for delta in deltas).strip() == done["text"].strip()
    assert done["usage"]["seconds"] == pytest.approx(5.37, abs=0.01)
    assert done["text"] == recognizer.ask(LONG).json()["text"]
    if recognizer.engine == SPHINX_ENGINE:
        assert len(deltas) == 3


def streamed(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [part for part in answer.text.split("\n\n") if part and not part.startswith(":")]
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


# --- what cannot be heard ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["not-text.txt", "empty.bin", "not-zip.zip", "noaudio.mp4"])
def test_what_is_no_audio_is_the_callers_fault(recognizer: Recognizer, name: str) -> None:
    refusal = recognizer.ask(DATA / name)
    assert (refusal.status_code, envelope(refusal)["param"]) == (400, "file")


def test_a_recording_that_was_cut_off_is_not_taken_for_a_whole_one(recognizer: Recognizer) -> None:
    whole = LONG.read_bytes()
    refusal = recognizer.ask(whole[: len(whole) // 2])
    assert (refusal.status_code, envelope(refusal)["param"]) == (400, "file")


def test_a_recording_that_was_damaged_does_no_harm(recognizer: Recognizer) -> None:
    """Whatever the answer to it is, the next one is served."""
    content, chance = bytearray(LONG.read_bytes()), random.Random(1)
    for _ in range(200):
        content[chance.randrange(1000, len(content))] ^= 0xFF
    assert recognizer.ask(bytes(content)).status_code in (200, 400)
    assert recognizer.hears(recognizer.ask().json()["text"])


@pytest.mark.parametrize("name", ["silence.flac", "tone.flac", "hum.flac"])
def test_where_nobody_speaks_there_is_nothing(recognizer: Recognizer, name: str) -> None:
    body = recognizer.ask(DATA / name, response_format="verbose_json").json()
    assert (body["text"], body["segments"]) == ("", [])


def test_nothing_is_nothing_in_every_format(recognizer: Recognizer) -> None:
    silence = DATA / "silence.flac"
    assert recognizer.ask(silence, response_format="text").text.strip() == ""
    assert recognizer.ask(silence, response_format="srt").text.strip() == ""
    assert recognizer.ask(silence, response_format="vtt").text.strip() == "WEBVTT"
    (done,) = streamed(recognizer.ask(silence, stream="true"))
    assert (done["type"], done["text"]) == ("transcript.text.done", "")


def test_a_language_that_it_does_not_speak_is_refused(recognizer: Recognizer) -> None:
    refusal = recognizer.ask(language="sw")
    assert (refusal.status_code, envelope(refusal)["param"]) == (400, "language")


def test_into_english_goes_what_can_be_translated(recognizer: Recognizer) -> None:
    answer = recognizer.server.transcribe(SPEECH, "/v1/audio/translations", model=recognizer.model)
    if recognizer.engine == WHISPER_ENGINE:
        assert (answer.status_code, bool(answer.json()["text"])) == (200, True)
    else:
        # A gateway's catalogue says that the service translates, and this one does not.
        assert answer.status_code in (400, 404, 502)
        envelope(answer)


# --- many, and those who leave -------------------------------------------------------------------


def test_of_many_at_once_each_has_its_own_answer(recognizer: Recognizer) -> None:
    speech = [recording for recording in RECORDINGS if recording.text and recording.duration]
    asked = speech[:: len(speech) // AT_ONCE]

    with ThreadPoolExecutor(len(asked)) as clients:
        answers = list(clients.map(lambda each: recognizer.ask(each.path, response_format="verbose_json"), asked))
    assert len(asked) >= AT_ONCE
    for recording, answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["duration"] == pytest.approx(recording.duration, abs=0.06)
        if recognizer.engine == SPHINX_ENGINE:
            assert word_errors(recording.text, body["text"]) <= 0.5, recording.file
        else:
            assert body["text"], recording.file


def test_who_hangs_up_is_not_worked_for(recognizer: Recognizer, endless: bytes) -> None:
    before = recognizer.metrics().get("voxgate_batch_size_sum", 0)
    with hanging(recognizer, endless):
        until(lambda: recognizer.metrics()["voxgate_queue_audio_seconds"] > 0)
    until(lambda: recognizer.metrics()["voxgate_queue_audio_seconds"] == 0, seconds=15)
    assert recognizer.hears(recognizer.ask().json()["text"])
    if recognizer.engine == WHISPER_ENGINE:
        time.sleep(1.2)  # until the engine has said what it did
        assert recognizer.metrics()["voxgate_batch_size_sum"] - before < MINUTES
    if recognizer.office:
        until(lambda: held(recognizer) == 0)


def test_what_cannot_be_heard_in_time_is_given_up_in_time(recognizer: Recognizer, endless: bytes) -> None:
    assert recognizer.hears(recognizer.ask().json()["text"])  # from then on it knows how fast it is
    form: dict[str, Any] = {"data": {"model": recognizer.model, "language": "en"}, "files": {"file": endless}}
    headers = recognizer.server.auth | {"x-voxgate-deadline": "2"}
    begun = time.monotonic()
    answer = httpx.post(recognizer.server.url + OPENAI, headers=headers, timeout=PATIENCE, **form)
    assert time.monotonic() - begun < 20
    # Silence takes pocketsphinx no time, so that one who has heard much of it may try.
    tried = answer.status_code == 502 and recognizer.engine == SPHINX_ENGINE
    assert envelope(answer)["code"] == ("provider_unavailable" if tried else "overloaded")
    assert tried or (answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1)
    until(lambda: recognizer.metrics()["voxgate_queue_audio_seconds"] == 0, seconds=15)
    assert recognizer.hears(recognizer.ask().json()["text"])


def held(recognizer: Recognizer) -> int:
    assert recognizer.office is not None
    (account,) = recognizer.office.tell("accounts", "list")
    return recognizer.office.money(account["id"])[1]


def until(what: Any, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@contextlib.contextmanager
def hanging(recognizer: Recognizer, audio: bytes) -> Iterator[None]:
    """A whole request whose answer nobody reads; at the end the client hangs up."""
    server = recognizer.server
    form = httpx.Request("POST", server.url + OPENAI, data={"model": recognizer.model}, files={"file": audio})
    lines = [f"POST {OPENAI} HTTP/1.1", "Host: voxgate", f"Content-Length: {len(form.read())}"]
    lines += [f"Content-Type: {form.headers['content-type']}", *(f"{name}: {of}" for name, of in server.auth.items())]
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=PATIENCE) as client:
        client.sendall("\r\n".join([*lines, "", ""]).encode() + form.content)
        yield


# --- live --------------------------------------------------------------------------------------


def spoken(path: Path) -> bytes:
    return b"".join(decode(str(path), path.suffix[1:], max_seconds=60))


def test_live_speech_is_heard_in_finals_that_are_the_whole(recognizer: Recognizer) -> None:
    with live(recognizer) as session:
        session.send(spoken(SPEECH), 3200)
        done = session.close()
    assert recognizer.hears(" ".join(" ".join(session.finals).split()))
    assert done["duration"] == pytest.approx(1.01, abs=0.05)
    words = [word for final in session.of("final") for word in final["words"] or ()]
    assert words
    if recognizer.engine == SPHINX_ENGINE:
        assert [word["word"] for word in words] == TEXT.split()


def test_live_utterances_are_told_one_by_one_and_partials_before_them(recognizer: Recognizer) -> None:
    with live(recognizer) as session:
        audio = spoken(LONG)
        for at in range(0, len(audio), 16_000):  # half a second each, so that the engine keeps up
            session.send(audio[at : at + 16_000])
            time.sleep(0.02)
        session.close()
    told = [final for final in session.finals if final]
    assert len(told) >= (2 if recognizer.engine == SPHINX_ENGINE else 1)  # random weights may have no word for one
    if recognizer.engine == SPHINX_ENGINE:
        assert session.of("partial")


def test_live_silence_has_no_words(recognizer: Recognizer) -> None:
    with live(recognizer) as session:
        session.send(bytes(3 * 32_000), 3200)
        done = session.close()
    assert (done["text"], done["duration"]) == ("", pytest.approx(3.0))
    assert not any(session.finals)


def test_live_sessions_at_once_each_hear_their_own(recognizer: Recognizer) -> None:
    audio = spoken(SPEECH)

    def speak(number: int) -> tuple[float, str]:
        with live(recognizer) as session:
            session.send(audio + bytes(3200 * number), 3200)
            done = session.close()
        return done["duration"], " ".join(" ".join(session.finals).split())

    with ThreadPoolExecutor(3) as clients:
        heard = list(clients.map(speak, range(3)))
    assert [duration for duration, _ in heard] == [
        pytest.approx(len(audio) / 32_000 + n / 10, abs=0.001) for n in range(3)
    ]
    assert all(recognizer.hears(text) for _, text in heard)


def test_who_leaves_a_live_session_leaves_no_place_taken(recognizer: Recognizer) -> None:
    for _ in range(5):
        with live(recognizer) as session:
            session.send(spoken(SPEECH)[:16_000], 3200)
            session.hang_up(reset=True)
    with live(recognizer) as session:
        session.send(spoken(SPEECH), 3200)
        session.close()
    assert recognizer.hears(" ".join(" ".join(session.finals).split()))


def live(recognizer: Recognizer) -> Live:
    return Live(recognizer.server.url, recognizer.customer, model_id=recognizer.model, language="en")


# --- money -------------------------------------------------------------------------------------


def test_what_a_gateway_charges_does_not_depend_on_who_hears(recognizer: Recognizer) -> None:
    if recognizer.office is None:
        pytest.skip("The service alone has no customers, and charges nobody.")
    customer = recognizer.office.open(credit=1_000_000)
    with httpx.Client(base_url=recognizer.server.url, headers=customer.headers, timeout=PATIENCE) as client:
        form: dict[str, Any] = {"data": {"model": "whisper-1", "language": "en"}}
        assert client.post(OPENAI, files={"file": SPEECH.read_bytes()}, **form).status_code == 200
        assert client.post(OPENAI, files={"file": b"no audio"}, **form).status_code == 400
    assert recognizer.office.money(customer.account) == (1_000_000 - COST, 0)
