"""What turns audio into a transcript, on this machine or on another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from voxgate.audio.sniff import Container
from voxgate.catalog import Deployment
from voxgate.model import Capabilities, Delta, Exchange, Heard, Transcript, TranscriptionRequest
from voxgate.receive import Upload

# Whoever reads an extension (many do, and refuse what they do not know) gets one that fits.
_EXTENSIONS = {"aac": "m4a"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One attempt: the request, who is to serve it, and the audio, which lasts `duration` seconds.
    `reference` is where the audio is staged, for a provider that fetches it by itself; `exchange` takes
    down what is said, for those who may see that. `heard` is to be told the transcript's pieces as they are
    made, by a provider that makes pieces. `left` is the seconds after which nobody waits for it any more."""

    request: TranscriptionRequest
    deployment: Deployment
    audio: Upload
    container: Container
    duration: float
    reference: str | None = None
    exchange: Exchange | None = None
    heard: Callable[[Delta], Awaitable[None]] | None = None
    left: float = 600.0

    @property
    def file_name(self) -> str:
        return f"audio.{_EXTENSIONS.get(self.container.name, self.container.name)}"


@dataclass(frozen=True, slots=True)
class Ask:
    """What live speech is to be heard as; `interim` texts are wanted or not."""

    deployment: Deployment
    language: str | None
    interim: bool


class LiveEngine(Protocol):
    """A recognizer at work on one session. It takes mono 16 kHz signed 16-bit little-endian samples, and is
    slower to take more where it has enough to do. All raise `ProviderError` once it is lost."""

    async def feed(self, pcm: bytes) -> None: ...

    async def finalize(self) -> None:
        """Ends the utterance here."""

    async def end(self) -> None:
        """That was all: `heard` ends with what is left."""

    def heard(self) -> AsyncIterator[Heard]: ...

    async def aclose(self) -> None: ...


class Provider(Protocol):
    """`transcribe` and `listen` raise `ProviderError`, whose class says what the failure means, or `Overloaded`
    where its queue is full."""

    async def capabilities(self, model: str) -> Capabilities | None:
        """What a model of its own can do; None where the catalogue says."""

    async def transcribe(self, call: Call) -> Transcript: ...

    async def listen(self, ask: Ask) -> LiveEngine: ...

    async def close(self) -> None: ...
