"""Subtitles. SRT has no standard beyond its players; VTT is https://www.w3.org/TR/webvtt1/."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from voxgate.model import Segment, Transcript


@dataclass(frozen=True, slots=True)
class Cue:
    """One subtitle: its times in whole milliseconds and its text on one line."""

    start: int
    end: int
    text: str


def cues(transcript: Transcript) -> Iterator[Cue]:
    """The cues of a transcript, in order: none is empty, none overlaps the one before it."""
    segments = transcript.segments
    if segments is None:  # the provider gave no times: one cue for the whole
        segments = (Segment(0.0, transcript.duration, transcript.text),)
    earliest = 0
    for segment in segments:
        # A line break would end the cue early; so would the separators that split() also folds.
        text = " ".join(segment.text.replace("\0", "").split())
        if not text:
            continue
        start = max(_milliseconds(segment.start), earliest)
        end = max(_milliseconds(segment.end), start + 1)
        yield Cue(start, end, text)
        earliest = end


def srt(transcript: Transcript) -> str:
    # SRT has no escapes, so an arrow in the text becomes another arrow.
    blocks = (
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{cue.text.replace('-->', '→')}\n"
        for number, cue in enumerate(cues(transcript), start=1)
    )
    return "\n".join(blocks)


def vtt(transcript: Transcript) -> str:
    blocks = [f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{_escape(cue.text)}\n" for cue in cues(transcript)]
    return "\n".join(["WEBVTT\n", *blocks])


def _milliseconds(seconds: float) -> int:
    return max(int(seconds * 1000 + 0.5), 0)


def _clock(milliseconds: int, point: str) -> str:
    # From whole milliseconds, so that 59.9996 s has already become a minute.
    seconds, thousandths = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{thousandths:03d}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
