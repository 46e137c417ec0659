"""What a caller may and may not, as plain functions on values, so that both stores refuse alike.

A rate is a token bucket, kept as one number (GCRA, ITU-T I.371): the time in microseconds at which
the bucket is full again. It never holds more than a minute's worth.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from voxgate.accounts import Bounds, Claim, Standing, Window
from voxgate.errors import IdempotencyConflict, InsufficientQuota, RateLimited, VoxgateError

_MINUTE = 60_000_000
_UNLIMITED = 10**9  # what headers say where nothing limits


@dataclass(frozen=True, slots=True)
class Bucket:
    """`units` a minute, and as many at once. All times are microseconds."""

    units: int

    @property
    def step(self) -> int:
        return -(-_MINUTE // self.units)

    @property
    def span(self) -> int:
        return self.step * self.units

    def latest(self, count: int, now: int) -> int:
        """The latest "full again" with which `count` get in. More than the bucket holds get in when
        it is full, and leave it in debt: refusing them for ever would help nobody."""
        return now + self.span - self.step * min(count, self.units)

    def take(self, full: int, count: int, now: int) -> int:
        return max(full, now) + self.step * count

    def wait(self, full: int, count: int, now: int) -> float:
        """Seconds until `count` get in."""
        return max(max(full, now) - self.latest(count, now), 0) / 1e6

    def window(self, full: int, now: int) -> Window:
        ahead = max(full - now, 0)
        return Window(self.units, max(self.span - ahead, 0) // self.step, ahead / 1e6)


@dataclass(frozen=True, slots=True)
class Tally:
    """How far one account or key has used its bounds: when its buckets are full again, how many
    requests run, and what is spent or held this month."""

    bounds: Bounds
    requests: int = 0
    audio: int = 0
    running: int = 0
    spent: int = 0

    @property
    def request_bucket(self) -> Bucket | None:
        limit = self.bounds.limits.requests_per_minute
        return None if limit is None else Bucket(limit)

    @property
    def audio_bucket(self) -> Bucket | None:
        """Its units are tenths of a second."""
        limit = self.bounds.limits.audio_seconds_per_minute
        return None if limit is None else Bucket(limit * 10)


@dataclass(frozen=True, slots=True)
class State:
    """All that a decision about one request needs."""

    balance: int
    free: int
    tallies: tuple[Tally, ...]


def check_admission(state: State, now: int, *, paid: bool, slot: bool) -> None:
    """Raises `InsufficientQuota` or `RateLimited`. `now` is in microseconds, as below."""
    with _telling(state, now):
        if paid:
            _check_money(state, 1, now)
        waits = _request_waits(state, now)
        for tally in state.tallies if slot else ():
            most = tally.bounds.limits.concurrent_requests
            if most is not None and tally.running >= most:
                waits.append((1.0, f"{most} requests run already, as many as may at once{_of(tally)}."))
        _refuse(waits)


def check_hold(state: State, amount: int, tenths: int, now: int, *, more: bool = False) -> None:
    """With `more`, for what has its hold already. Raises `InsufficientQuota` or `RateLimited`."""
    with _telling(state, now):
        if amount or not more:
            _check_money(state, amount, now)
        waits = [
            (
                b.wait(t.audio, tenths, now),
                f"The limit of {b.units // 10} seconds of audio a minute is reached{_of(t)}.",
            )
            for t in state.tallies
            if (b := t.audio_bucket)
        ]
        if any(wait for wait, _ in waits):
            # Whoever comes back needs a request as well, and this one has taken its own already.
            _refuse(waits + [(wait, waits[0][1]) for wait, _ in _request_waits(state, now)])


def _request_waits(state: State, now: int) -> list[tuple[float, str]]:
    return [
        (b.wait(t.requests, 1, now), f"The limit of {b.units} requests a minute is reached{_of(t)}.")
        for t in state.tallies
        if (b := t.request_bucket)
    ]


def _refuse(waits: list[tuple[float, str]]) -> None:
    """For the longest of several waits, so that whoever waits for it gets in."""
    wait, said = max(waits, default=(0.0, ""))
    if wait:
        raise RateLimited(said, wait=wait)


@contextlib.contextmanager
def _telling(state: State, now: int) -> Iterator[None]:
    """A refusal says where its caller stands, like any other answer."""
    try:
        yield
    except VoxgateError as error:
        error.headers |= limit_headers(standing(state, now))
        raise


def _check_money(state: State, amount: int, now: int) -> None:
    """Raises `InsufficientQuota`: with what is left and what it takes, or with the day on which a
    spent budget renews. Any request needs free credit, one that costs nothing too."""
    for tally in state.tallies:
        budget = tally.bounds.budget
        if budget is not None and tally.spent + amount > budget:
            left = dollars(max(budget - tally.spent, 0))
            raise InsufficientQuota(
                f"The monthly budget of ${dollars(budget)} is spent{_of(tally)}: ${left} of it is left"
                f"{f' and this request needs ${dollars(amount)}' if amount > 1 else ''}. "
                f"It renews on {renewal(now)} (UTC)."
            )
    if state.free < max(amount, 1):
        needs = f"this request needs ${dollars(amount)}" if amount > 1 else "a request needs credit"
        held = state.balance - state.free
        running = f" (${dollars(held)} more is held for requests that are running)" if held else ""
        raise InsufficientQuota(
            f"You have run out of credit: ${dollars(state.free)} is left{running} and {needs}. Top up the account."
        )


def standing(state: State, now: int) -> Standing:
    requests = [b.window(t.requests, now) for t in state.tallies if (b := t.request_bucket)]
    tenths = [b.window(t.audio, now) for t in state.tallies if (b := t.audio_bucket)]
    audio = [Window(w.limit // 10, w.remaining // 10, w.reset) for w in tenths]
    return Standing(_tightest(requests), _tightest(audio), state.balance, state.free)


def check_claim(claim: Claim, fingerprint: str, *, answered: bool) -> None:
    """Of a claim that somebody laid earlier. Raises `IdempotencyConflict` unless it is this same
    request's and answered."""
    if fingerprint != claim.fingerprint:
        raise IdempotencyConflict("This Idempotency-Key was used for another request; take a new one for this.")
    if not answered:
        message = "A request with this Idempotency-Key is still running; ask again for its answer."
        raise IdempotencyConflict(message, retry_after=1)


