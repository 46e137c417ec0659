"""The stats gateway's contract (llm-stats.com, "Speech to text"): one form, one JSON shape."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field as Described

from voxgate.dialects.form import FormModel, Language
from voxgate.dialects.speech_form import refuse_stream
from voxgate.formats import Body, json_body, verbose
from voxgate.model import Granularity, Outcome, Routing, TranscriptionRequest
from voxgate.multipart import Field


class StatsForm(FormModel):
    model_id: Annotated[str, Described(min_length=1, examples=["whisper-1"])]
    language: Language | None = None
    provider_id: str | None = None
    # No field of the contract; known here so that asking for it is refused, not ignored.
    stream: bool = False


class StatsDialect:
    name = "stats"
    path = "/v1/stt/transcribe"
    audio_field = "audio"
    nullable = False
    key_header = ""
    form: type[FormModel] = StatsForm

    def parse(self, fields: tuple[Field, ...], files: tuple[str, ...]) -> TranscriptionRequest:
        form, extra = StatsForm.read(fields)
        refuse_stream(form.stream)
        return TranscriptionRequest(
            model=form.model_id,
            language=form.language,
            granularities=frozenset({Granularity.WORD, Granularity.SEGMENT}),
            routing=Routing(provider=form.provider_id),
            ignored=(*extra, *files),
        )

    def render(self, outcome: Outcome) -> Body:
        transcript = outcome.transcript
        confidence = transcript.confidence
        return json_body(
            {
                "text": transcript.text,
                "duration": verbose.seconds(transcript.duration),
                "language": transcript.language,
                "confidence": None if confidence is None else round(confidence, 4),
                "words": verbose.words(transcript, confidence=True),
                "model": outcome.request.model,
            }
        )
