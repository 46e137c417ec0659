"""Speech recognizers that run on this machine, each inside a worker process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from voxgate.model import Capabilities, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One recording to recognize. `path` is a readable file of the `container` that was sniffed
    (a demuxer's name, see `voxgate.audio.sniff`), `max_seconds` the longest that may be decoded."""

    path: str
    container: str
    max_seconds: float
    language: str | None = None
    prompt: str | None = None
    temperature: float | None = None
    words: bool = False
    translate: bool = False  # into English
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recognition:
    """What an engine hears: the language's ISO 639 code, known before the first segment, and the
    segments in order, made as they are asked for."""

    language: str | None
    segments: Iterator[Segment]


class Engine(Protocol):
    """A recognizer. `transcribe` decodes the job's audio and raises `UnusableAudio` where that
    fails. Joined as they are, the segments' texts are the whole text."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def transcribe(self, job: Job) -> Recognition: ...
