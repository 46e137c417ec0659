"""Live speech on engine processes of their own, so that it does not wait for recordings."""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from voxgate.engines.process import Worker, segment_of
from voxgate.errors import FailureClass, Overloaded, ProviderError
from voxgate.model import Heard

_AHEAD = 16  # messages of an engine that wait to be read, before it gets more to do
_START_TIMEOUT = 600.0


class LivePool:
    """Sessions on at most `workers` processes, which are started as they are needed and, but for one, end
    when nobody needs them any more; `arguments` are `engines.worker`'s."""

    def __init__(self, *, arguments: Sequence[str], workers: int) -> None:
        self._arguments = tuple(arguments)
        self._size = workers
        self._processes: list[_Process] = []
        self._leaving: set[asyncio.Task[None]] = set()

    async def listen(self, language: str | None, *, interim: bool) -> LiveSession:
        """Raises `Overloaded` where all are taken, and `ProviderError`."""
        for dead in [p for p in self._processes if not p.alive and not p.sessions]:
            self.left(dead)
        process = next((p for p in self._processes if p.free), None)
        if process is None:
            if len(self._processes) >= self._size:
                message = "All of the recognizers for live speech are taken; try again in a while."
                raise Overloaded(message, retry_after=10)
            process = _Process(self._arguments)
            self._processes.append(process)
        session = LiveSession(self, process)
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                await asyncio.shield(process.started)
            await session.open(language, interim=interim)
        except BaseException:
            session.close()
            raise
        return session

    def left(self, process: _Process) -> None:
        """One of its sessions is over."""
        idle = [p for p in self._processes if p.alive and not p.sessions]
        if process in self._processes and (not process.alive or (not process.sessions and len(idle) > 1)):
            self._processes.remove(process)
            task = asyncio.create_task(process.end())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        await asyncio.gather(*(process.end() for process in self._processes), *self._leaving)


class _Process:
    """One process, and who reads what of it."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.sessions: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self.worker = Worker()
        self.started = asyncio.create_task(self._start(arguments))
        self._most = 1
        self._numbers = itertools.count()
        self._reading: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        if not self.started.done():
            return True
        return not self.started.cancelled() and self.started.exception() is None and self.worker.alive

    @property
    def free(self) -> bool:
        return self.alive and len(self.sessions) < self._most

    def join(self) -> int:
        number = next(self._numbers)
        self.sessions[number] = asyncio.Queue()
        return number

    async def end(self) -> None:
        self.started.cancel()
        if self._reading is not None:
            self._reading.cancel()
        await asyncio.wait([self.started])
        await self.worker.end()

    async def _start(self, arguments: Sequence[str]) -> None:
        try:
            self._most = (await self.worker.start(arguments)).sessions
        except BaseException:
            await self.worker.kill()
            raise
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            while True:
                message = await self.worker.message()
                if (queue := self.sessions.get(message.pop("live"))) is not None:
                    queue.put_nowait(message)
        except ProviderError as error:
            for queue in self.sessions.values():
                queue.put_nowait({"crash": error.message})


class LiveSession:
    """Implements `LiveEngine` on this machine."""

    def __init__(self, pool: LivePool, process: _Process) -> None:
        self._pool = pool
        self._process = process
        self._number = process.join()
        self._messages = process.sessions[self._number]
        self._room = asyncio.Event()
        self._over = False

    async def open(self, language: str | None, *, interim: bool) -> None:
        await self._send(open={"language": language, "interim": interim})
        await self._next()

    async def feed(self, pcm: bytes) -> None:
        if self._messages.qsize() > _AHEAD:
            self._room.clear()
            await self._room.wait()
        await self._send(pcm=base64.b64encode(pcm).decode())

    async def finalize(self) -> None:
        await self._send(finalize=True)

    async def end(self) -> None:
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
        if self._process.sessions.pop(self._number, None) is not None:
            if self._process.alive and not self._over:
                self._process.worker.post({"live": self._number, "drop": True})
            self._pool.left(self._process)

    async def _send(self, **message: Any) -> None:
        await self._process.worker.send({"live": self._number} | message)

    async def _next(self) -> dict[str, Any]:
        message = await self._messages.get()
        if self._messages.qsize() <= _AHEAD:
            self._room.set()
        if "crash" in message:
            raise ProviderError(FailureClass.TRANSIENT, f"The recognizer failed ({message['crash']}).")
        return message
