"""LiteLLM's contract as Bifrost publishes it: OpenAI's form with fallbacks, and a rich body."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from voxgate.dialects import Dialect
from voxgate.dialects.speech_form import SpeechForm
from voxgate.formats import verbose
from voxgate.model import Delta, Granularity, Outcome, Routing, Transcript, TranscriptionRequest


class LiteLLMForm(SpeechForm):
    fallbacks: list[str] | None = None

    def request(self) -> TranscriptionRequest:
        return replace(super().request(), routing=Routing(fallbacks=tuple(self.fallbacks or ())))


class LiteLLMDialect(Dialect):
    """Its published example asks for words with `response_format=json`, so here granularities go
    with every format, unlike OpenAI's (docs/decisions/004-litellm-granularities.md)."""

    name = "litellm"
    path = "/litellm/v1/audio/transcriptions"
    form = LiteLLMForm
    key_header = "x-api-key"

    def body(self, outcome: Outcome) -> dict[str, Any]:
        transcript, asked = outcome.transcript, outcome.request.granularities
        return {
            "task": "transcribe",
            "language": transcript.language,
            "duration": verbose.seconds(transcript.duration),
            "text": transcript.text,
            "segments": verbose.segments(transcript) if Granularity.SEGMENT in asked else None,
            "words": verbose.words(transcript) if Granularity.WORD in asked else None,
            "logprobs": verbose.logprobs(transcript),
            "usage": _usage(transcript),
            "extra_fields": _extra_fields(outcome, 0),
        }

    def render_delta(self, delta: Delta, index: int) -> dict[str, Any] | None:
        if not delta.text:
            return None
        extra = {"request_type": "transcription_stream", "chunk_index": index}
        return {"type": "transcript.text.delta", "delta": delta.text, "extra_fields": extra}

    def render_done(self, outcome: Outcome, text: str, index: int) -> dict[str, Any]:
        return {
            "type": "transcript.text.done",
            "text": text,
            "usage": _usage(outcome.transcript),
            "extra_fields": _extra_fields(outcome, index) | {"request_type": "transcription_stream"},
        }


def _usage(transcript: Transcript) -> dict[str, Any]:
    return verbose.usage(transcript) | {"seconds": verbose.seconds(transcript.duration)}


def _extra_fields(outcome: Outcome, index: int) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "request_type": "transcription",
        "provider": outcome.provider,
        "model_requested": outcome.request.model,
        "model_deployment": outcome.upstream_model,
        "latency": round(outcome.latency * 1000),  # milliseconds
        "chunk_index": index,
        "cache_debug": None,
    }
    if outcome.hit is not None:
        used = {"provider_used": outcome.provider, "model_used": outcome.upstream_model}
        fields["cache_debug"] = {"cache_hit": True, "cache_id": outcome.hit, "hit_type": "direct", **used}
    if outcome.converted:
        fields["converted_to"] = outcome.converted
    if outcome.exchange is not None:
        fields |= {"raw_request": outcome.exchange.request, "raw_response": outcome.exchange.response}
    return fields
