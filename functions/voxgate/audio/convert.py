"""The same speech as a file that a provider takes: 16 kHz mono, as FLAC or as Opus."""

from __future__ import annotations

from threading import Event
from typing import BinaryIO

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream

from voxgate.audio import UnusableAudio
from voxgate.audio.decode import RATE, decode
from voxgate.audio.sniff import FLAC, OGG, Container

OPUS_BITS = 24_000
TARGETS = (FLAC, OGG)  # without loss first


def convert(
    source: BinaryIO,
    container: Container,
    target: Container,
    into: BinaryIO,
    *,
    max_seconds: float,
    stop: Event | None = None,
) -> None:
    """Write the audio track of `source` into the seekable `into`, until told to stop. Raises `UnusableAudio`."""
    try:
        with av.open(into, "w", format=target.demuxer) as media:
            codec = "flac" if target == FLAC else "libopus"
            # Opus knows no 16 kHz stream of samples: its encoder wants its own 48.
            rate = RATE if target == FLAC else 48_000
            stream = media.add_stream(codec, rate=rate)
            assert isinstance(stream, AudioStream)
            stream.layout = "mono"
            if target == OGG:
                stream.bit_rate = OPUS_BITS
            written = 0
            for pcm in decode(source, container.demuxer, max_seconds=max_seconds):
                frame = AudioFrame(format="s16", layout="mono", samples=len(pcm) // 2)
                frame.planes[0].update(pcm)
                frame.sample_rate = RATE
                frame.pts = written
                written += frame.samples
                media.mux(stream.encode(frame))  # which brings it to the rate
                if stop is not None and stop.is_set():
                    break
            media.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise UnusableAudio("The audio cannot be converted for this provider.") from error
