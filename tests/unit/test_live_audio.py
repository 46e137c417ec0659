"""Audio while it is spoken: the same samples as of the whole, however it is split, and no harm in what is none."""

from __future__ import annotations

import contextlib
import io
import math
import random
import struct
import threading
import time
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import av
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA
from voxgate.audio import UnusableAudio
from voxgate.audio.decode import RATE, decode
from voxgate.audio.live import RAW, Decoder, decoder

RATES = (8000, 11_025, 16_000, 22_050, 44_100, 48_000)
OPUS = ("ogg", "webm")
PATIENCE = 10.0  # seconds, which only what hangs takes


def heard(decoding: Decoder, pieces: list[bytes]) -> bytes:
    try:
        out = [pcm for piece in pieces for pcm in decoding.push(piece)]
        out += decoding.end()
    finally:
        decoding.close()
    assert all(len(each) % 2 == 0 for each in out)
    return b"".join(out)


def split(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def at_random(data: bytes, seed: int) -> list[bytes]:
    """In pieces of nothing, of bytes and of many."""
    r = random.Random(seed)
    sizes = [r.choice([0, 1, 2, 3, 5, 100, 3201, 20_000]) for _ in range(60)]
    edges = [*accumulate([0, *sizes]), len(data)]
    return [data[a : max(a, b)] for a, b in pairwise(edges)]


def chirp(seconds: float, rate: int, channels: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Frames of channels that are each another sound."""
    t = np.arange(round(seconds * rate)) / rate
    return np.stack([0.4 * np.sin(math.tau * (200 + 150 * c) * t * (1 + t)) for c in range(channels)], axis=1)


def encoded(encoding: str, sound: np.ndarray[Any, np.dtype[np.float64]], rate: int) -> bytes:
    """As a client has it: little-endian and interleaved."""
    if encoding == "pcm_f32le":
        return sound.astype("<f4").tobytes()
    pcm = np.round(sound * 32767).astype("<i2")
    if encoding == "pcm_s16le":
        return pcm.tobytes()
    context: Any = av.CodecContext.create(f"pcm_{encoding}", "w")  # of one channel, whatever the samples are
    context.sample_rate, context.layout, context.format = rate, "mono", "s16"
    frame = av.AudioFrame.from_ndarray(pcm.reshape(1, -1), format="s16", layout="mono")
    frame.sample_rate = rate
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def in_wav(encoding: str, data: bytes, rate: int, channels: int) -> io.BytesIO:
    tag, size = {"pcm_s16le": (1, 2), "pcm_f32le": (3, 4), "mulaw": (7, 1), "alaw": (6, 1)}[encoding]
    form = struct.pack("<IHHIIHH", 16, tag, channels, rate, rate * channels * size, channels * size, size * 8)
    head = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + form + b"data" + struct.pack("<I", len(data))
    return io.BytesIO(head + data)


# Raw samples.


@pytest.mark.parametrize("channels", range(1, 9))
@pytest.mark.parametrize("encoding", RAW)
def test_raw_samples_are_the_same_however_they_are_split(encoding: str, channels: int) -> None:
    for rate in RATES:
        data = encoded(encoding, chirp(0.25, rate, channels), rate)

        def new(rate: int = rate) -> Decoder:
            return decoder(encoding, sample_rate=rate, channels=channels)

        whole = heard(new(), [data])
        assert abs(len(whole) / 2 - 0.25 * RATE) <= 2
        assert max(map(abs, array("h", whole))) > 1000
        for pieces in (split(data, 1001), at_random(data, rate + channels), [*split(data[:300], 1), data[300:]]):
            assert heard(new(), pieces) == whole


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("encoding", RAW)
def test_raw_samples_are_those_of_the_same_in_a_file(encoding: str, rate: int, channels: int) -> None:
    data = encoded(encoding, chirp(0.5, rate, channels), rate)
    filed = b"".join(decode(in_wav(encoding, data, rate, channels), "wav", max_seconds=60))
    assert heard(decoder(encoding, sample_rate=rate, channels=channels), split(data, 997)) == filed


@given(st.lists(st.integers(0, 6400), max_size=12))
@settings(max_examples=25)
def test_what_is_already_as_recognizers_take_it_goes_through_as_it_is(cuts: list[int]) -> None:
    data = random.Random(0).randbytes(6401)
    edges = [0, *sorted(cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges)]
    assert heard(decoder("pcm_s16le", sample_rate=16_000, channels=1), pieces) == data[:-1]


@pytest.mark.parametrize("channels", range(1, 9))
def test_every_channel_is_in_the_mix_and_none_is_louder_than_it_was(channels: int) -> None:
    for only in range(channels):
        frames = np.zeros((RATE // 4, channels))
        frames[:, only] = 0.5 * np.sin(math.tau * 440 * np.arange(RATE // 4) / RATE)
        data = encoded("pcm_s16le", frames, RATE)
        mixed = heard(decoder("pcm_s16le", sample_rate=RATE, channels=channels), [data])
        loudest = max(map(abs, array("h", mixed)))
        assert 32767 * 0.5 / channels / 4 < loudest <= 32767 * 0.5 + 1


@pytest.mark.parametrize("encoding", RAW)
@pytest.mark.parametrize("rate", [8000, 16_000])
def test_nothing_and_half_a_sample_are_no_samples(encoding: str, rate: int) -> None:
    for pieces in ([], [b""], [b"\x01"] * (encoding not in ("mulaw", "alaw"))):
        assert heard(decoder(encoding, sample_rate=rate, channels=2), pieces) == b""


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e38, -1e38])
def test_numbers_that_are_no_sound_are_clipped(wrong: float) -> None:
    data = struct.pack("<f", wrong) * 3200
    for rate in (8000, 16_000):
        assert len(heard(decoder("pcm_f32le", sample_rate=rate, channels=1), split(data, 999))) % 2 == 0


def test_samples_come_out_while_they_come_in() -> None:
    for encoding, rate in (("pcm_s16le", 8000), ("mulaw", 8000), ("pcm_f32le", 48_000)):
        data = encoded(encoding, chirp(2.0, rate, 1), rate)
        decoding, given = decoder(encoding, sample_rate=rate, channels=1), 0.0
        got = 0
        for piece in split(data, len(data) // 20):
            got += len(b"".join(decoding.push(piece))) // 2
            given += 0.1
            assert got / RATE > given - 0.02
        decoding.close()


# Opus in a container.


def recorded(
    container: str, seconds: float = 2.0, *, channels: int = 1, options: dict[str, str] | None = None
) -> bytes:
    """Speech as a browser records it, in Opus of a steady rate."""
    content = io.BytesIO()
    with (
        av.open(str(DATA / "long-slt.flac")) as source,
        av.open(content, "w", format=container, options=options or {}) as made,
    ):
        layout = "mono" if channels == 1 else "stereo"
        stream: Any = made.add_stream("libopus", rate=48_000, layout=layout, options={"vbr": "off"})
        resampler = av.AudioResampler(format=stream.format.name, layout=layout, rate=48_000)
        for frame in source.decode(audio=0):
            if frame.time is not None and frame.time >= seconds:
                break
            for piece in resampler.resample(frame):
                made.mux(stream.encode(piece))
        made.mux(stream.encode(None))
    return content.getvalue()


RECORDED = {name: recorded(name) for name in OPUS}


def opus() -> Decoder:
    return decoder("opus", sample_rate=16_000, channels=1)


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threads()
    yield
    assert threads() - before == set()


def tried(pieces: list[bytes]) -> bytes | None:
    """What is heard of them, or None where they are unusable; in time, either way."""
    found: list[bytes | None] = []

    def work() -> None:
        try:
            found.append(heard(opus(), pieces))
        except UnusableAudio:
            found.append(None)

    working = threading.Thread(target=work, daemon=True)
    working.start()
    working.join(PATIENCE)
    assert found, "it hangs, or has failed in another way"
    return found[0]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("container", OPUS)
def test_opus_is_the_same_as_of_the_file_however_it_is_split(container: str, channels: int) -> None:
    data = recorded(container, channels=channels)
    demuxer = "ogg" if container == "ogg" else "matroska"
    filed = b"".join(decode(io.BytesIO(data), demuxer, max_seconds=60))
    assert abs(len(filed) / 2 - 2 * RATE) < RATE / 5
    for pieces in ([data], split(data, 1), split(data, 1000), at_random(data, 1)):
        assert heard(opus(), pieces) == filed


def test_what_a_browser_records_has_no_lengths_and_is_heard_all_the_same() -> None:
    live = recorded("webm", options={"live": "1"})
    assert live != RECORDED["webm"]
    assert heard(opus(), split(live, 500)) == heard(opus(), [RECORDED["webm"]])


@pytest.mark.parametrize("container", OPUS)
def test_opus_is_heard_while_it_comes_in(container: str) -> None:
    shorter = {"page_duration": "200000"} if container == "ogg" else {"cluster_time_limit": "200"}
    data = recorded(container, 5.0, options=shorter)
    decoding, behind, got = opus(), [], 0.0
    for number, piece in enumerate(split(data, len(data) // 25), 1):
        got += len(b"".join(decoding.push(piece))) / 2 / RATE
        behind.append(5.0 * number / 25 - got)
    decoding.close()
    assert max(behind) < 1.0
    assert got > 4.5


def test_a_session_that_is_dropped_in_the_middle_leaves_no_thread() -> None:
    for container in OPUS:
        for length in (0, 3, 4, 30, 100, 1000, len(RECORDED[container])):
            decoding = opus()
            b"".join(decoding.push(RECORDED[container][:length]))
            decoding.close()
            decoding.close()


# What is no such audio, or was made to do harm.


@pytest.mark.parametrize(
    "start", [b"RIFF\0\0\0\0WAVE", b"fLaC", b"ID3\x04", b"\0\0\0\x18ftypisom", b"{}{}", b"\0" * 8], ids=repr
)
def test_another_container_is_refused_at_its_first_bytes(start: bytes) -> None:
    for pieces in ([start], split(start, 1)):
        with pytest.raises(UnusableAudio, match="must be Ogg or WebM"):
            heard(opus(), pieces)


@pytest.mark.parametrize("data", [b"", b"O", b"Ogg"])
def test_too_little_to_tell_is_nothing(data: bytes) -> None:
    assert heard(opus(), [data] * bool(data)) == b""


HOSTILE: dict[str, Callable[[], bytes]] = {
    "noise after OggS": lambda: b"OggS" + random.Random(1).randbytes(300_000),
    "noise after EBML": lambda: b"\x1a\x45\xdf\xa3" + random.Random(2).randbytes(300_000),
    "zeros after OggS": lambda: b"OggS" + bytes(1_000_000),
    "zeros after EBML": lambda: b"\x1a\x45\xdf\xa3" + bytes(1_000_000),
    "ones after EBML": lambda: b"\x1a\x45\xdf\xa3" + b"\xff" * 300_000,
    "many empty pages": lambda: b"OggS\0\2" + bytes(8) + b"abcd" + bytes(8) + b"\0" + b"OggS\0\0" * 50_000,
    "nothing but the magic": lambda: b"OggSOggSOggSOggS",
    "a video": (DATA / "a-webm-video.webm").read_bytes,
    "no audio in it": (DATA / "noaudio.webm").read_bytes,
    "ogg with noise after it": lambda: RECORDED["ogg"] + random.Random(3).randbytes(200_000),
    "webm with noise after it": lambda: RECORDED["webm"] + random.Random(4).randbytes(200_000),
    "ogg with zeros in it": lambda: RECORDED["ogg"][:3000] + bytes(100_000) + RECORDED["ogg"][3000:],
    "webm with zeros in it": lambda: RECORDED["webm"][:3000] + bytes(100_000) + RECORDED["webm"][3000:],
    "ogg in webm": lambda: RECORDED["webm"][:2000] + RECORDED["ogg"],
    "only the head of ogg": lambda: RECORDED["ogg"][:28],
    "only the heads of webm": lambda: RECORDED["webm"][:200],
    "a Vorbis Ogg": (DATA / "a-ogg-vorbis.ogg").read_bytes,
    "a Vorbis WebM": (DATA / "a-webm-vorbis.webm").read_bytes,
    "a FLAC Ogg": (DATA / "a-ogg-flac.ogg").read_bytes,
    "a Matroska file": (DATA / "a-mka.mka").read_bytes,
}


@pytest.mark.parametrize("size", [700, 100_000])
@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_ends_in_audio_or_in_a_refusal(name: str, size: int) -> None:
    data = HOSTILE[name]()
    got = tried(split(data, size))
    assert got is None or len(got) <= 60 * RATE * 2


def test_a_video_is_heard_for_its_sound() -> None:
    video = (DATA / "a-webm-video.webm").read_bytes()
    filed = b"".join(decode(io.BytesIO(video), "matroska", max_seconds=60))
    assert tried(split(video, 1000)) == filed


@pytest.mark.parametrize("container", OPUS)
def test_what_was_cut_off_anywhere_is_heard_up_to_there(container: str) -> None:
    data = RECORDED[container]
    whole = heard(opus(), [data])
    lengths = [*range(5, 200, 13), *range(200, len(data), len(data) // 20)]
    got = [tried(split(data[:length], 977)) for length in lengths]
    for each in got:
        assert each is None or whole.startswith(each[:-640])
    first = next(number for number, each in enumerate(got) if each)
    assert lengths[first] < 0.6 * len(data)  # a page of Ogg is a second of two
    assert None not in got[first:]


def test_damage_anywhere_is_survived() -> None:
    r = random.Random(5)
    for container in OPUS:
        for _ in range(25):
            data = bytearray(RECORDED[container])
            for _ in range(r.choice([1, 5, 50])):
                data[r.randrange(4, len(data))] = r.randrange(256)
            got = tried(split(bytes(data), 1500))
            assert got is None or len(got) < 60 * RATE * 2


@pytest.mark.parametrize("size", [1000, 10**6])
def test_two_recordings_one_after_the_other_are_both_heard_in_ogg(size: int) -> None:
    once = heard(opus(), [RECORDED["ogg"]])
    twice = tried(split(RECORDED["ogg"] * 2, size))
    assert twice is not None
    assert len(twice) == pytest.approx(2 * len(once), rel=0.05)
    filed = b"".join(decode(io.BytesIO(RECORDED["ogg"] * 2), "ogg", max_seconds=60))
    assert twice == filed


def test_after_a_refusal_nothing_more_is_kept() -> None:
    decoding = opus()
    junk = b"\x1a\x45\xdf\xa3" + random.Random(6).randbytes(100_000)
    with contextlib.suppress(UnusableAudio):
        for _ in range(5):
            b"".join(decoding.push(junk))
    for _ in range(20):
        with pytest.raises(UnusableAudio):
            b"".join(decoding.push(bytes(500_000)))
    decoding.close()


@pytest.mark.parametrize("container", OPUS)
def test_what_comes_after_the_end_of_a_recording_takes_no_memory(container: str) -> None:
    decoding = opus()
    b"".join(decoding.push(RECORDED[container]))
    tracemalloc.start()
    try:
        with contextlib.suppress(UnusableAudio):
            for _ in range(100):
                b"".join(decoding.push(bytes(500_000)))
        now, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        decoding.close()
    assert now < 5e6


def crc(page: bytes) -> int:
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
    return value


def page(packets: list[bytes], number: int, position: int, *, first: bool = False) -> bytes:
    """RFC 3533, 6."""
    lacing = b"".join(bytes([255] * (len(p) // 255) + [len(p) % 255]) for p in packets)
    head = b"OggS\0" + bytes([2 if first else 0]) + struct.pack("<qII", position, 7, number)
    rest = bytes([len(lacing)]) + lacing + b"".join(packets)
    return head + struct.pack("<I", crc(head + bytes(4) + rest)) + rest


def silence(pages: int) -> bytes:
    """Packets of two bytes that say 120 ms of nothing each (RFC 6716, 3.2.5: two frames of none)."""
    head = b"OpusHead\x01\x01" + struct.pack("<HIhB", 0, 48_000, 0, 0)
    tags = b"OpusTags" + struct.pack("<I", 0) + struct.pack("<I", 0)
    packet = bytes([3 << 3 | 3, 2])
    made = [page([head], 0, 0, first=True), page([tags], 1, 0)]
    made += [page([packet] * 255, 2 + n, (n + 1) * 255 * 5760) for n in range(pages)]
    return b"".join(made)


def test_a_message_that_says_hours_of_nothing_takes_no_memory_for_them() -> None:
    data = silence(600)
    assert len(data) < 500_000  # and it is five hours, of 600 MB
    decoding = opus()
    before = psutil.Process().memory_info().rss
    pieces = decoding.push(data)
    some = [next(pieces) for _ in range(100)]
    time.sleep(0.5)  # in which it could go on by itself
    grown = psutil.Process().memory_info().rss - before
    decoding.close()
    assert max(map(len, some)) <= RATE * 2
    assert grown < 50_000_000
