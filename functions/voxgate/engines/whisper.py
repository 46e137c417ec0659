"""Whisper by faster-whisper and CTranslate2, many windows at a time."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.audio import pad_or_trim
from faster_whisper.tokenizer import Tokenizer
from faster_whisper.transcribe import get_compression_ratio, get_suppressed_tokens
from faster_whisper.vad import VadOptions, get_speech_timestamps
from numpy.typing import NDArray

from voxgate import languages
from voxgate.audio.decode import RATE, decode
from voxgate.engines import Job
from voxgate.engines.batching import Again, Row
from voxgate.engines.windows import LONGEST, Samples, Spans, Window, windows
from voxgate.model import Capabilities, Feature, Segment, Word

logger = logging.getLogger(__name__)

# Whisper's own codes where they are not ISO 639-1's (`languages.parse` reads them back).
_THEIRS = {"jv": "jw", "nb": "no"}
# The method is Whisper's own: sample hotter while the text repeats itself or is improbable.
_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_BEST_OF = 5
_COLDEST = 0.001
_LEAST_REST = 100  # frames (of 10 ms) that are worth another look, where the text ends before the window does
_BEFORE, _AFTER = "\"'“¿([{-", "\"'.。,，!！?？:：”)]}、"  # what belongs to the word after, and before
_UNLOAD_TRIES, _UNLOAD_WAIT = 100, 0.01
_STEADY_WORD = 8 / 15  # of what a second of speech rises and falls by at the least, what a single word does

_FEATURES = frozenset(
    {
        *(Feature.WORDS, Feature.SEGMENTS, Feature.PROMPT, Feature.TEMPERATURE, Feature.LANGUAGE),
        *(Feature.KEYWORDS, Feature.LIVE),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guards:
    """What is not taken for speech, and which text not for its words. `speech` is the least probability of Silero's
    detector; `steady` the decibels by which sound rises and falls at the least, whatever that says; `no_speech`
    Whisper's own probability, above which a text of a mean log-probability below `logprob` is none; `compression` the
    ratio above which a text repeats itself."""

    speech: float = 0.5
    steady: float = 6.0
    no_speech: float = 0.6
    logprob: float = -1.0
    compression: float = 2.4


@dataclass(slots=True)
class Heard:
    """One request's options, and its language once that is known."""

    model: str
    job: Job
    prompt: tuple[int, ...]
    temperatures: tuple[float, ...]
    language: str | None  # Whisper's code
    passed: float = 0.0  # seconds that are in windows or in silence


@dataclass(frozen=True, slots=True)
class _Try:
    tokens: list[int]
    temperature: float
    logprob: float
    compression: float
    no_speech: float


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A window, or the rest of one from the frame `seek` on; `tries` are the texts that were not good enough."""

    heard: Heard
    window: Window
    features: NDArray[np.float32]
    seek: int = 0
    tries: tuple[_Try, ...] = field(default=())

    @property
    def temperature(self) -> float:
        return self.heard.temperatures[len(self.tries)]

    @property
    def frames(self) -> int:
        return int(self.features.shape[-1]) - self.seek


class _Model(WhisperModel):  # type: ignore[misc] # which has no types
    """faster-whisper's, which places the words of one row by an alignment that was made for many."""

    def find_alignment(
        self, tokenizer: Tokenizer, text_tokens: Any, encoder_output: Any, num_frames: Any, median_filter_width: int = 7
    ) -> Any:
        if isinstance(encoder_output, list):
            return encoder_output
        return super().find_alignment(tokenizer, text_tokens, encoder_output, num_frames, median_filter_width)


def usual_type(device: str) -> str:
    """CTranslate2's number format for a device."""
    if device == "auto":
        device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
    return "int8" if device == "cpu" else "float16"


def weight(directory: str) -> int:
    """Bytes that a model's weights take."""
    return sum(file.stat().st_size for file in Path(directory).glob("model.bin"))


