"""The Whisper engine in this process, with a real model of tiny shape and random weights, and with one whose words
are given."""

from __future__ import annotations

import threading
import time
import wave
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import DATA
from fakes import whisper_model
from fakes.whisper_model import Said, Scripted, timed
from voxgate.audio.decode import RATE, decode
from voxgate.engines import Job, Listening
from voxgate.engines.batching import Again, Batcher, Request
from voxgate.engines.whisper import Guards, Task, WhisperEngine
from voxgate.engines.whisper_live import Detector, WhisperListening
from voxgate.engines.windows import Samples, Window
from voxgate.model import Feature, Heard, Segment

SPEECH = DATA / "b-slt.mp3"
OPEN = Guards(compression=1e9, logprob=-1e9, no_speech=1.0)  # what a random model says fails every other
OURS = {"en", "es", "fr", "de", "ja", "jv", "no", "yue"}
THEIRS = {"en", "es", "fr", "de", "ja", "jw", "no", "yue"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whisper_model.build(tmp_path_factory.mktemp("models") / "tiny")


def load(directory: Path, *, guards: Guards | None = OPEN, beam: int = 1) -> WhisperEngine:
    return WhisperEngine(str(directory), name="tiny", device="cpu", beam_size=beam, guards=guards)


@pytest.fixture(scope="module")
def engine(directory: Path) -> WhisperEngine:
    return load(directory)


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> WhisperEngine:
    return load(whisper_model.build(tmp_path_factory.mktemp("models") / "tiny.en", multilingual=False))


def job(path: Path = SPEECH, container: str = "", **options: Any) -> Job:
    given: dict[str, Any] = {"max_seconds": 600.0, **options}
    return Job(path=str(path), container=container or path.suffix[1:], **given)


def tasks(engine: WhisperEngine, *jobs: Job) -> list[Task]:
    return [row.content for each in jobs for row in engine.rows(engine.heard(each)) if row is not None]


def decoded(engine: WhisperEngine, given: Sequence[Task], *, size: int) -> list[list[Segment]]:
    """What each becomes, with so many of a kind at a time."""
    results: list[list[Segment]] = [[] for _ in given]
    waiting = [(number, engine._row(task)) for number, task in enumerate(given)]
    while waiting:
        batch = [each for each in waiting if each[1].kind == waiting[0][1].kind][:size]
        waiting = [each for each in waiting if all(each is not other for other in batch)]
        outcomes = engine.decode([row.content for _, row in batch])
        for (number, _), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Again):
                results[number] += outcome.part
                waiting.append((number, outcome.row))
            else:
                results[number] += outcome
    return results


def transcribe(engine: WhisperEngine, asked: Job) -> tuple[str | None, list[Segment]]:
    heard = engine.heard(asked)
    rows = [row.content for row in engine.rows(heard) if row is not None]
    segments = [segment for each in decoded(engine, rows, size=4) for segment in each]
    return heard.language, segments


def samples(name: str) -> Samples:
    return np.frombuffer(pcm_of(name), "<i2").astype(np.float32) / np.float32(32768)


def pcm_of(name: str) -> bytes:
    return b"".join(decode(str(DATA / name), name.rpartition(".")[2], max_seconds=60))


def write(path: Path, pcm: bytes) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(pcm)
    return path


def task_of(engine: WhisperEngine, seconds: float, asked: Job | None = None) -> Task:
    """A window of so many seconds of somebody speaking."""
    spoken = np.resize(samples("b-slt.mp3"), round(seconds * RATE))
    return engine.row(engine.heard(asked or job()), Window(spoken, ((0, len(spoken)),))).content


# Languages.


def test_it_speaks_what_its_vocabulary_has_under_our_codes(engine: WhisperEngine) -> None:
    assert engine.capabilities.languages == frozenset(OURS | {"nb"})
    assert {Feature.KEYWORDS, Feature.TRANSLATION} <= engine.capabilities.features


def test_an_english_only_model_speaks_english_alone(english: WhisperEngine) -> None:
    assert english.capabilities.languages == frozenset({"en"})
    assert Feature.TRANSLATION not in english.capabilities.features
    language, segments = transcribe(english, job(words=True, prompt="Hello."))
    assert language == "en"
    assert segments


