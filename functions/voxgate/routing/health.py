"""How each deployment fares: a circuit breaker, rate limits that are waited out, and its speed.

A breaker opens when half of at least five attempts within 30 seconds failed, or five in a row, and keeps
requests away for 15 seconds, then lets one through. That one closes it, or doubles the time, up to five
minutes (Nygard, "Release It!": closed, open, half-open).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

_WINDOW = 30.0
_FEWEST = 5
_RATE = 0.5
_FIRST_PAUSE = 15.0
_LONGEST_PAUSE = 300.0
_PROBE_SECONDS = 60.0  # after which a probe that never ended is forgotten
_DECAY = 0.2  # what the newest of the speeds counts
_MEASURED_SECONDS = 300.0  # after which a speed is unknown again: who was slow once is not slow for ever

BreakerState = Literal["closed", "open", "half-open", "rate-limited"]


@dataclass(slots=True)
class _Record:
    outcomes: deque[tuple[float, bool]] = field(default_factory=lambda: deque(maxlen=512))
    opened_until: float = 0.0
    pause: float = 0.0  # 0: closed
    probing_until: float = 0.0
    limited_until: float = 0.0
    speed: float | None = None
    measured: float = 0.0
    failed_in_a_row: int = 0
    openings: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One that has begun: after how many openings of the breaker, and whether it is the one probe."""

    openings: int
    probe: bool


@dataclass(frozen=True, slots=True)
class Report:
    """`until` is unix seconds; `failures` of `attempts` are the last 30 seconds'."""

    deployment: str
    state: BreakerState
    until: float | None
    attempts: int
    failures: int
    speed: float | None


class Health:
    """Of all deployments, by their id. In process; `report` and `learn` are what is shared."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._records: dict[str, _Record] = {}

    def available(self, deployment: str) -> bool:
        """Whether to try it before those that are out of order. Asking changes nothing."""
        record, now = self._of(deployment), self._clock()
        if now < record.limited_until or now < record.opened_until:
            return False
        return not (record.pause and now < record.probing_until)

    def limited_for(self, deployment: str) -> float:
        """Seconds that its rate limit is still to be waited out."""
        return max(self._of(deployment).limited_until - self._clock(), 0.0)

    def begin(self, deployment: str) -> Attempt:
        """An attempt begins; with an open breaker whose time is over it is the one probe."""
        record, now = self._of(deployment), self._clock()
        probe = record.pause > 0 and now >= record.opened_until and now >= record.probing_until
        if probe:
            record.probing_until = now + _PROBE_SECONDS
        return Attempt(record.openings, probe)

    def succeeded(
        self, deployment: str, attempt: Attempt, *, latency: float | None = None, duration: float = 0.0
    ) -> bool:
        """Returns whether that closed the breaker, which an attempt from before it opened does not.
        `latency` and `duration` are in seconds; live speech tells no speed."""
        record, now = self._of(deployment), self._clock()
        if latency is not None:
            speed, known = latency / max(duration, 1.0), self.speed(deployment)
            record.speed = speed if known is None else known + _DECAY * (speed - known)
            record.measured = now
        record.outcomes.append((now, True))
        record.failed_in_a_row = 0
        closes = record.pause > 0 and attempt.openings == record.openings
        if closes:
            record.outcomes.clear()
            record.pause = record.opened_until = record.probing_until = 0.0
        return closes

    def failed(self, deployment: str, attempt: Attempt) -> bool:
        """Returns whether that opened the breaker."""
        record, now = self._of(deployment), self._clock()
        record.outcomes.append((now, False))
        record.failed_in_a_row += 1
        if record.pause:
            return attempt.probe and self._open(record, now, min(record.pause * 2, _LONGEST_PAUSE))
        attempts, failures = self._counts(record, now)
        if record.failed_in_a_row >= _FEWEST or (attempts >= _FEWEST and failures >= attempts * _RATE):
            return self._open(record, now, _FIRST_PAUSE)
        return False

    def ended(self, deployment: str, attempt: Attempt) -> None:
        """The attempt ended without saying anything about the deployment: given up, or the caller's fault."""
        if attempt.probe:
            self._of(deployment).probing_until = 0.0

    def limited(self, deployment: str, attempt: Attempt, seconds: float) -> None:
        """It asked to be left alone for so long, which is no failure."""
        self.ended(deployment, attempt)
        record = self._of(deployment)
        record.limited_until = max(record.limited_until, self._clock() + seconds)

    def speed(self, deployment: str) -> float | None:
        """Seconds for one of audio: a mean in which the latest counts most. None until measured, and later."""
        record = self._of(deployment)
        return record.speed if self._clock() < record.measured + _MEASURED_SECONDS else None

    def learn(self, outages: Mapping[str, float]) -> None:
        """What other processes found out."""
        now = self._clock()
        for name, until in outages.items():
            record = self._of(name)
            if until > max(now, record.opened_until):
                record.opened_until, record.pause = until, record.pause or _FIRST_PAUSE
                record.openings += 1

    def report(self, deployment: str) -> Report:
        record, now = self._of(deployment), self._clock()
        attempts, failures = self._counts(record, now)
        state: BreakerState = "closed"
        until = None
        if now < record.opened_until:
            state, until = "open", record.opened_until
        elif record.pause:
            state = "half-open"
        elif now < record.limited_until:
            state, until = "rate-limited", record.limited_until
        return Report(deployment, state, until, attempts, failures, self.speed(deployment))

    def _open(self, record: _Record, now: float, pause: float) -> bool:
        record.pause, record.opened_until, record.probing_until = pause, now + pause, 0.0
        record.openings += 1
        record.failed_in_a_row = 0
        return True

    def _counts(self, record: _Record, now: float) -> tuple[int, int]:
        while record.outcomes and record.outcomes[0][0] <= now - _WINDOW:
            record.outcomes.popleft()
        return len(record.outcomes), sum(not good for _, good in record.outcomes)

    def _of(self, deployment: str) -> _Record:
        return self._records.setdefault(deployment, _Record())
