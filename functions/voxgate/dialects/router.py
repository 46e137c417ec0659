"""The EU router's contract: OpenAI's form with a say in the routing, and a body of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from voxgate.dialects import Dialect
from voxgate.dialects.speech_form import SpeechForm, refuse_stream
from voxgate.formats import verbose
from voxgate.model import Outcome, Preference, ResponseFormat, Routing, TranscriptionRequest
from voxgate.multipart import Field


class RouterForm(SpeechForm):
    """Its documentation allows further parameters; what this form lacks is passed on."""

    preference: Preference = Preference.BALANCED
    allowed_providers: list[str] | None = None
    eu_native: bool = False
    allow_quantization: bool = True

    def request(self) -> TranscriptionRequest:
        self.check_granularities()
        refuse_stream(self.stream)
        routing = Routing(
            allowed_providers=frozenset(self.allowed_providers) if self.allowed_providers else None,
            preference=self.preference,
            eu_native=self.eu_native,
            allow_quantization=self.allow_quantization,
        )
        return replace(super().request(), routing=routing)


class RouterDialect(Dialect):
    name = "router"
    path = "/audio/transcriptions"
    form = RouterForm
    nullable = True

    def parse(self, fields: tuple[Field, ...], files: tuple[str, ...]) -> TranscriptionRequest:
        form, extra = self.form.read(fields, null=True)
        return replace(form.request(), extra=extra, ignored=files)

    def body(self, outcome: Outcome) -> dict[str, Any]:
        request, transcript = outcome.request, outcome.transcript
        body: dict[str, Any] = {
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
        return body
