"""What a file is, how long it lasts, and that no bytes whatever do harm."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import DATA, NOT_AUDIO, RECORDINGS, Recording
from voxgate.audio import UnusableAudio
from voxgate.audio.decode import RATE, decode
from voxgate.audio.probe import probe
from voxgate.audio.sniff import CONTAINERS, sniff

AUDIBLE = [r for r in RECORDINGS if r.duration]
SILENT_FILMS = [r for r in RECORDINGS if not r.duration]
SUFFIXES = {
    "wav": "wav", "flac": "flac", "mp3": "mp3", "mpga": "mp3", "aac": "aac", "mpeg": "mpeg", "m4a": "mp4", "mp4": "mp4",
    "mov": "mp4", "3gp": "mp4", "ogg": "ogg", "opus": "ogg", "webm": "webm", "mka": "webm",
}  # fmt: skip
MAX = 3600.0


def measured(content: bytes, max_seconds: float = MAX) -> float:
    file = io.BytesIO(content)
    return probe(file, sniff(file), max_seconds=max_seconds)


def decoded(path: Path, max_seconds: float = MAX) -> float:
    with path.open("rb") as file:
        container = sniff(file)
    pieces = decode(str(path), container.demuxer, max_seconds=max_seconds)
    return sum(len(piece) for piece in pieces) / 2 / RATE


def verdict(content: bytes, decoded_in: Path | None = None) -> str:
    """`used`, or why not; any other error than `UnusableAudio` comes through."""
    try:
        measured(content, max_seconds=60.0)
        if decoded_in is not None:
            path = decoded_in / "spoiled"
            path.write_bytes(content)
            decoded(path, max_seconds=60.0)
    except UnusableAudio as error:
        return str(error)
    return "used"


def name(recording: Recording) -> str:
    return recording.file


@pytest.mark.parametrize("recording", RECORDINGS, ids=name)
def test_each_recording_is_recognized_by_its_content(recording: Recording) -> None:
    with recording.path.open("rb") as file:
        assert sniff(file).name == SUFFIXES[recording.file.rsplit(".", 1)[1]]


NAMES = {
    "not-pdf.pdf": "a PDF document",
    "not-text.txt": "text",
    "not-zip.zip": "a ZIP archive",
    "not-image.png": "a PNG image",
    "not-image.jpg": "a JPEG image",
    "not-gif.gif": "a GIF image",
    "not-html.html": "an HTML page",
    "not-json.json": "a JSON document",
    "not-exe": "a program",
    "empty.bin": "empty",
}


@pytest.mark.parametrize("path", [path for path, _ in NOT_AUDIO], ids=lambda path: path.name)
def test_what_is_no_audio_is_refused_by_what_it_is(path: Path) -> None:
    with path.open("rb") as file, pytest.raises(UnusableAudio, match=NAMES[path.name]):
        sniff(file)


@pytest.mark.parametrize("file", ["a-mp3-noxing.mp3", "a-mpga.mpga", "a-adts.aac"])
@pytest.mark.parametrize("before", [b"\0" * 1000, b"\xff" * 7, b"\xff\xfb\0", bytes(range(256))], ids=len)
def test_frames_are_found_behind_padding_and_false_starts(file: str, before: bytes) -> None:
    content = (DATA / file).read_bytes()
    assert sniff(io.BytesIO(before + content)) == sniff(io.BytesIO(content))


def test_every_container_has_a_name_of_its_own() -> None:
    assert set(SUFFIXES.values()) == set(CONTAINERS)


@pytest.mark.parametrize("recording", AUDIBLE, ids=name)
def test_each_recording_lasts_as_long_as_it_does(recording: Recording) -> None:
    assert measured(recording.path.read_bytes()) == pytest.approx(recording.duration, abs=0.05)


@pytest.mark.parametrize("recording", AUDIBLE, ids=name)
def test_what_is_measured_is_what_is_decoded(recording: Recording) -> None:
    assert decoded(recording.path) == pytest.approx(measured(recording.path.read_bytes()), abs=0.05)


@pytest.mark.parametrize("recording", SILENT_FILMS, ids=name)
def test_a_film_without_sound_is_refused(recording: Recording) -> None:
    with pytest.raises(UnusableAudio, match="no audio track"):
        measured(recording.path.read_bytes())
    with pytest.raises(UnusableAudio, match="no audio track"):
        decoded(recording.path)


CUT = ["a-wav-s16.wav", "a-flac.flac", "a-m4a-moovfirst.m4a", "a-m4a-moovlast.m4a", "a-rf64.wav", "a-mov-pcm.mov"]


@pytest.mark.parametrize("file", CUT)
def test_a_file_cut_off_by_half_is_refused(file: str) -> None:
    content = (DATA / file).read_bytes()
    with pytest.raises(UnusableAudio):
        measured(content[: len(content) // 2 - 2000])


@pytest.mark.parametrize("file", ["a-wav-s16.wav", "a-flac.flac", "a-m4a-moovfirst.m4a"])
def test_a_file_cut_off_is_told_so_with_its_seconds(file: str) -> None:
    content = (DATA / file).read_bytes()
    with pytest.raises(UnusableAudio, match=r"cut off: its header promises 1\.0 s, 0\.\d s are there"):
        measured(content[: len(content) * 2 // 5])


@pytest.mark.parametrize("recording", [r for r in AUDIBLE if r.file.startswith("a-")], ids=name)
@pytest.mark.parametrize("kept", [1, 4, 16, 64, 200])
def test_a_head_alone_is_refused_or_measured_and_never_more(recording: Recording, kept: int) -> None:
    content = recording.path.read_bytes()[:kept]
    with suppress(UnusableAudio):
        assert measured(content) <= recording.duration


@pytest.mark.parametrize("file", ["a-wav-s16.wav", "a-mp3-cbr.mp3", "a-m4a-moovlast.m4a", "a-opus.opus", "a-webm.webm"])
def test_audio_longer_than_the_limit_is_refused(file: str) -> None:
    content = (DATA / file).read_bytes()
    assert measured(content, max_seconds=1.1) < 1.1
    with pytest.raises(UnusableAudio, match=r"at most 0\.5 s"):
        measured(content, max_seconds=0.5)
    with pytest.raises(UnusableAudio, match=r"longer than 0\.5 seconds"):
        decoded(DATA / file, max_seconds=0.5)


def test_decoding_stops_at_the_limit_and_not_at_the_end() -> None:
    pieces = decode(str(DATA / "long-slt.flac"), "flac", max_seconds=1.0)
    got = 0
    with suppress(UnusableAudio):
        for piece in pieces:
            got += len(piece)
    assert RATE < got <= 2 * RATE


def wav(samples: int) -> bytes:
    head = b"fmt " + (16).to_bytes(4, "little") + bytes.fromhex("01000100803e0000007d000002001000")
    data = b"data" + (samples * 2).to_bytes(4, "little") + bytes(samples * 2)
    return b"RIFF" + (4 + len(head) + len(data)).to_bytes(4, "little") + b"WAVE" + head + data


@pytest.mark.parametrize(("samples", "usable"), [(0, False), (1, False), (1599, False), (1600, True), (1601, True)])
def test_a_tenth_of_a_second_is_the_shortest_taken(samples: int, usable: bool) -> None:
    if usable:
        assert measured(wav(samples)) == samples / RATE
    else:
        with pytest.raises(UnusableAudio):
            measured(wav(samples))


PLAYLISTS = {
    "m3u": b"#EXTM3U\n#EXTINF:1,\nhttp://169.254.169.254/latest/meta-data\n",
    "m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "ffconcat": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "dash": b"<?xml version='1.0'?><MPD><BaseURL>http://localhost/</BaseURL></MPD>",
    "sdp": b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=audio 5004 RTP/AVP 0\r\n",
    "pls": b"[playlist]\nFile1=http://localhost/a.mp3\n",
    "cue": b'FILE "/etc/passwd" WAVE\n',
    "m3u behind an ID3 tag": b"ID3\x03\0\0\0\0\0\0#EXTM3U\nfile:///etc/passwd\n",
}


@pytest.mark.parametrize("content", PLAYLISTS.values(), ids=PLAYLISTS.keys())
def test_a_list_of_other_files_is_refused(content: bytes) -> None:
    with pytest.raises(UnusableAudio):
        measured(content)


@settings(max_examples=300)
@given(st.binary(max_size=2000))
@example(b"\0" * 2000)
@example(b"\xff" * 2000)
def test_any_bytes_are_refused_or_measured(content: bytes) -> None:
    assert verdict(content)


HEADS = [
    b"RIFF\xff\xff\xff\xffWAVE", b"RF64\xff\xff\xff\xffWAVEds64", b"fLaC", b"OggS", b"\x1a\x45\xdf\xa3",
    b"\0\0\x01\xba", b"\0\0\0\x14ftypM4A ", b"\0\0\0\x08moov", b"ID3\x04\0\0\0\0\0\0", b"\xff\xfb\x90\0",
    b"\xff\xf1\x50\x80",
    b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x80\x3e\0\0\0\x7d\0\0\x02\0\x10\0data\xff\xff\xff\xff",
]  # fmt: skip


@settings(max_examples=300)
@given(st.sampled_from(HEADS), st.binary(max_size=300))
def test_any_bytes_behind_a_true_head_are_refused_or_measured(head: bytes, rest: bytes) -> None:
    assert verdict(head + rest)


def damaged(content: bytes, seed: int) -> Iterator[bytes]:
    r = random.Random(seed)
    for flips in (1, 20, len(content) // 50):
        spoiled = bytearray(content)
        for _ in range(flips):
            spoiled[r.randrange(min(len(content), 400) if flips == 20 else len(content))] ^= 1 << r.randrange(8)
        yield bytes(spoiled)
    start = r.randrange(len(content))
    yield content[:start] + content[start + r.randrange(1, 200) :]
    yield content[:start] + content[r.randrange(len(content)) :] + content[:start]


@pytest.mark.parametrize("recording", [r for r in RECORDINGS if r.file.startswith(("a-", "no"))], ids=name)
def test_a_damaged_file_is_refused_or_used(recording: Recording, tmp_path: Path) -> None:
    content = recording.path.read_bytes()
    for seed in range(2):
        for spoiled in damaged(content, seed):
            assert verdict(spoiled, decoded_in=tmp_path)


def test_a_recording_whose_format_changes_midway_is_refused_or_decoded_whole(tmp_path: Path) -> None:
    joined = [DATA / "a-mp3-noxing.mp3", DATA / "a-mp3-44k-stereo.mp3"]
    path = tmp_path / "joined.mp3"
    path.write_bytes(b"".join(part.read_bytes() for part in joined))
    try:
        seconds = decoded(path)
    except UnusableAudio:
        return
    assert seconds == pytest.approx(sum(decoded(part) for part in joined), abs=0.1)


@pytest.mark.parametrize(
    ("codec", "container", "rate", "options"),
    [
        ("libopus", "webm", 48000, {"frame_duration": "2.5"}),
        ("libopus", "webm", 48000, {"frame_duration": "60"}),
        ("libopus", "ogg", 48000, {"frame_duration": "60"}),
        ("vorbis", "webm", 44100, {"strict": "-2"}),
        ("vorbis", "ogg", 44100, {"strict": "-2"}),
        ("adpcm_ms", "wav", 44100, {}),
        ("adpcm_ima_wav", "wav", 44100, {}),
        ("aac", "matroska", 44100, {}),
        ("ac3", "mp4", 48000, {}),
    ],
    ids=lambda value: str(value) if not isinstance(value, dict) else "-".join(value.values()),
)
def test_measured_by_whatever_can_be_believed(
    codec: str, container: str, rate: int, options: dict[str, str], tmp_path: Path
) -> None:
    """Matroska rounds each packet's duration, Ogg's Vorbis packets do not add up, ADPCM's byte rate is a hint."""
    path = tmp_path / "recording"
    with av.open(str(path), "w", format=container) as out, av.open(str(DATA / "long-slt.flac")) as source:
        stream = out.add_stream(codec, rate=rate, options=options, layout="stereo")
        assert isinstance(stream, av.AudioStream)
        frames = list(source.decode(audio=0))
        for frame in frames * 8:  # long enough for small errors to add up
            frame.pts = None
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert measured(path.read_bytes()) == pytest.approx(decoded(path), abs=0.05)
