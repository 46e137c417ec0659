"""The EU router's contract: OpenAI's form with a say in the routing, and a body of its own."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field as Described

from voxgate.dialects.form import FormModel, Language, Temperature
from voxgate.dialects.openai import Text, check_granularities, refuse_stream, required_by_format
from voxgate.formats import Body, json_body, plain_body, verbose
from voxgate.model import Granularity, Outcome, Preference, ResponseFormat, Routing, TranscriptionRequest
from voxgate.multipart import Field


class RouterForm(FormModel):
    model: Annotated[str, Described(min_length=1, examples=["whisper-large-v3"])]
    language: Language | None = None
    prompt: Text | None = None
    response_format: ResponseFormat = ResponseFormat.JSON
    temperature: Temperature = 0.0
    preference: Preference = Preference.BALANCED
    allowed_providers: list[str] | None = None
    eu_native: bool = False
    allow_quantization: bool = True
    # "Additional parameters may be included": these two are read here, the rest is passed on.
    timestamp_granularities: list[Granularity] | None = None
    stream: bool = False


class RouterDialect:
    name = "router"
    path = "/audio/transcriptions"
    audio_field = "file"
    nullable = True
    form: type[FormModel] = RouterForm

    def parse(self, fields: tuple[Field, ...], files: tuple[str, ...]) -> TranscriptionRequest:
        form, extra = RouterForm.read(fields, null=self.nullable)
        refuse_stream(form.stream)
        check_granularities(form.timestamp_granularities, form.response_format)
        return TranscriptionRequest(
            model=form.model,
            language=form.language,
            prompt=form.prompt,
            temperature=form.temperature,
            response_format=form.response_format,
            granularities=frozenset(form.timestamp_granularities or [Granularity.SEGMENT]),
            routing=Routing(
                allowed_providers=frozenset(form.allowed_providers) if form.allowed_providers else None,
                preference=form.preference,
                eu_native=form.eu_native,
                allow_quantization=form.allow_quantization,
            ),
            required=required_by_format(form.response_format),
            extra=extra,
            ignored=files,
        )

    def render(self, outcome: Outcome) -> Body:
        request, transcript = outcome.request, outcome.transcript
        plain = plain_body(transcript, request.response_format)
        if plain is not None:
            return plain
        body = {
            "id": outcome.id,
            "object": "audio.transcription",
            "created": outcome.created,
            "provider": outcome.provider,
            "model": request.model,
            "text": transcript.text,
            "language": transcript.language,
            "segments": verbose.segments(transcript),
        }
        if request.response_format is ResponseFormat.VERBOSE_JSON:
            body["duration"] = verbose.seconds(transcript.duration)
            if request.words:
                body["words"] = verbose.words(transcript)
        return json_body(body)
