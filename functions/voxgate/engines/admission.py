"""Which recordings an engine takes on: those that it can do before nobody waits for them any more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from voxgate.engines import Job
from voxgate.errors import Overloaded
from voxgate.model import Priority

_RANKS = {priority: rank for rank, priority in enumerate(Priority)}
_DECAY = 0.5
_FULL = 0.5  # of a batch: who has less to do is not as fast as it could be
# Seconds, the shortest time in which a speed is measured; what comes to nothing may only come between two batches.
_LOOK, _LOOK_IN_VAIN = 1.0, 5.0
# Seconds after which a speed is not believed any more where nobody is ahead: who was slow once, and refuses everybody,
# would never learn that it is not any more.
_GOOD_FOR = 600.0


class Admitted:
    """`left` is how many seconds of its audio are not heard yet."""

    def __init__(self, job: Job) -> None:
        self.rank = _RANKS[Priority(job.priority)]
        self.seconds = self.left = job.seconds


class Admission:
    """At most `most` recordings wait or are at work, beside those that are less urgent. `cost` is what so many seconds
    of audio take, and `speed` how much of that is done in a second; 0 is not known yet. What it takes, times `margin`,
    must be within the time that is left; below 1 where the speed is but a guess.

    `batch` of the cost are at work at a time, as a whole, by turns and by priority; or, where that is 0, `abreast`
    recordings are, one after the other."""

    def __init__(
        self,
        *,
        most: int,
        cost: Callable[[float], float],
        abreast: int = 1,
        margin: float = 1.0,
        batch: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._cost = cost
        self._abreast = abreast
        self._margin = margin
        self._clock = clock
        self._jobs: set[Admitted] = set()
        self._seen = clock()  # when the speed was
        self._fastest = 0.0
        self._since, self._passed, self._full = 0.0, 0.0, False  # what is measured: from when on, and how much
        self.speed = 0.0
        self.batch = batch

    @property
    def queued(self) -> int:
        return len(self._jobs)

    def went(self, speed: float) -> None:
        self.speed += (_DECAY if self.speed else 1.0) * (speed - self.speed)
        self._seen, self._fastest = self._clock(), max(self._fastest, speed)

    def restarted(self, speed: float, batch: float) -> None:
        """By another process, which says how fast it is."""
        self.speed, self.batch = 0.0, batch
        self.went(speed)

    def check(self, priority: str, seconds: float, left: float) -> None:
        """Raises `Overloaded` where so many seconds of audio cannot be heard within the time that is `left`."""
        rank, own = _RANKS[Priority(priority)], self._cost(seconds)
        before = self._before(rank, own)
        speed = self.speed if before else self._fastest  # of one alone, which is not slowed down by others
        wait = max(math.ceil(before / speed), 1) if speed else 1
        if sum(job.rank <= rank for job in self._jobs) >= self._most:
            raise Overloaded(f"The recognizer's queue is full; try again in {wait} s.", retry_after=wait)
        if not before and self._clock() >= self._seen + _GOOD_FOR:
            return
        need = (before + own) / speed if speed else 0.0
        if need * self._margin > left:
            raise Overloaded(
                f"The recognizer needs {need:.1f} s for this, and has {left:.1f} s; try again in {wait} s.",
                retry_after=wait,
            )

    @contextmanager
    def admit(self, job: Job) -> Iterator[Admitted]:
        """Raises `Overloaded`."""
        self.check(job.priority, job.seconds, job.left)
        admitted = Admitted(job)
        if not self._jobs:
            self._since, self._passed, self._full = self._clock(), 0.0, False
        self._jobs.add(admitted)
        try:
            yield admitted
            self.hear(admitted, admitted.seconds)
        finally:
            self._look(_LOOK_IN_VAIN)  # where nothing is done in time, that tells how slow it is
            self._jobs.remove(admitted)
            self._full = self._full and self._is_full

    def hear(self, job: Admitted, until: float) -> None:
        """So many seconds of it are heard."""
        before = self._left(job)
        job.left = min(max(job.seconds - until, 0.0), job.left)
        self._passed += before - self._left(job)
        self._look()

    def _look(self, after: float = _LOOK) -> None:
        if self.batch and (now := self._clock()) >= self._since + after:
            speed = self._passed / (now - self._since)
            if self._full or speed > self.speed:
                self.went(speed)
            self._since, self._passed, self._full = now, 0.0, self._is_full

    def _left(self, job: Admitted) -> float:
        return self._cost(job.left) if job.left else 0.0

    @property
    def _is_full(self) -> bool:
        return sum(map(self._left, self._jobs)) >= _FULL * self.batch

    def _before(self, rank: int, own: float) -> float:
        """What is done before such a one: of those whose turns alternate with its own, no more than of itself."""
        if not self.batch:
            waits = len(self._jobs) >= self._abreast
            return sum(map(self._left, self._jobs)) / self._abreast if waits else 0.0
        left = [(job.rank, self._left(job)) for job in self._jobs]
        at_work = min(self.batch, sum(cost for _, cost in left))
        return at_work + sum(cost if other < rank else min(cost, own) for other, cost in left if other <= rank)
