"""OpenAI's verbose JSON: its segments and words, which other contracts show too."""

from __future__ import annotations

from typing import Any

from voxgate import languages
from voxgate.model import Segment, Transcript, Word


def segment(number: int, value: Segment) -> dict[str, Any]:
    return {
        "id": number,
        "seek": value.seek,
        "start": seconds(value.start),
        "end": seconds(value.end),
        "text": value.text,
        "tokens": list(value.tokens),
        "temperature": value.temperature,
        "avg_logprob": value.avg_logprob,
        "compression_ratio": value.compression_ratio,
        "no_speech_prob": value.no_speech_prob,
    }


def segments(transcript: Transcript) -> list[dict[str, Any]] | None:
    if transcript.segments is None:
        return None
    return [segment(number, value) for number, value in enumerate(transcript.segments)]


def word(value: Word, *, confidence: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"word": value.text, "start": seconds(value.start), "end": seconds(value.end)}
    if confidence:
        shown["confidence"] = None if value.confidence is None else round(value.confidence, 4)
    return shown


def words(transcript: Transcript, *, confidence: bool = False) -> list[dict[str, Any]] | None:
    if transcript.words is None:
        return None
    return [word(value, confidence=confidence) for value in transcript.words]


def language(code: str | None, style: str) -> str | None:
    """A language as its catalogue entry prints it: `english` (style `name`) or `en` (`code`)."""
    return languages.name(code) if code and style == "name" else code


def seconds(value: float) -> float:
    return round(value, 3)
