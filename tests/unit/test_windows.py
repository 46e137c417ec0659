"""How speech is put into windows, with a detector that takes for speech whatever is not zero."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from voxgate.audio.decode import RATE
from voxgate.engines import windows as module
from voxgate.engines.windows import LONGEST, Samples, Spans, Window

PAUSE = RATE // 2  # that ends a stretch of speech, as it ends one for the engine
SHORTEST = RATE // 5  # less is not taken for speech
MOST = 29 * RATE  # of it at once


def windows(pcm: Iterable[bytes], find: Callable[[Samples], Spans]) -> Iterator[Window]:
    """Those that there are, without the word that there is none yet."""
    return (window for window in module.windows(pcm, find) if not isinstance(window, float))


def detect(samples: Samples) -> Spans:
    """What is not zero, cut as Silero's detector cuts: at pauses, when it gets too long, and not at all if short."""
    (loud,) = np.nonzero(samples)
    spans: Spans = []
    for group in np.split(loud, np.nonzero(np.diff(loud) >= PAUSE)[0] + 1) if len(loud) else []:
        start, end = int(group[0]), int(group[-1]) + 1
        if end - start >= SHORTEST:
            spans += [(at, min(at + MOST, end)) for at in range(start, end, MOST)]
    return spans


def speech(*spoken: tuple[float, float], until: float) -> bytes:
    """Speech from one second to another, each of whose samples is unlike its neighbours, and silence else."""
    samples = np.zeros(round(until * RATE), "<i2")
    numbers = (np.arange(len(samples)) % 30_011 + 1).astype("<i2")
    for start, end in spoken:
        at = slice(round(start * RATE), round(end * RATE))
        samples[at] = numbers[at]
    return samples.tobytes()


def chunks(pcm: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(pcm), 2 * size):
        yield pcm[at : at + 2 * size]


def check(made: list[Window], pcm: bytes) -> None:
    """Every sample of speech is in one window, once, in order, and where its pieces say."""
    whole = np.frombuffer(pcm, "<i2")
    heard = np.zeros(len(whole), np.int8)
    after = 0
    for window in made:
        assert 0 < len(window.samples) <= LONGEST
        assert window.samples.dtype == np.float32
        assert sum(count for _, count in window.pieces) == len(window.samples)
        at = 0
        for first, count in window.pieces:
            assert first >= after
            after = first + count
            heard[first:after] += 1
            back = np.round(window.samples[at : at + count] * 32768).astype(np.int16)
            assert np.array_equal(back, whole[first:after])
            at += count
    assert heard.max(initial=0) <= 1
    assert not np.any(whole[heard == 0]), "of what was said, something is in no window"


@pytest.mark.parametrize("size", [160, 4096, 48_000, 10**7])
def test_speech_with_pauses_is_packed_into_windows_and_none_of_it_is_lost(size: int) -> None:
    spoken = [(3 + 7 * n, 8.5 + 7 * n) for n in range(30)]
    pcm = speech(*spoken, until=220)
    made = list(windows(chunks(pcm, size), detect))
    check(made, pcm)
    assert [len(window.pieces) for window in made] == [5] * 6
    assert all(window.seconds == pytest.approx(27.5) for window in made)
    assert [window.start for window in made] == [pytest.approx(3 + 35 * n) for n in range(6)]


@pytest.mark.parametrize("size", [1000, 16_000, 10**7])
def test_speech_without_a_pause_is_cut_and_none_of_it_is_lost(size: int) -> None:
    pcm = speech((0, 200), until=200)
    made = list(windows(chunks(pcm, size), detect))
    check(made, pcm)
    assert len(made) <= 12
    assert all(a.pieces[-1][0] + a.pieces[-1][1] == b.pieces[0][0] for a, b in pairwise(made))


def test_nothing_and_silence_and_a_click_give_no_window() -> None:
    for pcm in (b"", bytes(10), bytes(100 * 2 * RATE), speech((70, 70.1), until=140)):
        assert list(windows(chunks(pcm, 16_000), detect)) == []
    assert list(windows([], detect)) == []


@pytest.mark.parametrize("border", [30.0, 90.0])  # the first block's, and the second's
@pytest.mark.parametrize("before", [0.05, 0.15, 0.19, 0.21, 0.45, 0.55, 1.0])
def test_a_word_that_begins_just_before_a_block_ends_is_whole(border: float, before: float) -> None:
    pcm = speech((border - before, border + 2), until=150)
    made = list(windows(chunks(pcm, 1600), detect))
    check(made, pcm)
    assert [window.pieces for window in made] == [((round((border - before) * RATE), round((2 + before) * RATE)),)]


