"""Pocketsphinx: English on any processor, with a model that comes inside its package.

It is here so that a fresh installation transcribes without a download or an account. It is a
recognizer of its time: good on clear speech, poor in noise, and mostly silent there.
Music with rests in it can draw words out of it.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pocketsphinx import Decoder

from voxgate.audio.decode import RATE, decode
from voxgate.engines import Job, Recognition
from voxgate.engines.voice import Region, Regions, regions
from voxgate.model import Capabilities, Feature, Heard, Segment, Word

_DECODER_FRAME_SECONDS = 0.01
# A third of the default number of states alive at once: as many words are right. With 5,000
# two more words in a hundred are wrong at telephone quality.
_MOST_STATES = 10_000
# What is said is shown while it is said by a second one that is twice as quick: no second pass, each other frame.
_QUICK = {"maxhmmpf": 3_000, "ds": 2, "fwdflat": False, "bestpath": False}
_PARTIAL_BYTES = RATE  # half a second, in which a partial is renewed
_SILENCE = 1.0  # seconds, of which word is given
_VARIANT = re.compile(r"\(\d+\)$")

# What tells speech from sounds that a voice activity detector takes for it. Measured on read speech
# (clean, 30 dB down, Opus at 8 kbit/s) and on noise, tones, sweeps, sirens and plucked music.
#
# Speech rises and falls by 30 dB and more (14 dB under noise 10 dB below it); steady noise, tones,
# sweeps and held chords stay within 8 dB. It spares most of them the decoder, where they are slow.
_LEAST_SPREAD_DB = 12.0
# From here on only the tests of length and filler apply: those of fit and confidence, which tell music
# without rests (under 20 dB) from speech, also refuse half of the correct words at telephone quality (over 30 dB).
_WIDE_SPREAD_DB = 25.0
# Seconds that a word lasts on average: at most 0.4 in sentences and 0.7 alone. Pulsing noise
# becomes single words of 0.9 s and more.
_LONGEST_MEAN_WORD = 0.75
# Share of the sound that the decoder itself explains as noise ([SPEECH], [NOISE]): at most 0.05 in
# clean speech, up to 0.8 in music.
_MOST_FILLER = 0.25
# Natural logarithm, per frame, of how far the words are from the best sounds: -1.8 to -3.7 in
# speech, below -4 in most of what is not.
_LEAST_FIT = -4.2
# Posterior of the words, weighted by duration: 0.7 and more in nine of ten clean sentences, below 0.45
# in all but one of the pieces of music that passed every other test.
_LEAST_CONFIDENCE = 0.45


@dataclass(frozen=True, slots=True)
class _Piece:
    """One entry of the decoder's answer; `fit` is the logarithm of its acoustic score."""

    word: str
    first: int
    frames: int
    confidence: float
    fit: float

    @property
    def spoken(self) -> bool:
        return self.word[0] not in "<[+"


class SphinxEngine:
    """Recognizes English. One instance serves one job at a time."""

    name = "sphinx"
    capabilities = Capabilities(languages=frozenset({"en"}), features=frozenset({Feature.WORDS, Feature.LIVE}))

    def __init__(self) -> None:
        self._decoder = Decoder(loglevel="FATAL", maxhmmpf=_MOST_STATES)
        self._quick: Decoder | None = None

    def transcribe(self, job: Job) -> Recognition:
        return Recognition("en", self.recognize(decode(job.path, job.container, max_seconds=job.max_seconds)))

    def recognize(self, pcm: Iterable[bytes]) -> Iterator[Segment]:
        """The speech in mono 16 kHz signed 16-bit little-endian samples, one segment for each stretch
        between pauses, as soon as it has ended. Chunks may be split anywhere, within samples too."""
        lead = ""
        for region in regions(pcm):
            if (segment := self.understand(region, lead)) is not None:
                yield segment
                lead = " "  # each further text brings its own space, as Whisper's do

    def listen(self, language: str | None, *, interim: bool) -> _Listening:
        if interim and self._quick is None:
            self._quick = Decoder(loglevel="FATAL", **_QUICK)
        return _Listening(self, self._quick if interim else None)

    def understand(self, region: Region, lead: str = "") -> Segment | None:
        """What is said there, if that is speech."""
        spread = _spread(region)
        if spread < _LEAST_SPREAD_DB:
            return None
        pieces = self._decode(region.pcm)
        return _segment(region, pieces, lead) if _is_speech(pieces, sure=spread >= _WIDE_SPREAD_DB) else None

    def _decode(self, pcm: bytes) -> list[_Piece]:
        # Only this resets the tracked noise (30 microseconds); resetting the cepstral mean does not.
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        try:
            # Given whole, a region is normalized by its own mean, and fewer words are wrong than live
            # (6 % against 7 %, 4-second sentences).
            self._decoder.process_raw(pcm, full_utt=True)
        finally:
            self._decoder.end_utt()
        if self._decoder.hyp() is None:
            return []
        return [
            _Piece(
                s.word, s.start_frame, s.end_frame - s.start_frame + 1, min(s.prob, 1.0), math.log(s.ascore or 5e-324)
            )
            for s in self._decoder.seg()
        ]


