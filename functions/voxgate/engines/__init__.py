"""Speech recognizers that run on this machine, each inside a worker process of its own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from voxgate.model import Capabilities, Heard, Segment

if TYPE_CHECKING:
    from voxgate.engines.admission import Admission
    from voxgate.engines.live import LivePool
    from voxgate.engines.process import EngineInfo, Told

WINDOW_SECONDS = 30.0


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
    model: str = ""  # of several; any other name is the first
    seconds: float = 0.0  # that it lasts
    left: float = 600.0  # seconds in which it is wanted
    priority: str = "interactive"


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
    """A recognizer that does one thing at a time. `transcribe` decodes the job's audio and raises `UnusableAudio`
    where that fails. Joined as they are, the segments' texts are the whole text."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def transcribe(self, job: Job) -> Recognition: ...

    def listen(self, language: str | None, *, interim: bool) -> Listening: ...


def window_count(seconds: float) -> int:
    """How many of Whisper's so many seconds of audio take; a shorter one costs the same."""
    return max(math.ceil(seconds / WINDOW_SECONDS), 1)


def told(can: Capabilities) -> dict[str, Any]:
    """As a process says it."""
    return {"languages": None if can.languages is None else sorted(can.languages), "features": sorted(can.features)}


class Pool(Protocol):
    """Engines at work for this machine's requests."""

    live: LivePool
    admission: Admission

    @property
    def failed(self) -> bool:
        """Whether the last start came to nothing."""

    @property
    def ready(self) -> bool: ...

    def begin(self) -> asyncio.Task[EngineInfo]:
        """Begin to start, or begin again after a failure, without waiting for it."""

    async def start(self) -> EngineInfo:
        """Start unless it runs, and say what it is. Raises `ProviderError`."""

    async def recognize(self, job: Job, heard: Told | None = None) -> tuple[str | None, tuple[Segment, ...]]:
        """The language heard and the segments, each of which `heard` is told as it is made. Raises
        `Overloaded`, or `ProviderError` of class CALLER_FAULT for unusable audio and TRANSIENT for an
        engine that failed. Cancelling this call stops the engine."""

    async def close(self) -> None: ...