def test_a_language_is_detected_or_taken_as_given(engine: WhisperEngine) -> None:
    assert transcribe(engine, job())[0] in THEIRS
    assert transcribe(engine, job(language="jv"))[0] == "jw"
    assert transcribe(engine, job(language="nb"))[0] == "no"


class Detecting(Scripted):
    """Finds languages in their order, whatever it hears."""

    def __init__(self, engine: WhisperEngine, *codes: str) -> None:
        text = timed(engine, 0.0, " Yes.", 1.0)
        super().__init__(engine._model.model, lambda prompt, temperature: Said(text))
        self._codes = list(codes)
        engine._model.model = self

    def detect_language(self, encoded: Any) -> list[list[tuple[str, float]]]:
        return [[(f"<|{self._codes.pop(0)}|>", 0.9)] for _ in range(encoded.shape[0])]


def language_ids(engine: WhisperEngine, *codes: str) -> list[int]:
    return [engine._model.hf_tokenizer.token_to_id(f"<|{code}|>") for code in codes]


def test_a_language_is_detected_in_the_first_window_and_only_there(directory: Path) -> None:
    engine = load(directory)
    model = Detecting(engine, "de", "fr", "es")
    long, other = engine.heard(job()), engine.heard(job())
    window = Window(samples("b-slt.mp3"), ((0, 3 * RATE),))
    first = [engine.row(heard, window).content for heard in (long, long, other)]
    decoded(engine, first, size=3)
    assert (long.language, other.language) == ("de", "es")
    decoded(engine, [engine.row(heard, window).content for heard in (other, long)], size=2)
    assert [prompt[1] for prompt in model.prompts] == language_ids(engine, "de", "de", "es", "es", "de")


def test_a_translation_is_asked_for_from_the_language_that_was_spoken(directory: Path) -> None:
    engine = load(directory)
    model = Detecting(engine, "fr")
    heard = [engine.heard(job(translate=True)), engine.heard(job(translate=True, language="de"))]
    for each in heard:
        decoded(engine, [engine.row(each, Window(samples("b-slt.mp3"), ((0, RATE),))).content], size=1)
    ids = language_ids(engine, "startoftranscript", "fr", "de", "translate")
    assert model.prompts == [[ids[0], ids[1], ids[3]], [ids[0], ids[2], ids[3]]]
    assert [each.language for each in heard] == ["fr", "de"]


# Batches.


def same(batched: Sequence[Segment], alone: Sequence[Segment]) -> None:
    assert [segment.tokens for segment in batched] == [segment.tokens for segment in alone]
    for one, other in zip(batched, alone, strict=True):
        assert (one.text, one.seek, one.temperature) == (other.text, other.seek, other.temperature)
        for name in ("start", "end", "avg_logprob", "compression_ratio", "no_speech_prob"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-3), name
        assert (one.words is None) == (other.words is None)
        for word, its in zip(one.words or (), other.words or (), strict=True):
            assert word.text == its.text
            assert (word.start, word.end) == pytest.approx((its.start, its.end), abs=0.021)
            assert word.confidence == pytest.approx(its.confidence, abs=1e-3)


LENGTHS = (3.0, 29.9, 0.4, 12.0, 5.4)


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("beam", [1, 5])
def test_a_window_in_a_batch_becomes_what_it_becomes_alone(directory: Path, beam: int, words: bool) -> None:
    engine = load(directory, beam=beam)
    given = [task_of(engine, seconds, job(language="en", words=words)) for seconds in LENGTHS]
    alone = [decoded(engine, [task], size=1)[0] for task in given]
    assert sum(len(each) for each in alone) >= len(LENGTHS)
    assert len({segment.tokens for each in alone for segment in each}) > len(LENGTHS)
    for batched, its in zip(decoded(engine, given, size=len(given)), alone, strict=True):
        same(batched, its)


def test_in_an_english_only_model_too(english: WhisperEngine) -> None:
    given = [task_of(english, seconds, job(words=True)) for seconds in (3.0, 1.0, 8.0)]
    alone = [decoded(english, [task], size=1)[0] for task in given]
    for batched, its in zip(decoded(english, given, size=3), alone, strict=True):
        same(batched, its)


