"""Whisper by faster-whisper and CTranslate2: used where VOXGATE_WHISPER_MODEL names a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.transcribe import Segment as WhisperSegment

from voxgate import languages
from voxgate.audio.decode import RATE, decode
from voxgate.engines import Job, Recognition
from voxgate.engines.whisper_live import Samples, WhisperListening
from voxgate.model import Capabilities, Feature, Segment, Word

# Whisper's features of four hours would be gigabytes, so the audio is worked through in pieces,
# each cut at the quietest tenth of a second near its end.
_PIECE = 600 * RATE
_SEARCH = 15 * RATE
_TENTH = RATE // 10
# Whisper's own codes where they are not ISO 639-1's (`languages.parse` reads them back).
_THEIRS = {"jv": "jw", "nb": "no"}
# The method is Whisper's own: sample hotter while the text repeats itself or is improbable.
_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


_FEATURES = frozenset(
    {
        *(Feature.WORDS, Feature.SEGMENTS, Feature.PROMPT, Feature.TEMPERATURE, Feature.LANGUAGE),
        *(Feature.KEYWORDS, Feature.LIVE),
    }
)


class WhisperEngine:
    """Implements `Engine`. `model` is a CTranslate2 model's directory or a hub name; `device` and
    `compute_type` are CTranslate2's."""

    sessions = 16

    def __init__(self, *, model: str, device: str = "auto", compute_type: str = "default") -> None:
        self.name = model.rstrip("/").rsplit("/", 1)[-1]
        self._model = WhisperModel(model, device=device, compute_type=compute_type)
        # The list is of all Whisper models'; which of them this one knows, its vocabulary says.
        known = self._model.hf_tokenizer.token_to_id
        listed = self._model.supported_languages
        theirs = [code for code in listed if len(listed) == 1 or known(f"<|{code}|>") is not None]
        codes = {languages.parse(code) or code for code in theirs}
        self.capabilities = Capabilities(
            languages=frozenset(codes | {ours for ours, code in _THEIRS.items() if code in theirs}),
            features=_FEATURES | ({Feature.TRANSLATION} if len(listed) > 1 else set()),
        )

    def transcribe(self, job: Job) -> Recognition:
        pieces = _pieces(decode(job.path, job.container, max_seconds=job.max_seconds))
        language = _THEIRS.get(job.language or "", job.language)
        first = next(pieces, None)
        if first is None:
            return Recognition(job.language, iter(()))
        found, heard = self._piece(first, job, language)
        code = job.language or (languages.parse(found) if found else None)
        return Recognition(code, self._all(heard, pieces, job, language or found))

    def listen(self, language: str | None, *, interim: bool) -> WhisperListening:
        return WhisperListening(self._utterance, _quietest, language, interim=interim)

    def _utterance(self, samples: Samples, language: str | None, words: bool) -> tuple[str | None, Segment | None]:
        segments, info = self._model.transcribe(
            samples,
            language=_THEIRS.get(language or "", language),
            temperature=_TEMPERATURES if words else 0.0,
            beam_size=5 if words else 1,
            word_timestamps=words,
            condition_on_previous_text=False,
        )
        heard = list(_segments(segments, 0.0, len(samples) / RATE))
        if not heard:
            return None, None
        said = tuple(word for segment in heard for word in segment.words or ())
        text = "".join(segment.text for segment in heard)
        return languages.parse(info.language), Segment(heard[0].start, heard[-1].end, text, said if words else None)

    def _all(
        self, heard: Iterator[Segment], pieces: Iterator[tuple[int, Samples]], job: Job, language: str | None
    ) -> Iterator[Segment]:
        yield from heard
        for piece in pieces:
            yield from self._piece(piece, job, language)[1]

    def _piece(
        self, piece: tuple[int, Samples], job: Job, language: str | None
    ) -> tuple[str | None, Iterator[Segment]]:
        offset, samples = piece
        segments, info = self._model.transcribe(
            samples,
            language=language,
            task="translate" if job.translate else "transcribe",
            initial_prompt=job.prompt,
            hotwords=", ".join(job.keywords) or None,
            temperature=job.temperature or _TEMPERATURES,
            word_timestamps=job.words,
            vad_filter=True,  # bare Whisper invents words for silence
            condition_on_previous_text=False,  # one bad window must not colour the rest
        )
        # Where there is no speech, the language that it reports is a guess at nothing.
        return info.language if info.duration_after_vad else None, _segments(
            segments, offset / RATE, len(samples) / RATE
        )


def _segments(heard: Iterable[WhisperSegment], offset: float, length: float) -> Iterator[Segment]:
    """As ours: on the recording's own clock, inside it, and with no number that JSON lacks."""

    def at(seconds: float) -> float:
        return offset + min(max(float(seconds), 0.0), length)

    for segment in heard:
        if not segment.text.strip():
            continue
        words = None
        if segment.words is not None:
            words = tuple(Word(w.word.strip(), at(w.start), at(w.end), _finite(w.probability)) for w in segment.words)
        yield Segment(
            start=at(segment.start),
            end=at(max(segment.end, segment.start)),
            text=segment.text,
            words=words,
            seek=round(offset * 100) + segment.seek,
            tokens=tuple(segment.tokens),
            temperature=_finite(segment.temperature),
            avg_logprob=_finite(segment.avg_logprob),
            compression_ratio=_finite(segment.compression_ratio),
            no_speech_prob=_finite(segment.no_speech_prob),
        )


def _pieces(pcm: Iterable[bytes]) -> Iterator[tuple[int, Samples]]:
    """Pieces of at most ten minutes, each with its first sample's number."""
    offset = 0
    pending: list[Samples] = []
    size = 0
    for chunk in pcm:
        samples = np.frombuffer(chunk, "<i2").astype(np.float32) / np.float32(32768)
        pending.append(samples)
        size += len(samples)
        if size >= _PIECE:
            whole = np.concatenate(pending)
            cut = _quietest(whole, _SEARCH)
            yield offset, whole[:cut]
            offset += cut
            pending, size = [whole[cut:]], len(whole) - cut
    if size:
        yield offset, np.concatenate(pending)


def _quietest(samples: Samples, search: int) -> int:
    """In the last so many of them."""
    tail = samples[-search:]
    tenths = tail[: len(tail) // _TENTH * _TENTH].reshape(-1, _TENTH)
    quietest = int(np.argmin((tenths**2).mean(axis=1)))
    return len(samples) - len(tail) + quietest * _TENTH + _TENTH // 2


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
