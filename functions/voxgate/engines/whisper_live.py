"""Whisper on live speech: a window that slides from utterance to utterance, whose ends Silero's detector finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from voxgate.audio.decode import RATE
from voxgate.engines.windows import Samples, Spans, floats
from voxgate.model import Heard, Segment

# The language that was heard, and the utterance; words only where they are wanted.
Understand = Callable[[Samples, str | None, bool], tuple[str | None, Segment | None]]

_LOOK = RATE // 2  # new samples after which it is looked for speech again
_PARTIAL = RATE  # new samples after which a partial is renewed
_PAUSE_SECONDS = 0.6  # of silence, which end an utterance
_LONGEST = 28 * RATE  # Whisper's window is thirty seconds
_SEARCH = 5 * RATE  # in which a longer one is cut where it is quietest
_MARGIN = RATE // 2  # of silence that is kept, for a weak onset
_TENTH = RATE // 10


class Detector(Protocol):
    def __call__(self, samples: Samples, *, pause: float) -> Spans: ...


class WhisperListening:
    """Implements `Listening`."""

    def __init__(self, understand: Understand, speech: Detector, language: str | None, *, interim: bool) -> None:
        self._understand = understand
        self._speech = speech
        self._language = language
        self._interim = interim
        self._samples = np.empty(0, np.float32)
        self._from = 0  # the number of their first
        self._looked = self._shown = 0  # samples of them that were there the last time
        self._cuts: list[int] = []

    def push(self, pcm: bytes) -> None:
        self._samples = np.concatenate([self._samples, floats(pcm)])

    def finalize(self) -> None:
        self._cuts.append(self._from + len(self._samples))

    def end(self) -> None:
        self.finalize()

    def close(self) -> None:
        self._samples = self._samples[:0]

    def step(self) -> Iterator[Heard]:
        while self._cuts:
            yield from self._look(self._cuts.pop(0) - self._from)
        while len(self._samples) >= self._looked + _LOOK:
            yield from self._look(None)

    def _look(self, cut: int | None) -> Iterator[Heard]:
        """At all that is there, or up to a cut, at which everything ends."""
        window = self._samples[: min(_LONGEST, len(self._samples) if cut is None else cut)]
        whole = cut is not None and len(window) == cut
        self._looked = len(window)
        spans = self._speech(window, pause=_PAUSE_SECONDS) if len(window) else []
        done = 0
        while spans and (whole or len(spans) > 1 or spans[0][1] + _PAUSE_SECONDS * RATE <= len(window)):
            start, done = spans.pop(0)
            yield self._final(start, done)
        if not spans:
            done = len(window) if whole else max(len(window) - _MARGIN, done)
            yield Heard(Segment(self._at(done), self._at(done), ""), final=True)
        elif len(window) == _LONGEST:
            start, done = spans[0][0], _quietest(window)
            if start < done:
                yield self._final(start, done)
        elif self._interim and cut is None and len(window) >= self._shown + _PARTIAL:
            self._shown = len(window)
            heard = self._understand(window[spans[0][0] :], self._language, False)[1]
            if heard is not None:
                yield Heard(heard.moved(self._at(spans[0][0])), final=False)
        self._drop(done)
        if cut is not None and not whole:
            yield from self._look(cut - done)

    def _final(self, start: int, end: int) -> Heard:
        language, heard = self._understand(self._samples[start:end], self._language, True)
        self._language = self._language or language  # once, so that it does not change from sentence to sentence
        if heard is None:
            return Heard(Segment(self._at(end), self._at(end), ""), final=True)
        return Heard(heard.moved(self._at(start)), final=True)

    def _at(self, sample: int) -> float:
        return (self._from + sample) / RATE

    def _drop(self, count: int) -> None:
        self._samples = self._samples[count:]
        self._from += count
        self._looked, self._shown = max(self._looked - count, 0), max(self._shown - count, 0) if count else self._shown


def _quietest(samples: Samples) -> int:
    """The middle of the quietest tenth of a second near their end."""
    tail = samples[-_SEARCH:]
    tenths = tail[: len(tail) // _TENTH * _TENTH].reshape(-1, _TENTH)
    quietest = int(np.argmin((tenths**2).mean(axis=1)))
    return len(samples) - len(tail) + quietest * _TENTH + _TENTH // 2