def test_a_requests_result_does_not_depend_on_what_is_beside_it(engine: WhisperEngine) -> None:
    jobs = [
        job(),
        job(language="de"),
        job(DATA / "c-rms.mp3"),
        job(DATA / "a-flac.flac"),
        job(DATA / "long-slt.flac", words=True),
        job(words=True),
        job(DATA / "d-slt.opus", "ogg", translate=True, language="fr"),
        job(prompt="Voxgate."),
        job(keywords=("voxgate", "whisper")),
        job(DATA / "silence.flac"),
    ]
    go = threading.Event()

    def decode_then(given: Sequence[Task]) -> Any:
        assert go.wait(30)
        return engine.decode(given)

    batcher: Batcher[Task] = Batcher(decode_then, size=4, linger=0.0, threads=2)
    told: list[list[Segment]] = [[] for _ in jobs]
    ends: list[Any] = []
    try:
        requests = [
            Request(engine.rows(engine.heard(asked)), into.append, ends.append)
            for asked, into in zip(jobs, told, strict=True)
        ]
        for request in requests:
            batcher.submit(request)
        until(lambda: all(request.exhausted for request in requests), 30.0)
        go.set()
        until(lambda: len(ends) == len(told), 30.0)
        stats = batcher.stats()
    finally:
        go.set()
        batcher.close()
    assert ends == [None] * len(told)
    assert max(stats.batches) > 1
    for asked, batched in zip(jobs, told, strict=True):
        same(batched, transcribe(engine, asked)[1])


def test_unlike_options_do_not_share_a_batch_and_like_ones_do(engine: WhisperEngine) -> None:
    unlike: list[dict[str, Any]] = [
        {},
        {"language": "de"},
        {"translate": True},
        {"prompt": "Voxgate."},
        {"prompt": "Whisper."},
        {"keywords": ("Nora", "Ada")},
        {"temperature": 0.2},
        {"temperature": 0.4},
        {"words": True},
    ]
    kinds = [engine._row(task_of(engine, 1.0, job(**options))).kind for options in unlike]
    assert len(set(kinds)) == len(unlike)
    again = [engine._row(task_of(engine, 2.0, job(DATA / "c-rms.mp3", **options))).kind for options in unlike]
    assert again == kinds


# Times.


def test_words_only_when_asked_for(engine: WhisperEngine) -> None:
    assert all(segment.words is None for segment in transcribe(engine, job(language="en"))[1])
    with_words = transcribe(engine, job(language="en", words=True, keywords=("voxgate",), prompt="Hi."))[1]
    assert any(segment.words for segment in with_words)
    assert all(segment.words is not None for segment in with_words)


def test_every_time_is_inside_the_audio_in_order_and_every_number_is_json(engine: WhisperEngine) -> None:
    for name, length in (("b-slt.mp3", 3.04), ("long-slt.flac", 5.37), ("a-flac.flac", 1.02)):
        segments = transcribe(engine, job(DATA / name, language="en", words=True))[1]
        assert segments
        for segment in segments:
            assert 0 <= segment.start <= segment.end <= length
            times = [time for word in segment.words or () for time in (word.start, word.end)]
            starts = [word.start for word in segment.words or ()]
            assert all(segment.start <= time <= segment.end for time in times)
            assert starts == sorted(starts)
            assert all(word.start <= word.end for word in segment.words or ())
            assert all(type(word.confidence) is float for word in segment.words or ())
            for number in (segment.avg_logprob, segment.no_speech_prob, segment.compression_ratio):
                assert type(number) is float
            assert all(type(token) is int for token in segment.tokens)
        assert all(a.start <= b.start and a.end <= b.start + 1e-9 for a, b in pairwise(segments))


