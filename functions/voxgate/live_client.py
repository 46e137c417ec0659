"""`voxgate live`: a client of the live socket, docs/live.md."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException

from voxgate.audio import UnusableAudio
from voxgate.client import ClientError, refusal

_TENTHS = 10  # messages a second
_PCM = "pcm_s16le"
_SAMPLE_BYTES = {_PCM: 2, "pcm_f32le": 4, "mulaw": 1, "alaw": 1, "opus": 1}
_RESTART = 1012
_LONGEST = 4 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Without an `encoding` a file is decoded here. `speed` is how many times as fast as speech it is sent; 0:
    as fast as it is taken."""

    base_url: str
    api_key: str
    model: str
    language: str | None
    encoding: str | None
    sample_rate: int
    channels: int
    speed: float
    as_json: bool


def live(path: Path | None, options: Options) -> None:
    """Send a file, or the standard input, and print what is heard. Raises `ClientError`."""
    try:
        asyncio.run(_live(path, options))
    except InvalidStatus as error:
        raise ClientError(refusal(error.response.status_code, bytes(error.response.body or b""))) from error
    except (InvalidURI, ValueError) as error:
        raise ClientError(f"{options.base_url} is no gateway's address, or the API key is none: {error}.") from error
    except BrokenPipeError:  # whoever read what is printed has seen enough
        raise
    except (OSError, WebSocketException) as error:
        raise ClientError(f"{options.base_url} cannot be reached: {error}.") from error


async def _live(path: Path | None, options: Options) -> None:
    query = {"model_id": options.model, "encoding": options.encoding or _PCM}
    query |= {"sample_rate": str(options.sample_rate), "channels": str(options.channels)} if options.encoding else {}
    query |= {"language": options.language} if options.language else {}
    base = "ws" + options.base_url.removeprefix("http").rstrip("/").removesuffix("/v1")
    async with connect(
        f"{base}/v1/stt/stream?{urlencode(query)}",
        additional_headers={"authorization": f"Bearer {options.api_key}"},
        compression=None,
    ) as socket:
        speed = 0.0 if path is None or options.encoding == "opus" else options.speed
        sending = asyncio.create_task(_send(socket, _pieces(path, options), speed))
        showing = asyncio.create_task(_show(socket, as_json=options.as_json))
        try:
            await asyncio.gather(sending, showing)
        finally:
            sending.cancel()
            showing.cancel()
            await asyncio.wait({sending, showing})


async def _send(socket: ClientConnection, pieces: AsyncIterator[bytes], speed: float) -> None:
    clock = asyncio.get_running_loop().time
    begun, sent = clock(), 0
    with contextlib.suppress(ConnectionClosed):  # which is shown
        async for piece in pieces:
            await socket.send(piece)
            sent += 1
            if speed:
                await asyncio.sleep(begun + sent / _TENTHS / speed - clock())
        await socket.send(json.dumps({"type": "close"}))


async def _pieces(path: Path | None, options: Options) -> AsyncIterator[bytes]:
    """A tenth of a second each, until there is no more or the user ends it. Raises `ClientError`."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes | ClientError | None] = asyncio.Queue()
    room = threading.Semaphore(_TENTHS)

    def read() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            for piece in _safely(path, options):
                room.acquire()
                loop.call_soon_threadsafe(queue.put_nowait, piece)

    def stop() -> None:
        """What is read already is not sent any more."""
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(None)

    with contextlib.suppress(NotImplementedError):  # Windows
        loop.add_signal_handler(signal.SIGINT, stop)
    # A thread that nobody waits for: a terminal that says nothing must not keep the program.
    threading.Thread(target=read, daemon=True).start()
    while isinstance(piece := await queue.get(), bytes):
        room.release()
        yield piece
    if piece is not None:
        raise piece


def _safely(path: Path | None, options: Options) -> Iterator[bytes | ClientError | None]:
    """What is read, and at the end None, or what went wrong."""
    try:
        yield from _read(path, options)
    except OSError as error:
        yield ClientError(f"{path or 'the standard input'}: {error.strerror}.")
    except UnusableAudio as error:
        yield ClientError(f"{path}: {error}")
    else:
        yield None


def _read(path: Path | None, options: Options) -> Iterator[bytes]:
    size = options.sample_rate * options.channels * _SAMPLE_BYTES[options.encoding or _PCM] // _TENTHS
    if path is None:
        while piece := os.read(sys.stdin.fileno(), size):
            yield piece
    elif options.encoding:
        with path.open("rb") as file:
            while piece := file.read(size):
                yield piece
    else:
        yield from _decoded(path, size)


def _decoded(path: Path, size: int) -> Iterator[bytes]:
    from voxgate.audio.decode import decode
    from voxgate.audio.sniff import sniff

    with path.open("rb") as file:
        rest = b""
        for pcm in decode(file, sniff(file).demuxer, max_seconds=_LONGEST):
            rest += pcm
            while len(rest) >= size:
                yield rest[:size]
                rest = rest[size:]
        yield rest


async def _show(socket: ClientConnection, *, as_json: bool) -> None:
    """Finals line by line, and on a terminal the partial of the utterance in place. Raises `ClientError`."""
    in_place = sys.stderr.isatty() and not as_json
    async for text in socket:
        message: dict[str, Any] = json.loads(text)
        if as_json:
            print(json.dumps(message, ensure_ascii=False), flush=True)
        elif message["type"] == "partial" and in_place:
            print(f"\r\x1b[K{_printable(message['text'])[-79:]}", end="", file=sys.stderr, flush=True)
        elif message["type"] in ("final", "error", "done") and in_place:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if message["type"] == "final" and not as_json:
            print(_printable(message["text"]), flush=True)
        if message["type"] == "error" and message["fatal"]:
            raise ClientError(f"{message['error']['message']} ({message['error']['code']})")
    if socket.close_code == _RESTART:
        raise ClientError("The server restarts; send what is left again.")


def _printable(text: str) -> str:
    """Nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)
