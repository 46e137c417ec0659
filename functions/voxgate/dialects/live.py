"""The live socket's contract, docs/live.md: a query, a client's words, and what it is told."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field as Described

from voxgate.dialects.form import FormModel, Language
from voxgate.errors import InvalidInput, VoxgateError
from voxgate.formats import verbose
from voxgate.model import Feature, Heard, Routing, Transcript, TranscriptionRequest

PATH = "/v1/stt/stream"
NAME = "live"
_SHOWN = 40


class Encoding(StrEnum):
    PCM_S16LE = "pcm_s16le"
    PCM_F32LE = "pcm_f32le"
    MULAW = "mulaw"
    ALAW = "alaw"
    OPUS = "opus"


class Word(StrEnum):
    """What a client says beside the audio."""

    FINALIZE = "finalize"
    KEEPALIVE = "keepalive"
    CLOSE = "close"


class LiveForm(FormModel):
    model_id: Annotated[str, Described(min_length=1)]
    language: Language | None = None
    encoding: Encoding = Encoding.PCM_S16LE
    sample_rate: Annotated[int, Described(ge=8000, le=48_000)] = 16_000
    channels: Annotated[int, Described(ge=1, le=8)] = 1
    interim_results: bool = True
    provider_id: str | None = None

    def request(self) -> TranscriptionRequest:
        return TranscriptionRequest(
            model=self.model_id,
            language=self.language,
            routing=Routing(provider=self.provider_id),
            required={Feature.LIVE: "model_id"},
        )


class TokenForm(FormModel):
    expires_in: Annotated[int, Described(ge=1, le=3600)] = 60


def word(text: str) -> Word:
    """Raises `InvalidInput`."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("A text message must be JSON; audio goes into binary messages.") from error
    said = body.get("type") if isinstance(body, dict) else None
    if not isinstance(said, str) or said not in tuple(Word):
        shown = f"not '{said[:_SHOWN]}'" if isinstance(said, str) else "and this message has none"
        raise InvalidInput(f"The 'type' must be {', '.join(Word)}, {shown}.", param="type")
    return Word(said)


def ready(session_id: str, form: LiveForm, provider: str, ignored: tuple[str, ...]) -> dict[str, Any]:
    return {
        "type": "ready",
        "session_id": session_id,
        "model": form.model_id,
        "provider": provider,
        **form.model_dump(mode="json", include={"language", "encoding", "sample_rate", "channels", "interim_results"}),
        **({"sample_rate": None, "channels": None} if form.encoding is Encoding.OPUS else {}),
        "ignored": list(ignored),
    }


def heard(value: Heard) -> dict[str, Any]:
    segment, text = value.segment, value.segment.text.strip()
    body = {"text": text, "start": verbose.seconds(segment.start), "end": verbose.seconds(segment.end)}
    if not value.final:
        return {"type": "partial", **body}
    transcript = Transcript(text, segment.end, words=segment.words)
    return {
        "type": "final",
        **body,
        "words": verbose.words(transcript, confidence=True),
        "confidence": verbose.probability(transcript.confidence),
    }


def account(duration: float, billed: float, money: dict[str, str]) -> dict[str, Any]:
    """What a session was, and what it cost."""
    return {
        "duration": verbose.seconds(duration),
        "usage": {"type": "duration", "seconds": verbose.seconds(billed)},
        "cost": money.get("x-voxgate-cost", "0.00"),
        **({"balance": money["x-voxgate-balance"]} if "x-voxgate-balance" in money else {}),
    }


def done(finals: list[str], language: str | None, account: dict[str, Any]) -> dict[str, Any]:
    """The finals joined; some languages have no spaces to join them with."""
    return {"type": "done", "text": ("" if language in _UNSPACED else " ").join(finals), **account}


_UNSPACED = {"zh", "yue", "ja", "th", "lo", "my", "km"}


def error(failure: VoxgateError, *, account: dict[str, Any] | None = None) -> dict[str, Any]:
    """Fatal where there is an account to give."""
    return {"type": "error", "fatal": account is not None, **failure.envelope(), **(account or {})}
