"""Windows of many requests, decoded together: whose turn it is, and what is never begun.

    request -> preparing (threads: decode, find speech, features) -> ready -> batch -> result, in the request's order

Knows nothing of Whisper: a `Row` is what one place in a batch takes, and a function takes a batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

_AHEAD = 2  # batches that are prepared and wait, for all requests together
_LEAST = 4  # rows, for each of them
_NEVER = float("inf")
_DECAY = 0.3


class Priority(IntEnum):
    LIVE = 0
    INTERACTIVE = 1
    BATCH = 2


@dataclass(slots=True)
class Row(Generic[T]):
    """One place in a batch. Only rows of the same `kind` share one. `seconds` is what it costs, and `audio` how much
    of it there is that no row before was of."""

    kind: Hashable
    content: T
    seconds: float
    audio: float = 0.0
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Again(Generic[T]):
    """A row's outcome that is none yet: it is to be decoded once more, as this one."""

    row: Row[T]
    part: tuple[Any, ...] = ()  # what is sure already


class Late(Exception):
    """The request's time was over before it was its turn."""


class Cancelled(Exception):
    """Nobody wants the rest."""


@dataclass(slots=True)
class _Outcome:
    parts: list[Any] = field(default_factory=list)
    whole: bool = False


@dataclass(slots=True)
class Request(Generic[T]):
    """`rows` are made one after the other, in a thread; None is one that is not ready yet. `tell` gets what comes out
    of each, in their order, and `finish` is called once: with None, or with what ended it. `seconds` is what all rows
    cost together, as far as that is known, and `deadline` is on `time.monotonic`'s clock."""

    rows: Generator[Row[T] | None]
    tell: Callable[[Any], None]
    finish: Callable[[BaseException | None], None]
    seconds: float = 0.0
    priority: Priority = Priority.INTERACTIVE
    deadline: float = _NEVER
    ready: deque[tuple[int, Row[T]]] = field(default_factory=deque)
    outcomes: dict[int, _Outcome] = field(default_factory=dict)
    told: int = 0  # rows whose outcome was told
    made: int = 0
    preparing: bool = False
    exhausted: bool = False
    over: bool = False
    turn: float = 0.0  # virtual time, in which all would be done if they shared alike


_Taken = tuple[Request[T], int, Row[T]]


@dataclass(slots=True)
class Stats:
    """Of the time since the last look, but for what waits; times are in seconds."""

    batches: dict[int, int] = field(default_factory=dict)  # by their size
    rows: int = 0
    seconds: float = 0.0  # of windows, decoded
    decoding: float = 0.0
    preparing: float = 0.0
    waiting: float = 0.0  # of rows, for their turn


