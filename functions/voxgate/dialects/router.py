"""The EU router's contract: OpenAI's form with a say in the routing, and a body of its own."""

from __future__ import annotations

from dataclasses import replace

from voxgate.dialects.form import FormModel
from voxgate.dialects.speech_form import SpeechForm, refuse_stream
from voxgate.formats import Body, json_body, plain_body, verbose
from voxgate.model import Outcome, Preference, ResponseFormat, Routing, TranscriptionRequest
from voxgate.multipart import Field


class RouterForm(SpeechForm):
    """Its documentation allows further parameters; what this form lacks is passed on."""

    preference: Preference = Preference.BALANCED
    allowed_providers: list[str] | None = None
    eu_native: bool = False
    allow_quantization: bool = True


class RouterDialect:
    name = "router"
    path = "/audio/transcriptions"
    audio_field = "file"
    nullable = True
    key_header = ""
    form: type[FormModel] = RouterForm

    def parse(self, fields: tuple[Field, ...], files: tuple[str, ...]) -> TranscriptionRequest:
        form, extra = RouterForm.read(fields, null=self.nullable)
        form.check_granularities()
        refuse_stream(form.stream)
        return replace(
            form.request(),
            routing=Routing(
                allowed_providers=frozenset(form.allowed_providers) if form.allowed_providers else None,
                preference=form.preference,
                eu_native=form.eu_native,
                allow_quantization=form.allow_quantization,
            ),
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
