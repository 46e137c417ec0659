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
_DECAY = 0.3
# Seconds after which a speed is not believed any more where nobody is ahead: who was slow once, and refuses everybody,
# would never learn that it is not any more.
_GOOD_FOR = 600.0


class Admitted:
    """`left` is how many seconds of its audio are not heard yet."""

    def __init__(self, job: Job) -> None:
        self.rank = _RANKS[Priority(job.priority)]
        self.left = job.seconds


class Admission:
    """At most `most` recordings wait or are at work, `abreast` of them at once, each `in_turn` or by priority. `cost`
    is what so many seconds of audio take, and `speed` how much of that is done in a second; 0 is not known yet. What
    it takes, times `margin`, must be within the time that is left; below 1 where the speed is but a guess."""

    def __init__(
        self,
        *,
        most: int,
        cost: Callable[[float], float],
        abreast: int = 1,
        margin: float = 1.0,
        in_turn: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._cost = cost
        self._abreast = abreast
        self._margin = margin
        self._in_turn = in_turn
        self._clock = clock
        self._seen = clock()
        self._fastest = 0.0
        self._jobs: set[Admitted] = set()
        self.speed = 0.0
        self.batch = 0.0  # what is at work is so as a whole

    @property
    def queued(self) -> int:
        return len(self._jobs)

    def went(self, speed: float) -> None:
        self.speed += (_DECAY if self.speed else 1.0) * (speed - self.speed)
        self._seen, self._fastest = self._clock(), max(self._fastest, speed)

    def check(self, priority: str, seconds: float, left: float) -> None:
        """Raises `Overloaded` where so many seconds of audio cannot be heard within the time that is `left`."""
        rank = _RANKS[Priority(priority)]
        ahead = sum(self._cost(job.left) for job in self._jobs if self._in_turn or job.rank <= rank)
        before = 0.0 if len(self._jobs) < self._abreast else ahead / self._abreast + self.batch
        speed = self.speed if before else self._fastest  # of one alone, which is not slowed down by others
        wait = max(math.ceil(before / speed), 1) if speed else 1
        if len(self._jobs) >= self._most:
            raise Overloaded(f"The recognizer's queue is full; try again in {wait} s.", retry_after=wait)
        if not before and self._clock() >= self._seen + _GOOD_FOR:
            return
        need = (before + self._cost(seconds)) / speed if speed else 0.0
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
        self._jobs.add(admitted)
        try:
            yield admitted
        finally:
            self._jobs.remove(admitted)