def test_words_that_alignment_places_elsewhere_are_brought_into_their_segments(
    engine: WhisperEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misplaced(segments: list[list[dict[str, Any]]], *_: Any) -> None:
        for row in segments:
            for number, segment in enumerate(row):
                words = [(-1.0, 99.0), (2.0, 0.5), (0.1, 0.2)]
                segment["words"] = [{"word": " a", "start": s, "end": e, "probability": 0.5} for s, e in words]
                segment["start"], segment["end"] = 2.0 - number, 1.5 - number  # and segments before one another

    monkeypatch.setattr(engine._model, "add_word_timestamps", misplaced)
    segments = transcribe(engine, job(DATA / "long-slt.flac", language="en", words=True))[1]
    assert segments
    for segment in segments:
        assert segment.words is not None
        times = [time for word in segment.words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert segment.start <= times[0] <= times[-1] <= segment.end
    assert all(0 <= a.start <= a.end <= b.start <= b.end <= 5.37 for a, b in pairwise(segments))


def test_times_do_not_drift(directory: Path, tmp_path: Path) -> None:
    # A sentence each twenty seconds, for five minutes; the model says when it begins and ends within its window.
    engine = load(directory)
    sentence, every = SENTENCE, 20
    pcm = (sentence + bytes(every * SECOND - len(sentence))) * 15
    answer: list[int] = []
    whisper_model.script(engine, lambda prompt, temperature: Said(answer))
    found: list[Segment] = []
    for row in filter(None, engine.rows(engine.heard(job(write(tmp_path / "long.wav", pcm), language="en")))):
        at = 0.0
        answer = []
        for _, count in row.content.window.pieces:
            seconds = count / RATE
            answer += timed(engine, round(at * 50) / 50, " Yes.", round((at + seconds) * 50) / 50)
            at += seconds
        (outcome,) = engine.decode([row.content])
        assert isinstance(outcome, list)
        found += outcome
    assert len(found) == 15
    for number, segment in enumerate(found):
        assert segment.start == pytest.approx(number * every, abs=0.3)
        assert segment.end == pytest.approx(number * every + 3.03, abs=0.3)
    assert all(a.end <= b.start for a, b in pairwise(found))


def test_words_of_several_languages_share_a_batch(directory: Path) -> None:
    engine = load(directory)
    Detecting(engine, "de", "fr", "de")
    given = [task_of(engine, seconds, job(words=True)) for seconds in (3.0, 5.0, 4.0)]
    told = decoded(engine, given, size=3)
    assert [[[word.text for word in segment.words or ()] for segment in each] for each in told] == [[["Yes."]]] * 3
    assert [task.heard.language for task in given] == ["de", "fr", "de"]


def going_on(directory: Path, say: Callable[[WhisperEngine], list[int]]) -> WhisperEngine:
    engine = load(directory)
    text = say(engine)
    # It goes on only once, with what a rest may be.
    answers = iter([text])
    rest = timed(engine, 0.0, " And the rest.", 1.0)
    whisper_model.script(engine, lambda prompt, temperature: Said(next(answers, rest)))
    return engine


@pytest.mark.parametrize("words", [False, True])
def test_a_window_of_which_nothing_is_said_is_no_text(directory: Path, words: bool) -> None:
    engine = load(directory)
    answers = iter([[], timed(engine, 0.0, " Yes.", 1.0), timed(engine, 0.0, 2.0)])
    whisper_model.script(engine, lambda prompt, temperature: Said(next(answers)))
    given = [task_of(engine, 3.0, job(language="en", words=words)) for _ in range(3)]
    assert [[each.text for each in told] for told in decoded(engine, given, size=3)] == [[], [" Yes."], []]


def test_a_text_that_ends_before_its_window_does_goes_on_there(directory: Path) -> None:
    engine = going_on(directory, lambda e: timed(e, 0.0, " Yes.", 4.0, 4.0, " And"))
    (told,) = decoded(engine, [task_of(engine, 10.0, job(language="en"))], size=1)
    assert [segment.text for segment in told] == [" Yes.", " And the rest."]
    assert [(segment.start, segment.end) for segment in told] == [(0.0, 4.0), (4.0, 5.0)]
    assert [segment.seek for segment in told] == [0, 400]


@pytest.mark.parametrize(("until", "seconds"), [(0.5, 10.0), (9.4, 10.0)], ids=["near its start", "near its end"])
def test_a_text_that_ends_there_is_not_lost_either(directory: Path, until: float, seconds: float) -> None:
    engine = going_on(directory, lambda e: timed(e, 0.0, " Yes.", until, until, " And the rest."))
    (told,) = decoded(engine, [task_of(engine, seconds, job(language="en"))], size=1)
    assert "".join(segment.text for segment in told) == " Yes. And the rest."


def test_silence_is_empty_and_in_no_language(engine: WhisperEngine) -> None:
    assert transcribe(engine, job(DATA / "silence.flac")) == (None, [])


# Guards.

LOOP = " and then" * 12


class Stubborn:
    """What is said at each temperature; at all others what is said at the last one."""

    def __init__(self, directory: Path, guards: Guards, *tries: tuple[str, float, float]) -> None:
        self.engine = load(directory, guards=guards, beam=3)
        self._tries = [Said(timed(self.engine, 0.0, text, 2.0), score, silence) for text, score, silence in tries]
        self.model = whisper_model.script(self.engine, self._say)

    def _say(self, prompt: list[int], temperature: float) -> Said:
        return self._tries[min(round(temperature * 5), len(self._tries) - 1)]

    def hear(self, **options: Any) -> list[Segment]:
        return decoded(self.engine, [task_of(self.engine, 3.0, job(language="en", **options))], size=1)[0]

    @property
    def temperatures(self) -> list[float]:
        return [options.get("sampling_temperature", 0.0) for options in self.model.options]


def test_a_text_that_is_good_enough_is_taken_at_once(directory: Path) -> None:
    stubborn = Stubborn(directory, Guards(), (" Good.", -0.5, 0.1))
    (segment,) = stubborn.hear()
    assert (segment.text, segment.temperature, segment.no_speech_prob) == (" Good.", 0.0, 0.1)
    count = len(segment.tokens)
    assert segment.avg_logprob == pytest.approx(-0.5 * count / (count + 1))
    assert stubborn.model.options[0]["beam_size"] == 3
    assert "sampling_temperature" not in stubborn.model.options[0]


def test_a_text_that_repeats_itself_or_is_improbable_is_tried_hotter(directory: Path) -> None:
    stubborn = Stubborn(directory, Guards(), (LOOP, -0.1, 0.1), (" Odd.", -1.5, 0.1), (" Good.", -0.5, 0.1))
    (segment,) = stubborn.hear()
    assert (segment.text, segment.temperature) == (" Good.", 0.4)
    assert stubborn.temperatures == [0.0, 0.2, 0.4]
    assert [options["beam_size"] for options in stubborn.model.options] == [3, 1, 1]
    assert [options.get("num_hypotheses", 1) for options in stubborn.model.options] == [1, 5, 5]


def test_where_none_is_good_the_most_probable_is_taken(directory: Path) -> None:
    stubborn = Stubborn(directory, Guards(), (LOOP, -0.1, 0.1), (" Odd.", -1.4, 0.1), (" Odder.", -2.5, 0.1))
    (segment,) = stubborn.hear()
    assert (segment.text, segment.temperature) == (" Odd.", 0.2)
    assert stubborn.temperatures == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_what_repeats_itself_at_every_temperature_is_no_text(directory: Path) -> None:
    assert Stubborn(directory, Guards(), (LOOP, -0.1, 0.1)).hear() == []


def test_where_nobody_speaks_and_the_text_is_improbable_there_is_none_and_no_second_try(directory: Path) -> None:
    stubborn = Stubborn(directory, Guards(), (" Thank you.", -1.5, 0.8))
    assert stubborn.hear() == []
    assert stubborn.temperatures == [0.0]


def test_a_probable_text_is_one_though_it_may_be_that_nobody_speaks(directory: Path) -> None:
    (segment,) = Stubborn(directory, Guards(), (" Thank you.", -0.5, 0.8)).hear()
    assert segment.text == " Thank you."


@pytest.mark.parametrize(
    ("guards", "said"),
    [
        (Guards(logprob=-0.3), (" Good.", -0.5, 0.7)),
        (Guards(logprob=-0.3, no_speech=0.05), (" Good.", -0.5, 0.1)),
        (Guards(compression=0.5), (" Good, and long enough.", -0.1, 0.0)),
    ],
    ids=["improbable", "nobody speaks", "repeats itself"],
)
def test_each_threshold_is_what_it_was_set_to(directory: Path, guards: Guards, said: tuple[str, float, float]) -> None:
    assert len(Stubborn(directory, Guards(), said).hear()) == 1
    assert Stubborn(directory, guards, said).hear() == []


def test_a_temperature_that_was_asked_for_is_the_only_one(directory: Path) -> None:
    stubborn = Stubborn(directory, Guards(), (" Odd.", -1.5, 0.1))
    (segment,) = stubborn.hear(temperature=0.6)
    assert stubborn.temperatures == [0.6]
    assert segment.temperature == 0.6
    stubborn = Stubborn(directory, Guards(), (" Odd.", -1.5, 0.1))
    stubborn.hear(temperature=0.0)
    assert stubborn.temperatures == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_windows_of_a_batch_are_each_tried_as_often_as_they_need(directory: Path) -> None:
    engine = load(directory, guards=Guards())
    bad, good = Said(timed(engine, 0.0, LOOP, 2.0)), Said(timed(engine, 0.0, " Good.", 2.0))
    answers = iter([good, bad, bad, good, bad, bad, good, good])
    model = whisper_model.script(engine, lambda prompt, temperature: next(answers))
    given = [task_of(engine, seconds, job(language="en")) for seconds in (1.0, 2.0, 3.0, 4.0)]
    told = decoded(engine, given, size=4)
    assert [[(each.text, each.temperature) for each in segments] for segments in told] == [
        [(" Good.", 0.0)],
        [(" Good.", 0.4)],
        [(" Good.", 0.4)],
        [(" Good.", 0.0)],
    ]
    assert len(model.options) == 3


# Prompts.


def prompt_of(engine: WhisperEngine, **options: Any) -> list[int]:
    return list(engine.heard(job(**options)).prompt)


def test_a_prompt_is_cut_to_what_the_model_takes_from_its_end(engine: WhisperEngine) -> None:
    said = " ".join(f"word{number}" for number in range(500))
    (before, *rest) = prompt_of(engine, prompt=said)
    assert [before] == language_ids(engine, "startofprev")
    assert len(rest) == 223
    assert said.endswith(engine._model.hf_tokenizer.decode(rest))


def test_names_come_before_the_prompt_and_all_of_them_count(engine: WhisperEngine) -> None:
    (_, *rest) = prompt_of(engine, prompt="And so on. " * 50, keywords=("Voxgate", "Whisper"))
    text = engine._model.hf_tokenizer.decode(rest)
    assert text.startswith(" Voxgate, Whisper")
    assert text.endswith("so on.")
    assert len(rest) == 223
    assert len(prompt_of(engine, prompt="And so on.", keywords=("Voxgate",) * 100)) == 224


@pytest.mark.parametrize("special", ["<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|de|>", "<|0.00|>"])
def test_what_a_prompt_says_gives_the_model_no_orders(engine: WhisperEngine, special: str) -> None:
    plain = prompt_of(engine, prompt="Before after.", keywords=("Voxgate",))
    assert prompt_of(engine, prompt=f"Before{special} after.{special}", keywords=(f"Voxgate{special}",)) == plain


def test_without_a_prompt_there_is_none(engine: WhisperEngine) -> None:
    assert prompt_of(engine) == prompt_of(engine, prompt="") == []
    (_, *rest) = prompt_of(engine, prompt="  Short. ")
    assert engine._model.hf_tokenizer.decode(rest) == " Short."


def test_a_prompt_of_any_length_leaves_room_for_the_text(engine: WhisperEngine) -> None:
    _, segments = transcribe(engine, job(language="en", prompt="word " * 1000, words=True))
    assert segments


# Memory.


def test_a_model_comes_and_goes_and_is_the_same(directory: Path) -> None:
    engine = load(directory)
    before = transcribe(engine, job(language="en", words=True))
    assert engine.loaded
    engine.unload()
    assert not engine.loaded
    waiting = tasks(engine, job(language="en", words=True, prompt="Hello."))  # others may prepare meanwhile
    engine.load()
    assert engine.loaded
    assert transcribe(engine, job(language="en", words=True)) == before
    assert decoded(engine, waiting, size=1)
    assert engine.bytes == (directory / "model.bin").stat().st_size


def test_the_fastest_batch_is_found_among_those_that_are_allowed(engine: WhisperEngine) -> None:
    size, speed = engine.warm_up(most=1)
    assert size == 1
    assert speed > 0
    assert engine.warm_up(most=4)[0] in (1, 2, 4)


def test_a_batch_that_does_not_fit_is_not_taken(directory: Path) -> None:
    engine = load(directory)

    class Small(Scripted):
        def generate(self, encoded: Any, prompts: Sequence[list[int]], **options: Any) -> list[Said]:
            if len(prompts) > most:
                raise RuntimeError("CUDA failed with error out of memory")
            return super().generate(encoded, prompts, **options)

    engine._model.model = Small(engine._model.model, lambda prompt, temperature: Said([]))
    most = 2
    assert engine.warm_up(most=64)[0] <= 2
    most = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.warm_up(most=64)


def until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# Speech that is still being spoken.


SENTENCE = pcm_of("b-slt.mp3")
SECOND = 2 * RATE  # bytes


@pytest.fixture(scope="module")
def speech(engine: WhisperEngine) -> Detector:
    return engine.speech


class Ear:
    """Hears that there is something, in a language of its own, and notes what it was asked."""

    def __init__(self, speech: Detector, language: str | None = "de") -> None:
        self.speech = speech
        self.language = language
        self.asked: list[tuple[Samples, str | None, bool]] = []

    def __call__(self, samples: Samples, language: str | None, words: bool) -> tuple[str | None, Segment | None]:
        self.asked.append((samples, language, words))
        return self.language, Segment(0.0, len(samples) / RATE, " heard")

    def listen(self, language: str | None = None, *, interim: bool = False) -> WhisperListening:
        return WhisperListening(self, self.speech, language, interim=interim)

    @property
    def finals(self) -> list[Samples]:
        return [samples for samples, _, words in self.asked if words]


def hear(listening: Listening, pcm: bytes, size: int = SECOND) -> list[Heard]:
    """What is heard of it, looked for after each piece."""
    heard: list[Heard] = []
    for at in range(0, len(pcm), size):
        listening.push(pcm[at : at + size])
        heard += listening.step()
    return heard


def end(listening: Listening) -> list[Heard]:
    listening.end()
    heard = list(listening.step())
    listening.close()
    return heard


def said(heard: list[Heard]) -> list[Segment]:
    return [each.segment for each in heard if each.final and each.segment.text]


def check(heard: list[Heard], finals: list[Samples], pcm: bytes) -> None:
    """Each final is of the samples that its times name, and none of them is in two."""
    whole = np.frombuffer(pcm, "<i2").astype(np.float32) / np.float32(32768)
    told = said(heard)
    assert len(told) == len(finals)
    for segment, samples in zip(told, finals, strict=True):
        first = round(segment.start * RATE)
        assert np.array_equal(whole[first : first + len(samples)], samples)
        assert segment.end == pytest.approx((first + len(samples)) / RATE)
    assert all(a.end <= b.start for a, b in pairwise(told))
    ends = [each.segment.end for each in heard if each.final]
    assert ends == pytest.approx(sorted(ends))


def share_heard(finals: list[Samples], pcm: bytes) -> float:
    """How much of the sound is in what was listened to."""
    loud = np.frombuffer(pcm, "<i2").astype(np.float64) / 32768
    return float(sum((samples.astype(np.float64) ** 2).sum() for samples in finals) / (loud**2).sum())


@pytest.mark.parametrize("size", [3200, 40_000, 10**7])
def test_what_is_said_is_listened_to_once_and_all_of_it(speech: Detector, size: int) -> None:
    ear = Ear(speech)
    pcm = (SENTENCE + bytes(SECOND)) * 2
    listening = ear.listen()
    heard = hear(listening, pcm, size) + end(listening)
    check(heard, ear.finals, pcm)
    assert len(ear.finals) == 2
    assert share_heard(ear.finals, pcm) > 0.98
    assert all(words for _, _, words in ear.asked)


def test_a_language_is_detected_once_and_stays(speech: Detector) -> None:
    for given, asked in ((None, [None, "de"]), ("nb", ["nb", "nb"])):
        ear = Ear(speech)
        listening = ear.listen(given)
        hear(listening, (SENTENCE + bytes(SECOND)) * 2)
        end(listening)
        assert [language for _, language, _ in ear.asked] == asked


def test_where_none_was_heard_it_is_asked_for_again(speech: Detector) -> None:
    ear = Ear(speech, None)
    listening = ear.listen()
    hear(listening, (SENTENCE + bytes(SECOND)) * 2)
    assert [language for _, language, _ in ear.asked] == [None, None]


def test_a_final_comes_when_its_pause_does_and_not_at_the_end(speech: Detector) -> None:
    listening = Ear(speech).listen()
    assert len(said(hear(listening, SENTENCE + bytes(2 * SECOND), 3200))) == 1
    assert said(end(listening)) == []


def test_partials_are_of_the_utterance_that_goes_on(speech: Detector) -> None:
    ear = Ear(speech)
    listening = ear.listen(interim=True)
    heard = hear(listening, SENTENCE + bytes(2 * SECOND), 3200) + end(listening)
    partials = [each.segment for each in heard if not each.final]
    (final,) = said(heard)
    assert len(partials) >= 2
    assert all(a.end < b.end for a, b in pairwise(partials))
    assert all(abs(each.start - final.start) < 0.2 and each.end <= final.end + 0.7 for each in partials)
    assert heard.index(Heard(partials[-1], final=False)) < heard.index(Heard(final, final=True))


def test_finalize_ends_the_utterance_there_and_the_next_one_begins_after_it(speech: Detector) -> None:
    ear = Ear(speech)
    listening = ear.listen()
    heard = hear(listening, SENTENCE[: 2 * SECOND])
    assert said(heard) == []
    listening.finalize()
    heard += listening.step()
    (before,) = said(heard)
    listening.finalize()
    assert said(list(listening.step())) == []
    heard += hear(listening, SENTENCE[2 * SECOND :]) + end(listening)
    check(heard, ear.finals, SENTENCE)
    (_, after) = said(heard)
    assert before.end <= 2.0 <= after.start
    assert share_heard(ear.finals, SENTENCE) > 0.98


def test_audio_that_came_after_finalize_belongs_to_the_next_utterance(speech: Detector) -> None:
    ear = Ear(speech)
    listening = ear.listen()
    listening.push(SENTENCE[: 2 * SECOND])
    listening.finalize()
    listening.push(SENTENCE[2 * SECOND :])
    heard = list(listening.step()) + end(listening)
    check(heard, ear.finals, SENTENCE)
    assert said(heard)[0].end <= 2.0 <= said(heard)[1].start


def test_finalize_in_silence_and_before_anything_gives_nothing(speech: Detector) -> None:
    ear = Ear(speech)
    listening = ear.listen(interim=True)
    listening.finalize()
    heard = [*listening.step(), *hear(listening, bytes(3 * SECOND))]
    listening.finalize()
    heard += [*listening.step(), *end(listening)]
    assert said(heard) == []
    assert ear.asked == []


def test_silence_moves_on_and_is_not_kept(speech: Detector) -> None:
    ear = Ear(speech)
    listening = ear.listen(interim=True)
    for second in range(1, 61):
        ends = [each.segment.end for each in hear(listening, bytes(SECOND), 16_000)]
        assert max(ends) >= second - 1
        assert len(listening._samples) <= 2 * RATE
    assert ear.asked == []


@pytest.mark.parametrize("size", [3 * SECOND, 10**7])
def test_speech_without_a_pause_is_cut_and_none_of_it_is_lost_or_heard_twice(speech: Detector, size: int) -> None:
    ear = Ear(speech)
    pcm = SENTENCE[8000 : 8000 + 2 * SECOND] * 35
    listening = ear.listen()
    heard = hear(listening, pcm, size) + end(listening)
    check(heard, ear.finals, pcm)
    assert all(len(samples) <= 28 * RATE for samples in ear.finals)
    assert len(ear.finals) >= 3
    assert share_heard(ear.finals, pcm) > 0.97


@pytest.mark.parametrize("silent", [22.9, 26.0, 27.2])
def test_speech_after_a_long_silence_that_came_at_once_is_one_utterance(speech: Detector, silent: float) -> None:
    ear = Ear(speech)
    pcm = bytes(round(silent * RATE) * 2) + SENTENCE
    listening = ear.listen()
    heard = hear(listening, pcm, 10**7) + end(listening)
    check(heard, ear.finals, pcm)
    assert all(len(samples) > RATE / 10 for samples in ear.finals), "less is nothing, and Whisper invents words for it"
    assert share_heard(ear.finals, pcm) > 0.98


def test_many_finalizes_at_once_are_each_where_they_were_said(speech: Detector) -> None:
    ear = Ear(speech)
    listening = ear.listen()
    pcm = SENTENCE * 12  # longer than a window
    for at in range(0, len(pcm), SECOND):
        listening.push(pcm[at : at + SECOND])
        if at // SECOND in (0, 5, 33):
            listening.finalize()
    heard = list(listening.step()) + end(listening)
    check(heard, ear.finals, pcm)
    for cut in (1.0, 6.0, 34.0):
        assert not any(each.start < cut < each.end for each in said(heard))
