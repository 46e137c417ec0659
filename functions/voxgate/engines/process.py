"""Engine processes, from the side of their host; see `engines.worker` and `engines.batch_worker` for the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from voxgate.engines import Job
from voxgate.errors import FailureClass, ProviderError
from voxgate.model import Capabilities, Feature, Segment, Word

Told = Callable[[Segment], Awaitable[None]]
_LINE = 16 * 1024 * 1024  # the longest message of a worker, in bytes
_CANCEL_GRACE = 1.0  # seconds for a cancelled engine to stop by itself


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Each of its `models` can something of its own; the first is asked for by any other name. `sessions` of live
    speech are understood at once by each process. One that batches decodes `batch` windows at a time, and `speed` of
    them a second."""

    models: Mapping[str, Capabilities]
    sessions: int
    speed: float = 0.0
    batch: int = 1

    def capabilities(self, model: str) -> Capabilities:
        return self.models.get(model) or next(iter(self.models.values()))


class Worker:
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
                # Threads that spin while they wait for each other take the cores from those that they wait for.
                "OMP_WAIT_POLICY": "passive",
                "KMP_BLOCKTIME": "0",
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            },
        )
        hello = await self.message()
        if "failed" in hello:
            raise ProviderError(FailureClass.TRANSIENT, hello["failed"])
        return EngineInfo(
            {name: _capabilities(can) for name, can in hello["ready"].items()},
            hello["sessions"],
            hello.get("speed", 0.0),
            hello.get("batch", 1),
        )

    async def run(self, job: Job, heard: Told | None) -> tuple[str | None, tuple[Segment, ...]]:
        language: str | None = None
        segments: list[Segment] = []
        await self.send(asdict(job))
        while True:
            match await self.message():
                case {"language": language}:
                    pass
                case {"segment": segment}:
                    segments.append(segment_of(segment))
                    if heard is not None:
                        await heard(segments[-1])
                case {"done": _}:
                    return language, tuple(segments)
                case other:
                    raise failure_of(other)

    async def cancel(self) -> bool:
        """Stop the job at hand. False where the process did not, and must be replaced."""
        process = self._process
        if process is None:
            return False
        try:
            async with asyncio.timeout(_CANCEL_GRACE):
                process.send_signal(signal.SIGUSR1)
                while not {"cancelled", "done", "error", "crash"} & (await self.message()).keys():
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
        self.abort()
        if self._process is not None:
            await self._process.wait()

    def abort(self) -> None:
        """Kill it, and do not wait until it has ended."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def send(self, message: Mapping[str, Any]) -> None:
        """Waits where the process has more than enough to do."""
        if self._process is None or self._process.stdin is None:
            raise ProviderError(FailureClass.TRANSIENT, "The recognizer's process has not started.")
        try:
            self.post(message)
            await self._process.stdin.drain()
        except (OSError, RuntimeError) as error:  # the latter is uvloop's, for a pipe that is closed
            await self.kill()
            raise ProviderError(FailureClass.TRANSIENT, "The recognizer's process ended.") from error

    def post(self, message: Mapping[str, Any]) -> None:
        """Raises `OSError` or `RuntimeError` where the process has ended."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def message(self) -> dict[str, Any]:
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


class Channel:
    """A process that serves several at once, each under a number. Who reads is told by `take`, and what belongs to
    nobody by `aside`."""

    def __init__(self, arguments: Sequence[str], aside: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        self.worker = Worker()
        self.takers: dict[int, Callable[[dict[str, Any]], None]] = {}
        self.info: EngineInfo | None = None
        self.started = asyncio.create_task(self._start(arguments))
        self.ended = asyncio.Event()
        self.spoke = 0.0  # when it last said anything, by the loop's clock
        self._aside = aside
        self._numbers = 0
        self._reading: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Or about to be."""
        if not self.started.done():
            return True
        return not self.started.cancelled() and self.started.exception() is None and self.worker.alive

    def join(self, take: Callable[[dict[str, Any]], None]) -> int:
        self._numbers += 1
        self.takers[self._numbers] = take
        return self._numbers

    async def end(self) -> None:
        self.started.cancel()
        if self._reading is not None:
            self._reading.cancel()
        await asyncio.wait([self.started])
        await self.worker.end()
        self.ended.set()

    async def _start(self, arguments: Sequence[str]) -> EngineInfo:
        try:
            self.info = await self.worker.start(arguments)
        except BaseException:
            await self.worker.kill()
            self.ended.set()
            raise
        self.spoke = asyncio.get_running_loop().time()
        self._reading = asyncio.create_task(self._read())
        return self.info

    async def _read(self) -> None:
        try:
            while True:
                message = await self.worker.message()
                self.spoke = asyncio.get_running_loop().time()
                number = message.pop("job", None) or message.pop("live", None)
                take = self._aside if number is None else self.takers.get(number)
                if take is not None:
                    take(message)
        except ProviderError as error:
            for take in tuple(self.takers.values()):
                take({"crash": error.message})
            self.ended.set()


def _capabilities(can: dict[str, Any]) -> Capabilities:
    languages = can["languages"]
    return Capabilities(
        languages=None if languages is None else frozenset(languages),
        features=frozenset(Feature(feature) for feature in can["features"]),
    )


def failure_of(message: Mapping[str, Any]) -> ProviderError:
    """What a process says of a job that came to nothing."""
    if "error" in message:
        return ProviderError(FailureClass.CALLER_FAULT, message["error"], status=400, param="file")
    if "late" in message:
        return ProviderError(FailureClass.TRANSIENT, "The recognizer had no time for it before its deadline.")
    return ProviderError(FailureClass.TRANSIENT, f"The recognizer failed ({message.get('crash')}).")


def segment_of(value: dict[str, Any]) -> Segment:
    words = value.pop("words")
    tokens = tuple(value.pop("tokens"))
    return Segment(words=None if words is None else tuple(Word(**word) for word in words), tokens=tokens, **value)
