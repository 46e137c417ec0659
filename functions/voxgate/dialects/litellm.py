"""LiteLLM's contract as Bifrost publishes it: OpenAI's form with fallbacks, and a rich body."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field as Described

from voxgate.dialects.form import FormModel, Language, Temperature
from voxgate.dialects.openai import Text, refuse_stream, required_by_format
from voxgate.formats import Body, json_body, plain_body, verbose
from voxgate.model import Granularity, Outcome, ResponseFormat, Routing, TranscriptionRequest
from voxgate.multipart import Field


class LiteLLMForm(FormModel):
    model: Annotated[str, Described(min_length=1, examples=["whisper-1"])]
    language: Language | None = None
    prompt: Text | None = None
    response_format: ResponseFormat = ResponseFormat.JSON
    temperature: Temperature = 0.0
    timestamp_granularities: list[Granularity] | None = None
    stream: bool = False
    fallbacks: list[str] | None = None


class LiteLLMDialect:
    """Its published example asks for words with `response_format=json`, so here granularities go
    with every format, unlike OpenAI's (docs/decisions/004-litellm-granularities.md)."""

    name = "litellm"
    path = "/litellm/v1/audio/transcriptions"
    audio_field = "file"
    nullable = False
    form: type[FormModel] = LiteLLMForm

    def parse(self, fields: tuple[Field, ...], files: tuple[str, ...]) -> TranscriptionRequest:
        form, extra = LiteLLMForm.read(fields)
        refuse_stream(form.stream)
        return TranscriptionRequest(
            model=form.model,
            language=form.language,
            prompt=form.prompt,
            temperature=form.temperature,
            response_format=form.response_format,
            granularities=frozenset(form.timestamp_granularities or [Granularity.SEGMENT]),
            routing=Routing(fallbacks=tuple(form.fallbacks or ())),
            required=required_by_format(form.response_format),
            ignored=(*extra, *files),
        )

    def render(self, outcome: Outcome) -> Body:
        request, transcript = outcome.request, outcome.transcript
        plain = plain_body(transcript, request.response_format)
        if plain is not None:
            return plain
        asked = request.granularities
        return json_body(
            {
                "task": "transcribe",
                "language": transcript.language,
                "duration": verbose.seconds(transcript.duration),
                "text": transcript.text,
                "segments": verbose.segments(transcript) if Granularity.SEGMENT in asked else None,
                "words": verbose.words(transcript) if Granularity.WORD in asked else None,
                "logprobs": None,
                "usage": {"type": "duration", "seconds": verbose.seconds(transcript.duration)},
                "extra_fields": {
                    "request_type": "transcription",
                    "provider": outcome.provider,
                    "model_requested": request.model,
                    "model_deployment": outcome.upstream_model,
                    "latency": round(outcome.latency * 1000),  # milliseconds
                },
            }
        )
