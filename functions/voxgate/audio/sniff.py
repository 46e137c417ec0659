"""What a file is, from its content alone; names and content types are not asked.

Besides telling customers what they sent, this is what keeps FFmpeg safe: a demuxer is opened by
the name found here and by no other, so that a playlist or a concat script, which make FFmpeg open
other files and addresses, is never one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from voxgate.audio import UnusableAudio

SUPPORTED = ("flac", "m4a", "mp3", "mp4", "mpeg", "mpga", "ogg", "opus", "wav", "webm")


@dataclass(frozen=True, slots=True)
class Container:
    """A kind of file that can be transcribed. `demuxer` is FFmpeg's name for its reader."""

    name: str
    demuxer: str
    content_type: str


WAV = Container("wav", "wav", "audio/wav")
FLAC = Container("flac", "flac", "audio/flac")
MP3 = Container("mp3", "mp3", "audio/mpeg")
AAC = Container("aac", "aac", "audio/aac")
MP4 = Container("mp4", "mov", "audio/mp4")
OGG = Container("ogg", "ogg", "audio/ogg")
WEBM = Container("webm", "matroska", "audio/webm")
MPEG = Container("mpeg", "mpeg", "video/mpeg")

CONTAINERS = {c.name: c for c in (WAV, FLAC, MP3, AAC, MP4, OGG, WEBM, MPEG)}

