"""What the built-in recognizer must not hear, and how recordings are cut for it.

Speech itself is measured where fixtures of it are; everything here is made in code.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxgate.engines.sphinx import SphinxEngine
from voxgate.engines.voice import FRAME_SECONDS, LONGEST, RATE, regions

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


BURSTS = sound(lambda t, r: r.gauss(0, 0.2) if t % 1.3 < 0.4 else 0.0, 4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, len(BURSTS)), max_size=12))
def test_regions_do_not_depend_on_how_the_samples_are_split(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(BURSTS)]
    pieces = [BURSTS[a:b] for a, b in pairwise(edges)]
    whole = list(regions([BURSTS]))
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
            yield BURSTS

    assert next(iter(regions(endless()))).start < 1.0
