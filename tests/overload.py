"""More requests than a recognizer has time for, and what becomes of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import psutil

from conftest import Server
from prometheus import scraped

WARM = 2.0  # seconds of a load that are not measured
CLIENTS = 24  # who ask without a pause, to find out how many are served a second
ROOM = 512  # connections
TOLD = 1.2  # seconds, after which what was done is in the metrics
PATIENCE = 8  # batches, which each request has time for


@dataclass(frozen=True, slots=True)
class Answer:
    """`at` is when it was asked, in seconds from the load's start, and `took` until the answer was there; a `status`
    of 0 is a connection that broke."""

    at: float
    deadline: float
    took: float
    status: int
    retry_after: str | None = None

    @property
    def late(self) -> float:
        return self.took - self.deadline


@dataclass(slots=True)
class Work:
    """What the engine has decoded, in windows and in seconds of its time."""

    batches: float
    windows: float
    decoding: float

    def since(self, before: Work) -> Work:
        return Work(self.batches - before.batches, self.windows - before.windows, self.decoding - before.decoding)

    @property
    def batch_seconds(self) -> float:
        return self.decoding / self.batches


@dataclass(slots=True)
class Load:
    """What came back while there were new requests, for so many `seconds`; how much memory the service and its
    engine had meanwhile, in bytes, by seconds; and what the engine did."""

    seconds: float
    answers: list[Answer] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    work: Work = field(default_factory=lambda: Work(0, 0, 0))
    took: float = 0.0  # until the last answer

    def of(self, *statuses: int) -> list[Answer]:
        return [answer for answer in self.answers if answer.status in statuses]

    @property
    def served(self) -> list[Answer]:
        """In time."""
        return [answer for answer in self.of(200) if answer.late <= 0]

    @property
    def goodput(self) -> float:
        """Requests a second that were served in time, but for those of the first seconds and of the last."""
        ends = [answer.at + answer.took for answer in self.served]
        return sum(WARM < end <= self.seconds for end in ends) / (self.seconds - WARM)

    @property
    def latest(self) -> float:
        """By how many seconds the latest answer to an accepted request missed its deadline; negative where none did."""
        return max(answer.late for answer in self.answers if answer.status != 503)

    @property
    def grown(self) -> float:
        """The memory of the last quarter by that of the second: medians."""
        quarters = [
            sorted(each for at, each in self.memory if low <= at / self.seconds < low + 0.25) for low in (0.25, 0.75)
        ]
        first, last = (quarter[len(quarter) // 2] for quarter in quarters)
        return last / first


@dataclass(frozen=True, slots=True)
class Upload:
    """A form, encoded once."""

    path: str
    headers: dict[str, str]
    content: bytes

    @classmethod
    def of(cls, audio: bytes, **fields: str) -> Upload:
        request = httpx.Request("POST", "http://voxgate", data=fields, files={"file": ("speech", audio)})
        return cls("/v1/audio/transcriptions", {"content-type": request.headers["content-type"]}, request.read())


def capacity(server: Server, upload: Upload, seconds: float, *, clients: int = CLIENTS) -> float:
    """Requests a second that are served where there are always so many."""
    ends: list[float] = []

    async def ask(client: httpx.AsyncClient) -> None:
        while time.monotonic() < begun + WARM + seconds:
            answer = await client.post(upload.path, headers=upload.headers, content=upload.content)
            assert answer.status_code == 200, answer.text
            ends.append(time.monotonic() - begun)

    async def work() -> None:
        async with _client(server) as client:
            await asyncio.gather(*(ask(client) for _ in range(clients)))

    begun = time.monotonic()
    asyncio.run(work())
    return sum(WARM < end <= WARM + seconds for end in ends) / seconds


def overload(server: Server, upload: Upload, *, most: float, times: float, seconds: float) -> Load:
    """`times` as many requests as are served, whatever becomes of those before, each with time for `PATIENCE`
    batches. `most` is what was served without it; where the machine has become quicker since, it is more, and where
    a batch takes longer than before, the deadlines are longer."""
    load = Load(seconds)
    processes = [process := psutil.Process(server.pid), *process.children(recursive=True)]
    batch = worked(server).batch_seconds

    async def ask(client: httpx.AsyncClient, deadline: float) -> None:
        asked = time.monotonic()
        headers = upload.headers | {"x-voxgate-deadline": f"{deadline:g}"}
        try:
            answer = await client.post(upload.path, headers=headers, content=upload.content)
            status, retry_after = answer.status_code, answer.headers.get("retry-after")
        except httpx.TransportError:
            status, retry_after = 0, None
        load.answers.append(Answer(asked - begun, deadline, time.monotonic() - asked, status, retry_after))

    async def watch(client: httpx.AsyncClient) -> None:
        nonlocal batch, most
        before, served = start, 0
        while True:
            await asyncio.sleep(1.0)
            load.memory.append((time.monotonic() - begun, _memory(processes)))
            now = _work((await client.get("/metrics")).text)
            if now.batches > before.batches:
                batch, before = now.since(before).batch_seconds, now
            most, served = max(most, len(load.of(200)) - served), len(load.of(200))

    async def work() -> None:
        async with _client(server) as client:
            watching = asyncio.create_task(watch(client))
            async with asyncio.TaskGroup() as group:
                due = begun
                while due < begun + seconds:
                    await asyncio.sleep(due - time.monotonic())
                    group.create_task(ask(client, PATIENCE * batch))
                    due += 1 / (times * most)
            watching.cancel()

    start, begun = worked(server), time.monotonic()
    asyncio.run(work())
    load.took = time.monotonic() - begun
    load.work = worked(server).since(start)
    return load


def worked(server: Server) -> Work:
    """So far. The engine tells of it each second."""
    time.sleep(TOLD)
    return _work(httpx.get(f"{server.url}/metrics").text)


def _work(metrics: str) -> Work:
    found = scraped(metrics)
    decoding = found['voxgate_stage_seconds_total{stage="decoding"}']
    return Work(found["voxgate_batch_size_count"], found["voxgate_batch_size_sum"], decoding)


def _client(server: Server) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=ROOM, max_keepalive_connections=ROOM)
    return httpx.AsyncClient(base_url=server.url, headers=server.auth, limits=limits, timeout=120, verify=False)


def _memory(processes: Sequence[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in processes)
