"""Live speech on engine processes: as many sessions as there are places, and no process that nobody has."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any, ParamSpec

import psutil
import pytest

from conftest import DATA
from voxgate.audio.decode import decode
from voxgate.engines import Job, Listening, Recognition
from voxgate.engines.live import LivePool, LiveSession
from voxgate.engines.process import Channel
from voxgate.engines.worker import _Live as Sessions
from voxgate.errors import Overloaded, ProviderError
from voxgate.model import Capabilities, Heard

P = ParamSpec("P")
SPEECH = b"".join(decode(str(DATA / "a-flac.flac"), "flac", max_seconds=60))  # a second
TEXT = "please send the letter"
LONG = b"".join(decode(str(DATA / "long-slt.flac"), "flac", max_seconds=60))
PATIENCE = 30.0  # seconds, which only what hangs takes


def sync(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test that is a coroutine. None hangs, and none leaves a process."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(PATIENCE):
                await test(*args, **kwargs)

        asyncio.run(bounded())
        assert engines() == []

    return run


def engines() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE and "voxgate.engines.worker" in " ".join(process.cmdline()):
                found.append(process)
    return found


async def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def pool(most: int) -> AsyncIterator[LivePool]:
    pool = LivePool(lambda: Channel(["sphinx"]), most=most)
    try:
        yield pool
    finally:
        await pool.close()


async def spoken(session: LiveSession, pcm: bytes = SPEECH) -> str:
    """What is heard of it, to the end of the session."""

    async def feed() -> None:
        for at in range(0, len(pcm), 3200):
            await session.feed(pcm[at : at + 3200])
        await session.end()

    feeding = asyncio.create_task(feed())
    texts = [heard.segment.text async for heard in session.heard() if heard.final]
    await feeding
    await session.aclose()
    return " ".join(filter(None, texts))


@sync
async def test_sessions_come_one_after_another_to_one_process() -> None:
    async with pool(1) as live:
        assert engines() == []
        pids = set()
        for _ in range(3):
            session = await live.listen("en", interim=True)
            pids.add(engines()[0].pid)
            assert await spoken(session) == TEXT
        assert len(engines()) == len(pids) == 1


@sync
async def test_beyond_the_number_of_places_it_is_overloaded_until_one_leaves() -> None:
    async with pool(2) as live:
        first, second = await asyncio.gather(live.listen(None, interim=False), live.listen(None, interim=False))
        for _ in range(3):
            with pytest.raises(Overloaded) as refused:
                await live.listen(None, interim=False)
            assert int(refused.value.headers["retry-after"]) >= 1
        assert len(engines()) == 2
        for _ in range(2):
            await first.aclose()
        third = await live.listen(None, interim=False)
        with pytest.raises(Overloaded):
            await live.listen(None, interim=False)
        assert list(await asyncio.gather(spoken(second), spoken(third))) == [TEXT, TEXT]


@sync
async def test_without_places_there_are_none() -> None:
    async with pool(0) as live:
        with pytest.raises(Overloaded):
            await live.listen(None, interim=False)


@sync
async def test_of_idle_processes_all_but_one_end() -> None:
    async with pool(3) as live:
        sessions = [await live.listen(None, interim=False) for _ in range(3)]
        assert len(engines()) == 3
        for session in sessions:
            await session.aclose()
        await until(lambda: len(engines()) == 1)
        await live.listen(None, interim=False)
        assert len(engines()) == 1


@pytest.mark.parametrize("when", ["reading", "feeding"])
@sync
async def test_a_killed_process_loses_its_session_and_the_next_one_gets_another(when: str) -> None:
    async with pool(1) as live:
        session = await live.listen(None, interim=True)
        (engine,) = engines()
        await session.feed(SPEECH[:32_000])
        engine.kill()
        with pytest.raises(ProviderError):
            await (_read(session) if when == "reading" else _feed(session))
        await session.aclose()
        await live.listen(None, interim=True)
        (another,) = engines()
        assert another.pid != engine.pid


async def _read(session: LiveSession) -> None:
    async for _ in session.heard():
        pass


async def _open(live: LivePool) -> None:
    await live.listen(None, interim=False)


async def _end(session: LiveSession) -> None:
    await session.end()
    await _read(session)


async def _feed(session: LiveSession) -> None:
    while True:
        await session.feed(SPEECH[:3200])
        await asyncio.sleep(0.001)


@sync
async def test_a_killed_process_loses_its_own_session_and_no_other() -> None:
    async with pool(2) as live:
        lost = await live.listen(None, interim=False)
        (engine,) = engines()
        other = await live.listen(None, interim=False)
        speaking = asyncio.create_task(spoken(other))
        engine.kill()
        with pytest.raises(ProviderError):
            await spoken(lost)
        await lost.aclose()
        assert await speaking == TEXT


@pytest.mark.parametrize("when", ["feeding", "ending", "opening"])
def test_a_process_that_is_stuck_is_ended_and_the_next_session_gets_another(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @sync
    async def test() -> None:
        async with pool(1) as live:
            monkeypatch.setattr("voxgate.engines.live._STUCK_SECONDS", 1.0)
            session = await live.listen(None, interim=False)
            if when == "opening":
                await session.aclose()
            (engine,) = engines()
            engine.suspend()
            with pytest.raises(ProviderError):
                await (_feed(session) if when == "feeding" else _end(session) if when == "ending" else _open(live))
            await session.aclose()
            assert await spoken(await live.listen(None, interim=False)) == TEXT

    test()


@sync
async def test_a_process_that_has_nothing_to_do_is_not_taken_for_stuck() -> None:
    async with pool(1) as live:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("voxgate.engines.live._STUCK_SECONDS", 0.5)
            session = await live.listen(None, interim=False)
            await asyncio.sleep(2.2)
        assert await spoken(session) == TEXT


@sync
async def test_an_idle_process_that_was_killed_is_replaced() -> None:
    async with pool(1) as live:
        await (await live.listen(None, interim=False)).aclose()
        (engine,) = engines()
        engine.kill()
        await until(lambda: not engines())
        await asyncio.sleep(0.2)  # until the pool knows, too
        await live.listen(None, interim=False)
        assert len(engines()) == 1


@sync
async def test_a_process_that_is_killed_while_it_starts_costs_one_session() -> None:
    async with pool(1) as live:
        starting = asyncio.create_task(live.listen(None, interim=False))
        await until(lambda: bool(engines()))
        engines()[0].kill()
        with pytest.raises(ProviderError):
            await starting
        await live.listen(None, interim=False)


@sync
async def test_an_engine_that_does_not_start_is_told_and_takes_no_place() -> None:
    live = LivePool(lambda: Channel(["no-such-engine"]), most=1)
    for _ in range(2):
        with pytest.raises(ProviderError):
            await live.listen(None, interim=False)
    await live.close()


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.2])
@sync
async def test_a_session_that_is_dropped_while_its_process_starts_gives_its_place_back(delay: float) -> None:
    async with pool(1) as live:
        starting = asyncio.create_task(live.listen(None, interim=False))
        await asyncio.sleep(delay)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await starting).aclose()  # where it was quicker
        await live.listen(None, interim=False)
        assert len(engines()) == 1


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.01, 0.1])
@sync
async def test_a_pool_that_is_closed_while_a_process_starts_leaves_none(delay: float) -> None:
    async with pool(2) as live:
        starting = [asyncio.create_task(live.listen(None, interim=False)) for _ in range(2)]
        await asyncio.sleep(delay)
        for each in starting:
            each.cancel()
        await asyncio.gather(*starting, return_exceptions=True)


@sync
async def test_a_pool_that_is_closed_in_the_middle_of_sessions_leaves_none() -> None:
    async with pool(2) as live:
        await live.listen(None, interim=True)
        session = await live.listen(None, interim=True)
        await session.feed(LONG)


@sync
async def test_a_process_that_does_not_end_by_itself_is_ended() -> None:
    async with pool(1) as live:
        await live.listen(None, interim=False)
        os.kill(engines()[0].pid, signal.SIGSTOP)


@sync
async def test_what_was_said_before_somebody_hung_up_is_not_heard_by_the_next_one() -> None:
    async with pool(1) as live:
        dropped = await live.listen(None, interim=True)
        await dropped.feed(LONG[: 2 * 32_000])
        await dropped.aclose()  # in the middle of an utterance
        session = await live.listen(None, interim=True)
        speaking = asyncio.create_task(spoken(session))
        assert await speaking == TEXT
        assert len(engines()) == 1


@sync
async def test_an_end_comes_after_all_that_is_owed_and_nothing_after_it() -> None:
    async with pool(1) as live:
        session = await live.listen("en", interim=False)
        await session.feed(LONG)
        await session.end()
        ends = [heard.segment.end async for heard in session.heard() if heard.segment.text]
        assert ends == sorted(ends)
        assert len(ends) == 3
        assert [heard async for heard in session.heard()] == []
        await session.aclose()


@sync
async def test_finalize_ends_the_utterance_at_once() -> None:
    async with pool(1) as live:
        session = await live.listen(None, interim=False)
        speech = b"".join(decode(str(DATA / "b-slt.mp3"), "mp3", max_seconds=60))
        await session.feed(speech[: 2 * 32_000])
        await session.finalize()
        async for heard in session.heard():
            if heard.final and heard.segment.text:
                break
        assert heard.segment.text.startswith("the weather is nice")
        assert heard.segment.end <= 2.0
        await session.aclose()


@sync
async def test_who_does_not_read_is_not_told_without_end() -> None:
    async with pool(1) as live:
        session = await live.listen(None, interim=True)

        async def feed() -> None:
            for _ in range(60):  # a minute of silence, of which each second is told
                await session.feed(bytes(32_000))
                await asyncio.sleep(0.01)

        feeding = asyncio.create_task(feed())
        await asyncio.wait({feeding}, timeout=1)
        assert not feeding.done()
        feeding.cancel()
        assert session._messages.qsize() < 40
        await session.aclose()


class _Failing:
    """An engine whose sessions fail at work, and one of which may be open at a time."""

    name = "failing"
    capabilities = Capabilities(languages=None, features=frozenset())
    sessions = 1

    def __init__(self) -> None:
        self.open = 0

    def transcribe(self, job: Job) -> Recognition:
        raise NotImplementedError

    def listen(self, language: str | None, *, interim: bool) -> Listening:
        self.open += 1
        return _FailingSession(self)


class _FailingSession:
    def __init__(self, engine: _Failing) -> None:
        self._engine = engine

    def push(self, pcm: bytes) -> None:
        raise RuntimeError

    def finalize(self) -> None:
        raise RuntimeError

    def end(self) -> None:
        raise RuntimeError

    def step(self) -> Iterator[Heard]:
        return iter(())

    def close(self) -> None:
        self._engine.open -= 1


@pytest.mark.parametrize("message", [{"pcm": ""}, {"finalize": True}, {"end": True}], ids=lambda m: next(iter(m)))
def test_a_session_that_fails_is_told_and_closed(message: dict[str, object]) -> None:
    engine, out = _Failing(), io.StringIO()
    worker = Sessions(engine, out)
    for number in (1, 2):
        worker.take({"live": number, "open": {"language": None, "interim": True}}, more=False)
        worker.take({"live": number} | message, more=False)
        worker.take({"live": number, "drop": True}, more=False)  # its host does not know yet
    told = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line for line in told if "crash" in line] == [{"live": n, "crash": "RuntimeError"} for n in (1, 2)]
    assert engine.open == 0
