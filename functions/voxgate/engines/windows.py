"""Speech as Whisper takes it: windows of at most thirty seconds without the silence in between, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxgate.audio.decode import RATE

Samples = NDArray[np.float32]
Spans = list[tuple[int, int]]
LONGEST = 30 * RATE
_BLOCK = 60 * RATE  # in which speech is looked for at a time
_FIRST = 30 * RATE  # and in the first place, so that there is soon something to do
_OPEN = RATE // 2  # speech that ends so near the end of a block may go on
_WEAK = RATE  # and may have begun in so much of it without being found
_SNAP = RATE // 5  # silence around speech: a time in it is the border's


@dataclass(frozen=True, slots=True)
class Window:
    """`pieces` are where in the recording its samples are from: their first there, and how many."""

    samples: Samples
    pieces: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return sum(count for _, count in self.pieces)

    @property
    def seconds(self) -> float:
        return self.size / RATE

    @property
    def start(self) -> float:
        return self.pieces[0][0] / RATE

    def at(self, seconds: float, *, end: bool = False) -> float:
        """When in the recording that was. Near where two pieces meet, an `end` is the end of the first, and a start
        that of the second: a pause may lie between them."""
        sample = min(max(round(seconds * RATE), 0), self.size)
        for first, count in self.pieces[:-1]:
            near = min(_SNAP, count // 2)
            if sample < count + near if end else sample < count - near:
                return (first + min(max(sample, 0), count)) / RATE
            sample -= count
        first, count = self.pieces[-1]
        return (first + min(max(sample, 0), count)) / RATE


def windows(pcm: Iterable[bytes], speech: Callable[[Samples], Spans]) -> Iterator[Window | float]:
    """Of mono 16 kHz signed 16-bit little-endian samples; now and then how many seconds are in windows or
    in silence, and not to come. `speech` finds where there is any: in order, none longer than a window."""
    packed = _Packed()
    parts: list[Samples] = []
    size, offset, block = 0, 0, _FIRST
    for chunk in pcm:
        parts.append(floats(chunk))
        size += len(parts[-1])
        if size >= block:
            samples, block = np.concatenate(parts), _BLOCK
            spans = speech(samples)
            # What goes on is looked at again, with what follows; but it is never all of the block.
            if spans and spans[-1][1] > size - _OPEN and spans[-1][0] > 0:
                cut = spans.pop()[0]
            else:
                cut = max(spans[-1][1] if spans else 0, size - _WEAK)
            yield from packed.add(samples, spans, offset)
            parts, size, offset = [samples[cut:]], size - cut, offset + cut
            yield (offset - packed.size) / RATE
    if size:
        samples = np.concatenate(parts)
        yield from packed.add(samples, speech(samples), offset)
    yield from packed.rest()


def floats(pcm: bytes) -> Samples:
    """Whole signed 16-bit little-endian samples, as Whisper takes them."""
    return np.frombuffer(pcm, "<i2").astype(np.float32) / np.float32(32768)


class _Packed:
    """Speech that waits for its window to be full."""

    def __init__(self) -> None:
        self._samples: list[Samples] = []
        self._pieces: list[tuple[int, int]] = []
        self.size = 0

    def add(self, samples: Samples, spans: Spans, offset: int) -> Iterator[Window]:
        for start, end in spans:
            if self.size + end - start > LONGEST:
                yield from self.rest()
            self._samples.append(samples[start:end].copy())  # and not a view, which would keep the block
            self._pieces.append((offset + start, end - start))
            self.size += end - start

    def rest(self) -> Iterator[Window]:
        if self._pieces:
            yield Window(np.concatenate(self._samples), tuple(self._pieces))
            self._samples, self._pieces, self.size = [], [], 0
