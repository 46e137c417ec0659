"""Make the audio fixtures beside this file, and manifest.json, which says what is in each.

    python tests/data/make_fixtures.py

needs `flite` and `ffmpeg` (Debian's) and the project's own PyAV and numpy. The sentences are
ours and the voices synthetic. Sentence A is put in every container; every other file is one
more sentence, or a sound without speech, or something that is not audio at all.
"""

import json
import re
import struct
import subprocess
import tempfile
import wave
import zipfile
import zlib
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
RATE = 16000
Samples = npt.NDArray[np.int16]

A = "please send the letter"
B = "the weather is nice today and we are going to the park"
C = "she said that they would come back in the morning"
D = "he was looking for his keys when the phone rang"
LONG = ("he was looking for his keys", "the train was late today", "my brother lives in the city")
PAUSE_S = 0.8
BRISK = 0.8  # flite's duration_stretch where many or long files would be large

EXACT = "-map_metadata -1 -fflags +bitexact -flags:v +bitexact -flags:a +bitexact -threads 1"
FLAC = "-c:a flac -compression_level 12 -metadata_header_padding 0"
VIDEO = "-f lavfi -i testsrc=size=32x32:rate=10:duration=1"
VP8 = "-c:v libvpx -b:v 20k"
OPUS = "-c:a libopus -b:a 16k"
AAC = "-c:a aac -b:a 24k"
MP2 = "-c:a mp2 -ar 32000 -b:a 48k"
MP3_CBR = "-c:a libmp3lame -b:a 24k"
MP3_VBR = "-c:a libmp3lame -q:a 7"
TITLE = "-metadata title=Letter"
ID3V2 = b"ID3\x03\x00\x00\x00\x00\x00\x11" + b"TIT2\x00\x00\x00\x07\x00\x00\x00Voices"