@pytest.mark.parametrize("after", [0.0, 0.1, 0.19, 0.4, 0.49, 0.5, 0.6])
def test_a_pause_at_the_end_of_a_block_is_a_pause(after: float) -> None:
    pcm = speech((25, 30 - after), (30.7, 33), until=40)
    made = list(windows(chunks(pcm, 1600), detect))
    check(made, pcm)
    assert [piece for window in made for piece in window.pieces] == [
        (25 * RATE, round((5 - after) * RATE)),
        (round(30.7 * RATE), round(2.3 * RATE)),
    ]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0.25, 28.0), st.floats(0.6, 20.0)), max_size=12),
    st.integers(800, 200_000),
)
def test_whatever_is_said_is_in_one_window_once(spoken: list[tuple[float, float]], size: int) -> None:
    stretches, at = [], 0.0
    for seconds, pause in spoken:
        stretches.append((at + pause, at + pause + seconds))
        at += pause + seconds
    pcm = speech(*stretches, until=at + 1)
    made = list(windows(chunks(pcm, size), detect))
    check(made, pcm)
    pieces = [piece for window in made for piece in window.pieces]
    assert [first for first, _ in pieces] == [round(start * RATE) for start, _ in stretches]


def test_a_window_is_there_as_soon_as_it_is_full_and_the_first_one_early() -> None:
    read = 0

    def pcm() -> Iterator[bytes]:
        nonlocal read
        whole = speech(*((n * 10, n * 10 + 9) for n in range(60)), until=600)
        for chunk in chunks(whole, 16_000):
            read += 1
            yield chunk

    made = windows(pcm(), detect)
    next(made)
    assert read <= 91
    next(made)
    assert read <= 151


def test_how_far_it_has_come_is_told_and_never_more() -> None:
    pcm = speech((10, 12), (70, 75), (200, 202), until=400)
    told = [each for each in module.windows(chunks(pcm, 30 * RATE), detect) if isinstance(each, float)]
    assert told == sorted(told)
    assert told[0] == pytest.approx(30 - 2, abs=1.5)  # what was said waits for more
    assert told[-1] == pytest.approx(400 - 9, abs=60)
    assert told[-1] <= 400 - 9


def test_four_hours_take_no_more_memory_than_minutes() -> None:
    minute = speech(*((n * 10, n * 10 + 8) for n in range(6)), until=60)

    def pcm(minutes: int) -> Iterator[bytes]:
        for _ in range(minutes):
            yield from chunks(minute, 30 * RATE)

    def cheap(samples: Samples) -> Spans:
        tenth = RATE // 10
        return [(start * tenth, end * tenth) for start, end in _runs(samples[::tenth] != 0)]

    tracemalloc.start()
    try:
        count, last = 0, 0.0
        for window in windows(pcm(240), cheap):
            assert window.start >= last
            last = window.start
            count += 1
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == pytest.approx(240 * 6 / 3, abs=5)
    assert last == pytest.approx(4 * 3600 - 30, abs=25)
    assert most < 30e6  # a minute's samples are 4 MB, the whole would be 920


def _runs(loud: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(np.int8)))
    return ((int(start), int(end)) for start, end in edges.reshape(-1, 2))


def test_a_window_does_not_keep_the_block_that_it_is_of() -> None:
    (window,) = windows([speech((1, 3), until=20)], detect)
    assert window.samples.base is None


# Back to the recording's clock.

WINDOW = Window(np.zeros(6 * RATE, np.float32), ((10 * RATE, 2 * RATE), (20 * RATE, 3 * RATE), (40 * RATE, RATE)))


@pytest.mark.parametrize(
    ("within", "begins", "ends"),
    [(0, 10, 10), (1.5, 11.5, 11.5), (2, 20, 12), (2.25, 20.25, 20.25), (5, 40, 23), (5.5, 40.5, 40.5), (6, 41, 41)],
)
def test_a_time_in_a_window_is_one_in_the_recording(within: float, begins: float, ends: float) -> None:
    assert WINDOW.at(within) == pytest.approx(begins)
    assert WINDOW.at(within, end=True) == pytest.approx(ends)


@pytest.mark.parametrize("end", [False, True])
def test_a_time_outside_of_a_window_is_at_its_edge(end: bool) -> None:
    assert WINDOW.at(-3, end=end) == 10
    assert WINDOW.at(29.98, end=end) == 41


@given(st.lists(st.floats(0, 7), min_size=2, max_size=20))
def test_times_keep_their_order(times: list[float]) -> None:
    for a, b in pairwise(sorted(times)):
        assert WINDOW.at(a) <= WINDOW.at(b)
        assert WINDOW.at(a, end=True) <= WINDOW.at(a) <= WINDOW.at(max(a, b))
        assert WINDOW.at(a) <= WINDOW.at(b, end=True) or b - a <= 0.4  # both at the border


def test_a_window_knows_how_long_it_is_and_where_it_begins() -> None:
    assert (WINDOW.seconds, WINDOW.start) == (6.0, 10.0)
