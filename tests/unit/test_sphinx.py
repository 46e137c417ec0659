"""What the built-in recognizer must not hear, and how recordings are cut for it.

Speech itself is measured where fixtures of it are; everything here is made in code.
"""

from __future__ import annotations

import dataclasses
import math
import random
from array import array
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA
from voxgate.audio.decode import decode
from voxgate.engines import Listening
from voxgate.engines.sphinx import SphinxEngine
from voxgate.engines.voice import FRAME_SECONDS, LONGEST, RATE, regions
from voxgate.model import Heard, Segment

Wave = Callable[[float, random.Random], float]

SOUNDS: dict[str, Wave] = {
    "digital silence": lambda t, r: 0.0,
    "room noise": lambda t, r: r.gauss(0, 0.0005),
    "white noise": lambda t, r: r.gauss(0, 0.2),
    "mains hum": lambda t, r: 0.3 * sum(math.sin(math.tau * 50 * h * t) / h for h in range(1, 6)),
    "quiet tone": lambda t, r: 0.01 * math.sin(math.tau * 440 * t),
    "tone": lambda t, r: 0.5 * math.sin(math.tau * 440 * t),
    "chord": lambda t, r: 0.2 * sum(math.sin(math.tau * f * t) for f in (261.6, 329.6, 392.0)),
    "clicks": lambda t, r: 0.5 if t % 0.31 < 0.0003 else 0.0,
    "sweep": lambda t, r: 0.5 * math.sin(math.tau * (100 * t + 450 * t * t)),
    "siren": lambda t, r: 0.5 * math.sin(math.tau * 800 * t - 800 * math.cos(math.pi * t)),
    "noise that pulses like syllables": lambda t, r: r.gauss(0, 0.1) * (1 + 0.9 * math.sin(math.tau * 4 * t)),
    "ringing telephone": lambda t, r: (
        0.5 * math.sin(math.tau * 440 * t) * (t % 2 < 1) * (1 if t % 0.05 < 0.025 else -1)
    ),
}


def sound(make: Wave, seconds: float) -> bytes:
    r = random.Random(7)
    return array(
        "h", (max(-32768, min(32767, round(make(i / RATE, r) * 32767))) for i in range(int(seconds * RATE)))
    ).tobytes()


@pytest.fixture(scope="module")
def engine() -> SphinxEngine:
    return SphinxEngine()


@pytest.mark.parametrize("seconds", [1, 3])
@pytest.mark.parametrize("name", SOUNDS)
def test_no_words_are_heard_in(engine: SphinxEngine, name: str, seconds: int) -> None:
    assert [s.text for s in engine.recognize([sound(SOUNDS[name], seconds)])] == []


@pytest.mark.parametrize("pcm", [[], [b""], [b"\1"], [b"\0" * 959]], ids=["nothing", "empty", "half a sample", "short"])
def test_too_little_sound_gives_nothing(engine: SphinxEngine, pcm: list[bytes]) -> None:
    assert list(engine.recognize(pcm)) == []


def test_what_was_decoded_before_leaves_no_trace(engine: SphinxEngine) -> None:
    # On the decoder itself: the sounds made here give no segments whose scores could be compared.
    pulses = sound(SOUNDS["noise that pulses like syllables"], 2)
    first = engine._decode(pulses)
    engine._decode(sound(SOUNDS["sweep"], 1))
    assert len(first) >= 2
    assert engine._decode(pulses) == first


@cache
def bursts() -> bytes:
    return sound(lambda t, r: r.gauss(0, 0.2) if t % 1.3 < 0.4 else 0.0, 4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4 * RATE * 2), max_size=12))
def test_regions_do_not_depend_on_how_the_samples_are_split(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(bursts())]
    pieces = [bursts()[a:b] for a, b in pairwise(edges)]
    whole = list(regions([bursts()]))
    assert len(whole) >= 3
    assert list(regions(pieces)) == whole


def test_unbroken_sound_is_cut_without_losing_or_repeating_any() -> None:
    pcm = sound(SOUNDS["white noise"], 30)
    found = list(regions(pcm[i : i + 4000] for i in range(0, len(pcm), 4000)))
    assert all(len(r.levels) <= LONGEST for r in found)
    assert len(found) >= 3
    for a, b in pairwise(found):
        assert b.start == pytest.approx(a.start + len(a.levels) * FRAME_SECONDS)
    joined = b"".join(r.pcm for r in found)
    first = round(found[0].start * RATE) * 2
    assert joined[: len(pcm) - first] == pcm[first:]


def test_a_region_is_given_out_before_the_recording_ends() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield bursts()

    assert next(iter(regions(endless()))).start < 1.0


# Speech that is still being spoken.


def speech(name: str) -> bytes:
    return b"".join(decode(str(DATA / name), name.rpartition(".")[2], max_seconds=60))


SHORT, SENTENCE, SENTENCES = speech("a-wav-s16.wav"), speech("b-slt.mp3"), speech("long-slt.flac")
SHORT_TEXT, TEXT = "please send the letter", "the weather is nice today and we are going to the park"
PAUSE = bytes(32_000)


def hear(listening: Listening, pcm: bytes, size: int = 3200) -> list[Heard]:
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


