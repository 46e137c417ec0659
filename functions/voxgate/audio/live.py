"""Audio that is still being spoken, to the samples that recognizers take: 16 kHz, mono, 16 bits."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Protocol

import av
from av.audio.codeccontext import AudioCodecContext

from voxgate.audio import UnusableAudio
from voxgate.audio.decode import RATE, decode, samples

# Without a channel for effects alone, which would be left out of the mix.
_LAYOUTS = ("mono", "stereo", "3.0", "4.0", "5.0", "hexagonal", "7.0", "octagonal")
_SAMPLE_BYTES = {"pcm_s16le": 2, "pcm_f32le": 4, "mulaw": 1, "alaw": 1}
_CODECS = {"mulaw": "pcm_mulaw", "alaw": "pcm_alaw"}
RAW = tuple(_SAMPLE_BYTES)
_DEMUXERS = {b"OggS": "ogg", b"\x1a\x45\xdf\xa3": "matroska"}
_MAGIC = 4
_FOREVER = 10.0**6


class Decoder(Protocol):
    """Chunks come in split anywhere, and go out in whole samples. Raises `UnusableAudio`. One that `blocks` is
    for a thread."""

    blocks: bool

    def push(self, data: bytes) -> bytes: ...

    def end(self) -> bytes:
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

    def push(self, data: bytes) -> bytes:
        data = self._rest + data if self._rest else data
        whole = len(data) - len(data) % self._size
        self._rest = data[whole:]
        return data[:whole]

    def end(self) -> bytes:
        return b""  # half a sample is none

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

    def push(self, data: bytes) -> bytes:
        whole = self._whole.push(data)
        frames = self._context.decode(av.Packet(whole)) if whole else []
        return b"".join(pcm for frame in frames for pcm in samples(self._resampler, frame))

    def end(self) -> bytes:
        return b"".join(samples(self._resampler, None))

    def close(self) -> None:
        pass


class _Container:
    """Ogg or WebM, which FFmpeg reads in a thread of its own."""

    blocks = True

    def __init__(self) -> None:
        self._pipe = _Pipe()
        self._decoded: SimpleQueue[bytes] = SimpleQueue()
        self._failure: UnusableAudio | None = None
        self._thread: threading.Thread | None = None
        self._head = b""

    def push(self, data: bytes) -> bytes:
        if self._thread is None:
            self._head += data
            if len(self._head) < _MAGIC:
                return b""
            demuxer = _DEMUXERS.get(self._head[:_MAGIC])
            if demuxer is None:
                raise UnusableAudio("With encoding 'opus' the audio must be Ogg or WebM, from its first byte on.")
            data = self._head
            self._thread = threading.Thread(target=self._work, args=(demuxer,), daemon=True)
            self._thread.start()
        self._pipe.write(data)
        return self._taken()

    def end(self) -> bytes:
        self.close()
        return self._taken()

    def close(self) -> None:
        if self._thread is not None:
            self._pipe.write(b"")
            self._thread.join()

    def _work(self, demuxer: str) -> None:
        try:
            for pcm in decode(self._pipe, demuxer, max_seconds=_FOREVER):
                self._decoded.put(pcm)
        except UnusableAudio as error:
            self._failure = error
        finally:
            self._pipe.leave()

    def _taken(self) -> bytes:
        taken = [self._decoded.get() for _ in range(self._decoded.qsize())]
        if self._failure is not None and not taken:
            raise self._failure
        return b"".join(taken)


class _Pipe:
    """Between one that writes and one that reads, who has always had all of it when the other goes on."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._data = b""
        self._hungry = self._ended = self._left = False

    def write(self, data: bytes) -> None:
        """Returns when the reader wants more; with nothing, that was all."""
        with self._condition:
            self._data += data
            self._ended = self._ended or not data
            self._hungry = False
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._hungry or self._left or self._ended)

    def read(self, size: int) -> bytes:
        with self._condition:
            if not self._data and not self._ended:
                self._hungry = True
                self._condition.notify_all()
                self._condition.wait_for(lambda: not self._hungry)
            data, self._data = self._data[:size], self._data[size:]
            return data

    def leave(self) -> None:
        """The reader reads no more."""
        with self._condition:
            self._left = True
            self._data = b""
            self._condition.notify_all()
