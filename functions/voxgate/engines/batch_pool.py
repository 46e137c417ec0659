"""Recordings on one engine process that decodes the windows of many at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from dataclasses import asdict
from typing import Any

from voxgate.engines import Job, window_count
from voxgate.engines.admission import Admission, Admitted
from voxgate.engines.live import LivePool
from voxgate.engines.process import Channel, EngineInfo, Told, failure_of, segment_of
from voxgate.errors import ProviderError
from voxgate.model import Segment

logger = logging.getLogger(__name__)

_MARGIN = 1.1  # how much longer than expected it may take
_LONGEST_PAUSE = 30.0
# Who says nothing in so many of such times, though it should in each second, hangs.
_SILENCES, _SILENCE = 6, 10.0  # seconds


class BatchPool:
    """Implements `Pool`. `queue` requests at most wait or are at work; what cannot be done before its deadline is
    refused, by what is ahead of it and how fast that went so far."""

    def __init__(self, *, options: dict[str, Any], queue: int) -> None:
        self._arguments = ("whisper", json.dumps(options))
        self._channel: Channel | None = None
        self.admission = Admission(most=queue, cost=window_count, margin=_MARGIN, batch=1.0)
        self._keeping: asyncio.Task[None] | None = None
        self._failed = False
        self.live = LivePool(self._shared, most=1, shared=True)
        self.stats = Totals()

    async def start(self) -> EngineInfo:
        """Raises `ProviderError`."""
        return await asyncio.shield(self.begin())

    def begin(self) -> asyncio.Task[EngineInfo]:
        return self._shared().started

    @property
    def failed(self) -> bool:
        return self._failed and not self.ready

    @property
    def ready(self) -> bool:
        return self._channel is not None and self._channel.info is not None and self._channel.alive

    async def recognize(self, job: Job, heard: Told | None = None) -> tuple[str | None, tuple[Segment, ...]]:
        """As `EnginePool.recognize` does."""
        channel = self._shared()
        await asyncio.shield(channel.started)
        with self.admission.admit(job) as admitted:
            return await self._recognize(channel, job, admitted, heard)

    async def _recognize(
        self, channel: Channel, job: Job, admitted: Admitted, heard: Told | None
    ) -> tuple[str | None, tuple[Segment, ...]]:
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        number = channel.join(messages.put_nowait)
        segments: list[Segment] = []
        done = False
        try:
            await channel.worker.send({"job": number, "do": asdict(job)})
            while True:
                message = await messages.get()
                if "segment" in message:
                    segments.append(segment_of(message["segment"]))
                    self.admission.hear(admitted, segments[-1].end)
                    if heard is not None:
                        await heard(segments[-1])
                    continue
                if "passed" in message:
                    self.admission.hear(admitted, message["passed"])
                    continue
                done = True
                if "done" in message:
                    return message["language"], tuple(segments)
                raise failure_of(message)
        finally:
            del channel.takers[number]
            if not done and channel.alive:
                with contextlib.suppress(OSError, RuntimeError):
                    channel.worker.post({"cancel": number})

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
        if self._channel is not None:
            await self._channel.end()

    def _shared(self) -> Channel:
        if self._channel is None or not self._channel.alive:
            self._channel = Channel(self._arguments, self._report)
            self._channel.started.add_done_callback(self._started)
        return self._channel

    def _started(self, task: asyncio.Task[EngineInfo]) -> None:
        if task.cancelled():
            return
        self._keeping = self._keeping or asyncio.create_task(self._keep())
        error = task.exception()
        self._failed = error is not None
        if error is None:
            self.admission.restarted(task.result().speed, task.result().batch)
        else:
            logger.error("the recognizer does not start: %s", error)

    async def _keep(self) -> None:
        """Starts it again where it ends, or hangs."""
        pause = 0.0
        while self._channel is not None:
            await self._until_ended(self._channel)
            await asyncio.sleep(pause)
            try:
                await self.start()
                pause = 0.0
            except (ProviderError, OSError):
                pause = min(pause * 2 + 1, _LONGEST_PAUSE)

    async def _until_ended(self, channel: Channel) -> None:
        silences = 0
        while not channel.ended.is_set():
            spoke = channel.spoke
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SILENCE):
                    await channel.ended.wait()
            # Counted and not timed: it may be this process that stood still.
            silences = 0 if channel.spoke > spoke else silences + 1
            if silences == _SILENCES:
                logger.error("the recognizer says nothing any more, and is ended")
                channel.info = None  # it is not ready, even where its driver keeps it from being killed
                channel.worker.abort()

    def _report(self, message: dict[str, Any]) -> None:
        if "stats" in message:
            self.stats.add(message["stats"])


class Totals:
    """What the process has reported since its start; the latest where it is a state."""

    def __init__(self) -> None:
        self.batches: dict[int, int] = {}
        self.sums: dict[str, float] = {}
        self.loaded: dict[str, bool] = {}

    def add(self, stats: dict[str, Any]) -> None:
        for size, count in stats["batches"].items():
            self.batches[int(size)] = self.batches.get(int(size), 0) + count
        for name in ("rows", "seconds", "decoding", "preparing", "waiting"):
            self.sums[name] = self.sums.get(name, 0.0) + stats[name]
        self.loaded = stats["loaded"]
