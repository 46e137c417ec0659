"""Work that must not be left half done, however its request ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


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
