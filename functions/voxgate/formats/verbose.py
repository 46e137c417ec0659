"""OpenAI's verbose JSON: its segments and words, which other contracts show too."""

from __future__ import annotations

from typing import Any

from voxgate import languages
from voxgate.model import Delta, Segment, Transcript


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
        **({} if value.speaker is None else {"speaker": value.speaker}),
    }


def segments(transcript: Transcript) -> list[dict[str, Any]] | None:
    if transcript.segments is None:
        return None
    return [segment(number, value) for number, value in enumerate(transcript.segments)]


def words(transcript: Transcript, *, confidence: bool = False) -> list[dict[str, Any]] | None:
    if transcript.words is None:
        return None
    return [
        {
            "word": word.text,
            "start": seconds(word.start),
            "end": seconds(word.end),
            **({"confidence": probability(word.confidence)} if confidence else {}),
        }
        for word in transcript.words
    ]


def diarized(transcript: Transcript) -> list[dict[str, Any]]:
    """Segments as OpenAI's diarizing models give them."""
    return [diarized_segment(number, value) for number, value in enumerate(transcript.segments or ())]


def diarized_segment(number: int, value: Segment) -> dict[str, Any]:
    return {
        "type": "transcript.text.segment",
        "id": f"seg_{number}",
        "start": seconds(value.start),
        "end": seconds(value.end),
        "speaker": value.speaker,
        "text": value.text,
    }


def logprobs(heard: Transcript | Delta) -> list[dict[str, Any]] | None:
    if heard.logprobs is None:
        return None
    return [
        {"token": p.token, "logprob": p.logprob, "bytes": None if p.bytes is None else list(p.bytes)}
        for p in heard.logprobs
    ]


def usage(transcript: Transcript) -> dict[str, Any]:
    """OpenAI's usage: in tokens where the provider counted them, else in seconds."""
    tokens = transcript.tokens
    if tokens is None:
        return {"type": "duration", "seconds": seconds(transcript.duration)}
    return {
        "type": "tokens",
        "input_tokens": tokens.input,
        "input_token_details": {"text_tokens": tokens.text, "audio_tokens": tokens.audio},
        "output_tokens": tokens.output,
        "total_tokens": tokens.input + tokens.output,
    }


def language(code: str | None, style: str) -> str | None:
    """A language as its catalogue entry prints it: `english` (style `name`) or `en` (`code`)."""
    return languages.name(code) if code and style == "name" else code


def seconds(value: float) -> float:
    return round(value, 3)


def probability(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