@pytest.fixture(scope="module")
def whole(engine: SphinxEngine) -> Callable[[bytes], list[Segment]]:
    """What is heard of a recording, by its samples."""

    @cache
    def recognized(pcm: bytes) -> list[Segment]:
        return [dataclasses.replace(each, text=each.text.strip()) for each in engine.recognize([pcm])]

    return recognized


def said(heard: list[Heard]) -> list[Segment]:
    return [each.segment for each in heard if each.final and each.segment.text]


@pytest.mark.parametrize(
    ("speech", "utterances", "size", "interim"),
    [
        (SENTENCES, 3, 640, True),
        (SHORT + PAUSE + SHORT, 2, 3198, False),
        (SHORT + PAUSE + SHORT, 2, 50_000, True),
        (SENTENCES, 3, 10**6, False),
    ],
    ids=["640-True", "3198-False", "50000-True", "1000000-False"],
)
def test_what_is_heard_live_is_what_is_heard_of_the_recording(
    engine: SphinxEngine,
    whole: Callable[[bytes], list[Segment]],
    speech: bytes,
    utterances: int,
    size: int,
    interim: bool,
) -> None:
    assert len(whole(speech)) == utterances
    listening = engine.listen("en", interim=interim)
    heard = hear(listening, speech, size) + end(listening)
    assert said(heard) == whole(speech)
    assert interim or all(each.final for each in heard)


def test_a_final_comes_when_its_pause_does_and_not_at_the_end(engine: SphinxEngine) -> None:
    listening = engine.listen(None, interim=False)
    assert [each.text for each in said(hear(listening, SHORT + PAUSE))] == [SHORT_TEXT]
    assert said(end(listening)) == []


def test_partials_are_of_the_utterance_that_goes_on_and_grow(engine: SphinxEngine) -> None:
    listening = engine.listen("en", interim=True)
    heard = hear(listening, (SHORT + PAUSE) * 3) + end(listening)
    shown: list[Segment] = []
    finals = 0
    for each in heard:
        if each.final:
            if each.segment.text:
                finals += 1
                assert shown
                assert all(part.start <= each.segment.start and part.text for part in shown)
            shown = []
        else:
            assert all(part.start == each.segment.start and part.end < each.segment.end for part in shown)
            shown.append(each.segment)
    assert finals == 3


def test_finalize_ends_the_utterance_there_and_the_next_one_begins_after_it(engine: SphinxEngine) -> None:
    for interim in (False, True):
        listening = engine.listen("en", interim=interim)
        first = hear(listening, SENTENCE[: 2 * 32_000])
        assert said(first) == []
        listening.finalize()
        first = list(listening.step())
        (before,) = said(first)
        assert before.text.startswith("the weather is nice")
        listening.finalize()
        assert said(list(listening.step())) == []
        rest = hear(listening, SENTENCE[2 * 32_000 :]) + end(listening)
        (after,) = said(rest)
        assert after.text.endswith("park")
        assert before.end <= 2.0 <= after.start
        assert after.end <= len(SENTENCE) / 32_000


def test_finalize_in_silence_and_before_anything_gives_nothing(engine: SphinxEngine) -> None:
    listening = engine.listen("en", interim=True)
    listening.finalize()
    assert list(listening.step()) == []
    heard = hear(listening, bytes(64_000))
    listening.finalize()
    heard += [*listening.step(), *hear(listening, SHORT), *end(listening)]
    (only,) = said(heard)
    assert only.text == SHORT_TEXT
    assert only.start >= 2.0


@pytest.mark.parametrize("name", ["digital silence", "white noise", "mains hum"])
def test_where_nobody_speaks_there_is_no_text_and_time_goes_on(engine: SphinxEngine, name: str) -> None:
    listening = engine.listen(None, interim=True)
    pcm = sound(SOUNDS[name], 1) * 12
    heard = hear(listening, pcm) + end(listening)
    assert [each.segment.text for each in heard if each.segment.text] == []
    ends = [0.0, *(each.segment.end for each in heard), len(pcm) / 32_000]
    assert max(b - a for a, b in pairwise(ends)) < 10.0  # seconds, of which no word was given


def test_speech_without_a_pause_is_cut_and_none_of_it_is_lost_or_heard_twice(
    engine: SphinxEngine, whole: Callable[[bytes], list[Segment]]
) -> None:
    # From word to word of one sentence, over and over, without the silence around it.
    pcm = SENTENCE[16_000:-16_000] * 5
    listening = engine.listen("en", interim=False)
    while_spoken = said(hear(listening, pcm, 32_000))
    finals = while_spoken + said(end(listening))
    assert len(while_spoken) >= 1
    assert all(each.end - each.start < 10.0 for each in finals)
    assert all(a.end <= b.start for a, b in pairwise(finals))
    assert finals == whole(pcm)


@pytest.mark.parametrize("interim", [False, True])
def test_a_session_that_was_dropped_in_an_utterance_leaves_no_trace(engine: SphinxEngine, interim: bool) -> None:
    def whole() -> list[Heard]:
        listening = engine.listen("en", interim=interim)
        return hear(listening, SHORT) + end(listening)

    alone = whole()
    dropped = engine.listen("en", interim=True)
    hear(dropped, SENTENCES[: 32_000 * 3 // 2])
    dropped.close()
    dropped.close()
    assert whole() == alone


def test_a_session_without_audio_ends_without_a_word(engine: SphinxEngine) -> None:
    assert end(engine.listen("en", interim=True)) == []
