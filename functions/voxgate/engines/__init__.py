"""Speech recognizers that run on this machine, each inside a worker process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from voxgate.model import Capabilities, Heard, Segment


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


class Listening(Protocol):
    """Speech that is recognized while it is spoken: mono 16 kHz signed 16-bit little-endian samples, in chunks
    of whole ones. `push`, `finalize` and `end` only take note, and `step` does the work: a final for each
    utterance that has ended since, and a partial of one that goes on, where these are wanted."""

    def push(self, pcm: bytes) -> None: ...

    def finalize(self) -> None:
        """Ends the utterance here."""

    def end(self) -> None:
        """That was all."""

    def step(self) -> Iterator[Heard]: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """A recognizer. `transcribe` decodes the job's audio and raises `UnusableAudio` where that
    fails. Joined as they are, the segments' texts are the whole text. `sessions` of live speech are
    understood at once."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def sessions(self) -> int: ...

    def transcribe(self, job: Job) -> Recognition: ...

    def listen(self, language: str | None, *, interim: bool) -> Listening: ...
