"""The stats gateway's contract (llm-stats.com, "Speech to text"): one form, one JSON shape."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field as Described

from voxgate.dialects import Dialect
from voxgate.dialects.form import Language, RequestForm
from voxgate.dialects.speech_form import refuse_stream
from voxgate.formats import verbose
from voxgate.model import Granularity, Outcome, Routing, TranscriptionRequest


class StatsForm(RequestForm):
    model_id: Annotated[str, Described(min_length=1, examples=["whisper-1"])]
    language: Language | None = None
    provider_id: str | None = None
    # No field of the contract; known here so that asking for it is refused, not ignored.
    stream: bool = False

    def request(self) -> TranscriptionRequest:
        refuse_stream(self.stream)
        return TranscriptionRequest(
            model=self.model_id,
            language=self.language,
            granularities=frozenset({Granularity.WORD, Granularity.SEGMENT}),
            routing=Routing(provider=self.provider_id),
        )


class StatsDialect(Dialect):
    name = "stats"
    path = "/v1/stt/transcribe"
    form = StatsForm
    audio_field = "audio"
    model_field = "model_id"

    def body(self, outcome: Outcome) -> dict[str, Any]:
        transcript = outcome.transcript
        return {
            "text": transcript.text,
            "duration": verbose.seconds(transcript.duration),
            "language": transcript.language,
            "confidence": verbose.probability(transcript.confidence),
            "words": verbose.words(transcript, confidence=True),
            "model": outcome.request.model,
        }
