"""Where a recording may hold speech: stretches of sound cut at pauses, streamed.

PCM here is mono, 16 kHz, signed 16-bit little endian, as `voxgate.audio.decode` gives it.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import mul

from pocketsphinx import Vad

RATE = 16_000
FRAME_SECONDS = 0.03  # the longest that WebRTC's detector takes
FRAME_BYTES = 960
# Four voiced frames in six open a region: "yes" has ten, a click has one or two.
ONSET_WINDOW, ONSET_VOICED = 6, 4
# 0.45 s without a voiced frame close it; shorter gaps are stops and hesitations within a sentence.
HANGOVER = 15
# Sound kept on both sides. The detector misses weak onsets ("f", "th"), and the decoder wants some silence.
MARGIN = 8
# A region is decoded in calls that nothing can interrupt, so it is cut at 9.6 s at the latest, at the
# quietest place of its second half.
LONGEST = 320
QUIET_SPAN = 4


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch that may be speech. `start` is in seconds from the start of the audio, `levels`
    holds each frame's power in decibels (of one bit's step)."""

    start: float
    pcm: bytes
    levels: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Frame:
    pcm: bytes
    voiced: bool
    level: float


def regions(pcm: Iterable[bytes]) -> Iterator[Region]:
    """The stretches that a voice activity detector takes for speech, in order, none overlapping.
    They depend on the samples only, not on how these are split into chunks."""
    cutter = Regions()
    for chunk in pcm:
        yield from cutter.push(chunk)
    yield from cutter.end()


class Regions:
    """The same of audio that is still being spoken."""

    def __init__(self) -> None:
        self._vad = Vad(Vad.MEDIUM_STRICT, RATE, FRAME_SECONDS)
        self._rest = b""
        self._before: deque[_Frame] = deque(maxlen=MARGIN + ONSET_WINDOW)
        self._region: list[_Frame] = []
        self._silence = 0  # unvoiced frames at the region's end
        self._count = 0

    @property
    def silent_until(self) -> float:
        """Where no region that is still to come can begin before; in seconds."""
        return max(self._count - MARGIN - ONSET_WINDOW, 0) * FRAME_SECONDS

    @property
    def begun(self) -> Region | None:
        """The region that has not ended yet."""
        return self._of(self._region) if self._region else None

    def push(self, pcm: bytes) -> Iterator[Region]:
        pcm = self._rest + pcm
        whole = len(pcm) - len(pcm) % FRAME_BYTES
        self._rest = pcm[whole:]
        for at in range(0, whole, FRAME_BYTES):
            if (region := self._take(pcm[at : at + FRAME_BYTES])) is not None:
                yield region

    def cut(self) -> Iterator[Region]:
        """Ends the region that has begun."""
        if self._region:
            yield self._of(self._region)
            self._region = []

    def end(self) -> Iterator[Region]:
        """That was all. What is less than a frame is completed with silence, so that a word's last sound
        is not lost."""
        if self._rest:
            yield from self.push(bytes(FRAME_BYTES - len(self._rest)))
        yield from self.cut()

    def _take(self, pcm: bytes) -> Region | None:
        frame = _frame(self._vad, pcm)
        self._count += 1
        if not self._region:
            self._before.append(frame)
            recent = list(self._before)[-ONSET_WINDOW:]
            if sum(f.voiced for f in recent) >= ONSET_VOICED:
                self._region, self._silence = list(self._before), 0
                self._before.clear()
            return None
        self._region.append(frame)
        self._silence = 0 if frame.voiced else self._silence + 1
        if self._silence >= HANGOVER:
            keep = len(self._region) - self._silence + MARGIN
            region = self._of(self._region, keep)
            self._before.extend(self._region[keep:])
            self._region = []
            return region
        if len(self._region) >= LONGEST:
            keep = _quietest(self._region)
            region = self._of(self._region, keep)
            self._region = self._region[keep:]
            return region
        return None

    def _of(self, frames: list[_Frame], keep: int | None = None) -> Region:
        kept, first = frames[:keep], self._count - len(frames)
        return Region(first * FRAME_SECONDS, b"".join(f.pcm for f in kept), tuple(f.level for f in kept))


def _quietest(frames: list[_Frame]) -> int:
    """The middle of the quietest span in the second half, the last of equals."""
    spans = range(len(frames) // 2, len(frames) - QUIET_SPAN)
    return QUIET_SPAN // 2 + max(
        spans, key=lambda i: (-sum(10 ** (f.level / 10) for f in frames[i : i + QUIET_SPAN]), i)
    )


def _frame(vad: Vad, pcm: bytes) -> _Frame:
    samples = array("h", pcm)
    power = sum(map(mul, samples, samples)) / len(samples)
    return _Frame(pcm, vad.is_speech(pcm), 10 * math.log10(power + 1))