class Batcher(Generic[T]):
    """`decode` takes rows of one kind, and returns for each its outcome, a list, or `Again`. `size` rows at most
    share a batch, for which the first waits `linger` seconds at most. `threads` prepare."""

    def __init__(
        self,
        decode: Callable[[Sequence[T]], Sequence[list[Any] | Again[T]]],
        *,
        size: int = 1,
        linger: float = 0.005,
        threads: int = 2,
    ) -> None:
        self._decode = decode
        self.size = size
        self._linger = linger
        self._changed = threading.Condition()
        self._requests: list[Request[T]] = []
        self._to_prepare: list[Request[T]] = []
        self._now = dict.fromkeys(Priority, 0.0)  # virtual time
        self._closed = False
        self._stats = Stats()
        self._ahead = _AHEAD * size
        self.usual = 0.0  # seconds that a batch takes, a decayed mean
        self._decoding: float | None = None  # since when
        self._threads = [threading.Thread(target=self._prepare_all, daemon=True) for _ in range(threads)]
        self._threads.append(threading.Thread(target=self._decode_all, name="decode", daemon=True))
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request[T]) -> None:
        with self._changed:
            closed = self._closed
            if not closed:
                request.turn = self._now[request.priority] + request.seconds
                self._requests.append(request)
                self._prepare(request)
        if closed:
            request.finish(Cancelled())

    def cancel(self, request: Request[T]) -> None:
        """What is not begun is never begun, and what is at work is not told."""
        self._end(request, Cancelled())

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for request in tuple(self._requests):
            self.cancel(request)
        for thread in self._threads:
            thread.join()

    @property
    def decoding_for(self) -> float:
        """For how many seconds the batch at hand is being decoded; 0 where there is none."""
        since = self._decoding
        return 0.0 if since is None else time.monotonic() - since

    def stats(self) -> Stats:
        with self._changed:
            stats, self._stats = self._stats, Stats()
        return stats

    # Preparing.

    def _prepare(self, request: Request[T]) -> None:
        """With the lock."""
        enough = len(request.ready) >= _LEAST and sum(len(each.ready) for each in self._requests) >= self._ahead
        if not (request.preparing or request.exhausted or request.over or enough):
            request.preparing = True
            self._to_prepare.append(request)
            self._changed.notify_all()

    def _prepare_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._to_prepare)
                if self._closed:
                    return
                request = min(self._to_prepare, key=_turn)
                self._to_prepare.remove(request)
            self._make(request)

    def _make(self, request: Request[T]) -> None:
        """One row at most, so that a long recording does not keep the thread from a short one."""
        begun = time.monotonic()
        row, error, exhausted = None, None, False
        try:
            if not request.over:
                row = next(request.rows)
        except StopIteration:
            exhausted = True
        except Exception as failure:  # noqa: BLE001 - the request fails, and no other
            error = failure
        with self._changed:
            self._stats.preparing += time.monotonic() - begun
            request.preparing = False
            request.exhausted = exhausted
            if request.over:
                request.rows.close()
            elif row is not None:
                row.since = time.monotonic()
                request.ready.append((request.made, row))
                request.made += 1
                self._changed.notify_all()
            if error is None:
                self._prepare(request)
        if error is not None:
            self._end(request, error)
        self._end_if_done(request)

    # Decoding.

    def _decode_all(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._late() and not any(r.ready for r in self._requests):
                    first = min((r.deadline for r in self._requests), default=_NEVER)
                    self._changed.wait(None if first == _NEVER else max(first - time.monotonic(), 0.0))
                if self._closed:
                    return
                late = self._late()
                batch = [] if late else self._next_batch()
            for request in late:
                self._end(request, Late())
            if batch:
                self._work(batch)

    def _late(self) -> list[Request[T]]:
        now = time.monotonic()
        return [request for request in self._requests if request.deadline <= now]

    def _next_batch(self) -> list[_Taken[T]]:
        """With the lock: of whoever's turn it is, and of the others those that fit."""
        batch = self._take([])
        until = time.monotonic() + self._linger
        while batch and len(batch) < self.size and (left := until - time.monotonic()) > 0:
            self._changed.wait(left)
            batch = self._take(batch)
        return batch

    def _take(self, batch: list[_Taken[T]]) -> list[_Taken[T]]:
        """Of whoever would be done first if all shared alike, and so nobody is done later than that. Who cannot be
        done before its deadline gives way to those who can."""
        ends = time.monotonic() + self.usual
        while len(batch) < self.size:
            waiting = [r for r in self._requests if r.ready and (not batch or r.ready[0][1].kind == batch[0][2].kind)]
            if not waiting:
                break
            request = min(waiting, key=lambda request: (request.deadline < ends, *_turn(request)))
            index, row = request.ready.popleft()
            sharing = sum(each.priority is request.priority for each in self._requests)
            self._now[request.priority] += row.seconds / sharing
            batch.append((request, index, row))
            self._prepare(request)
        return batch

    def _work(self, batch: list[_Taken[T]]) -> None:
        batch = [each for each in batch if not each[0].over]
        if not batch:
            return
        begun = self._decoding = time.monotonic()
        waited = sum(begun - row.since for _, _, row in batch)
        try:
            outcomes = list(zip(batch, self._decode([row.content for _, _, row in batch]), strict=True))
        except Exception as error:  # noqa: BLE001 - these requests fail, and no other
            for request, _, _ in batch:
                self._end(request, error)
            return
        finally:
            self._decoding = None
        took = time.monotonic() - begun
        with self._changed:
            self.usual += _DECAY * (took - self.usual)
            self._stats.decoding += took
            self._stats.waiting += waited
            self._stats.batches[len(batch)] = self._stats.batches.get(len(batch), 0) + 1
            self._stats.rows += len(batch)
            self._stats.seconds += sum(row.audio for _, _, row in batch)
        for (request, index, _), outcome in outcomes:
            try:
                self._came(request, index, outcome)
            except Exception as error:  # noqa: BLE001 - nobody listens to this one any more
                self._end(request, error)

    def _came(self, request: Request[T], index: int, outcome: list[Any] | Again[T]) -> None:
        with self._changed:
            if request.over:
                return
            done = request.outcomes.setdefault(index, _Outcome())
            if isinstance(outcome, Again):
                done.parts += outcome.part
                outcome.row.since = time.monotonic()
                request.ready.appendleft((index, outcome.row))
                self._changed.notify_all()
                return
            done.parts += outcome
            done.whole = True
        while (next_ := request.outcomes.get(request.told)) and next_.whole:
            for part in next_.parts:
                if not request.over:
                    request.tell(part)
            with self._changed:
                request.outcomes.pop(request.told, None)
                request.told += 1  # from here on it may be over
        self._end_if_done(request)

    # Ends.

    def _end_if_done(self, request: Request[T]) -> None:
        with self._changed:
            done = request.exhausted and not request.preparing and request.told == request.made
        if done:
            self._end(request, None)

    def _end(self, request: Request[T], error: BaseException | None) -> None:
        with self._changed:
            if request.over:
                return
            request.over = True
            request.ready.clear()
            request.outcomes.clear()
            self._requests.remove(request)
            if request in self._to_prepare:
                self._to_prepare.remove(request)
                request.preparing = False
            if not request.preparing:
                request.rows.close()
        try:
            request.finish(error)
        except Exception:  # whoever asked does not hear it; the others go on
            logger.exception("the end of a request could not be told")


def _turn(request: Request[Any]) -> tuple[int, float]:
    return request.priority, request.turn
