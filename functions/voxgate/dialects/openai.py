"""OpenAI's contract: https://platform.openai.com/docs/api-reference/audio/createTranscription."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field as Described

from voxgate.dialects import Dialect
from voxgate.dialects.form import Language, RequestForm
from voxgate.dialects.speech_form import SpeechForm, Text, refuse_stream
from voxgate.errors import InvalidInput
from voxgate.formats import verbose
from voxgate.model import Delta, Feature, Granularity, Outcome, ResponseFormat, TranscriptionRequest
from voxgate.multipart import Field


class OpenAIForm(SpeechForm):
    include: list[Literal["logprobs"]] | None = None
    chunking_strategy: Text | None = None
    keywords: list[Text] | None = None
    languages: list[Language] | None = None
    known_speaker_names: Annotated[list[Text], Described(max_length=4)] | None = None
    known_speaker_references: Annotated[list[str], Described(max_length=4)] | None = None

    def request(self, *, chunking_fields: bool = False) -> TranscriptionRequest:
        """`chunking_fields`: the chunking strategy came as a field for each of its own."""
        self.check_granularities()
        request = super().request()
        required = {**request.required, **self._required()}
        if chunking_fields or self.chunking_strategy:
            required |= _chunking(self.chunking_strategy, chunking_fields)
        language = self.language
        if language is None and self.languages and len(self.languages) == 1:
            language = self.languages[0]
        return replace(request, language=language, keywords=tuple(self.keywords or ()), required=required)

    def _required(self) -> dict[Feature, str]:
        """The features that the newer parameters need."""
        asked = (
            (self.known_speaker_names, Feature.DIARIZATION, "known_speaker_names[]"),
            (self.known_speaker_references, Feature.DIARIZATION, "known_speaker_references[]"),
            (self.include, Feature.LOGPROBS, "include[]"),
            (self.keywords, Feature.KEYWORDS, "keywords"),
            (len(self.languages or ()) > 1, Feature.LANGUAGES, "languages"),
        )
        return {feature: field for given, feature, field in asked if given}


class OpenAIDialect(Dialect):
    name = "openai"
    path = "/v1/audio/transcriptions"
    form: type[RequestForm] = OpenAIForm
    _confident_words = False

    def parse(self, fields: tuple[Field, ...], files: tuple[str, ...]) -> TranscriptionRequest:
        chunking = tuple(f for f in fields if f.name.startswith("chunking_strategy["))
        form, extra = OpenAIForm.read(tuple(f for f in fields if f not in chunking))
        return replace(form.request(chunking_fields=bool(chunking)), ignored=(*extra, *files))

    def body(self, outcome: Outcome) -> dict[str, Any]:
        request, transcript = outcome.request, outcome.transcript
        usage = verbose.usage(transcript)
        if request.response_format is ResponseFormat.JSON:
            return {"text": transcript.text, **_logprobs(outcome), "usage": usage}
        body: dict[str, Any] = {
            "task": "translate" if request.translate else "transcribe",
            # Of a translation it is that of the output.
            "language": verbose.language("en" if request.translate else transcript.language, outcome.language_style),
            "duration": verbose.seconds(transcript.duration),
            "text": transcript.text,
        }
        if request.response_format is ResponseFormat.DIARIZED_JSON:
            del body["language"]
            return body | {"segments": verbose.diarized(transcript), "usage": usage}
        # As recorded from OpenAI: words alone means no segments.
        if Granularity.SEGMENT in request.granularities:
            body["segments"] = verbose.segments(transcript)
        if Granularity.WORD in request.granularities:
            body["words"] = verbose.words(transcript, confidence=self._confident_words)
        return body | {"usage": usage}

    def render_delta(self, delta: Delta, index: int) -> dict[str, Any] | None:
        if delta.segment is not None and delta.segment.speaker is not None:
            return verbose.diarized_segment(index, delta.segment)
        logprobs = {"logprobs": verbose.logprobs(delta)} if delta.logprobs else {}
        return {"type": "transcript.text.delta", "delta": delta.text, **logprobs} if delta.text else None

    def render_done(self, outcome: Outcome, text: str, index: int) -> dict[str, Any]:
        usage = verbose.usage(outcome.transcript)
        return {"type": "transcript.text.done", "text": text, **_logprobs(outcome), "usage": usage}


def _logprobs(outcome: Outcome) -> dict[str, Any]:
    asked = Feature.LOGPROBS in outcome.request.required
    return {"logprobs": verbose.logprobs(outcome.transcript)} if asked else {}


class TranslationForm(RequestForm):
    """What OpenAI's translations take: into English, from whichever language it is."""

    model: Annotated[str, Described(min_length=1, examples=["whisper-1"])]
    prompt: Text | None = None
    response_format: ResponseFormat = ResponseFormat.JSON
    temperature: Annotated[float, Described(ge=0, le=1, allow_inf_nan=False)] = 0.0
    # No field of the contract; known here so that asking for it is refused, not ignored.
    stream: bool = False

    def request(self) -> TranscriptionRequest:
        refuse_stream(self.stream)
        if self.response_format is ResponseFormat.DIARIZED_JSON:
            raise InvalidInput("Translations have no 'diarized_json'.", param="response_format")
        return TranscriptionRequest(
            model=self.model,
            prompt=self.prompt,
            temperature=self.temperature,
            response_format=self.response_format,
            translate=True,
        )


class TranslationDialect(OpenAIDialect):
    """https://platform.openai.com/docs/api-reference/audio/createTranslation"""

    name = "translations"
    path = "/v1/audio/translations"
    form = TranslationForm
    parse = Dialect.parse


class InferenceDialect(OpenAIDialect):
    """What our own inference service speaks: OpenAI's contract, with each word's confidence."""

    name = "inference"
    _confident_words = True

    def render_delta(self, delta: Delta, index: int) -> dict[str, Any] | None:
        told = super().render_delta(delta, index)
        return None if told is None else told | {"end": delta.end}

    def render_done(self, outcome: Outcome, text: str, index: int) -> dict[str, Any]:
        transcript = outcome.transcript
        heard = {
            "language": transcript.language,
            "segments": verbose.segments(transcript),
            "words": verbose.words(transcript, confidence=True),
        }
        return super().render_done(outcome, text, index) | heard


def _chunking(strategy: str | None, by_fields: bool) -> dict[Feature, str]:
    if strategy == "auto" and not by_fields:
        return {}  # cutting at pauses is what every engine here does
    if strategy is not None:
        try:
            known = isinstance(json.loads(strategy), dict)
        except (ValueError, RecursionError):
            known = False
        if not known:
            raise InvalidInput(
                "Invalid value for 'chunking_strategy': it should be 'auto' or a JSON object.",
                param="chunking_strategy",
            )
    return {Feature.CHUNKING: "chunking_strategy"}
