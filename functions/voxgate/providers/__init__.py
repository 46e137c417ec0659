"""What turns audio into a transcript, on this machine or on another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from voxgate.audio.sniff import Container
from voxgate.model import Capabilities, Transcript, TranscriptionRequest
from voxgate.receive import Upload


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One attempt: the request, the provider's own name for the model, and the audio, which
    lasts `duration` seconds."""

    request: TranscriptionRequest
    upstream_model: str
    audio: Upload
    container: Container
    duration: float


class Provider(Protocol):
    """`transcribe` raises `ProviderError`, whose class says what the failure means, or
    `Overloaded` where its queue is full."""

    async def capabilities(self) -> Capabilities: ...

    async def transcribe(self, call: Call) -> Transcript: ...

    async def close(self) -> None: ...
