"""A bounded number of engine processes, and a bounded queue before them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from voxgate.engines import Job
from voxgate.engines.admission import Admission
from voxgate.engines.live import LivePool
from voxgate.engines.process import Channel, EngineInfo, Told, Worker
from voxgate.errors import ProviderError
from voxgate.model import Segment

logger = logging.getLogger(__name__)

_START_TIMEOUT = 600.0  # a large model from a slow disk
_MARGIN = 0.5  # what is said and how clearly makes a recording take half or twice as long
_OVERHEAD = 1.0  # seconds of audio that take as long as what each recording takes besides


class EnginePool:
    """Implements `Pool`: runs jobs on `workers` processes of one engine, and live speech on `live` others;
    `arguments` are `engines.worker`'s.

    At most `queue` jobs wait; one more is refused with `Overloaded`, and so is one that cannot be done in its time,
    once it is known how fast they are.
    """

    def __init__(self, *, arguments: Sequence[str], workers: int, queue: int, live: int = 0) -> None:
        self.live = LivePool(lambda: Channel(arguments), most=live)
        self._arguments = tuple(arguments)
        self._size = workers
        self.admission = Admission(most=workers + queue, cost=_cost, abreast=workers, margin=_MARGIN)
        self._idle: asyncio.Queue[Worker] = asyncio.Queue()
        self._workers: set[Worker] = set()
        self._starting: asyncio.Task[EngineInfo] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> EngineInfo:
        """Start the processes unless they run, and say what they are. Raises `ProviderError`."""
        return await asyncio.shield(self.begin())

    def begin(self) -> asyncio.Task[EngineInfo]:
        """Begin to start, or begin again after a failure, without waiting for it."""
        if self._starting is None or (self._starting.done() and not self.ready):
            self._starting = asyncio.create_task(self._start_all())
        return self._starting

    @property
    def failed(self) -> bool:
        """Whether the last start came to nothing."""
        return self._starting is not None and self._starting.done() and not self.ready

    @property
    def ready(self) -> bool:
        started = self._starting
        return started is not None and started.done() and not started.cancelled() and started.exception() is None

    async def recognize(self, job: Job, heard: Told | None = None) -> tuple[str | None, tuple[Segment, ...]]:
        """The language heard and the segments, each of which `heard` is told as it is made. Raises
        `Overloaded`, or `ProviderError` of class CALLER_FAULT for unusable audio and TRANSIENT for an
        engine that failed. Cancelling this call stops the engine."""
        await self.start()
        with self.admission.admit(job) as admitted:

            async def told(segment: Segment) -> None:
                self.admission.hear(admitted, segment.end)
                if heard is not None:
                    await heard(segment)

            while not (worker := await self._idle.get()).alive:
                self._spawn(self._recover(worker))  # it died while it had nothing to do
            return await self._run(worker, job, told)

    async def _run(self, worker: Worker, job: Job, heard: Told) -> tuple[str | None, tuple[Segment, ...]]:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        finished = False
        try:
            result = await worker.run(job, heard)
            finished = True
            self.admission.went(_cost(job.seconds) / (loop.time() - begun))
            return result
        except ProviderError:
            finished = worker.alive
            raise
        finally:
            if finished:
                self._idle.put_nowait(worker)
            else:  # it died, or the client hung up: not this caller's time to spend
                self._spawn(self._recover(worker))

    async def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
        for task in self._tasks:
            task.cancel()
        await self.live.close()
        await asyncio.gather(*(worker.end() for worker in self._workers))

    async def _start_all(self) -> EngineInfo:
        starting = [asyncio.create_task(self._add()) for _ in range(self._size)]
        try:
            return (await asyncio.gather(*starting))[0]
        except BaseException:  # all or none, so that the next try does not add to this one
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            self._idle = asyncio.Queue()
            for worker in tuple(self._workers):
                await self._discard(worker)
            raise

    async def _add(self) -> EngineInfo:
        worker = Worker()
        self._workers.add(worker)
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                info = await worker.start(self._arguments)
        except BaseException:
            await self._discard(worker)
            raise
        self._idle.put_nowait(worker)
        return info

    async def _discard(self, worker: Worker) -> None:
        self._workers.discard(worker)
        await worker.kill()

    async def _recover(self, worker: Worker) -> None:
        if worker.alive and await worker.cancel():
            self._idle.put_nowait(worker)
            return
        await self._discard(worker)
        delay = 0.0
        while True:  # an engine that started once will again, unless memory is short for a while
            await asyncio.sleep(delay)
            try:
                await self._add()
                return
            except (ProviderError, OSError, TimeoutError):
                delay = min(delay * 2 + 1, 30.0)
                logger.warning("the recognizer's process did not start; next try in %.0f s", delay)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _cost(seconds: float) -> float:
    return seconds + _OVERHEAD
