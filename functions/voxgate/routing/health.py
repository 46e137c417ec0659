"""How each deployment fares: a circuit breaker, rate limits that are waited out, and its speed.

A breaker opens when half of at least five attempts within 30 seconds failed, and keeps requests
away for 15 seconds, then lets one through. That one closes it, or doubles the time, up to five
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

BreakerState = Literal["closed", "open", "half-open", "rate-limited"]


@dataclass(slots=True)
class _Record:
    outcomes: deque[tuple[float, bool]] = field(default_factory=lambda: deque(maxlen=512))
    opened_until: float = 0.0
    pause: float = 0.0  # 0: closed
    probing_until: float = 0.0
    limited_until: float = 0.0
    speed: float | None = None


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
    """Of all deployments, by their id. In process; `outages` and `learn` are what is shared."""

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

    def begin(self, deployment: str) -> None:
        """An attempt begins; with an open breaker it is the one probe."""
        record, now = self._of(deployment), self._clock()
        if record.pause and now >= record.opened_until:
            record.probing_until = now + _PROBE_SECONDS

    def succeeded(self, deployment: str, *, latency: float, duration: float) -> bool:
        """Returns whether that closed the breaker. `latency` and `duration` are in seconds."""
        record = self._of(deployment)
        speed = latency / max(duration, 1.0)
        record.speed = speed if record.speed is None else record.speed + _DECAY * (speed - record.speed)
        record.outcomes.append((self._clock(), True))
        was_open = record.pause > 0
        if was_open:
            record.outcomes.clear()
            record.pause = record.opened_until = record.probing_until = 0.0
        return was_open

    def failed(self, deployment: str) -> bool:
        """Returns whether that opened the breaker."""
        record, now = self._of(deployment), self._clock()
        record.outcomes.append((now, False))
        if record.pause:
            return (
                self._open(record, now, min(record.pause * 2, _LONGEST_PAUSE)) if now >= record.opened_until else False
            )
        attempts, failures = self._counts(record, now)
        if attempts >= _FEWEST and failures >= attempts * _RATE:
            return self._open(record, now, _FIRST_PAUSE)
        return False

    def ended(self, deployment: str) -> None:
        """The attempt ended without saying anything about the deployment: given up, or the caller's fault."""
        self._of(deployment).probing_until = 0.0

    def limited(self, deployment: str, seconds: float) -> None:
        """It asked to be left alone for so long, which is no failure."""
        record = self._of(deployment)
        record.probing_until = 0.0
        record.limited_until = max(record.limited_until, self._clock() + seconds)

    def speed(self, deployment: str) -> float | None:
        """Seconds for one of audio: a mean in which the latest counts most. None until measured."""
        return self._of(deployment).speed

    def outages(self) -> dict[str, float]:
        """Which breakers are open, until when."""
        now = self._clock()
        return {name: record.opened_until for name, record in self._records.items() if record.opened_until > now}

    def learn(self, outages: Mapping[str, float]) -> None:
        """What other processes found out."""
        now = self._clock()
        for name, until in outages.items():
            record = self._of(name)
            if until > max(now, record.opened_until):
                record.opened_until, record.pause = until, record.pause or _FIRST_PAUSE

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
        return Report(deployment, state, until, attempts, failures, record.speed)

    def _open(self, record: _Record, now: float, pause: float) -> bool:
        record.pause, record.opened_until, record.probing_until = pause, now + pause, 0.0
        return True

    def _counts(self, record: _Record, now: float) -> tuple[int, int]:
        while record.outcomes and record.outcomes[0][0] <= now - _WINDOW:
            record.outcomes.popleft()
        return len(record.outcomes), sum(not good for _, good in record.outcomes)

    def _of(self, deployment: str) -> _Record:
        return self._records.setdefault(deployment, _Record())
