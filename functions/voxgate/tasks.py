"""Work that must not be left half done, however its request ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class Threads:
    """Blocking work, beside whichever event loop asks for it."""

    def __init__(self, name: str, most: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=most, thread_name_prefix=name)

    async def run(self, work: Callable[[], _T], *, stop: Callable[[], object] = lambda: None) -> _T:
        """Cancelled, it tells the work to `stop`, and waits until it does."""
        started = self._pool.submit(work)
        done = asyncio.wrap_future(started)
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            # A thread cannot be stopped. Were it left behind, it would read a file that the request
            # closes, and store the audio after the request has removed it.
            done.add_done_callback(lambda future: future.cancelled() or future.exception())
            stop()
            if not started.cancel():
                await asyncio.wait([done])
            raise
        return done.result()

    async def close(self) -> None:
        await asyncio.to_thread(self._pool.shutdown)


def given_up() -> bool:
    """Whether this task has been cancelled, whatever became of that on its way out: a connection that is closed for
    it may fail in its place."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def whole(work: Coroutine[Any, Any, _T], *, keep: bool = False) -> _T:
    """Wait for it to its end also when cancelled meanwhile, and be cancelled then; with `keep`, only
    where it came to nothing."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if task.cancelled():
            raise
        if error := task.exception():
            logger.warning("a cancelled request failed as well: %s", type(error).__name__)
        elif keep:
            return task.result()
        raise