class WhisperEngine:
    """One model. `directory` is a CTranslate2 model's, or a hub name; `device` and `compute_type` are CTranslate2's, of
    which the latter goes by the device, unless it is given, and not by how the weights happen to be stored.
    Raises `OSError`, `RuntimeError` or `ValueError` where it cannot be loaded."""

    def __init__(
        self,
        directory: str,
        *,
        name: str,
        device: str = "auto",
        compute_type: str = "",
        beam_size: int = 5,
        guards: Guards | None = None,
    ) -> None:
        self.name = name
        self._model = _Model(directory, device=device, compute_type=compute_type or usual_type(device))
        self._multilingual = bool(self._model.model.is_multilingual)  # which only a loaded one says
        self._beam_size = beam_size
        self._guards = guards or Guards()
        self.bytes = weight(directory)
        # The list is of all Whisper models'; which of them this one knows, its vocabulary says.
        known = self._model.hf_tokenizer.token_to_id
        listed = self._model.supported_languages
        theirs = [code for code in listed if len(listed) == 1 or known(f"<|{code}|>") is not None]
        codes = {languages.parse(code) or code for code in theirs}
        self.capabilities = Capabilities(
            languages=frozenset(codes | {ours for ours, code in _THEIRS.items() if code in theirs}),
            features=_FEATURES | ({Feature.TRANSLATION} if len(listed) > 1 else set()),
        )
        self._tokenizers: dict[tuple[str, bool], Tokenizer] = {}

    @property
    def loaded(self) -> bool:
        return bool(self._model.model.model_is_loaded)

    def load(self) -> None:
        self._model.model.load_model()

    def unload(self) -> None:
        for _ in range(_UNLOAD_TRIES):
            self._model.model.unload_model()
            if not self.loaded:
                return
            time.sleep(_UNLOAD_WAIT)  # right after a batch it may still count as being at work

    # What a request becomes.

    def heard(self, job: Job, *, tries: int | None = None) -> Heard:
        language = _THEIRS.get(job.language or "", job.language)
        if not self._multilingual:
            language = "en"
        # What is nearly none is none: the scores, divided by it, would be no numbers.
        temperature = job.temperature or 0.0
        temperatures = (temperature,) if temperature >= _COLDEST else _TEMPERATURES
        return Heard(self.name, job, self._prompt(job), temperatures[:tries], language)

    def rows(self, heard: Heard) -> Generator[Row[Task] | None]:
        """Raises `UnusableAudio`."""
        job = heard.job
        for window in windows(decode(job.path, job.container, max_seconds=job.max_seconds), self.speech):
            if isinstance(window, float):
                heard.passed = window
            yield None if isinstance(window, float) else self.row(heard, window)

    def row(self, heard: Heard, window: Window) -> Row[Task]:
        features = self._model.feature_extractor(window.samples)[..., :-1]
        window = dataclasses.replace(window, samples=window.samples[:0].copy())  # which nobody needs any more
        return self._row(Task(heard, window, features), audio=window.seconds)

    def _row(self, task: Task, *, audio: float = 0.0) -> Row[Task]:
        heard, job = task.heard, task.heard.job
        # What does not share a batch. Where the language is still to be found, it is each row's own.
        kind = (self.name, job.language, job.translate, heard.prompt, task.temperature, job.words)
        return Row(kind, task, LONGEST / RATE, audio)

    def _prompt(self, job: Job) -> tuple[int, ...]:
        """What stands before a transcript: names to listen for, and the end of the prompt."""
        if not job.prompt and not job.keywords:
            return ()
        tokenizer = self._tokenizer("en", translate=False)
        most = self._model.max_length // 2 - 1

        def tokens(text: str) -> list[int]:
            # Text only: `<|endoftext|>` in a prompt would be what it means to the model.
            return [token for token in tokenizer.encode(" " + text) if token < tokenizer.eot]

        names = tokens(", ".join(job.keywords))[:most] if job.keywords else []
        said = tokens(job.prompt.strip()) if job.prompt else []
        left = max(most - len(names), 0)
        return (tokenizer.sot_prev, *names, *(said[-left:] if left else ()))

    def _tokenizer(self, language: str, *, translate: bool) -> Tokenizer:
        key = (language, translate)
        if key not in self._tokenizers:
            model = self._model
            task = "translate" if translate else "transcribe"
            self._tokenizers[key] = Tokenizer(model.hf_tokenizer, self._multilingual, task=task, language=language)
        return self._tokenizers[key]

    def speech(self, samples: Samples, *, pause: float = 0.5) -> Spans:
        """Stretches of it, with more than that many seconds between them."""
        options = VadOptions(
            threshold=self._guards.speech,
            min_speech_duration_ms=200,
            min_silence_duration_ms=round(pause * 1000),
            max_speech_duration_s=LONGEST / RATE - 1,
            speech_pad_ms=200,
        )
        spans = get_speech_timestamps(samples, options)
        found = [(span["start"], min(span["end"], span["start"] + LONGEST)) for span in spans]
        return [(start, end) for start, end in found if self._moves(samples[start:end])]

    def _moves(self, samples: Samples) -> bool:
        """Whether it rises and falls as speech does."""
        frames = samples[: len(samples) // 320 * 320].reshape(-1, 320)
        if not len(frames):
            return True
        levels = 10 * np.log10((frames.astype(np.float64) ** 2).mean(axis=1) + 1e-10)
        least = self._guards.steady * (1.0 if len(samples) >= RATE else _STEADY_WORD)
        return bool(np.percentile(levels, 95) - np.percentile(levels, 10) >= least)

    # What a batch becomes.

    def decode(self, tasks: Sequence[Task]) -> list[list[Segment] | Again[Task]]:
        """Tasks of one kind."""
        model = self._model
        features = np.stack([pad_or_trim(task.features[..., task.seek :]) for task in tasks])
        encoded = model.encode(features)
        found = self._find_languages(tasks, encoded)
        tokenizers = [
            self._tokenizer(task.heard.language or "en", translate=task.heard.job.translate) for task in tasks
        ]
        prompts = [
            [*task.heard.prompt, *tokenizer.sot_sequence] for task, tokenizer in zip(tasks, tokenizers, strict=True)
        ]
        temperature = tasks[0].temperature
        sampling: dict[str, Any] = {"beam_size": self._beam_size}
        if temperature > 0:
            sampling = {"beam_size": 1, "num_hypotheses": _BEST_OF, "sampling_topk": 0}
            sampling["sampling_temperature"] = temperature
        results = model.model.generate(
            encoded,
            prompts,
            max_length=model.max_length,
            return_scores=True,
            return_no_speech_prob=True,
            suppress_blank=True,
            suppress_tokens=get_suppressed_tokens(tokenizers[0], [-1]),
            max_initial_timestamp_index=round(1.0 / model.time_precision),
            **sampling,
        )
        tries = [_tried(result, tokenizer, temperature) for result, tokenizer in zip(results, tokenizers, strict=True)]
        chosen = [self._choose(task, tried) for task, tried in zip(tasks, tries, strict=True)]
        split = [
            self._split(task, tokenizer, choice or tried)
            for task, tokenizer, choice, tried in zip(tasks, tokenizers, chosen, tries, strict=True)
        ]
        if tasks[0].heard.job.words:
            self._align(tasks, tokenizers, [segments for segments, _ in split], encoded)
        outcomes: list[list[Segment] | Again[Task]] = []
        for task, tokenizer, choice, tried, (segments, rest) in zip(
            tasks, tokenizers, chosen, tries, split, strict=True
        ):
            if choice is None:
                again = dataclasses.replace(task, tries=(*task.tries, tried))
                outcomes.append(Again(self._row(again)))
                continue
            if not self._is_speech(choice):
                if task in found:
                    task.heard.language = None  # it was found in what is no speech
                outcomes.append([])
                continue
            made = _segments(task, segments, rest, choice, tokenizer)
            told = [segment for segment in made if segment.text.strip()]
            if rest:
                again = dataclasses.replace(task, seek=task.seek + rest, tries=())
                outcomes.append(Again(self._row(again), tuple(told)))
            else:
                outcomes.append(told)
        return outcomes

    def _find_languages(self, tasks: Sequence[Task], encoded: ctranslate2.StorageView) -> list[Task]:
        """Of those who have none yet, by their first window; whose they were."""
        found: list[Task] = []
        if not all(task.heard.language for task in tasks):
            for task, ranked in zip(tasks, self._model.model.detect_language(encoded), strict=True):
                if task.heard.language is None:
                    task.heard.language = ranked[0][0][2:-2]
                    found.append(task)
        return found

    def _choose(self, task: Task, tried: _Try) -> _Try | None:
        """The text to take; None where a hotter one is to be tried."""
        guards = self._guards
        silent = tried.no_speech > guards.no_speech and tried.logprob < guards.logprob
        good = tried.compression <= guards.compression and tried.logprob >= guards.logprob
        if good or silent:
            return tried
        if len(task.tries) + 1 < len(task.heard.temperatures):
            return None
        tries = (*task.tries, tried)
        return max([each for each in tries if each.compression <= guards.compression] or tries, key=lambda t: t.logprob)

    def _is_speech(self, choice: _Try) -> bool:
        guards = self._guards
        silent = choice.no_speech > guards.no_speech and choice.logprob < guards.logprob
        return not silent and choice.compression <= guards.compression

    def _split(self, task: Task, tokenizer: Tokenizer, choice: _Try) -> tuple[list[dict[str, Any]], int]:
        """Segments by the text's own times, in seconds from the task's first frame, and how many frames on there
        is more to come; 0 where there is none."""
        segments, seek, _ = self._model._split_segments_by_timestamps(
            tokenizer=tokenizer,
            tokens=choice.tokens,
            time_offset=0.0,
            segment_size=task.frames,
            segment_duration=task.frames / self._model.frames_per_second,
            seek=0,
        )
        if _LEAST_REST <= seek <= task.frames - _LEAST_REST:
            return segments, seek
        rest = choice.tokens[sum(len(segment["tokens"]) for segment in segments) :]
        if any(token < tokenizer.eot for token in rest):  # a text whose end is missing, and not worth another look
            end = task.frames / self._model.frames_per_second
            segments.append({"seek": 0, "start": segments[-1]["end"], "end": end, "tokens": rest})
        return segments, 0

    def _align(
        self,
        tasks: Sequence[Task],
        tokenizers: Sequence[Tokenizer],
        rows: Sequence[list[dict[str, Any]]],
        encoded: ctranslate2.StorageView,
    ) -> None:
        """Words and their times into the segments. Each language goes by its own start, for all rows, of which only
        its own are kept."""
        frames = [task.frames for task in tasks]
        for tokenizer in dict.fromkeys(tokenizers):
            texts = [[token for segment in row for token in segment["tokens"] if token < tokenizer.eot] for row in rows]
            aligned = self._model.find_alignment(tokenizer, texts, encoded, frames)
            for row, alignment, count, own in zip(rows, aligned, frames, tokenizers, strict=True):
                if own is tokenizer:
                    self._model.add_word_timestamps([row], tokenizer, [alignment], count, _BEFORE, _AFTER, 0.0)

    def warm_up(self, *, most: int) -> tuple[int, float]:
        """The number of windows at a time that is the fastest here, up to so many, and how many a second they are."""
        size, fastest = 1, 0.0
        count = 1
        while count <= min(most, 4 * size):  # one that is no faster is passed over once
            try:
                took = self._time(count)
            except RuntimeError as error:  # out of memory
                if count == 1:
                    raise
                logger.info("batches of %d do not fit: %s", count, error)
                break
            if count / took > fastest * 1.02:
                size, fastest = count, count / took
            if took > _WARM_SECONDS:
                break
            count *= 2
        logger.info("%s decodes %d windows at a time, %.2f a second", self.name, size, fastest)
        return size, fastest

    def _time(self, count: int) -> float:
        shape = (count, self._model.feature_extractor.mel_filters.shape[0], 3000)
        noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        prompt = [list(self._tokenizer("en", translate=False).sot_sequence)] * count
        begun = time.perf_counter()
        encoded = self._model.encode(noise)
        self._model.model.generate(encoded, prompt, beam_size=self._beam_size, max_length=_WARM_TOKENS)
        return time.perf_counter() - begun


_WARM_TOKENS = 48
_WARM_SECONDS = 10.0  # a machine where one batch takes so long is not asked for a larger one


def _tried(result: Any, tokenizer: Tokenizer, temperature: float) -> _Try:
    tokens = result.sequences_ids[0]
    # CTranslate2's score is the mean; Whisper's divides by one token more, for the end.
    logprob = result.scores[0] * len(tokens) / (len(tokens) + 1)
    text = tokenizer.decode(tokens).strip()
    return _Try(tokens, temperature, logprob, get_compression_ratio(text), result.no_speech_prob)


def _segments(
    task: Task, split: list[dict[str, Any]], rest: int, choice: _Try, tokenizer: Tokenizer
) -> Iterator[Segment]:
    """On the recording's own clock, one after the other, inside of the window and before its rest, if there is one; and
    with no number that JSON lacks. Alignment finds words outside of their segments, too: they are brought into them."""
    offset, window = task.seek / 100, task.window

    def at(seconds: float, *, end: bool = False) -> float:
        return window.at(offset + seconds, end=end)

    before, last = at(0.0), at((rest or task.frames) / 100, end=True)
    if task.heard.job.seconds:  # which some decoders' padding is beyond
        before, last = min(before, task.heard.job.seconds), min(last, task.heard.job.seconds)
    for heard in split:
        start = min(max(at(heard["start"]), before), max(before, last))
        before = end = max(min(at(heard["end"], end=True), last), start)
        words = heard.get("words")
        yield Segment(
            start=start,
            end=end,
            text=tokenizer.decode(heard["tokens"]),
            words=None if words is None else tuple(_words(words, at, start, end)),
            seek=round(window.start * 100) + task.seek,
            tokens=tuple(heard["tokens"]),
            temperature=choice.temperature,
            avg_logprob=_finite(choice.logprob),
            compression_ratio=_finite(choice.compression),
            no_speech_prob=_finite(choice.no_speech),
        )


def _words(words: list[dict[str, Any]], at: Callable[..., float], start: float, end: float) -> Iterator[Word]:
    for word in words:
        start = min(max(at(word["start"]), start), end)
        until = min(max(at(word["end"], end=True), start), end)
        yield Word(word["word"].strip(), start, until, _finite(word["probability"]))


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
