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
    before: deque[_Frame] = deque(maxlen=MARGIN + ONSET_WINDOW)
    region: list[_Frame] = []
    silence = 0  # unvoiced frames at the region's end
    count = 0
    for frame in _frames(pcm):
        count += 1
        if not region:
            before.append(frame)
            recent = list(before)[-ONSET_WINDOW:]
            if sum(f.voiced for f in recent) >= ONSET_VOICED:
                region, silence = list(before), 0
                before.clear()
            continue
        region.append(frame)
        silence = 0 if frame.voiced else silence + 1
        if silence >= HANGOVER:
            keep = len(region) - silence + MARGIN
            yield _region(count - len(region), region[:keep])
            before.extend(region[keep:])
            region = []
        elif len(region) >= LONGEST:
            cut = _quietest(region)
            yield _region(count - len(region), region[:cut])
            region = region[cut:]
    if region:
        yield _region(count - len(region), region)


def _region(first: int, frames: list[_Frame]) -> Region:
    return Region(first * FRAME_SECONDS, b"".join(f.pcm for f in frames), tuple(f.level for f in frames))


def _quietest(frames: list[_Frame]) -> int:
    """The middle of the quietest span in the second half, the last of equals."""
    spans = range(len(frames) // 2, len(frames) - QUIET_SPAN)
    return QUIET_SPAN // 2 + max(
        spans, key=lambda i: (-sum(10 ** (f.level / 10) for f in frames[i : i + QUIET_SPAN]), i)
    )


def _frames(pcm: Iterable[bytes]) -> Iterator[_Frame]:
    vad = Vad(Vad.MEDIUM_STRICT, RATE, FRAME_SECONDS)
    rest = b""
    for chunk in pcm:
        rest += chunk
        whole = len(rest) - len(rest) % FRAME_BYTES
        for at in range(0, whole, FRAME_BYTES):
            yield _frame(vad, rest[at : at + FRAME_BYTES])
        rest = rest[whole:]
    if rest:
        # Less than a frame: completed with silence, so that a word's last sound is not lost.
        yield _frame(vad, rest.ljust(FRAME_BYTES, b"\0"))


def _frame(vad: Vad, pcm: bytes) -> _Frame:
    samples = array("h", pcm)
    power = sum(map(mul, samples, samples)) / len(samples)
    return _Frame(pcm, vad.is_speech(pcm), 10 * math.log10(power + 1))
