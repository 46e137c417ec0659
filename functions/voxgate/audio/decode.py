"""Samples out of a file: 16 kHz, mono, signed 16-bit little-endian, a piece at a time.

Hostile files are the normal case here. Memory is bounded by one packet's frames, and time by
`max_seconds` of decoded audio, whatever a header claims.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Protocol

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer

from voxgate.audio import NoAudio, UnusableAudio

RATE = 16_000
BYTES_PER_SECOND = RATE * 2
_UNREADABLE = "The audio cannot be decoded: the file is damaged, cut off, or not what its first bytes say."


class Pipe(Protocol):
    """What is read from its start to its end as it comes, and cannot be gone back in."""

    def read(self, size: int) -> bytes: ...


@contextmanager
def opened(source: str | BinaryIO | Pipe, demuxer: str) -> Iterator[tuple[InputContainer, AudioStream]]:
    """The file, from its start, and its audio track, read by the demuxer of that name and no other.

    Raises `UnusableAudio`, also for what FFmpeg reports while the file is in use.
    """
    # No protocol but plain files: a QuickTime reference must not make us fetch an address.
    options = {"protocol_whitelist": "file"}
    if hasattr(source, "seek"):
        source.seek(0)
    elif not isinstance(source, str):
        options |= {"probesize": "32", "analyzeduration": "0"}  # else it reads seconds ahead
    try:
        with av.open(source, "r", format=demuxer, options=options, metadata_errors="ignore") as container:
            stream = container.streams.best("audio")
            if not isinstance(stream, AudioStream):
                raise UnusableAudio("The file has no audio track.")
            if stream.codec_context is None:
                raise UnusableAudio("The file's audio track uses a codec that is not supported here.")
            yield container, stream
    except av.FFmpegError as error:
        raise UnusableAudio(_UNREADABLE) from error


def decode(source: str | BinaryIO | Pipe, demuxer: str, *, max_seconds: float) -> Iterator[bytes]:
    """Yield the audio track's samples. Raises `UnusableAudio` for a file that has none, that is
    damaged beyond use, or that lasts longer than `max_seconds`."""
    left = max_seconds * BYTES_PER_SECOND
    with opened(source, demuxer) as (container, stream):
        for pcm in _resampled(_frames(container, stream)):
            left -= len(pcm)
            if left < 0:
                raise UnusableAudio(f"The audio is longer than {max_seconds:g} seconds: send it in parts.")
            yield pcm


def _frames(container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
    good = bad = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            bad += 1  # one damaged packet costs its own 20 ms, as in any player
            continue
        good += len(frames)
        yield from frames
    if bad > good:
        raise UnusableAudio(_UNREADABLE)
    if not good:
        raise NoAudio("The file holds no audio.")


def _resampled(frames: Iterator[AudioFrame]) -> Iterator[bytes]:
    shape = resampler = None
    for frame in frames:
        # Joined recordings change their rate or channels on the way.
        if shape != (shape := (frame.format.name, frame.layout.name, frame.sample_rate)):
            yield from samples(resampler, None)
            resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
        yield from samples(resampler, frame)
    yield from samples(resampler, None)


def samples(resampler: av.AudioResampler | None, frame: AudioFrame | None) -> Iterator[bytes]:
    for piece in resampler.resample(frame) if resampler else ():
        yield bytes(piece.planes[0])[: piece.samples * 2]