def limit_headers(standing: Standing) -> dict[str, str]:
    """OpenAI's `x-ratelimit-*`, which every answer to a known caller carries."""
    headers: dict[str, str] = {}
    for name, window in (("requests", standing.requests), ("audio-seconds", standing.audio_seconds)):
        headers[f"x-ratelimit-limit-{name}"] = str(window.limit)
        headers[f"x-ratelimit-remaining-{name}"] = str(window.remaining)
        headers[f"x-ratelimit-reset-{name}"] = _reset(window)
    return headers


def _reset(window: Window) -> str:
    """As OpenAI writes it: `12ms`, `1.5s`, `6m0s`."""
    milliseconds = -int(-window.reset * 1000 // 1)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    seconds = f"{milliseconds / 1000:g}s"
    return f"{minutes}m{seconds}" if minutes else seconds


def overdrawn(free: int, amount: int) -> ValueError:
    return ValueError(f"Only ${dollars(free)} is free: ${dollars(-amount)} cannot be taken off.")


def dollars(amount: int) -> str:
    """Micro-dollars as text: two decimals, and as many more as it has."""
    sign, amount = ("-", -amount) if amount < 0 else ("", amount)
    whole, rest = divmod(amount, 1_000_000)
    decimals = f"{rest:06d}".rstrip("0")
    return f"{sign}{whole}.{decimals:0<2}"


def microseconds(seconds: float) -> int:
    return math.floor(seconds * 1e6)


def day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def midnight(day: str) -> float:
    """The day's first second."""
    return dt.datetime.fromisoformat(f"{day}T00:00+00:00").timestamp()


def month(now: int) -> str:
    return time.strftime("%Y-%m", time.gmtime(now // 1_000_000))


def renewal(now: int) -> str:
    """The first day of the next month."""
    year, number = map(int, month(now).split("-"))
    return dt.date(year + number // 12, number % 12 + 1, 1).isoformat()


def _tightest(windows: list[Window]) -> Window:
    return min(windows, key=lambda window: window.remaining, default=Window(_UNLIMITED, _UNLIMITED, 0.0))


def _of(tally: Tally) -> str:
    return " by this key" if tally.bounds.id.startswith("key_") else ""