# name: (container, ffmpeg's output arguments, note)
CONTAINERS: dict[str, tuple[str, str, str]] = {
    "a-wav-u8.wav": ("wav", "-c:a pcm_u8", "8-bit unsigned PCM"),
    "a-wav-s16.wav": ("wav", "-c:a pcm_s16le", "the plain one"),
    "a-wav-s32.wav": ("wav", "-c:a pcm_s32le", "32-bit PCM, extensible"),
    "a-wav-alaw.wav": ("wav", "-c:a pcm_alaw", "A-law"),
    "a-wav-mulaw.wav": ("wav", "-c:a pcm_mulaw", "mu-law"),
    "a-wav-8k.wav": (
        "wav",
        "-c:a pcm_s16le -ar 8000",
        "8 kHz, for which a wideband model is wrong",
    ),
    "a-wav-piped.wav": ("wav", "-c:a pcm_s16le", "RIFF and data sizes 0xFFFFFFFF"),
    "a-rf64.wav": ("rf64", "-c:a pcm_s16le -rf64 always", "RF64 with ds64"),
    "a-flac.flac": ("flac", FLAC, "the plain one"),
    "a-flac-piped.flac": ("flac", FLAC, "STREAMINFO total_samples 0"),
    "a-flac-48k-stereo.flac": (
        "flac",
        f"{FLAC} -ar 48000 -ac 2 -sample_fmt s16",
        "resampled, stereo",
    ),
    "a-mp3-cbr.mp3": ("mp3", MP3_CBR, "CBR with Info header and ID3v2"),
    "a-mp3-vbr.mp3": (
        "mp3",
        f"{MP3_VBR} -id3v2_version 3 -write_id3v1 1 {TITLE}",
        "VBR with Xing header, ID3v2 and ID3v1",
    ),
    "a-mp3-noxing.mp3": (
        "mp3",
        f"{MP3_CBR} -write_xing 0 -id3v2_version 0",
        "CBR, frames alone",
    ),
    "a-mp3-vbr-noxing.mp3": (
        "mp3",
        f"{MP3_VBR} -write_xing 0 -id3v2_version 0",
        "VBR, frames alone",
    ),
    "a-mp3-44k-stereo.mp3": (
        "mp3",
        "-c:a libmp3lame -b:a 48k -ar 44100 -ac 2",
        "MPEG-1, 44.1 kHz stereo",
    ),
    "a-mpga.mpga": ("mpga", f"{MP2} -f mp2", "MPEG-1 layer 2, 32 kHz"),
    "a-mpegps.mpeg": ("mpegps", f"{MP2} -f mpeg", "program stream, mp2 alone"),
    "a-mpegps-video.mpeg": (
        "mpegps",
        f"-c:v mpeg1video -r 25 {MP2} -f mpeg",
        "program stream, mpeg1video and mp2",
    ),
    "a-m4a-moovlast.m4a": ("mp4", f"{AAC} -f ipod", "AAC, moov last"),
    "a-m4a-moovfirst.m4a": (
        "mp4",
        f"{AAC} -f ipod -movflags +faststart",
        "AAC, moov first",
    ),
    "a-m4a-fragmented.m4a": (
        "mp4",
        f"{AAC} -f mp4 -movflags +frag_keyframe+empty_moov -frag_duration 300000",
        "AAC, empty moov, several moof",
    ),
    "a-m4a-alac.m4a": ("mp4", "-c:a alac -sample_fmt s16p -f ipod", "ALAC"),
    "a-mov-aac.mov": ("mov", f"{AAC} -f mov", "brand qt, AAC"),
    "a-mov-pcm.mov": ("mov", "-c:a pcm_s16le -f mov", "brand qt, PCM (sowt)"),
    "a-3gp.3gp": ("3gp", f"{AAC} -f 3gp", "AAC"),
    "a-adts.aac": ("adts", f"{AAC} -f adts", "AAC frames alone"),
    "a-mp4-video.mp4": ("mp4", f"-c:v mpeg4 -b:v 20k {AAC}", "video and AAC"),
    "a-webm-video.webm": ("webm", f"{VP8} {OPUS}", "VP8 and Opus"),
    "a-webm.webm": ("webm", OPUS, "Opus, Duration written"),
    "a-webm-noduration.webm": (
        "webm",
        f"{OPUS} -f webm -live 1 -cluster_time_limit 300",
        "Opus, no Duration, unknown-size clusters, as MediaRecorder writes it",
    ),
    "a-webm-vorbis.webm": ("webm", "-c:a libvorbis -q:a 0", "Vorbis"),
    "a-mka.mka": ("mka", OPUS, "Matroska, Opus"),
    "a-ogg-vorbis.ogg": ("ogg", "-c:a libvorbis -q:a 0", "Vorbis"),
    "a-opus.opus": ("ogg", OPUS, "Opus"),
    "a-ogg-flac.ogg": ("ogg", FLAC, "FLAC in Ogg"),
}
# Those which decode to just the samples of a-wav-s16.wav, and those written to a pipe.
LOSSLESS = {
    "a-wav-s16.wav",
    "a-wav-s32.wav",
    "a-wav-piped.wav",
    "a-rf64.wav",
    "a-flac.flac",
    "a-flac-piped.flac",
    "a-m4a-alac.m4a",
    "a-mov-pcm.mov",
    "a-ogg-flac.ogg",
}
PIPED = {"a-wav-piped.wav", "a-flac-piped.flac", "a-webm-noduration.webm"}


