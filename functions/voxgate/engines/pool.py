"""A bounded number of engine processes, and a bounded queue before them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from voxgate.engines import Job
from voxgate.errors import FailureClass, Overloaded, ProviderError
from voxgate.model import Capabilities, Feature, Segment, Word

logger = logging.getLogger(__name__)

Heard = Callable[[Segment], Awaitable[None]]
_LINE = 16 * 1024 * 1024  # the longest message of a worker, in bytes
_CANCEL_GRACE = 1.0  # seconds for a cancelled engine to stop by itself
_START_TIMEOUT = 600.0  # a large model from a slow disk


@dataclass(frozen=True, slots=True)
class EngineInfo:
    name: str
    capabilities: Capabilities


class EnginePool:
    """Runs jobs on `workers` processes of one engine; `arguments` are `engines.worker`'s.

    At most `queue` jobs wait; one more is refused with `Overloaded`.
    """

    def __init__(self, *, arguments: Sequence[str], workers: int, queue: int) -> None:
        self._arguments = tuple(arguments)
        self._size = workers
        self._queue = queue
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._workers: set[_Worker] = set()
        self._waiting = 0
        self._starting: asyncio.Task[EngineInfo] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._seconds = 5.0  # a decayed mean of how long a job takes, for Retry-After

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

    async def recognize(self, job: Job, heard: Heard | None = None) -> tuple[str | None, tuple[Segment, ...]]:
        """The language heard and the segments, each of which `heard` is told as it is made. Raises
        `Overloaded`, or `ProviderError` of class CALLER_FAULT for unusable audio and TRANSIENT for an
        engine that failed. Cancelling this call stops the engine."""
        await self.start()
        if self._idle.empty() and self._waiting >= self._queue:
            wait = max(1, round(self._seconds * (self._waiting + 1) / self._size))
            raise Overloaded(f"The recognizer's queue is full; try again in {wait} s.", retry_after=wait)
        self._waiting += 1
        try:
            while not (worker := await self._idle.get()).alive:
                self._spawn(self._recover(worker))  # it died while it had nothing to do
        finally:
            self._waiting -= 1
        loop = asyncio.get_running_loop()
        begun = loop.time()
        finished = False
        try:
            result = await worker.run(job, heard)
            finished = True
            return result
        except ProviderError:
            finished = worker.alive
            raise
        finally:
            self._seconds += 0.2 * (loop.time() - begun - self._seconds)
            if finished:
                self._idle.put_nowait(worker)
            else:  # it died, or the client hung up: not this caller's time to spend
                self._spawn(self._recover(worker))

    async def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
        for task in self._tasks:
            task.cancel()
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
        worker = _Worker()
        self._workers.add(worker)
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                info = await worker.start(self._arguments)
        except BaseException:
            await self._discard(worker)
            raise
        self._idle.put_nowait(worker)
        return info

    async def _discard(self, worker: _Worker) -> None:
        self._workers.discard(worker)
        await worker.kill()

    async def _recover(self, worker: _Worker) -> None:
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


class _Worker:
    """One engine process."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, arguments: Sequence[str]) -> EngineInfo:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "voxgate.engines.worker",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE,
            # ONNX Runtime, which finds where there is speech, would report to its makers.
            env={
                "ORT_DISABLE_TELEMETRY": "1",
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            },
        )
        hello = await self._message()
        languages = hello["languages"]
        return EngineInfo(
            str(hello["ready"]),
            Capabilities(
                languages=None if languages is None else frozenset(languages),
                features=frozenset(Feature(feature) for feature in hello["features"]),
            ),
        )

    async def run(self, job: Job, heard: Heard | None) -> tuple[str | None, tuple[Segment, ...]]:
        if self._process is None or self._process.stdin is None:
            raise ProviderError(FailureClass.TRANSIENT, "The recognizer's process has not started.")
        language: str | None = None
        segments: list[Segment] = []
        try:
            self._process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            await self._process.stdin.drain()
        except OSError as error:
            await self.kill()
            raise ProviderError(FailureClass.TRANSIENT, "The recognizer's process ended.") from error
        while True:
            match await self._message():
                case {"language": language}:
                    pass
                case {"segment": segment}:
                    segments.append(_segment(segment))
                    if heard is not None:
                        await heard(segments[-1])
                case {"done": _}:
                    return language, tuple(segments)
                case {"error": message}:
                    raise ProviderError(FailureClass.CALLER_FAULT, message, status=400, param="file")
                case other:
                    raise ProviderError(FailureClass.TRANSIENT, f"The recognizer failed ({other.get('crash')}).")

    async def cancel(self) -> bool:
        """Stop the job at hand. False where the process did not, and must be replaced."""
        process = self._process
        if process is None:
            return False
        try:
            async with asyncio.timeout(_CANCEL_GRACE):
                process.send_signal(signal.SIGUSR1)
                while not {"cancelled", "done", "error", "crash"} & (await self._message()).keys():
                    pass
        except (TimeoutError, ProviderError, ProcessLookupError):
            return False
        return True

    async def end(self) -> None:
        """Let the process end by itself, which it does when its input is over."""
        process = self._process
        if process is not None and process.stdin is not None:
            process.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CANCEL_GRACE):
                    await process.wait()
        await self.kill()

    async def kill(self) -> None:
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _message(self) -> dict[str, Any]:
        if self._process is None or self._process.stdout is None:
            raise ProviderError(FailureClass.TRANSIENT, "The recognizer's process has not started.")
        try:
            line = await self._process.stdout.readline()
        except ValueError as error:  # longer than the limit
            await self.kill()
            raise ProviderError(FailureClass.TRANSIENT, "The recognizer's answer is too long.") from error
        if not line.endswith(b"\n"):
            await self.kill()
            raise ProviderError(FailureClass.TRANSIENT, "The recognizer's process ended.")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            await self.kill()
            raise ProviderError(FailureClass.TRANSIENT, "The recognizer's answer is malformed.")
        return message


def _segment(value: dict[str, Any]) -> Segment:
    words = value.pop("words")
    tokens = tuple(value.pop("tokens"))
    return Segment(words=None if words is None else tuple(Word(**word) for word in words), tokens=tokens, **value)
