"""Live speech on engine processes: of their own, so that it does not wait for recordings, or on one that serves
both at once."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from voxgate.engines.process import Channel, segment_of
from voxgate.errors import FailureClass, Overloaded, ProviderError
from voxgate.model import Heard

logger = logging.getLogger(__name__)

_UNREAD = 16  # messages of an engine that wait to be read, before it gets more to do
_UNTAKEN = 64  # messages that it has not taken or answered, likewise
_START_TIMEOUT = 600.0
_STUCK_SECONDS = 300.0  # in which a process that has something to do says nothing at all: it never will


class LivePool:
    """Sessions on at most `most` processes, which `start` makes as they are needed and which, but for one, end
    when nobody needs them any more; or all on the one that it gives, where they are `shared`."""

    def __init__(self, start: Callable[[], Channel], *, most: int, shared: bool = False) -> None:
        self._start = start
        self._most = most
        self._shared = shared
        self._processes: list[Channel] = []
        self._leaving: set[asyncio.Task[None]] = set()
        self._open = 0

    async def listen(self, language: str | None, *, model: str = "", interim: bool) -> LiveSession:
        """Raises `Overloaded` where all are taken, and `ProviderError`."""
        process = self._free()
        session = LiveSession(self, process)
        self._open += 1
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                await asyncio.shield(process.started)
            await session.open(language, model=model, interim=interim)
        except BaseException:
            session.close()
            raise
        return session

    def _free(self) -> Channel:
        if self._shared:
            process = self._start()
            if process.info is None or self._open < process.info.sessions:  # recordings have places of their own
                return process
        else:
            for dead in [each for each in self._processes if not each.alive and not each.takers]:
                self._tidy(dead)
            for process in self._processes:
                if process.alive and len(process.takers) < (process.info.sessions if process.info else 1):
                    return process
            if len(self._processes) < self._most:
                self._processes.append(self._start())
                return self._processes[-1]
        raise Overloaded("All of the recognizers for live speech are taken; try again in a while.", retry_after=10)

    def left(self, process: Channel) -> None:
        """One of its sessions is over."""
        self._open -= 1
        self._tidy(process)

    def _tidy(self, process: Channel) -> None:
        idle = [p for p in self._processes if p.alive and not p.takers]
        if process in self._processes and (not process.alive or (not process.takers and len(idle) > 1)):
            self._processes.remove(process)
            task = asyncio.create_task(process.end())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        await asyncio.gather(*(process.end() for process in self._processes), *self._leaving)


class LiveSession:
    """Implements `LiveEngine` on this machine."""

    def __init__(self, pool: LivePool, process: Channel) -> None:
        self._pool = pool
        self._process = process
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._untaken = 0
        self._asked = 0.0  # when it had taken all, and got more, by the loop's clock
        self._room = asyncio.Event()
        self._room.set()
        self._over = False
        self._number = process.join(self._take)
        self._watch: asyncio.TimerHandle | None = None

    async def open(self, language: str | None, *, model: str, interim: bool) -> None:
        self._watch = asyncio.get_running_loop().call_later(_STUCK_SECONDS, self._judge)
        self._more()
        await self._send(open={"language": language, "model": model, "interim": interim})
        await self._next()

    async def feed(self, pcm: bytes) -> None:
        await self._room.wait()
        self._more()
        self._look()
        await self._send(pcm=base64.b64encode(pcm).decode())

    async def finalize(self) -> None:
        await self._send(finalize=True)

    async def end(self) -> None:
        self._more()
        await self._send(end=True)

    async def heard(self) -> AsyncIterator[Heard]:
        while not self._over:
            message = await self._next()
            if "segment" in message:
                yield Heard(segment_of(message["segment"]), message["final"])
            self._over = "ended" in message

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """What the process is at is given up with its next step."""
        if self._watch is not None:
            self._watch.cancel()
        if self._process.takers.pop(self._number, None) is not None:
            if self._process.alive and not self._over:
                with contextlib.suppress(OSError, RuntimeError):
                    self._process.worker.post({"live": self._number, "drop": True})
            self._pool.left(self._process)

    def _take(self, message: dict[str, Any]) -> None:
        if message.keys() & {"open", "took", "ended"}:
            self._untaken -= 1
        if "took" not in message:
            self._messages.put_nowait(message)
        self._look(lost="crash" in message)

    def _more(self) -> None:
        if not self._untaken:
            self._asked = asyncio.get_running_loop().time()
        self._untaken += 1

    def _judge(self) -> None:
        """End a process that is stuck: who waits for it would wait for ever, and so would the next."""
        loop = asyncio.get_running_loop()
        silent = loop.time() - max(self._process.spoke, self._asked)
        if self._untaken and silent >= _STUCK_SECONDS:
            logger.warning("a recognizer for live speech is stuck, and is ended")
            self._process.worker.abort()
        else:
            self._watch = loop.call_later(max(_STUCK_SECONDS - silent, 1.0), self._judge)

    def _look(self, *, lost: bool = False) -> None:
        """Whether it may get more to do; who is lost is told by the next that is sent."""
        if lost or (self._untaken < _UNTAKEN and self._messages.qsize() < _UNREAD):
            self._room.set()
        else:
            self._room.clear()

    async def _send(self, **message: Any) -> None:
        await self._process.worker.send({"live": self._number} | message)

    async def _next(self) -> dict[str, Any]:
        message = await self._messages.get()
        self._look()
        if "crash" in message:
            raise ProviderError(FailureClass.TRANSIENT, f"The recognizer failed ({message['crash']}).")
        return message
