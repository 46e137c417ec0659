"""What must never become text, before an engine that finds fluent words in whatever it is given."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import DATA, RECORDINGS, Recording
from fakes import whisper_model
from fakes.whisper_model import Said
from voxgate.audio.decode import RATE, decode
from voxgate.engines import Job
from voxgate.engines.batching import Again
from voxgate.engines.whisper import Guards, WhisperEngine
from voxgate.model import Segment

Wave = NDArray[np.float64]
INVENTED = " Thank you for watching, and do not forget to subscribe."
SECONDS = 84
TIMES = np.arange(SECONDS * RATE) / RATE


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whisper_model.build(tmp_path_factory.mktemp("models") / "tiny")


def inventing(directory: Path, guards: Guards | None = None) -> WhisperEngine:
    """One that always hears the same sentence, and is sure of it."""
    engine = WhisperEngine(str(directory), name="tiny", device="cpu", guards=guards)
    text = whisper_model.timed(engine, 0.0, INVENTED, 2.0)
    whisper_model.script(engine, lambda prompt, temperature: Said(text))
    return engine


def texts(engine: WhisperEngine, path: Path, container: str = "wav") -> list[Segment]:
    heard = engine.heard(Job(path=str(path), container=container, max_seconds=4 * 3600.0, language="en"))
    segments: list[Segment] = []
    for row in filter(None, engine.rows(heard)):
        (outcome,) = engine.decode([row.content])
        assert not isinstance(outcome, Again)
        segments += outcome
    return segments


def write(path: Path, *sounds: Wave) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        for sound in sounds:
            file.writeframes((sound.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return path


def random() -> np.random.Generator:
    return np.random.default_rng(7)


def pink(count: int) -> Wave:
    spectrum = np.fft.rfft(random().normal(size=count))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    noise = np.fft.irfft(spectrum, count)
    return np.asarray(noise / np.abs(noise).max())


def tone(hertz: float) -> Wave:
    return np.asarray(np.sin(2 * np.pi * hertz * TIMES))


def notes(pitches: list[float], seconds: float, decay: float, overtones: int) -> Wave:
    within = TIMES % seconds
    pitch = np.array(pitches)[(TIMES / seconds).astype(int) % len(pitches)]
    sound = sum(np.sin(2 * np.pi * pitch * n * within) / n for n in range(1, overtones + 1))
    return np.asarray(sound * np.exp(-within / decay) / overtones)


SOUNDS: dict[str, Callable[[], Wave]] = {
    "silence": lambda: np.zeros(len(TIMES)),
    "white noise": lambda: random().normal(0, 0.3, len(TIMES)),
    "white noise that comes and goes": lambda: random().normal(0, 0.3, len(TIMES)) * np.where(TIMES % 7 < 3, 1, 0.01),
    "pink noise": lambda: pink(len(TIMES)),
    "mains hum": lambda: np.asarray(sum(tone(50 * n) / n for n in range(1, 8)) / 2.5),
    "another mains hum": lambda: np.asarray(sum(tone(60 * n) / n for n in range(1, 12, 2)) / 2),
    "clicks": lambda: np.where(TIMES % 0.31 < 0.0004, 1.0, 0.0),
    "crackle": lambda: np.where(random().random(len(TIMES)) < 0.0003, 1.0, 0.0),
    "a low tone": lambda: tone(110),
    "a tone": lambda: tone(440),
    "a high tone": lambda: tone(3000),
    "beeps": lambda: tone(1000) * (TIMES % 1 < 0.3),
}


@pytest.mark.parametrize("loudness", [0.5, 0.02])
def test_a_thousand_seconds_of_noise_are_no_text(directory: Path, tmp_path: Path, loudness: float) -> None:
    assert len(SOUNDS) * SECONDS >= 1000
    path = write(tmp_path / "noise.wav", *(loudness * make() for make in SOUNDS.values()))
    assert texts(inventing(directory), path) == []


MUSIC: dict[str, Callable[[], Wave]] = {
    "a melody": lambda: notes([262, 294, 330, 349, 392, 440, 494, 523], 0.4, 0.3, 5),
    "a piano": lambda: notes([131, 165, 196, 262, 196, 165], 0.25, 0.5, 8),
    "a chord": lambda: np.asarray(sum(tone(hertz) for hertz in (261.6, 329.6, 392.0)) / 3),
    "drums": lambda: random().normal(0, 0.5, len(TIMES)) * np.exp(-(TIMES % 0.5) / 0.05),
    "a siren": lambda: np.sin(2 * np.pi * 800 * TIMES - 800 * np.cos(np.pi * TIMES)),
    "keys of a telephone": lambda: (tone(770) + tone(1336)) / 2 * (TIMES % 0.4 < 0.2),
}


@pytest.mark.parametrize("name", MUSIC)
def test_music_is_no_text(directory: Path, tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "music.wav", *(loudness * MUSIC[name]()[: 40 * RATE] for loudness in (0.3, 0.03)))
    assert texts(inventing(directory), path) == []


@pytest.mark.parametrize("name", ["silence.flac", "hum.flac", "clicks.flac", "tone.flac", "noise.ogg"])
def test_recordings_without_speech_are_no_text(directory: Path, name: str) -> None:
    assert texts(inventing(directory), DATA / name, name.rpartition(".")[2]) == []


def test_what_is_steady_is_no_speech_whatever_the_detector_says(directory: Path, tmp_path: Path) -> None:
    engine = inventing(directory, Guards(speech=0.001))
    for name in ("silence", "white noise", "mains hum", "a tone"):
        assert texts(engine, write(tmp_path / "sound.wav", 0.3 * SOUNDS[name]()[: 10 * RATE])) == [], name


def test_speech_in_noise_as_loud_as_itself_passes_where_that_is_wanted(directory: Path, tmp_path: Path) -> None:
    sentence = np.frombuffer(b"".join(decode(str(DATA / "b-slt.mp3"), "mp3", max_seconds=60)), "<i2") / 32768
    level = np.sqrt((sentence[np.abs(sentence) > 0.02] ** 2).mean())
    sound = sentence + np.random.default_rng(5).normal(size=len(sentence)) * level
    path = write(tmp_path / "noisy.wav", 0.3 * sound / np.abs(sound).max())
    assert texts(inventing(directory), path) == []
    assert [segment.text for segment in texts(inventing(directory, Guards(steady=0.0)), path)] == [INVENTED]


# The same engine is let through where somebody speaks.

SPOKEN = [recording for recording in RECORDINGS if recording.text and recording.file.partition("-")[0] != "a"]


@pytest.mark.parametrize("recording", SPOKEN, ids=lambda recording: recording.file)
def test_speech_is_let_through(directory: Path, recording: Recording) -> None:
    told = texts(inventing(directory), recording.path, recording.path.suffix[1:])
    assert [segment.text for segment in told] == [INVENTED]
    assert 0 <= told[0].start <= told[0].end <= recording.duration + 0.1


@pytest.mark.parametrize("loudness", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_speech_is_found_at_any_loudness_and_in_noise(
    directory: Path, tmp_path: Path, loudness: float, noise: float
) -> None:
    sentence = np.frombuffer(b"".join(decode(str(DATA / "b-slt.mp3"), "mp3", max_seconds=60)), "<i2") / 32768
    sound = np.concatenate([np.zeros(40 * RATE), sentence, np.zeros(30 * RATE)])
    level = np.sqrt((sentence**2).mean())
    sound += np.random.default_rng(1).normal(0, noise * level, len(sound))
    (segment,) = texts(inventing(directory), write(tmp_path / "speech.wav", loudness * sound))
    assert 39.7 <= segment.start <= 41
    assert segment.end <= 43.3


@pytest.mark.parametrize("before", [0.2, 0.45, 0.6, 0.75])
def test_a_sentence_that_begins_just_before_a_block_ends_is_whole(
    directory: Path, tmp_path: Path, before: float
) -> None:
    sentence = np.frombuffer(b"".join(decode(str(DATA / "b-slt.mp3"), "mp3", max_seconds=60)), "<i2") / 32768
    sound = np.concatenate([np.zeros(round((30 - before) * RATE)), sentence, np.zeros(5 * RATE)])
    (segment,) = texts(inventing(directory), write(tmp_path / "speech.wav", sound))
    assert segment.start <= 30 - before + 0.15
