"""How long a recording lasts, to bill by: what its packets hold, not what its header claims.

The packets are counted without being decoded, which takes milliseconds where decoding takes
seconds. Where the count cannot be trusted either, the audio is decoded after all.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO, Literal

import av
from av.audio.stream import AudioStream
from av.container import InputContainer

from voxgate.audio import UnusableAudio
from voxgate.audio.decode import opened
from voxgate.audio.sniff import FLAC, MP3, MP4, OGG, WAV, WEBM, Container

SHORTEST = 0.1  # seconds, as OpenAI has it
_TOLERANCE = 0.05
_ANY_PADDING = 60.0  # seconds that an encoder may have put before and behind
_MOST_PACKETS = 1_000_000  # four hours are 720,000 of 20 ms; a hostile file has millions
_CUT_OFF = 0.5  # seconds missing from what the header promises that make a file "cut off"
# Recorders that write to a pipe leave a size that means "unknown": all ones, or near the largest
# signed number that still has room for the header.
_UNKNOWN_WAV_SIZE = 0x7F00_0000
_SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")  # behind the tag, in WAVEFORMATEXTENSIBLE's GUID


def probe(file: BinaryIO, container: Container, *, max_seconds: float) -> float:
    """The seconds of the audio track, as decoded. Raises `UnusableAudio` for a file without one, a damaged or cut
    off one, one shorter than 0.1 s and one longer than `max_seconds`."""
    wav = _wav(file) if container == WAV else None
    duration, promised = (wav.duration if wav else None), None
    if duration is None:
        with opened(file, container.demuxer) as (media, stream):
            scan = _scan(media, stream, container, max_seconds)
            duration = scan.duration(container, stream)
            if container == FLAC or (container == MP4 and scan.packets < stream.frames):
                promised = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
        if duration is None:
            duration = _decoded(file, container, max_seconds)
    if wav is not None:
        promised = duration * wav.promise
    if promised is not None and promised - duration > _CUT_OFF:
        raise UnusableAudio(
            f"The audio is cut off: its header promises {promised:.1f} s, {duration:.1f} s are there. Upload it again."
        )
    if duration > max_seconds:
        raise UnusableAudio(
            f"The audio is {duration:.0f} s long or longer; at most {max_seconds:g} s are taken: send it in parts."
        )
    if duration < SHORTEST:
        raise UnusableAudio(f"The audio is too short ({duration:.3f} s): at least {SHORTEST} s are needed.")
    return duration


@dataclass(slots=True)
class _Scan:
    """What the packets say, in seconds."""

    packets: int = 0
    total: float = 0.0
    unknown: int = 0  # packets that do not say how long they are
    skipped_start: float = 0.0
    skipped_end: float = 0.0
    discarded: float = 0.0
    opus: float = 0.0  # by the packets' own first bytes

    def duration(self, container: Container, stream: AudioStream) -> float | None:
        """None where the packets cannot be believed."""
        codec = stream.codec_context
        # Vorbis' blocks overlap by lengths that only its decoder knows (Vorbis I, 4.3.8).
        if not self.packets or self.unknown or codec.name == "vorbis":
            return None
        total = self.total
        if container in (MP4, WEBM):
            # An MP4's durations come from a table that can say anything, and Matroska's are whole
            # milliseconds, which add up to seconds lost. Opus says it in each packet, frames of a
            # fixed size are counted, PCM is its own measure; the rest is decoded.
            if codec.name == "opus":
                total = self.opus
            elif codec.frame_size and codec.sample_rate:
                frame = codec.frame_size / codec.sample_rate
                allowed = self.packets * 0.001 if container == WEBM else 0.0
                if abs(self.packets * frame - total) > max(_TOLERANCE, frame) + allowed:
                    return None
                total = self.packets * frame if container == WEBM else total
            elif container == WEBM or not codec.name.startswith("pcm_"):
                return None
        # Ogg's last packet is already cut to the stream's end in its duration.
        end = 0.0 if container == OGG else self.skipped_end
        return total - max(self.skipped_start, self.discarded) - end


def _scan(media: InputContainer, stream: AudioStream, container: Container, max_seconds: float) -> _Scan:
    scan = _Scan()
    ticks = discarded = 0
    rate = stream.codec_context.sample_rate or 1
    time_base = float(stream.time_base or 0)
    opus = stream.codec_context.name == "opus"
    for packet in media.demux(stream):
        if not packet.size:
            continue
        duration = packet.duration
        if not duration or duration < 0:
            scan.unknown += 1
            continue
        if container == MP3 and bytes(memoryview(packet)[:1]) != b"\xff":
            continue  # a tag behind the last frame
        scan.packets += 1
        ticks += duration
        if scan.packets > _MOST_PACKETS:
            raise UnusableAudio(f"The audio is in more than {_MOST_PACKETS} packets: encode it anew.")
        if ticks * time_base > max_seconds + _ANY_PADDING:
            break
        scan.opus += _opus_seconds(packet) if opus else 0.0
        if packet.is_discard:
            discarded += duration
        if packet.has_sidedata("skip_samples"):
            # FFmpeg's AV_PKT_DATA_SKIP_SAMPLES: u32le from the start, u32le from the end.
            skip = bytes(packet.get_sidedata("skip_samples"))
            scan.skipped_start += int.from_bytes(skip[:4], "little") / rate
            scan.skipped_end += int.from_bytes(skip[4:8], "little") / rate
    scan.total = ticks * time_base
    scan.discarded = discarded * time_base
    return scan


def _opus_seconds(packet: av.Packet[AudioStream]) -> float:
    """What an Opus packet lasts by its table of contents (RFC 6716, 3.1 and 3.2)."""
    head = bytes(memoryview(packet)[:2])
    config, code = head[0] >> 3, head[0] & 3
    if config < 12:
        frame = (0.01, 0.02, 0.04, 0.06)[config & 3]
    elif config < 16:
        frame = (0.01, 0.02)[config & 1]
    else:
        frame = (0.0025, 0.005, 0.01, 0.02)[config & 3]
    if code < 3:
        return frame * (1 if code == 0 else 2)
    return frame * (head[1] & 63) if len(head) > 1 else 0.0


def _decoded(file: BinaryIO, container: Container, max_seconds: float) -> float:
    seconds = 0.0
    with opened(file, container.demuxer) as (media, stream):
        for packet in media.demux(stream):
            try:
                for frame in packet.decode():
                    seconds += frame.samples / (frame.sample_rate or 1)
            except av.InvalidDataError:
                continue
            if seconds > max_seconds:
                break
    return seconds


@dataclass(frozen=True, slots=True)
class _Wav:
    """`duration` is in seconds, None for what is not plain PCM; `promise` is how many times the data that
    is there the header claims: 1 where all of it is there or the header does not know."""

    duration: float | None = None
    promise: float = 1.0


def _wav(file: BinaryIO) -> _Wav:
    """By the header alone: FFmpeg takes 5 to 30 ms to see that PCM is nothing else. The promise is in bytes,
    since compressed formats' rates are advisory (EBU 3306 for RF64)."""
    there = file.seek(0, 2)
    file.seek(0)
    order: Literal["big", "little"] = "big" if file.read(12)[:4] == b"RIFX" else "little"
    size64, form = 0, b""
    while len(header := file.read(8)) == 8:
        name, size = header[:4], int.from_bytes(header[4:], order)
        if name == b"data":
            there -= file.tell()
            known = size64 if size64 and size == 0xFFFF_FFFF else size if size < _UNKNOWN_WAV_SIZE else 0
            rate = _pcm_rate(form) if order == "little" else None
            used = min(known or there, there)
            return _Wav(used / rate if rate and used else None, max(known / there, 1.0) if there > 0 else 1.0)
        content = file.read(min(size, 40))
        if name == b"ds64":
            size64 = int.from_bytes(content[8:16], "little")
        elif name == b"fmt ":
            form = content
        file.seek(size - len(content) + (size & 1), 1)
    return _Wav()


def _pcm_rate(form: bytes) -> int | None:
    """The bytes of a second, of a `fmt ` chunk (WAVEFORMATEX, mmreg.h); None for anything but PCM."""
    if len(form) < 16:
        return None
    tag, channels, rate, _, block, bits = struct.unpack("<HHIIHH", form[:16])
    if tag == 0xFFFE and form[26:40] == _SUBFORMAT:
        tag = int.from_bytes(form[24:26], "little")
    plain = bits in {1: (8, 16, 24, 32), 3: (32, 64), 6: (8,), 7: (8,)}.get(tag, ())
    return rate * block if plain and rate and channels and block == channels * bits // 8 else None