class _Listening:
    """Implements `Listening`: a final is what `recognize` makes of the same stretch."""

    def __init__(self, engine: SphinxEngine, quick: Decoder | None) -> None:
        self._engine = engine
        self._quick = quick
        self._regions = Regions()
        self._ended: deque[Region] = deque()
        self._showing: float | None = None  # where the region starts that the quick decoder hears
        self._shown = 0  # bytes of it
        self._silent_until = 0.0

    def push(self, pcm: bytes) -> None:
        self._ended.extend(self._regions.push(pcm))

    def finalize(self) -> None:
        self._ended.extend(self._regions.cut())

    def end(self) -> None:
        self._ended.extend(self._regions.end())

    def step(self) -> Iterator[Heard]:
        while self._ended:
            region = self._ended.popleft()
            if self._showing == region.start:
                self._hide()
            end = region.start + len(region.pcm) / (2 * RATE)
            yield Heard(self._engine.understand(region) or Segment(region.start, end, ""), final=True)
        begun = self._regions.begun
        if begun is None and self._regions.silent_until >= self._silent_until + _SILENCE:
            self._silent_until = self._regions.silent_until
            yield Heard(Segment(self._silent_until, self._silent_until, ""), final=True)
        elif begun is not None and self._quick is not None and len(begun.pcm) >= self._shown + _PARTIAL_BYTES:
            yield from self._partial(self._quick, begun)

    def _partial(self, quick: Decoder, region: Region) -> Iterator[Heard]:
        if self._showing != region.start:
            self._hide()
            quick.reinit_feat()
            quick.start_utt()
            self._showing = region.start
        quick.process_raw(region.pcm[self._shown :])
        self._shown = len(region.pcm)
        said = quick.hyp()
        if said is not None and said.hypstr and _spread(region) >= _LEAST_SPREAD_DB:
            yield Heard(Segment(region.start, region.start + self._shown / (2 * RATE), said.hypstr), final=False)

    def close(self) -> None:
        self._hide()

    def _hide(self) -> None:
        if self._quick is not None and self._showing is not None:
            self._quick.end_utt()
        self._showing, self._shown = None, 0


def _spread(region: Region) -> float:
    """How far, in decibels, the loud frames are above the quiet ones."""
    levels = sorted(region.levels)
    last = len(levels) - 1
    return levels[last * 95 // 100] - levels[last // 10]


def _is_speech(pieces: list[_Piece], *, sure: bool) -> bool:
    words = [p for p in pieces if p.spoken]
    frames = sum(p.frames for p in words)
    if not frames:
        return False
    filler = sum(p.frames for p in pieces if p.word[0] in "[+")
    if frames * _DECODER_FRAME_SECONDS > _LONGEST_MEAN_WORD * len(words) or filler > _MOST_FILLER * (frames + filler):
        return False
    return sure or (
        sum(p.fit for p in words) >= _LEAST_FIT * frames
        and sum(p.confidence * p.frames for p in words) >= _LEAST_CONFIDENCE * frames
    )


def _segment(region: Region, pieces: list[_Piece], lead: str) -> Segment:
    end = region.start + len(region.pcm) / (2 * RATE)  # the last frame may reach over it
    words = tuple(
        Word(
            _VARIANT.sub("", p.word),
            round(region.start + p.first * _DECODER_FRAME_SECONDS, 2),
            round(min(region.start + (p.first + p.frames) * _DECODER_FRAME_SECONDS, end), 3),
            round(p.confidence, 4),
        )
        for p in pieces
        if p.spoken
    )
    return Segment(words[0].start, words[-1].end, lead + " ".join(w.text for w in words), words)
