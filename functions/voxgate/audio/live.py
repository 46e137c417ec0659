"""Audio that is still being spoken, to the samples that recognizers take: 16 kHz, mono, 16 bits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from enum import Enum
from queue import Empty, Queue, SimpleQueue
from typing import Protocol

import av
from av.audio.codeccontext import AudioCodecContext

from voxgate.audio import NoAudio, UnusableAudio
from voxgate.audio.decode import RATE, decode, samples

# Without a channel for effects alone, which would be left out of the mix.
_LAYOUTS = ("mono", "stereo", "3.0", "4.0", "5.0", "hexagonal", "7.0", "octagonal")
_SAMPLE_BYTES = {"pcm_s16le": 2, "pcm_f32le": 4, "mulaw": 1, "alaw": 1}
_CODECS = {"mulaw": "pcm_mulaw", "alaw": "pcm_alaw"}
RAW = tuple(_SAMPLE_BYTES)
_DEMUXERS = {b"OggS": "ogg", b"\x1a\x45\xdf\xa3": "matroska"}
_MAGIC = 4
_AHEAD = 64  # pieces of decoded audio, of a tenth of a second or so
_WAIT = 0.05
_FOREVER = 10.0**6


class Decoder(Protocol):
    """Chunks come in split anywhere, and go out in whole samples. Raises `UnusableAudio`. Of one that `blocks`,
    each next piece is for a thread to ask for."""

    blocks: bool

    def push(self, data: bytes) -> Iterator[bytes]:
        """To be asked for all before the next push."""

    def end(self) -> Iterator[bytes]:
        """What is left."""

    def close(self) -> None: ...


def decoder(encoding: str, *, sample_rate: int, channels: int) -> Decoder:
    """`encoding` is one of `RAW`, or `opus` in a container."""
    if encoding == "opus":
        return _Container()
    if (encoding, sample_rate, channels) == ("pcm_s16le", RATE, 1):
        return _Pcm(2)
    return _Raw(encoding, sample_rate, channels)


class _Pcm:
    """Whole samples (of `size` bytes), as they are."""

    blocks = False

    def __init__(self, size: int) -> None:
        self._size = size
        self._rest = b""

    def push(self, data: bytes) -> Iterator[bytes]:
        data = self._rest + data if self._rest else data
        whole = len(data) - len(data) % self._size
        self._rest = data[whole:]
        yield data[:whole]

    def end(self) -> Iterator[bytes]:
        yield from ()  # half a sample is none

    def close(self) -> None:
        pass


class _Raw:
    blocks = False

    def __init__(self, encoding: str, sample_rate: int, channels: int) -> None:
        self._whole = _Pcm(_SAMPLE_BYTES[encoding] * channels)
        context = av.CodecContext.create(_CODECS.get(encoding, encoding), "r")
        assert isinstance(context, AudioCodecContext)
        context.sample_rate = sample_rate
        context.layout = _LAYOUTS[channels - 1]
        self._context = context
        self._resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)

    def push(self, data: bytes) -> Iterator[bytes]:
        for whole in self._whole.push(data):
            for frame in self._context.decode(av.Packet(whole)) if whole else ():
                yield from samples(self._resampler, frame)

    def end(self) -> Iterator[bytes]:
        yield from samples(self._resampler, None)

    def close(self) -> None:
        pass


class _Container:
    """Ogg or WebM, which FFmpeg reads in a thread of its own, as far ahead as its samples are asked for: a few bytes
    may say hours of them."""

    blocks = True

    def __init__(self) -> None:
        self._head = b""
        self._source = _Source(Queue(_AHEAD))
        self._thread: threading.Thread | None = None
        self._last: UnusableAudio | _Mark | None = None
        self._closed = False

    def push(self, data: bytes) -> Iterator[bytes]:
        if self._thread is None:
            data = self._head = self._head + data
            if len(data) < _MAGIC:
                return
            demuxer = _DEMUXERS.get(data[:_MAGIC])
            if demuxer is None:
                raise UnusableAudio("With encoding 'opus' the audio must be Ogg or WebM, from its first byte on.")
            self._thread = threading.Thread(target=self._work, args=(demuxer,), daemon=True)
            self._source.data.put(data)
            self._thread.start()
        else:
            self._source.data.put(data)
        yield from self._taken()

    def end(self) -> Iterator[bytes]:
        if self._thread is not None:
            self._source.data.put(b"")
            yield from self._taken()

    def close(self) -> None:
        self._closed = True
        self._source.data.put(b"")
        while self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(Empty):
                self._source.out.get(timeout=_WAIT)

    def _work(self, demuxer: str) -> None:
        last: UnusableAudio | _Mark = _Mark.END
        try:
            for pcm in decode(self._source, demuxer, max_seconds=_FOREVER):
                if self._closed:
                    break
                self._source.out.put(pcm)
        except NoAudio:
            pass  # who has begun and ended has not said anything wrong
        except UnusableAudio as error:
            last = error
        self._source.out.put(last)

    def _taken(self) -> Iterator[bytes]:
        while self._last is None:
            match self._source.out.get():
                case bytes() as pcm:
                    yield pcm
                case _Mark.HUNGRY:
                    return
                case last:
                    self._last = last
        if isinstance(self._last, UnusableAudio):
            raise self._last


class _Mark(Enum):
    HUNGRY = "waits for more data"
    END = "has ended"


class _Source:
    """What FFmpeg reads as a file; between that, it says so in `out`, among the samples."""

    def __init__(self, out: Queue[bytes | UnusableAudio | _Mark]) -> None:
        self.data: SimpleQueue[bytes] = SimpleQueue()
        self.out = out
        self._rest = b""
        self._ended = False

    def read(self, size: int) -> bytes:
        if not self._rest and not self._ended:
            if self.data.empty():
                self.out.put(_Mark.HUNGRY)
            self._rest = self.data.get()
            self._ended = not self._rest
        data, self._rest = self._rest[:size], self._rest[size:]
        return data
