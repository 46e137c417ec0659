"""The values that everything else speaks: what was asked, and what was heard.

Times are seconds as floats from the start of the audio, probabilities are 0..1, log-probabilities
are natural logarithms. `None` always means "the engine did not say", never zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any


class ResponseFormat(StrEnum):
    JSON = "json"
    TEXT = "text"
    SRT = "srt"
    VERBOSE_JSON = "verbose_json"
    VTT = "vtt"
    DIARIZED_JSON = "diarized_json"


class Granularity(StrEnum):
    WORD = "word"
    SEGMENT = "segment"


class Preference(StrEnum):
    BALANCED = "balanced"
    SPEED = "speed"
    COST = "cost"


class Priority(StrEnum):
    """Who is served first by our own engine: the first of these."""

    LIVE = "live"
    INTERACTIVE = "interactive"
    BATCH = "batch"


class Feature(StrEnum):
    """What a deployment may or may not be able to do beyond turning speech into text."""

    WORDS = "words"
    SEGMENTS = "segments"
    PROMPT = "prompt"
    TEMPERATURE = "temperature"
    LANGUAGE = "language"  # takes the language as a hint
    LOGPROBS = "logprobs"
    DIARIZATION = "diarization"
    KEYWORDS = "keywords"
    CHUNKING = "chunking"
    LANGUAGES = "several_languages"
    STREAMING = "streaming"
    TRANSLATION = "translation"
    LIVE = "live"


@dataclass(frozen=True, slots=True)
class Word:
    text: str
    start: float
    end: float
    confidence: float | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of speech. `seek` is in hundredths of a second, as Whisper counts its frames."""

    start: float
    end: float
    text: str
    words: tuple[Word, ...] | None = None
    seek: int | None = None
    tokens: tuple[int, ...] = ()
    temperature: float | None = None
    avg_logprob: float | None = None
    compression_ratio: float | None = None
    no_speech_prob: float | None = None
    speaker: str | None = None

    def moved(self, seconds: float) -> Segment:
        """The same, later by so much."""
        words = self.words and tuple(replace(w, start=w.start + seconds, end=w.end + seconds) for w in self.words)
        return replace(self, start=self.start + seconds, end=self.end + seconds, words=words)


@dataclass(frozen=True, slots=True)
class Logprob:
    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a provider that bills by tokens counted."""

    input: int
    output: int
    text: int | None = None
    audio: int | None = None


@dataclass(frozen=True, slots=True)
class Transcript:
    """What a provider heard. `language` is an ISO 639 code, `duration` the audio's seconds."""

    text: str
    duration: float
    language: str | None = None
    segments: tuple[Segment, ...] | None = None
    words: tuple[Word, ...] | None = None
    logprobs: tuple[Logprob, ...] | None = None
    tokens: Tokens | None = None

    @property
    def confidence(self) -> float | None:
        """The mean of the words' confidences, weighted by how long each word lasts."""
        known = [(w.confidence, max(w.end - w.start, 0.0)) for w in self.words or () if w.confidence is not None]
        total = sum(weight for _, weight in known)
        return sum(c * weight for c, weight in known) / total if total else None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a transcript that is still being made: its text as it follows on the pieces before, up
    to `end` seconds, the segment that it is, where it is a whole one, and its own tokens' log-probabilities."""

    text: str
    end: float | None = None
    segment: Segment | None = None
    logprobs: tuple[Logprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Heard:
    """Of live speech, one utterance: as far as it is understood, or for good where it is `final`. Without any
    text nothing is left to come from before `segment.end`."""

    segment: Segment
    final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The request's own say in which deployments may serve it."""

    provider: str | None = None
    allowed_providers: frozenset[str] | None = None
    preference: Preference = Preference.BALANCED
    eu_native: bool = False
    allow_quantization: bool = True
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscriptionRequest:
    """One request, whichever contract it came through.

    `required` maps each feature without which the answer would be wrong to the form field that
    asks for it, so that a refusal can name the field. `extra` is what the contract passes on to
    the provider as it is; `ignored` names the fields that nothing here reads.
    """

    model: str
    language: str | None = None
    prompt: str | None = None
    temperature: float | None = None
    response_format: ResponseFormat = ResponseFormat.JSON
    granularities: frozenset[Granularity] = frozenset({Granularity.SEGMENT})
    translate: bool = False
    stream: bool = False
    keywords: tuple[str, ...] = ()
    routing: Routing = Routing()
    required: Mapping[Feature, str] = field(default_factory=dict)
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    priority: Priority = Priority.INTERACTIVE

    @property
    def words(self) -> bool:
        return Granularity.WORD in self.granularities


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a deployment's engine can do. `languages` is None where it takes any."""

    languages: frozenset[str] | None = None
    features: frozenset[Feature] = frozenset()


@dataclass(slots=True)
class Exchange:
    """What was sent to the provider that answered last, and its answer, without secrets and without audio."""

    request: dict[str, Any] | None = None
    response: Any = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished transcription, with what the contracts say about how it came about.

    `created` is unix seconds, `latency` the seconds the serving provider took. `converted` is the
    container that the audio was made into for it, None where it took what came; `hit` is the cache's key of
    an answer out of it; `exchange` is there where the caller may see it.
    """

    id: str
    created: int
    request: TranscriptionRequest
    transcript: Transcript
    provider: str
    upstream_model: str
    language_style: str
    latency: float
    attempts: int = 1
    converted: str | None = None
    hit: str | None = None
    exchange: Exchange | None = None