_MP4_BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"moof", b"sidx", b"pnot"}
_IMAGE_BRANDS = {b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis", b"crx "}
# What else people send, so that the refusal can say so.
_OTHERS = (
    (b"%PDF-", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive (or an Office document)"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf'\x1c", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"MThd", "a MIDI file, which holds notes and no sound"),
    (b"#!AMR", "an AMR recording; convert it to wav or mp3"),
    (b"wvpk", "a WavPack file; convert it to flac"),
    (b"riff\x2e\x91\xcf\x11", "a Wave64 file; convert it to wav"),
    (b"caff", "a Core Audio (CAF) file; convert it to m4a or wav"),
    (b".snd", "a Sun audio file; convert it to wav"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a Windows Media file; convert it to mp3 or m4a"),
    (b"FLV\x01", "a Flash video; convert it to mp4"),
    (b"\x00\x00\x01\xb3", "a bare MPEG video stream, which has no audio track"),
    (b"ID3", "an ID3 tag with no audio after it"),
    (b"#EXTM3U", "a playlist; send the audio itself"),
    (b"ffconcat", "a playlist; send the audio itself"),
)
_SCAN = 64 * 1024
_LengthAt = Callable[[bytes], tuple[int, int]]


def sniff(file: BinaryIO) -> Container:
    """Tell the container of the seekable `file`. Raises `UnusableAudio`, saying what the
    file is, when it is nothing that can be transcribed."""
    file.seek(0)
    head = file.read(_SCAN)
    if not head:
        raise UnusableAudio("The audio file is empty.")
    container = _signature(head)
    if container is None and not any(head.startswith(magic) for magic, _ in _OTHERS if magic != b"ID3"):
        container = _frames(_after_id3(file, head))
    if container is None:
        raise UnusableAudio(
            f"Unrecognized file format: this is {_describe(head)}. Supported formats: {list(SUPPORTED)}."
        )
    return container


def _signature(head: bytes) -> Container | None:
    if head[:4] in (b"RIFF", b"RF64", b"BW64", b"RIFX") and head[8:12] == b"WAVE":
        return WAV
    if head[:4] == b"fLaC":
        return FLAC
    if head[:4] == b"OggS":
        return OGG
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return WEBM
    if head[:4] == b"\x00\x00\x01\xba":
        return MPEG
    if head[4:8] in _MP4_BOXES and not (head[4:8] == b"ftyp" and head[8:12] in _IMAGE_BRANDS):
        return MP4
    return None


def _after_id3(file: BinaryIO, head: bytes) -> bytes:
    """The bytes behind any ID3v2 tags (id3.org, ID3v2.4 3.1: sizes are in 7-bit bytes)."""
    offset = 0
    for _ in range(4):  # more than one tag is rare, endless ones are hostile
        if head[:3] != b"ID3" or len(head) < 10 or any(b & 0x80 for b in head[6:10]):
            break
        size = (head[6] << 21) | (head[7] << 14) | (head[8] << 7) | head[9]
        offset += 10 + size + (10 if head[5] & 0x10 else 0)
        file.seek(offset)
        head = file.read(_SCAN)
    return head


def _frames(head: bytes) -> Container | None:
    if head[:4] == b"fLaC":
        return FLAC
    # Encoders' padding and cut streams put other bytes before the first frame, so a run of frames
    # that lead to one another is looked for; a single sync word is found in any random bytes.
    if _looks_like_text(head[:1024]) or _transport_stream(head):
        return None
    start = head.find(b"\xff")
    while 0 <= start < len(head) - 4:
        for container, length_at in ((MP3, _mpeg_length), (AAC, _adts_length)):
            if _run(head, start, length_at):
                return container
        start = head.find(b"\xff", start + 1)
    return None


def _run(head: bytes, start: int, length_at: _LengthAt, wanted: int = 3) -> bool:
    kind: int | None = None
    offset = start
    for count in range(wanted):
        if count and offset >= len(head) - 4:
            # Fewer frames than wanted are all that a very short file has: they must end it.
            return offset == len(head) or len(head) == _SCAN or head[offset:].startswith(b"TAG")
        length, this = length_at(head[offset : offset + 7])
        if not length or (kind is not None and this != kind):
            return False
        kind = this
        offset += length
    return True


_BITRATES = {  # kbit/s by (MPEG-1?, layer), ISO/IEC 11172-3 2.4.2.3 and 13818-3
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def _mpeg_length(header: bytes) -> tuple[int, int]:
    """The length in bytes of the MPEG audio frame with this header and what must not change from
    frame to frame; length 0 where it is none."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return 0, 0
    version, layer = (header[1] >> 3) & 3, 4 - ((header[1] >> 1) & 3)
    bitrate, rate = header[2] >> 4, (header[2] >> 2) & 3
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return 0, 0
    bits = _BITRATES[version == 3, layer][bitrate] * 1000
    hertz, padding = _RATES[version][rate], (header[2] >> 1) & 1
    if layer == 1:
        length = (12 * bits // hertz + padding) * 4
    else:
        length = (72 if layer == 3 and version != 3 else 144) * bits // hertz + padding
    return length, header[1] & 0xFE | (rate << 8)


def _adts_length(header: bytes) -> tuple[int, int]:
    """As above for an ADTS frame of AAC (ISO/IEC 13818-7, 6.2)."""
    if len(header) < 7 or header[0] != 0xFF or header[1] & 0xF6 != 0xF0 or (header[2] >> 2) & 15 > 12:
        return 0, 0
    length = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
    return (length, header[2] & 0xFC) if length > 7 else (0, 0)


def _transport_stream(head: bytes) -> bool:
    return head[:1] == b"\x47" and head[188:189] == b"\x47" and head[376:377] == b"\x47"


def _looks_like_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # a character cut in two at the very end is still text
            return False
        text = head[: error.start].decode()
    return all(c.isprintable() or c in "\t\r\n\f\x1b\ufeff" for c in text)


def _describe(head: bytes) -> str:
    for magic, name in _OTHERS:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF":
        return {b"AVI ": "an AVI video; convert it to mp4", b"WEBP": "a WebP image"}.get(
            head[8:12], "a RIFF file of another kind"
        )
    if head[:4] == b"FORM" and head[8:11] == b"AIF":
        return "an AIFF file; convert it to wav or flac"
    if head[4:8] == b"ftyp":
        return "a HEIF or AVIF image"
    if _transport_stream(head):
        return "an MPEG transport stream; convert it to mp4"
    if _looks_like_text(head[:1024]):
        start = head[:256].lstrip().lower()
        if start.startswith((b"<!doctype html", b"<html")):
            return "an HTML page"
        if start.startswith(b"<"):
            return "an XML document"
        return "a JSON document" if start[:1] in (b"{", b"[") else "text"
    return "unknown data" if head.strip(b"\0") else "nothing but zero bytes"
