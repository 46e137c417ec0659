"""The Whisper engine in this process, with a real model of tiny shape and random weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from conftest import DATA
from fakes import whisper_model
from voxgate.audio.decode import RATE, decode
from voxgate.engines import Job, Listening, whisper
from voxgate.engines.whisper import WhisperEngine, _pieces, _quietest
from voxgate.engines.whisper_live import Samples, WhisperListening
from voxgate.model import Feature, Heard, Segment

SPEECH = DATA / "b-slt.mp3"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> WhisperEngine:
    model = whisper_model.build(tmp_path_factory.mktemp("models") / "tiny")
    return WhisperEngine(model=str(model), device="cpu")


def job(path: Path = SPEECH, container: str = "mp3", **options: object) -> Job:
    # One temperature: a random model never satisfies Whisper's tests, and would be tried at all six.
    given: dict[str, object] = {"max_seconds": 60.0, "temperature": 0.2, **options}
    return Job(path=str(path), container=container, **given)  # type: ignore[arg-type] # the options of one job


def test_it_speaks_what_its_vocabulary_has_under_our_codes(engine: WhisperEngine) -> None:
    expected = frozenset({"en", "es", "fr", "de", "ja", "jv", "no", "nb", "yue"})
    assert engine.capabilities.languages == expected
    assert Feature.KEYWORDS in engine.capabilities.features


def test_an_english_only_model_speaks_english_alone(tmp_path: Path) -> None:
    model = whisper_model.build(tmp_path / "tiny.en", multilingual=False)
    engine = WhisperEngine(model=str(model), device="cpu")
    assert engine.capabilities.languages == frozenset({"en"})
    assert engine.transcribe(job()).language == "en"


def test_a_language_is_detected_or_taken_as_given(engine: WhisperEngine) -> None:
    assert engine.transcribe(job()).language in {"en", "es", "fr", "de", "ja", "jv", "no", "yue"}
    assert engine.transcribe(job(language="jv")).language == "jv"
    assert engine.transcribe(job(language="nb")).language == "nb"


def test_words_only_when_asked_for(engine: WhisperEngine) -> None:
    assert all(segment.words is None for segment in engine.transcribe(job(language="en")).segments)
    with_words = list(engine.transcribe(job(language="en", words=True, keywords=("voxgate",), prompt="Hi.")).segments)
    assert all(segment.words is not None for segment in with_words)


def test_every_time_is_inside_the_audio_and_every_number_is_json(engine: WhisperEngine) -> None:
    for segment in engine.transcribe(job(language="en", words=True)).segments:
        assert 0 <= segment.start <= segment.end <= 3.04
        for number in (segment.avg_logprob, segment.no_speech_prob, segment.compression_ratio):
            assert type(number) is float


def test_silence_is_empty_and_in_no_language(engine: WhisperEngine) -> None:
    recognition = engine.transcribe(job(DATA / "silence.flac", "flac"))
    assert (recognition.language, list(recognition.segments)) == (None, [])


def test_long_audio_is_cut_where_it_is_quiet_and_nothing_is_lost() -> None:
    noise = np.random.default_rng(0).integers(-3000, 3000, 1250 * RATE, dtype=np.int16)
    noise[595 * RATE : 596 * RATE] = 0
    pcm = noise.tobytes()
    pieces = list(_pieces(pcm[i : i + 9_998] for i in range(0, len(pcm), 9_998)))
    assert [offset for offset, _ in pieces] == list(np.cumsum([0, *(len(samples) for _, samples in pieces[:-1])]))
    assert 595 * RATE < pieces[1][0] < 596 * RATE
    assert max(len(samples) for _, samples in pieces) <= 601 * RATE
    joined = np.concatenate([samples for _, samples in pieces])
    assert np.array_equal(np.round(joined * 32768).astype(np.int16), noise)


# Speech that is still being spoken.


def speech(name: str) -> bytes:
    return b"".join(decode(str(DATA / name), name.rpartition(".")[2], max_seconds=60))


SENTENCE, SENTENCES = speech("b-slt.mp3"), speech("long-slt.flac")
SECOND = 2 * RATE  # bytes


class Ear:
    """Hears that there is something, in a language of its own, and notes what it was asked."""

    def __init__(self, language: str | None = "de") -> None:
        self.language = language
        self.asked: list[tuple[Samples, str | None, bool]] = []

    def __call__(self, samples: Samples, language: str | None, words: bool) -> tuple[str | None, Segment | None]:
        self.asked.append((samples, language, words))
        return self.language, Segment(0.0, len(samples) / RATE, " heard")

    def listen(self, language: str | None = None, *, interim: bool = False) -> WhisperListening:
        return WhisperListening(self, _quietest, language, interim=interim)

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
    assert ends == sorted(ends)


def share_heard(finals: list[Samples], pcm: bytes) -> float:
    """How much of the sound is in what was listened to."""
    loud = np.frombuffer(pcm, "<i2").astype(np.float64) / 32768
    return float(sum((samples.astype(np.float64) ** 2).sum() for samples in finals) / (loud**2).sum())


@pytest.mark.parametrize("size", [3200, 40_000, 10**7])
def test_what_is_said_is_listened_to_once_and_all_of_it(size: int) -> None:
    ear = Ear()
    pcm = (SENTENCE + bytes(SECOND)) * 2
    listening = ear.listen()
    heard = hear(listening, pcm, size) + end(listening)
    check(heard, ear.finals, pcm)
    assert len(ear.finals) == 2
    assert share_heard(ear.finals, pcm) > 0.98
    assert all(words for _, _, words in ear.asked)


def test_a_language_is_detected_once_and_stays() -> None:
    for given, asked in ((None, [None, "de"]), ("nb", ["nb", "nb"])):
        ear = Ear()
        listening = ear.listen(given)
        hear(listening, (SENTENCE + bytes(SECOND)) * 2)
        end(listening)
        assert [language for _, language, _ in ear.asked] == asked


def test_where_none_was_heard_it_is_asked_for_again() -> None:
    ear = Ear(None)
    listening = ear.listen()
    hear(listening, (SENTENCE + bytes(SECOND)) * 2)
    assert [language for _, language, _ in ear.asked] == [None, None]


def test_a_final_comes_when_its_pause_does_and_not_at_the_end() -> None:
    listening = Ear().listen()
    assert len(said(hear(listening, SENTENCE + bytes(2 * SECOND), 3200))) == 1
    assert said(end(listening)) == []


def test_partials_are_of_the_utterance_that_goes_on() -> None:
    ear = Ear()
    listening = ear.listen(interim=True)
    heard = hear(listening, SENTENCE + bytes(2 * SECOND), 3200) + end(listening)
    partials = [each.segment for each in heard if not each.final]
    (final,) = said(heard)
    assert len(partials) >= 2
    assert all(a.end < b.end for a, b in pairwise(partials))
    assert all(abs(each.start - final.start) < 0.2 and each.end <= final.end + 0.7 for each in partials)
    assert heard.index(Heard(partials[-1], final=False)) < heard.index(Heard(final, final=True))


def test_finalize_ends_the_utterance_there_and_the_next_one_begins_after_it() -> None:
    ear = Ear()
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


def test_audio_that_came_after_finalize_belongs_to_the_next_utterance() -> None:
    ear = Ear()
    listening = ear.listen()
    listening.push(SENTENCE[: 2 * SECOND])
    listening.finalize()
    listening.push(SENTENCE[2 * SECOND :])
    heard = list(listening.step()) + end(listening)
    check(heard, ear.finals, SENTENCE)
    assert said(heard)[0].end <= 2.0 <= said(heard)[1].start


def test_finalize_in_silence_and_before_anything_gives_nothing() -> None:
    ear = Ear()
    listening = ear.listen(interim=True)
    listening.finalize()
    heard = [*listening.step(), *hear(listening, bytes(3 * SECOND))]
    listening.finalize()
    heard += [*listening.step(), *end(listening)]
    assert said(heard) == []
    assert ear.asked == []


def test_silence_moves_on_and_is_not_kept() -> None:
    ear = Ear()
    listening = ear.listen(interim=True)
    for second in range(1, 61):
        ends = [each.segment.end for each in hear(listening, bytes(SECOND), 16_000)]
        assert max(ends) >= second - 1
        assert len(listening._samples) <= 2 * RATE
    assert ear.asked == []


@pytest.mark.parametrize("size", [3 * SECOND, 10**7])
def test_speech_without_a_pause_is_cut_and_none_of_it_is_lost_or_heard_twice(size: int) -> None:
    ear = Ear()
    pcm = SENTENCE[8000 : 8000 + 2 * SECOND] * 35
    listening = ear.listen()
    heard = hear(listening, pcm, size) + end(listening)
    check(heard, ear.finals, pcm)
    assert all(len(samples) <= 28 * RATE for samples in ear.finals)
    assert len(ear.finals) >= 3
    assert share_heard(ear.finals, pcm) > 0.97


@pytest.mark.parametrize("silent", [22.9, 26.0, 27.2])
def test_speech_after_a_long_silence_that_came_at_once_is_one_utterance(silent: float) -> None:
    ear = Ear()
    pcm = bytes(round(silent * RATE) * 2) + SENTENCE
    listening = ear.listen()
    heard = hear(listening, pcm, 10**7) + end(listening)
    check(heard, ear.finals, pcm)
    assert all(len(samples) > RATE / 10 for samples in ear.finals), "less is nothing, and Whisper invents words for it"
    assert share_heard(ear.finals, pcm) > 0.98


def test_many_finalizes_at_once_are_each_where_they_were_said() -> None:
    ear = Ear()
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


def test_a_model_listens_and_its_times_are_within_the_audio(
    engine: WhisperEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whisper, "_TEMPERATURES", (0.2,))  # as in `job`
    listening = engine.listen(None, interim=False)
    pcm = SENTENCE + bytes(SECOND)
    finals = said(hear(listening, pcm) + end(listening))
    assert finals
    for segment in finals:
        assert 0 <= segment.start <= segment.end <= len(pcm) / SECOND
        assert segment.words is not None
        assert all(segment.start <= word.start <= word.end <= segment.end + 0.01 for word in segment.words)
    assert all(a.end <= b.start for a, b in pairwise(finals))
    assert listening._language in {"en", "es", "fr", "de", "ja", "jv", "no", "yue"}
    assert engine.sessions > 1
