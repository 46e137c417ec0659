"""LiteLLM's contract as Bifrost publishes it: OpenAI's form with fallbacks, and a rich body."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from voxgate.dialects.form import FormModel
from voxgate.dialects.speech_form import SpeechForm
from voxgate.formats import Body, json_body, plain_body, verbose
from voxgate.model import Delta, Granularity, Outcome, Routing, TranscriptionRequest
from voxgate.multipart import Field


class LiteLLMForm(SpeechForm):
    fallbacks: list[str] | None = None


class LiteLLMDialect:
    """Its published example asks for words with `response_format=json`, so here granularities go
    with every format, unlike OpenAI's (docs/decisions/004-litellm-granularities.md)."""

    name = "litellm"
    path = "/litellm/v1/audio/transcriptions"
    audio_field = "file"
    nullable = False
    key_header = "x-api-key"
    form: type[FormModel] = LiteLLMForm

    def parse(self, fields: tuple[Field, ...], files: tuple[str, ...]) -> TranscriptionRequest:
        form, extra = LiteLLMForm.read(fields)
        return replace(
            form.request(),
            routing=Routing(fallbacks=tuple(form.fallbacks or ())),
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
                "logprobs": verbose.logprobs(transcript),
                "usage": verbose.usage(transcript) | {"seconds": verbose.seconds(transcript.duration)},
                "extra_fields": _extra_fields(outcome, 0),
            }
        )

    def render_delta(self, delta: Delta, index: int) -> dict[str, Any] | None:
        if not delta.text:
            return None
        extra = {"request_type": "transcription_stream", "chunk_index": index}
        return {"type": "transcript.text.delta", "delta": delta.text, "extra_fields": extra}

    def render_done(self, outcome: Outcome, text: str, index: int) -> dict[str, Any]:
        transcript = outcome.transcript
        return {
            "type": "transcript.text.done",
            "text": text,
            "usage": verbose.usage(transcript) | {"seconds": verbose.seconds(transcript.duration)},
            "extra_fields": _extra_fields(outcome, index) | {"request_type": "transcription_stream"},
        }


def _extra_fields(outcome: Outcome, index: int) -> dict[str, Any]:
    return {
        "request_type": "transcription",
        "provider": outcome.provider,
        "model_requested": outcome.request.model,
        "model_deployment": outcome.upstream_model,
        "latency": round(outcome.latency * 1000),  # milliseconds
        "chunk_index": index,
        "cache_debug": _cache_debug(outcome),
        **({"converted_to": outcome.converted} if outcome.converted else {}),
        **_exchange(outcome),
    }


def _exchange(outcome: Outcome) -> dict[str, object]:
    if outcome.exchange is None:
        return {}
    return {"raw_request": outcome.exchange.request, "raw_response": outcome.exchange.response}


def _cache_debug(outcome: Outcome) -> dict[str, object] | None:
    if outcome.hit is None:
        return None
    used = {"provider_used": outcome.provider, "model_used": outcome.upstream_model}
    return {"cache_hit": True, "cache_id": outcome.hit.id, "hit_type": "direct", **used}
