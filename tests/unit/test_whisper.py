"""The Whisper engine in this process, with a real model of tiny shape and random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import DATA
from fakes import whisper_model
from voxgate.audio.decode import RATE
from voxgate.engines import Job
from voxgate.engines.whisper import WhisperEngine, _pieces
from voxgate.model import Feature

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