def say(text: str, voice: str, stretch: float = 1.0) -> Samples:
    """Speak text with flite, and cut the silence at both ends to a twentieth of a second."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as out:
        how = ["-voice", voice, "--setf", f"duration_stretch={stretch}"]
        subprocess.run(["flite", *how, "-t", f"{text}.", "-o", out.name], check=True)
        with wave.open(out.name) as spoken:
            assert (spoken.getframerate(), spoken.getnchannels()) == (RATE, 1)
            x = np.frombuffer(spoken.readframes(spoken.getnframes()), "<i2")
    loud = np.flatnonzero(np.abs(x.astype(np.int32)) > 300)
    edge = RATE // 20
    return x[max(0, loud[0] - edge) : loud[-1] + edge]


def encode(name: str, x: Samples, arguments: str, *, piped: bool = False, video: str = "") -> None:
    """Write samples as a file with ffmpeg, by a pipe (which cannot seek) where asked."""
    mono = f"-f s16le -ar {RATE} -ac 1 -i pipe:0"
    form = {"wav": "wav", "flac": "flac"}.get(name.rpartition(".")[2])
    form = f"-f {form}" if piped and form else ""
    out = "pipe:1" if piped else str(HERE / name)
    line = f"ffmpeg -v error -y {mono} {video} {EXACT} {arguments} {form}".split()
    done = subprocess.run([*line, out], input=x.tobytes(), stdout=subprocess.PIPE, check=True)
    if piped:
        # A browser knows no cluster's size either, where ffmpeg writes each of them.
        cluster = re.compile(rb"(?<=\x1f\x43\xb6\x75)[\x40-\x7f].(?=\xe7)", re.DOTALL)
        body = cluster.sub(b"\x01" + b"\xff" * 7, done.stdout)
        (HERE / name).write_bytes(body)


def chunk(tag: bytes, body: bytes, size: int | None = None) -> bytes:
    """One RIFF chunk, padded to an even length."""
    return tag + struct.pack("<I", len(body) if size is None else size) + body + b"\0" * (len(body) % 2)


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    return chunk(b"RIFF", b"WAVE" + b"".join(chunks), size)


def wavs_by_hand(x: Samples) -> dict[str, tuple[bytes, str]]:
    """The wav headers ffmpeg does not write."""

    def form(tag: int, width: int) -> bytes:
        return chunk(b"fmt ", struct.pack("<HHIIHH", tag, 1, RATE, RATE * width, width, width * 8))

    pcm = x.tobytes()
    wide = (x.astype("<i4") << 8).view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    real = (x / 32768).astype("<f4").tobytes()
    fmt = form(1, 2)
    subformat = bytes.fromhex("0100000000001000800000aa00389b71")
    extensible = struct.pack("<HHIIHHHHI", 0xFFFE, 1, RATE, RATE * 2, 2, 16, 22, 16, 4) + subformat
    info = chunk(b"LIST", b"INFO" + chunk(b"INAM", b"Letter\0"))
    odd = chunk(b"junk", b"odd")
    data = chunk(b"data", pcm)
    return {
        "a-wav-s24.wav": (riff(form(1, 3), chunk(b"data", wide)), "24-bit PCM, format 1"),
        "a-wav-f32.wav": (riff(form(3, 4), chunk(b"data", real)), "32-bit float, format 3"),
        "a-wav-extensible.wav": (riff(chunk(b"fmt ", extensible), data), "WAVE_FORMAT_EXTENSIBLE"),
        "a-wav-zerosize.wav": (riff(fmt, chunk(b"data", pcm, 0), size=0), "RIFF and data sizes 0"),
        "a-wav-list.wav": (riff(fmt, info, odd, data), "LIST and odd-sized chunks before data"),
    }


def not_audio() -> dict[str, tuple[bytes, str]]:
    """Things people send by mistake."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]>>",
    ]
    pdf, table = b"%PDF-1.4\n", b"0000000000 65535 f \n"
    for number, body in enumerate(objects, 1):
        table += b"%010d 00000 n \n" % len(pdf)
        pdf += b"%d 0 obj%sendobj\n" % (number, body)
    start = len(pdf)
    pdf += b"xref\n0 4\n" + table + b"trailer<</Size 4/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % start

    def part(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    png = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    png += part(b"IDAT", zlib.compress(b"\0\x80")) + part(b"IEND", b"")
    gif = b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"
    elf = b"\x7fELF\2\1\1" + b"\0" * 9 + struct.pack("<HHI", 2, 62, 1) + b"\0" * 40
    picture = "ffmpeg -v error -f lavfi -i testsrc=size=16x16 -frames:v 1 -flags:v +bitexact -f mjpeg -"
    jpg = subprocess.run(picture.split(), stdout=subprocess.PIPE, check=True).stdout
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo("note.txt"), "Not a recording.\n")
        file.seek(0)
        packed = file.read()
    return {
        "not-pdf.pdf": (pdf, "a one-page PDF"),
        "not-text.txt": (b"This is a note, not a recording.\n" * 20, "plain text"),
        "not-zip.zip": (packed, "a zip archive"),
        "not-image.png": (png, "a PNG image"),
        "not-image.jpg": (jpg, "a JPEG image"),
        "not-gif.gif": (gif, "a GIF image"),
        "not-html.html": (b"<!doctype html><title>404</title><p>Not found</p>\n", "a web page"),
        "not-json.json": (b'{"error": "not found"}\n', "a JSON object"),
        "not-exe": (elf, "the header of an ELF program"),
        "empty.bin": (b"", "no bytes at all"),
    }


