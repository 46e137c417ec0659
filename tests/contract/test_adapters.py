"""One suite for every wire format: what is sent to a provider, and what is made of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
import srt
import webvtt

from conftest import DATA, Server, start_server, stop_server, word_errors
from customers import LITELLM, OPENAI, ROUTER, SPEECH, STATS, Customer, Office, send
from fakes.upstreams import (
    KEY,
    SEGMENTS,
    TEXT,
    WORDS,
    DeepgramUpstream,
    InferenceUpstream,
    MistralUpstream,
    OpenAIUpstream,
    Script,
    Sent,
    Upstream,
    limited,
)
from voxgate.audio.sniff import CONTAINERS, MP3, sniff
from voxgate.catalog import Deployment, ProviderEntry
from voxgate.errors import FailureClass, Overloaded, ProviderError
from voxgate.model import Feature, Granularity, ResponseFormat, Tokens, Transcript, TranscriptionRequest
from voxgate.providers import Call
from voxgate.providers.deepgram import DeepgramAdapter
from voxgate.providers.http import Adapter, HttpProvider, Timeouts
from voxgate.providers.inference import InferenceAdapter
from voxgate.providers.openai import MistralAdapter, OpenAIAdapter
from voxgate.providers.prepare import Prepared
from voxgate.providers.secrets import StoredSecrets
from voxgate.receive import Upload

_TEXTUAL = {Feature.SEGMENTS, Feature.LANGUAGE, Feature.TEMPERATURE}
_WHISPER = frozenset({*_TEXTUAL, Feature.WORDS, Feature.PROMPT})


@dataclass(frozen=True)
class Kind:
    """A wire format: its fake, its adapter, and what its deployment declares here."""

    fake: type[Upstream]
    adapter: type[Adapter]
    features: frozenset[Feature]


KINDS = {
    "openai": Kind(OpenAIUpstream, OpenAIAdapter, _WHISPER),
    "mistral": Kind(MistralUpstream, MistralAdapter, frozenset({*_TEXTUAL, Feature.KEYWORDS, Feature.DIARIZATION})),
    "deepgram": Kind(
        DeepgramUpstream,
        DeepgramAdapter,
        frozenset({Feature.SEGMENTS, Feature.WORDS, Feature.LANGUAGE, Feature.KEYWORDS, Feature.DIARIZATION}),
    ),
    "inference": Kind(InferenceUpstream, InferenceAdapter, _WHISPER | {Feature.KEYWORDS}),
}
FORMS = ("openai", "mistral", "inference")
BOTH = frozenset({Granularity.WORD, Granularity.SEGMENT})


@dataclass(frozen=True)
class Desk:
    """A fake provider and the adapter that calls it."""

    name: str
    upstream: Upstream
    environ: dict[str, str] = field(default_factory=lambda: {"UPSTREAM_KEY": KEY})

    def calls(
        self,
        number: int,
        request: TranscriptionRequest | None = None,
        *,
        audio: bytes | None = None,
        reference: str | None = None,
        first_byte: float = 20.0,
        duration: float = 3.03,
        base_url: str | None = None,
        **deployment: Any,
    ) -> list[Transcript | ProviderError]:
        """What came of one call that was made so often."""
        kind = KINDS[self.name]
        entry = ProviderEntry(name="up", kind=kind.fake.kind, base_url=self.upstream.base_url, flavor=kind.fake.flavor)
        offer = Deployment(provider=entry, upstream_model="up-1", price=1, **({"features": kind.features} | deployment))

        async def run() -> list[Transcript | ProviderError]:
            provider = HttpProvider(
                adapter=kind.adapter(),
                base_url=base_url or self.upstream.base_url,
                api_key="env:UPSTREAM_KEY",
                secrets=StoredSecrets(self.environ),
                timeouts=Timeouts(connect=2.0, first_byte=first_byte),
                tls=False,  # certificates take longer to load than all the rest
            )
            try:
                with Upload(Path(tempfile.gettempdir())) as upload:
                    upload.write(SPEECH.read_bytes() if audio is None else audio)
                    call = Call(
                        request=request or TranscriptionRequest(model="m"),
                        deployment=offer,
                        audio=upload,
                        container=sniff(upload.file),
                        duration=duration,
                        reference=reference,
                    )
                    return [await _outcome(provider, call) for _ in range(number)]
            finally:
                await provider.close()

        return asyncio.run(run())

    def ask(self, request: TranscriptionRequest | None = None, *, tries: int = 1, **how: Any) -> Transcript:
        """What the last of these calls heard, after all the others failed."""
        *before, last = self.calls(tries, request, **how)
        assert all(isinstance(outcome, ProviderError) for outcome in before)
        if isinstance(last, ProviderError):
            raise last
        return last

    def failures(self, *scripts: Script, **how: Any) -> list[ProviderError]:
        """What each of these came to."""
        self.upstream.will(*scripts)
        outcomes = self.calls(len(scripts), **how)
        errors = [outcome for outcome in outcomes if isinstance(outcome, ProviderError)]
        assert len(errors) == len(scripts), outcomes
        return errors

    def fails(self, script: Script, **how: Any) -> ProviderError:
        return self.failures(script, **how)[0]

    @property
    def sent(self) -> Sent:
        return self.upstream.sent[-1]


async def _outcome(provider: HttpProvider, call: Call) -> Transcript | ProviderError:
    try:
        return await provider.transcribe(call)
    except ProviderError as error:
        return error


def desk_of(name: str) -> Iterator[Desk]:
    with KINDS[name].fake() as upstream:
        yield Desk(name, upstream)


@pytest.fixture(params=list(KINDS))
def desk(request: pytest.FixtureRequest) -> Iterator[Desk]:
    """Each of them in turn."""
    yield from desk_of(request.param)


@pytest.fixture(params=FORMS)
def form_desk(request: pytest.FixtureRequest) -> Iterator[Desk]:
    """Each of those that are sent a form."""
    yield from desk_of(request.param)


@pytest.fixture
def openai() -> Iterator[Desk]:
    yield from desk_of("openai")


@pytest.fixture
def mistral() -> Iterator[Desk]:
    yield from desk_of("mistral")


@pytest.fixture
def deepgram() -> Iterator[Desk]:
    yield from desk_of("deepgram")


@pytest.fixture
def inference() -> Iterator[Desk]:
    yield from desk_of("inference")


def asks(**fields: Any) -> TranscriptionRequest:
    return TranscriptionRequest(model="m", **fields)


# --- The audio --------------------------------------------------------------------------------

# OpenAI's list of endings has no aac, so what is AAC without a container goes as m4a.
ENDINGS = {name: name for name in CONTAINERS} | {"aac": "m4a"}
FILES = ["a-wav-s16.wav", "a-flac.flac", "b-slt.mp3", "a-adts.aac", "a-m4a-moovlast.m4a", "d-slt.opus", "a-webm.webm"]


@pytest.mark.parametrize("name", [*FILES, "a-mpegps.mpeg"])
def test_the_audio_arrives_whole_and_is_called_what_it_is(desk: Desk, name: str) -> None:
    audio = (DATA / name).read_bytes()
    desk.ask(audio=audio)
    container = sniff(io.BytesIO(audio))
    assert desk.sent.audio == audio
    assert desk.sent.headers["content-length"] == str(len(desk.sent.body))
    assert "transfer-encoding" not in desk.sent.headers
    if desk.name == "deepgram":
        assert desk.sent.headers["content-type"] == container.content_type
        return
    file = desk.sent.files["file"]
    assert list(desk.sent.files) == ["file"]
    assert file.name == f"audio.{ENDINGS[container.name]}"
    assert file.content_type == container.content_type


LARGE = (DATA / "a-wav-s16.wav").read_bytes()[:44] + bytes(range(256)) * 12_000  # 3 MB: no longer in memory


@pytest.mark.parametrize("audio", [LARGE, None], ids=["file", "memory"])
@pytest.mark.parametrize(
    "bad", [Script(status=500), Script(hang_up=True), Script(drop_after=20), Script(body=b"nonsense")], ids=repr
)
def test_a_retry_sends_all_of_it_again(desk: Desk, audio: bytes | None, bad: Script) -> None:
    desk.upstream.will(bad, bad)
    assert desk.ask(audio=audio, tries=3).text == TEXT
    assert [sent.audio for sent in desk.upstream.sent] == [audio or SPEECH.read_bytes()] * 3
    assert len({sent.headers["content-length"] for sent in desk.upstream.sent}) == 1


def test_one_given_up_in_the_middle_of_its_upload_is_sent_whole_the_next_time(desk: Desk) -> None:
    desk.upstream.will(Script(delay=1))
    assert desk.ask(audio=LARGE, tries=2, first_byte=0.3).text == TEXT
    assert desk.sent.audio == LARGE


# --- What is sent -----------------------------------------------------------------------------


def test_the_least_that_is_asked_of_openai(openai: Desk) -> None:
    openai.ask()
    assert openai.sent.path == "/v1/audio/transcriptions"
    assert openai.sent.query == []
    assert openai.sent.headers["authorization"] == f"Bearer {KEY}"
    assert openai.sent.headers["content-type"].startswith("multipart/form-data; boundary=")
    assert openai.sent.form == [
        ("model", "up-1"),
        ("response_format", "verbose_json"),
        ("timestamp_granularities[]", "segment"),
    ]


FULL = asks(
    language="en",
    prompt="Zoë, naïve",
    temperature=0.25,
    response_format=ResponseFormat.SRT,
    granularities=BOTH,
    keywords=("Zoë Müller", "a,b"),
)


def test_the_most_that_is_asked_of_openai(openai: Desk) -> None:
    openai.ask(FULL)
    assert openai.sent.form == [
        ("model", "up-1"),
        ("response_format", "verbose_json"),
        ("language", "en"),
        ("prompt", "Zoë, naïve"),
        ("temperature", "0.25"),
        ("timestamp_granularities[]", "segment"),
        ("timestamp_granularities[]", "word"),
    ]


def test_a_model_that_gives_text_alone_is_asked_for_no_times(openai: Desk) -> None:
    logprobs = asks(granularities=BOTH, required={Feature.LOGPROBS: "include[]"}, keywords=("Zoë",))
    features = frozenset({Feature.LOGPROBS, Feature.KEYWORDS})
    transcript = openai.ask(logprobs, response_format="json", features=features)
    assert openai.sent.form == [
        ("model", "up-1"),
        ("response_format", "json"),
        ("keywords[]", "Zoë"),
        ("include[]", "logprobs"),
    ]
    assert (transcript.text, transcript.segments, transcript.words, transcript.language) == (TEXT, None, None, None)
    assert [(p.token, p.logprob, p.bytes) for p in transcript.logprobs or ()] == [("Zo", -0.25, (90, 111))]
    assert transcript.tokens == Tokens(14, 45, 4, 10)


def test_a_model_that_tells_speakers_apart(openai: Desk) -> None:
    asked = asks(response_format=ResponseFormat.DIARIZED_JSON, required={Feature.DIARIZATION: "response_format"})
    transcript = openai.ask(asked, response_format="diarized_json", features=frozenset({Feature.DIARIZATION}))
    assert openai.sent.form == [
        ("model", "up-1"),
        ("response_format", "diarized_json"),
        ("chunking_strategy", "auto"),
    ]
    assert [s.speaker for s in transcript.segments or ()] == ["A", "B"]


def test_a_translation_has_a_path_of_its_own(openai: Desk) -> None:
    openai.ask(asks(translate=True, language="de", prompt="x"))
    assert openai.sent.path == "/v1/audio/translations"
    assert openai.sent.form == [("model", "up-1"), ("response_format", "verbose_json"), ("prompt", "x")]


def test_what_a_deployment_does_not_declare_is_not_sent(form_desk: Desk) -> None:
    form_desk.ask(FULL, features=frozenset(), response_format="json")
    names = {name for name, _ in form_desk.sent.form} - {"response_format"}
    assert names in ({"model"}, {"model", "language"} if form_desk.name == "mistral" else {"model"})


def test_mistral_gives_times_or_takes_a_language(mistral: Desk) -> None:
    mistral.ask()
    assert mistral.sent.path == "/v1/audio/transcriptions"
    assert mistral.sent.headers["authorization"] == f"Bearer {KEY}"
    assert mistral.sent.form == [("model", "up-1"), ("timestamp_granularities", "segment")]
    mistral.ask(asks(language="en", temperature=0.25))
    assert mistral.sent.form == [("model", "up-1"), ("language", "en"), ("temperature", "0.25")]
    mistral.ask(FULL)
    assert mistral.sent.form == [
        ("model", "up-1"),
        ("timestamp_granularities", "segment"),
        ("temperature", "0.25"),
        ("context_bias", "Zoë_Müller"),
        ("context_bias", "a_b"),
    ]


def test_mistral_tells_speakers_apart(mistral: Desk) -> None:
    transcript = mistral.ask(asks(required={Feature.DIARIZATION: "x"}))
    assert ("diarize", "true") in mistral.sent.form
    assert [s.speaker for s in transcript.segments or ()] == ["speaker_1", "speaker_2"]


@pytest.mark.parametrize("keyword", ["", " ", ",", " , "])
def test_mistral_is_given_no_empty_name(mistral: Desk, keyword: str) -> None:
    mistral.ask(asks(keywords=(keyword, "Zoë")))
    assert [value for name, value in mistral.sent.form if name == "context_bias"] == ["Zoë"]


def test_what_is_asked_of_deepgram(deepgram: Desk) -> None:
    deepgram.ask()
    assert deepgram.sent.path == "/v1/listen"
    assert deepgram.sent.headers["authorization"] == f"Token {KEY}"
    always = [("model", "up-1"), ("smart_format", "true"), ("punctuate", "true"), ("utterances", "true")]
    assert deepgram.sent.query == [*always, ("detect_language", "true")]
    deepgram.ask(dataclasses.replace(FULL, required={Feature.DIARIZATION: "x"}))
    assert deepgram.sent.query == [
        *always,
        ("language", "en"),
        ("diarize", "true"),
        ("keyterm", "Zoë Müller"),
        ("keyterm", "a,b"),
    ]


def test_our_own_service_is_asked_for_everything(inference: Desk) -> None:
    inference.ask(FULL)
    assert inference.sent.path == "/v1/audio/transcriptions"
    assert dict(inference.sent.form)["response_format"] == "verbose_json"
    assert [v for n, v in inference.sent.form if n == "timestamp_granularities[]"] == ["segment", "word"]
    assert [v for n, v in inference.sent.form if n == "keywords[]"] == ["Zoë Müller", "a,b"]


def test_our_own_service_is_given_a_reference_in_place_of_the_file(inference: Desk) -> None:
    inference.upstream.will(Script(body=json.dumps({"text": TEXT}).encode()))
    inference.ask(reference="audio/acc_1/req_1")
    assert ("s3", "audio/acc_1/req_1") in inference.sent.form
    assert inference.sent.files == {}


HANDED_ON = {"vad_filter": ("true",), "hotwords[]": ("a", "b")}
SOURCES = ["file", "file_url", "file_id", "url", "stream", "model", "callback", "s3", "url[]", "file_url[]", "model[]"]


def test_further_fields_go_with_it_and_never_say_where_the_audio_is(desk: Desk) -> None:
    evil = dict.fromkeys(SOURCES, ("http://169.254.169.254/",))
    desk.ask(asks(extra=HANDED_ON | evil))
    sent = desk.sent.form + desk.sent.query
    assert [pair for pair in sent if pair[0] in HANDED_ON] == [
        ("vad_filter", "true"),
        ("hotwords[]", "a"),
        ("hotwords[]", "b"),
    ]
    assert [name for name, value in sent if "169.254" in value] == []
    assert [value for name, value in sent if name == "model"] == ["up-1"]


def test_a_further_field_does_not_replace_what_was_understood(desk: Desk) -> None:
    known = {"timestamp_granularities": ("word",), "punctuate": ("false",), "utterances": ("false",)}
    desk.ask(asks(extra=known))
    sent = desk.sent.form + desk.sent.query
    names = [name.removesuffix("[]") for name, _ in sent]
    for name in known:
        if names.count(name) > 1:
            pytest.fail(f"{name} was sent twice")
    if desk.name == "deepgram":
        assert dict(sent)["punctuate"] == dict(sent)["utterances"] == "true"
    else:
        assert {v for n, v in sent if n.startswith("timestamp_granularities")} == {"segment"}


@pytest.mark.parametrize("base", ["", "/"])
@pytest.mark.parametrize("prefix", ["", "/proxy/eu"])
def test_an_address_keeps_its_own_path(desk: Desk, base: str, prefix: str) -> None:
    url = desk.upstream.url + prefix + desk.upstream.prefix + base
    desk.ask(base_url=url)
    assert desk.sent.path == prefix + desk.upstream.path


def test_the_key_is_read_anew_for_each_request(desk: Desk) -> None:
    desk.upstream.key = "second"
    if desk.name != "inference":
        assert desk.fails(Script()).failure is FailureClass.CREDENTIAL
    desk.environ["UPSTREAM_KEY"] = " second\n"
    assert desk.ask().text == TEXT
    assert desk.sent.headers["authorization"].endswith(" second")


@pytest.mark.parametrize("key", ["", " ", "ключ", "a\nb"])
def test_a_key_that_cannot_be_sent_is_a_failed_attempt(desk: Desk, key: str) -> None:
    desk.environ["UPSTREAM_KEY"] = key
    with pytest.raises(ProviderError) as caught:
        desk.ask()
    assert caught.value.failure in (FailureClass.CREDENTIAL, FailureClass.TRANSIENT)
    assert key.strip() == "" or key not in str(caught.value)
    assert desk.upstream.sent == []


def test_a_redirect_is_not_followed(desk: Desk) -> None:
    with KINDS[desk.name].fake() as other:
        location = ("location", other.url + desk.upstream.path)
        for status in (301, 302, 307, 308):
            assert desk.fails(Script(status=status, headers=(location,))).failure is FailureClass.TRANSIENT
        assert other.sent == []


# --- What is made of the answer -----------------------------------------------------------------


def words_of(transcript: Transcript) -> list[tuple[str, float, float]] | None:
    return None if transcript.words is None else [(w.text, w.start, w.end) for w in transcript.words]


def test_the_answer_is_the_speech(desk: Desk) -> None:
    transcript = desk.ask(asks(granularities=BOTH))
    assert (transcript.text, transcript.language, transcript.duration) == (TEXT, "en", 3.03)
    assert [(s.start, s.end, s.text.strip()) for s in transcript.segments or ()] == [
        (start, end, text.strip()) for start, end, text in SEGMENTS
    ]
    spoken = None if desk.name == "mistral" else [(w, s, e) for w, s, e, _ in WORDS]
    assert words_of(transcript) == spoken


def test_the_confidence_is_that_of_the_words_by_their_length(desk: Desk) -> None:
    confidence = desk.ask(asks(granularities=BOTH)).confidence
    if desk.name in ("openai", "mistral"):
        assert confidence is None
    else:
        total = sum(end - start for _, start, end, _ in WORDS)
        assert confidence == pytest.approx(sum(c * (e - s) for _, s, e, c in WORDS) / total)


def test_what_whisper_says_of_a_segment_is_kept(openai: Desk) -> None:
    first = (openai.ask().segments or ())[0]
    assert (first.seek, first.tokens, first.temperature) == (0, (50364, 2555, 0), 0.0)
    assert (first.avg_logprob, first.compression_ratio, first.no_speech_prob) == (-0.3, 1.25, 0.01)


LANGUAGES: dict[str | None, str | None] = {
    "english": "en",
    "en": "en",
    "en-US": "en",
    "German": "de",
    "zh-Hant": "zh",
    "zho": "zh",
}
LANGUAGES |= dict.fromkeys(["", "klingon", "unknown", None])


def test_a_language_is_a_code_or_none_and_not_made_up(desk: Desk) -> None:
    for said in LANGUAGES:
        desk.upstream.will(Script(body=json.dumps(minimal(desk, language=said)).encode()))
    heard = desk.calls(len(LANGUAGES))
    assert [isinstance(one, Transcript) and one.language for one in heard] == list(LANGUAGES.values())


def minimal(desk: Desk, *, language: object = None, **top: Any) -> dict[str, Any]:
    """The least that an answer can be."""
    if desk.name != "deepgram":
        return {"text": TEXT, "language": language} | top
    channel = {"alternatives": [{"transcript": TEXT} | top], "detected_language": language}
    return {"results": {"channels": [channel]}}


def test_what_is_missing_is_null_and_not_made_up(desk: Desk) -> None:
    body = minimal(desk)
    if desk.name == "deepgram":
        del body["results"]["channels"][0]["detected_language"]
    else:
        del body["language"]
    desk.upstream.will(Script(body=json.dumps(body).encode()))
    assert desk.ask(asks(granularities=BOTH)) == Transcript(text=TEXT, duration=3.03)


def test_nulls_are_nulls(form_desk: Desk) -> None:
    empty = {"segments": None, "words": None, "usage": None, "logprobs": None, "duration": None}
    form_desk.upstream.will(Script(body=json.dumps(minimal(form_desk, **empty)).encode()))
    assert form_desk.ask() == Transcript(text=TEXT, duration=3.03)


def test_a_segment_of_nulls(form_desk: Desk) -> None:
    bare = {"start": 0, "end": "1.5", "text": "x"}
    names = ["seek", "tokens", "temperature", "avg_logprob", "compression_ratio", "no_speech_prob", "speaker", "id"]
    body = minimal(form_desk, segments=[bare, bare | dict.fromkeys(names)])
    form_desk.upstream.will(Script(body=json.dumps(body).encode()))
    first, second = form_desk.ask().segments or ()
    assert first == second
    assert (first.start, first.end, first.tokens, first.avg_logprob, first.speaker) == (0.0, 1.5, (), None, None)


def test_silence_is_no_text(desk: Desk) -> None:
    body = json.loads(json.dumps(minimal(desk)).replace(json.dumps(TEXT), '""'))
    desk.upstream.will(Script(body=json.dumps(body).encode()))
    assert desk.ask().text == ""


def test_mistrals_empty_list_of_segments_that_were_not_asked_for_is_none(mistral: Desk) -> None:
    transcript = mistral.ask(asks(language="en"))
    assert transcript.text == TEXT
    assert transcript.segments is None


def test_ovhs_diarization_is_its_segments(openai: Desk) -> None:
    spoken = [{"speaker": 0, "text": "a", "start": 0.0, "end": 1.0}, {"speaker": 1, "text": "b", "start": 1, "end": 2}]
    openai.upstream.will(Script(body=json.dumps({"text": "a b", "diarization": spoken}).encode()))
    assert [(s.speaker, s.text, s.end) for s in openai.ask().segments or ()] == [("0", "a", 1.0), ("1", "b", 2.0)]


def test_ovh_is_asked_for_speakers_and_they_are_the_segments(openai: Desk) -> None:
    body = {"text": "a b", "segments": [{"text": "a b", "start": 0.0, "end": 2.0}]}
    spoken = [{"speaker": 0, "text": "a", "start": 0.0, "end": 1.0}, {"speaker": 1, "text": "b", "start": 1, "end": 2}]
    for diarization, segments in ((spoken, ["a", "b"]), ([], ["a b"]), (None, ["a b"])):
        openai.upstream.will(Script(body=json.dumps(body | {"diarization": diarization}).encode()))
        heard = openai.ask(
            asks(required={Feature.DIARIZATION: "x"}), features=frozenset({Feature.SEGMENTS, Feature.DIARIZATION})
        )
        assert ("diarize", "true") in openai.sent.form
        assert [s.text for s in heard.segments or ()] == segments
    openai.ask(features=frozenset({Feature.SEGMENTS, Feature.DIARIZATION}))
    assert "diarize" not in dict(openai.sent.form)


def test_deepgrams_speakers(deepgram: Desk) -> None:
    segments = deepgram.ask(asks(required={Feature.DIARIZATION: "x"})).segments or ()
    assert [s.speaker for s in segments] == ["0", "1"]
    assert [len(s.words or ()) for s in segments] == [4, 2]


# --- Failures -------------------------------------------------------------------------------------

CLASSES = {
    400: FailureClass.CALLER_FAULT,
    401: FailureClass.CREDENTIAL,
    403: FailureClass.CREDENTIAL,
    402: FailureClass.QUOTA,
    404: FailureClass.UNSUPPORTED,
    408: FailureClass.TRANSIENT,
    415: FailureClass.UNSUPPORTED,
    429: FailureClass.RATE_LIMIT,
    500: FailureClass.TRANSIENT,
    502: FailureClass.TRANSIENT,
    503: FailureClass.TRANSIENT,
    504: FailureClass.TRANSIENT,
    529: FailureClass.TRANSIENT,
}


@pytest.mark.parametrize(("status", "failure"), CLASSES.items())
def test_each_status_is_a_class_whatever_the_body(desk: Desk, status: int, failure: FailureClass) -> None:
    bodies = [
        None,
        b"",
        b"<html>",
        b'"text"',
        b"[]",
        b'{"error": null}',
        b'{"error": "x"}',
        b'{"error": {"message": 5}}',
    ]
    for body, error in zip(bodies, desk.failures(*(Script(status=status, body=body) for body in bodies)), strict=True):
        # That the audio is at fault is believed to the provider, and not to some proxy's page.
        mute = status == 400 and body in (b"", b"<html>", b'"text"', b"[]")
        assert (error.failure, error.status) == (FailureClass.UNSUPPORTED if mute else failure, status)
        assert error.message
        assert "<html>" not in error.message


def test_a_file_that_is_too_large_there_may_fit_elsewhere(desk: Desk) -> None:
    own = FailureClass.CALLER_FAULT if desk.name == "inference" else FailureClass.UNSUPPORTED
    assert desk.fails(Script(status=413)).failure is own


def test_what_a_provider_says_of_the_audio_is_told(desk: Desk) -> None:
    error = desk.fails(Script(status=400))
    assert any(words in error.message for words in ("corrupt", "could not be decoded"))
    assert error.param == "file"


@pytest.mark.parametrize("code", ["insufficient_quota", "billing_hard_limit_reached"])
def test_openais_429_for_want_of_credit_is_no_rate_limit(openai: Desk, code: str) -> None:
    body = {"error": {"message": "You exceeded your current quota", "type": code, "param": None, "code": code}}
    assert openai.fails(Script(status=429, body=json.dumps(body).encode())).failure is FailureClass.QUOTA


def test_deepgrams_incomplete_upload_is_tried_again(deepgram: Desk) -> None:
    assert deepgram.fails(Script(status=422)).failure is FailureClass.TRANSIENT


def test_the_full_queue_of_our_own_service(inference: Desk) -> None:
    inference.upstream.will(Script(status=503, headers=(("retry-after", "3"),)))
    with pytest.raises(Overloaded) as caught:
        inference.ask()
    assert caught.value.retry_after == 3


@pytest.mark.parametrize("as_date", [False, True])
def test_how_long_to_wait_is_understood_as_seconds_and_as_a_date(desk: Desk, as_date: bool) -> None:
    error = desk.fails(limited(40, as_date=as_date))
    assert error.failure is FailureClass.RATE_LIMIT
    assert error.retry_after is not None
    assert 38 <= error.retry_after <= 41


WAITS = {"0": 0, "0.2": 1, "1e9": 86400}
NONSENSE = ["-5", "soon", "", "nan", "inf", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Oct 2099"]


def test_a_wait_that_makes_no_sense_is_none(desk: Desk) -> None:
    known: dict[str, int | None] = {**WAITS, **dict.fromkeys(NONSENSE)}
    errors = desk.failures(*(Script(status=429, headers=(("retry-after", text),)) for text in known))
    assert {error.failure for error in errors} == {FailureClass.RATE_LIMIT}
    assert [error.retry_after for error in errors] == list(known.values())


def broken(desk: Desk) -> Mapping[str, bytes]:
    whole = json.dumps(minimal(desk)).encode()
    text = json.dumps(TEXT).encode()
    timed = {"start": 0.5, "end": 1.0, "word": "x", "text": "x", "transcript": "x"}
    words = json.dumps(minimal(desk, words=[timed])).encode()
    found = {
        "empty": b"",
        "cut": whole[:-3],
        "page": b"<html>It works!</html>",
        "null": b"null",
        "list": b"[]",
        "text": b'"hello"',
        "object": b"{}",
        "not utf-8": whole.replace(text, b'"\xff\xfe"'),
        "text is null": whole.replace(text, b"null"),
        "text is a number": whole.replace(text, b"5"),
        "text is a list": whole.replace(text, b'["a"]'),
        "nested deep": b"[" * 100_000,
        "words are text": json.dumps(minimal(desk, words=["a"])).encode(),
        "words are a number": json.dumps(minimal(desk, words=5)).encode(),
        "a time is text": words.replace(b"0.5", b'"soon"'),
        "a time is null": words.replace(b"0.5", b"null"),
        "a time is NaN": words.replace(b"0.5", b"NaN"),
        "a time is the text nan": words.replace(b"0.5", b'"nan"'),
        "a time is endless": words.replace(b"0.5", b"1e999"),
    }
    if desk.name != "deepgram":
        found["tokens are endless"] = whole.replace(
            b'"text":', b'"usage": {"input_tokens": 1e999, "output_tokens": 1}, "text":'
        )
    return found


BROKEN = ["a time is the text nan", "a time is endless", "tokens are endless"]


def test_a_broken_answer_is_a_failed_attempt(desk: Desk) -> None:
    answers = [answer for what, answer in broken(desk).items() if what not in BROKEN]
    errors = desk.failures(*(Script(body=answer) for answer in answers), request=asks(granularities=BOTH))
    assert {(error.failure, error.status) for error in errors} == {(FailureClass.TRANSIENT, 200)}


@pytest.mark.parametrize("what", BROKEN)
def test_a_number_that_is_none_is_a_failed_attempt(desk: Desk, what: str) -> None:
    if (answer := broken(desk).get(what)) is not None:
        error = desk.fails(Script(body=answer), request=asks(granularities=BOTH))
        assert (error.failure, error.status) == (FailureClass.TRANSIENT, 200)


def test_the_content_type_is_not_what_decides(desk: Desk) -> None:
    desk.upstream.will(Script(content_type="text/plain"))
    assert desk.ask().text == TEXT


def test_an_answer_is_read_up_to_a_bound(openai: Desk) -> None:
    error = openai.fails(Script(size=65 * 1024 * 1024))
    assert (error.failure, error.message) == (FailureClass.TRANSIENT, "The provider's answer is too large.")


def test_a_large_answer_is_read_whole(desk: Desk) -> None:
    desk.upstream.will(Script(size=3_000_000))
    assert desk.ask().text == TEXT


CUT = [Script(hang_up=True), Script(drop_after=0), Script(drop_after=30)]
SLOW = [Script(delay=5), Script(stall_after=0), Script(stall_after=30)]


@pytest.mark.parametrize("script", CUT + SLOW, ids=repr)
def test_a_connection_that_fails_is_a_failed_attempt(desk: Desk, script: Script) -> None:
    begun = time.monotonic()
    assert desk.fails(script, first_byte=0.1).failure is FailureClass.TRANSIENT
    assert time.monotonic() - begun < 4


def test_nobody_there_is_a_failed_attempt(desk: Desk) -> None:
    with pytest.raises(ProviderError) as caught:
        desk.ask(base_url="http://127.0.0.1:9")
    assert (caught.value.failure, caught.value.status) == (FailureClass.TRANSIENT, None)


# --- Examples of the providers' documentation -----------------------------------------------------

EXAMPLES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "openai",
        {
            "text": "Imagine the wildest idea that you've ever had.",
            "usage": {
                "type": "tokens",
                "input_tokens": 14,
                "input_token_details": {"text_tokens": 0, "audio_tokens": 14},
                "output_tokens": 45,
                "total_tokens": 59,
            },
        },
        {"segments": None, "words": None, "tokens": Tokens(14, 45, 0, 14)},
    ),
    (
        "openai",
        {
            "task": "transcribe",
            "language": "english",
            "duration": 8.470000267028809,
            "text": "The beach was a popular spot on a hot summer day.",
            "segments": [
                {
                    "id": 0,
                    "seek": 0,
                    "start": 0.0,
                    "end": 3.319999933242798,
                    "text": " The beach was a popular spot on a hot summer day.",
                    "tokens": [50364, 440, 7534, 390, 257, 3743, 4008, 322, 257, 2368, 4266, 786, 13, 50530],
                    "temperature": 0.0,
                    "avg_logprob": -0.2860786020755768,
                    "compression_ratio": 1.2363636493682861,
                    "no_speech_prob": 0.00985979475080967,
                }
            ],
            "words": [{"word": "The", "start": 0.0, "end": 0.23999999463558197}],
            "usage": {"type": "duration", "seconds": 9},
        },
        {"segments": [(0.0, 3.319999933242798)], "words": ["The"], "language": "en", "tokens": None},
    ),
    (
        "openai",
        {
            "task": "transcribe",
            "duration": 27.4,
            "text": "Agent: Thanks for calling OpenAI support.\nA: Hi, I'm trying to enable diarization.",
            "segments": [
                {
                    "type": "transcript.text.segment",
                    "id": "seg_001",
                    "start": 0.0,
                    "end": 4.7,
                    "text": "Thanks for calling OpenAI support.",
                    "speaker": "agent",
                }
            ],
            "usage": {"type": "duration", "seconds": 27},
        },
        {"segments": [(0.0, 4.7)], "language": None, "speakers": ["agent"]},
    ),
    (
        "openai",  # Groq
        {"text": "Your transcribed text appears here...", "x_groq": {"id": "req_unique_id"}},
        {"segments": None, "language": None},
    ),
    (
        "mistral",
        {
            "model": "voxtral-mini-latest",
            "text": "The sun was setting slowly.",
            "language": None,
            "segments": [
                {
                    "text": "The sun was setting slowly.",
                    "start": 0.2,
                    "end": 4.6,
                    "speaker_id": "speaker_1",
                    "type": "transcription_segment",
                }
            ],
            "usage": {
                "prompt_audio_seconds": 5,
                "prompt_tokens": 5,
                "total_tokens": 404,
                "completion_tokens": 24,
                "prompt_tokens_details": {"cached_tokens": 368},
            },
            "finish_reason": None,
        },
        {"segments": [(0.2, 4.6)], "language": None, "speakers": ["speaker_1"], "words": None, "tokens": Tokens(5, 24)},
    ),
    (
        "deepgram",
        {
            "metadata": {
                "transaction_key": "deprecated",
                "request_id": "2479c8c8-8185-40ac-9ac6-f0874419f793",
                "duration": 25.933313,
                "channels": 1,
            },
            "results": {
                "channels": [
                    {
                        "alternatives": [
                            {
                                "transcript": "Yeah. As as much as it's worth celebrating",
                                "confidence": 0.99902344,
                                "words": [
                                    {
                                        "word": "yeah",
                                        "start": 0.08,
                                        "end": 0.32,
                                        "confidence": 0.9975586,
                                        "punctuated_word": "Yeah.",
                                    },
                                    {"word": "as", "start": 0.32, "end": 0.79999995, "confidence": 0.9921875},
                                ],
                            }
                        ]
                    }
                ]
            },
        },
        {"segments": None, "words": ["Yeah.", "as"], "language": None},
    ),
]


@pytest.mark.parametrize(("name", "body", "expected"), EXAMPLES)
def test_the_published_examples(name: str, body: dict[str, Any], expected: dict[str, Any]) -> None:
    for desk in desk_of(name):
        desk.upstream.will(Script(body=json.dumps(body).encode()))
        heard = desk.ask(duration=60.0)
        found = {
            "segments": heard.segments and [(s.start, s.end) for s in heard.segments],
            "words": heard.words and [w.text for w in heard.words],
            "language": heard.language,
            "tokens": heard.tokens,
            "speakers": [s.speaker for s in heard.segments or ()],
        }
        assert heard.text == body.get("text", "Yeah. As as much as it's worth celebrating")
        assert {name: found[name] for name in expected} == expected


def test_the_published_failures() -> None:
    detail = {"category": "INVALID_JSON", "message": "Invalid JSON submitted.", "details": "x", "request_id": "y"}
    flat = {"object": "error", "message": "Rate limit exceeded", "type": "rate_limited", "param": None, "code": "1300"}
    fast = {"detail": "Invalid audio"}
    for name, status, body, failure, message in [
        ("deepgram", 400, detail, FailureClass.CALLER_FAULT, "Invalid JSON submitted."),
        ("mistral", 429, flat, FailureClass.RATE_LIMIT, "Rate limit exceeded"),
        ("openai", 422, fast, FailureClass.CALLER_FAULT, "Invalid audio"),
    ]:
        for desk in desk_of(name):
            error = desk.fails(Script(status=status, body=json.dumps(body).encode()))
            assert (error.failure, error.message) == (failure, message)


# --- Through the gateway: every contract, every format, every provider --------------------------

_OPENAI_OFFERS = {
    "flac-only": 'containers = ["flac"]',
    "ogg-only": 'containers = ["ogg"]',
    "small": "max_bytes = 20000",
    "small-flac": 'max_bytes = 20000, containers = ["flac", "mp3"]',
}
_MORE = {"openai": "words = true", "mistral": "prompt = false, keywords = true", "deepgram": "", "inference": ""}


@dataclass(frozen=True)
class Exchange:
    server: Server
    customer: Customer
    upstreams: Mapping[str, Upstream]

    def request(self, path: str, model: str, **form: Any) -> httpx.Response:
        with httpx.Client(base_url=self.server.url, headers=self.customer.headers, timeout=30) as client:
            return send(client, path, model=model, **form)

    def recorded(self, response: httpx.Response) -> dict[str, Any]:
        """The usage record of the request that this answers."""
        records = Office(self.server.data_dir).tell("usage", self.customer.account, "--requests")
        (record,) = (r for r in records if r["request_id"] == response.headers["x-request-id"])
        return dict(record)


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exchange]:
    """A gateway in front of one provider of each kind; the model is called as the kind is."""
    directory = tmp_path_factory.mktemp("exchange")
    upstreams = {name: kind.fake() for name, kind in KINDS.items()}
    lines = []
    for name, upstream in upstreams.items():
        lines += [f"[providers.{name}]", f'kind = "{upstream.kind}"', f'flavor = "{upstream.flavor}"']
        lines += [f'base_url = "{upstream.base_url}"', 'api_key = "env:UPSTREAM_KEY"']
    offers = {name: (name, more) for name, more in _MORE.items()}
    offers |= {name: ("openai", more) for name, more in _OPENAI_OFFERS.items()}
    for model, (name, more) in offers.items():
        tail = f", {more}" if more else ""
        lines += [f'[models."{model}"]', "deployments = ["]
        lines += [f'{{ provider = "{name}", upstream_model = "{model}", price_per_minute = "0.006"{tail} }}', "]"]
    catalog = directory / "catalog.toml"
    catalog.write_text("\n".join(lines), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        for upstream in upstreams.values():
            stack.enter_context(upstream)
        process, server = start_server(directory, VOXGATE_CATALOG=str(catalog), UPSTREAM_KEY=KEY)
        stack.callback(stop_server, process)
        yield Exchange(server, Office(directory).open(credit=10**9), upstreams)


SHAPES = [
    (path, shape) for path in (OPENAI, ROUTER, LITELLM) for shape in ("json", "text", "srt", "vtt", "verbose_json")
]


@pytest.mark.parametrize(("path", "shape"), [*SHAPES, (STATS, "json")])
@pytest.mark.parametrize("name", list(KINDS))
def test_the_same_speech_is_the_same_answer(exchange: Exchange, name: str, path: str, shape: str) -> None:
    form: dict[str, Any] = {} if path == STATS else {"response_format": shape}
    if path == LITELLM or shape == "verbose_json":
        form["timestamp_granularities[]"] = ["segment"] if name == "mistral" else ["word", "segment"]
    response = exchange.request(path, name, **form)
    assert response.status_code == 200, response.text
    assert (response.headers["x-voxgate-provider"], response.headers["x-voxgate-attempts"]) == (name, "1")
    if shape == "text":
        assert response.text == TEXT + "\n"
    elif shape == "srt":
        cues = [(c.start.total_seconds(), c.end.total_seconds(), c.content) for c in srt.parse(response.text)]
        same_segments(cues)
    elif shape == "vtt":
        found = webvtt.from_string(response.text)
        same_segments(
            [(c.start_in_seconds + _ms(c.start), c.end_in_seconds + _ms(c.end), c.text) for c in found.captions]
        )
    else:
        same_body(response.json(), name, path, shape)


@pytest.mark.parametrize("path", [OPENAI, ROUTER, LITELLM])
def test_words_of_who_has_none_are_refused_before_anyone_is_asked(exchange: Exchange, path: str) -> None:
    before = len(exchange.upstreams["mistral"].sent)
    form = {"response_format": "verbose_json", "timestamp_granularities[]": ["word"]}
    response = exchange.request(path, "mistral", **form)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "timestamp_granularities")
    assert len(exchange.upstreams["mistral"].sent) == before


def _ms(clock: str) -> float:
    return int(clock.rpartition(".")[2]) / 1000


def same_segments(found: list[tuple[float, float, str]]) -> None:
    assert [text.strip() for _, _, text in found] == [text.strip() for _, _, text in SEGMENTS]
    for (start, end, _), (true_start, true_end, _) in zip(found, SEGMENTS, strict=True):
        assert abs(start - true_start) <= 0.01
        assert abs(end - true_end) <= 0.01


def same_body(body: dict[str, Any], name: str, path: str, shape: str) -> None:
    assert body["text"] == TEXT
    if path == OPENAI and shape == "json":
        assert body.keys() == {"text", "usage"}
        return
    assert body["language"] == ("english" if path == OPENAI else "en")
    if path != ROUTER or shape == "verbose_json":
        assert body["duration"] == pytest.approx(3.03175, abs=0.001)
        same_words(body.get("words"), name)
    if path == STATS:
        known = name in ("deepgram", "inference")
        assert (0 < body["confidence"] < 1) if known else body["confidence"] is None
        return
    same_segments([(s["start"], s["end"], s["text"]) for s in body["segments"]])
    for segment in body["segments"]:
        whisper = name in ("openai", "inference")
        assert segment["avg_logprob"] == (-0.3 if whisper else None)
        assert segment["seek"] == (0 if whisper else None)
        assert isinstance(segment["tokens"], list)
        assert isinstance(segment["start"], float)
    if path == LITELLM:
        assert (body["extra_fields"]["provider"], body["extra_fields"].get("converted_to")) == (name, None)
        assert body["usage"]["seconds"] == body["duration"]


def same_words(words: list[dict[str, Any]] | None, name: str) -> None:
    if name == "mistral":
        assert words is None
        return
    assert words is not None
    assert [word["word"] for word in words] == [word for word, *_ in WORDS]
    for word, (_, start, end, _) in zip(words, WORDS, strict=True):
        assert abs(word["start"] - start) <= 0.01
        assert abs(word["end"] - end) <= 0.01


# --- Conversions ----------------------------------------------------------------------------------


def seconds_of(audio: bytes) -> tuple[str, float, int, int]:
    """The codec, the decoded length, the rate and the channels, by decoding all of it."""
    with av.open(io.BytesIO(audio), "r") as media:
        frames = list(media.decode(media.streams.audio[0]))
        context = media.streams.audio[0].codec_context
        samples = sum(frame.samples for frame in frames)
        return context.name, samples / frames[0].rate, frames[0].rate, context.channels


@pytest.mark.parametrize(
    ("model", "name", "codec"),
    [("flac-only", name, "flac") for name in ("b-slt.mp3", "d-slt.opus", "a-mp4-video.mp4", "a-wav-f32.wav")]
    + [("ogg-only", name, "opus") for name in ("b-slt.mp3", "a-webm.webm", "a-mp3-44k-stereo.mp3", "a-adts.aac")]
    + [("small", name, "opus") for name in ("d-rms.flac", "a-wav-s32.wav")],
)
def test_what_a_provider_does_not_take_is_made_into_what_it_takes(
    exchange: Exchange, model: str, name: str, codec: str
) -> None:
    audio = (DATA / name).read_bytes()
    response = exchange.request(LITELLM, model, audio=audio)
    assert response.status_code == 200, response.text
    container = {"flac": "flac", "opus": "ogg"}[codec]
    assert response.json()["extra_fields"]["converted_to"] == container
    assert exchange.recorded(response)["converted"] == container
    file = exchange.upstreams["openai"].sent[-1].files["file"]
    assert (file.name, file.content_type) == (f"audio.{container}", f"audio/{container}")
    if model == "small":
        assert len(file.content) <= 20_000
    found, seconds, rate, channels = seconds_of(file.content)
    assert (found.removeprefix("lib"), rate, channels) == (codec, 16_000 if codec == "flac" else 48_000, 1)
    assert seconds == pytest.approx(seconds_of(audio)[1], abs=0.05)
    assert response.json()["duration"] == pytest.approx(seconds_of(audio)[1], abs=0.1)


@pytest.mark.parametrize("model", ["flac-only", "ogg-only"])
def test_a_converted_recording_has_the_same_words(exchange: Exchange, server: Server, model: str) -> None:
    assert exchange.request(LITELLM, model).status_code == 200
    converted = exchange.upstreams["openai"].sent[-1].files["file"]
    heard = server.transcribe((converted.name, converted.content)).json()["text"]
    before = server.transcribe(SPEECH).json()["text"]
    assert before
    assert word_errors(before.lower(), heard) <= 0.2


@pytest.mark.parametrize(
    ("model", "name"), [("flac-only", "a-flac.flac"), ("flac-only", "a-flac-48k-stereo.flac"), ("small", "b-slt.mp3")]
)
def test_what_it_takes_is_left_as_it_is(exchange: Exchange, model: str, name: str) -> None:
    audio = (DATA / name).read_bytes()
    response = exchange.request(LITELLM, model, audio=audio)
    assert response.json()["extra_fields"].get("converted_to") is None
    assert exchange.recorded(response)["converted"] == ""
    assert exchange.upstreams["openai"].sent[-1].audio == audio


def test_what_can_be_made_into_nothing_that_fits_is_not_sent(exchange: Exchange) -> None:
    audio = (DATA / "d-rms.flac").read_bytes()
    assert len(audio) > 20_000
    before = len(exchange.upstreams["openai"].sent)
    response = exchange.request(OPENAI, "small-flac", audio=audio)
    assert response.status_code == 502
    assert "openai: unsupported" in response.json()["error"]["message"]
    assert len(exchange.upstreams["openai"].sent) == before


def test_one_that_takes_neither_flac_nor_ogg_is_not_called(tmp_path: Path) -> None:
    """A catalogue cannot say so; a deployment that is made by hand can."""
    entry = ProviderEntry(name="p", kind="openai", base_url="http://p")
    deployment = Deployment(provider=entry, upstream_model="u", price=0, containers=frozenset({"webm"}))

    async def called(upload: Upload) -> None:
        asked = TranscriptionRequest(model="m")
        async with Prepared(request=asked, audio=upload, container=MP3, duration=3.03, spool_dir=tmp_path) as prepared:
            await prepared.call(deployment)

    with Upload(tmp_path) as upload:
        upload.write(SPEECH.read_bytes())
        with pytest.raises(ProviderError) as caught:
            asyncio.run(called(upload))
    assert caught.value.failure is FailureClass.UNSUPPORTED