def sounds() -> dict[str, tuple[Samples, str, str]]:
    """Sounds without speech."""
    t = np.arange(2 * RATE) / RATE  # two seconds
    clicks = np.zeros(2 * RATE)
    for at in range(RATE // 4, 2 * RATE, RATE // 2):
        clicks[at : at + 16] = 0.8
    hum = 0.1 * np.sin(2 * np.pi * 50 * t) + 0.03 * np.sin(2 * np.pi * 150 * t)
    noise = np.random.default_rng(1).normal(0, 0.1, 3 * RATE)
    made = {
        "silence.flac": (0 * t, FLAC, "digital silence"),
        "noise.ogg": (noise, "-c:a libvorbis -q:a 0", "white noise"),
        "tone.flac": (0.3 * np.sin(2 * np.pi * 440 * t), FLAC, "440 Hz tone"),
        "hum.flac": (hum, FLAC, "50 Hz mains hum"),
        "clicks.flac": (clicks, FLAC, "four clicks"),
    }
    return {name: (np.round(y * 32767).astype("<i2"), arguments, note) for name, (y, arguments, note) in made.items()}


def seconds(path: Path) -> float:
    """How long what really decodes is, or 0 where there is no audio stream."""
    with av.open(str(path)) as file:
        if not file.streams.audio:
            return 0.0
        return sum(frame.samples / frame.sample_rate for frame in file.decode(audio=0))


def main() -> None:
    files: list[dict[str, object]] = []

    def note(name: str, container: str, text: str, voice: str | None, lossless: bool, what: str) -> None:
        duration = round(seconds(HERE / name), 6)
        files.append({
            "file": name, "voice": voice, "text": text, "duration": duration,
            "lossless": lossless, "container": container, "note": what,
        })  # fmt: skip

    a = say(A, "slt", BRISK)
    for name, (container, arguments, what) in CONTAINERS.items():
        encode(name, a, arguments, piped=name in PIPED, video=VIDEO if "-c:v" in arguments else "")
        note(name, container, A, "slt", name in LOSSLESS, what)
    for name, (body, what) in wavs_by_hand(a).items():
        (HERE / name).write_bytes(body)
        note(name, "wav", A, "slt", True, what)
    (HERE / "a-flac-id3.flac").write_bytes(ID3V2 + (HERE / "a-flac.flac").read_bytes())
    note("a-flac-id3.flac", "flac", A, "slt", True, "an ID3v2 tag before fLaC")

    for name, text, arguments in (
        ("b-slt.mp3", B, "-c:a libmp3lame -b:a 32k"),
        ("b-rms.mp3", B, "-c:a libmp3lame -b:a 32k"),
        ("c-slt.mp3", C, "-c:a libmp3lame -b:a 32k"),
        ("c-rms.mp3", C, "-c:a libmp3lame -b:a 32k"),
        ("d-slt.opus", D, "-c:a libopus -b:a 24k"),
        ("d-rms.flac", D, FLAC),
    ):
        voice, kind = name[2:].split(".")
        encode(name, say(text, voice), arguments)
        lossless = kind == "flac"
        note(name, "ogg" if kind == "opus" else kind, text, voice, lossless, "one sentence")

    pause = np.zeros(round(PAUSE_S * RATE), np.int16)
    parts = [part for text in LONG for part in (pause, say(text, "slt", BRISK))][1:]
    encode("long-slt.flac", np.concatenate(parts), FLAC)
    note("long-slt.flac", "flac", " ".join(LONG), "slt", True, f"three sentences, {PAUSE_S} s apart")

    for name, (x, arguments, what) in sounds().items():
        encode(name, x, arguments)
        note(name, name[-4:].strip("."), "", None, name.endswith("flac"), what)
    for name, arguments in (("noaudio.mp4", "-c:v mpeg4 -b:v 20k"), ("noaudio.webm", VP8)):
        encode(name, a, f"-map 1:v {arguments}", video=VIDEO)
        note(name, name.partition(".")[2], "", None, False, "video only, no audio stream")

    others = not_audio()
    for name, (body, _) in others.items():
        (HERE / name).write_bytes(body)
    listed = [{"file": name, "what": what} for name, (_, what) in others.items()]
    manifest = json.dumps({"files": files, "not_audio": listed}, indent=1)
    (HERE / "manifest.json").write_text(manifest + "\n")


if __name__ == "__main__":
    main()
