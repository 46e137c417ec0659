"""Whose outcome counts: one probe at a time, and nothing that an attempt from before an outage came to."""

from __future__ import annotations

from typing import Any

import pytest

from fakes.clock import Clock
from voxgate.routing.health import Health

NAME = "a/m"
PAUSE = 15.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(clock=clock)


def good(health: Health, token: Any, *, latency: float = 1.0) -> bool:
    return health.succeeded(NAME, token, latency=latency, duration=10.0)


def opened(health: Health) -> None:
    for _ in range(5):
        health.failed(NAME, health.begin(NAME))
    assert health.report(NAME).state == "open"


def test_of_many_attempts_after_the_pause_one_is_the_probe(health: Health, clock: Clock) -> None:
    opened(health)
    clock.now += PAUSE
    probe = health.begin(NAME)
    others = [health.begin(NAME) for _ in range(20)]
    assert not health.available(NAME)
    for other in others:
        health.ended(NAME, other)
        assert not health.available(NAME)  # the probe is still under way
    assert good(health, probe) is True
    assert health.available(NAME)


def test_attempts_beside_a_probe_that_fail_do_not_double_the_pause_again(health: Health, clock: Clock) -> None:
    opened(health)
    clock.now += PAUSE
    probe = health.begin(NAME)
    others = [health.begin(NAME) for _ in range(20)]
    assert health.failed(NAME, probe) is True
    assert [health.failed(NAME, other) for other in others] == [False] * 20
    assert health.report(NAME).until == clock.now + 2 * PAUSE


@pytest.mark.parametrize("later", [0.0, 1.0, PAUSE, PAUSE + 1.0])
def test_a_success_that_began_before_it_opened_does_not_close_it(health: Health, clock: Clock, later: float) -> None:
    early = health.begin(NAME)
    opened(health)
    clock.now += later
    assert good(health, early) is False
    assert health.report(NAME).state == ("open" if later < PAUSE else "half-open")
    assert health.available(NAME) is (later >= PAUSE)


def test_it_does_not_end_a_probe_that_is_under_way_either(health: Health, clock: Clock) -> None:
    early = health.begin(NAME)
    opened(health)
    clock.now += PAUSE
    probe = health.begin(NAME)
    for outcome in ("good", "bad", "ended"):
        if outcome == "good":
            assert good(health, early) is False
        elif outcome == "bad":
            assert health.failed(NAME, early) is False
        else:
            health.ended(NAME, early)
        assert not health.available(NAME), outcome
    assert good(health, probe) is True


def test_a_success_from_between_two_outages_does_not_end_the_second(health: Health, clock: Clock) -> None:
    opened(health)
    clock.now += PAUSE
    probe = health.begin(NAME)
    assert good(health, probe) is True
    between = health.begin(NAME)
    opened(health)
    assert good(health, between) is False
    assert health.report(NAME).state == "open"


def test_nor_does_one_end_an_outage_that_was_learnt_meanwhile(health: Health, clock: Clock) -> None:
    early = health.begin(NAME)
    health.learn({NAME: clock.now + 60})
    assert good(health, early) is False
    assert health.report(NAME).state == "open"


@pytest.mark.parametrize("apart", [1.0, 10.0, 29.0, 31.0, 600.0, 86_400.0])
def test_five_failures_in_a_row_open_it_however_far_apart(health: Health, clock: Clock, apart: float) -> None:
    told = []
    for _ in range(5):
        clock.now += apart
        told.append(health.failed(NAME, health.begin(NAME)))
    assert told == [False] * 4 + [True]
    assert health.report(NAME).state == "open"


@pytest.mark.parametrize("apart", [31.0, 600.0])
def test_a_success_between_them_begins_the_row_anew(health: Health, clock: Clock, apart: float) -> None:
    for outcome in "bbbbgbbbbgbbbb":
        clock.now += apart
        token = health.begin(NAME)
        if outcome == "b":
            assert health.failed(NAME, token) is False
        else:
            good(health, token)
    assert health.available(NAME)


@pytest.mark.parametrize("between", ["ended", "limited"])
def test_what_says_nothing_of_it_neither_lengthens_nor_breaks_the_row(
    health: Health, clock: Clock, between: str
) -> None:
    for _ in range(4):
        clock.now += 60
        assert health.failed(NAME, health.begin(NAME)) is False
        if between == "ended":
            health.ended(NAME, health.begin(NAME))
        else:
            health.limited(NAME, health.begin(NAME), 1.0)
    assert health.report(NAME).state != "open"
    clock.now += 60
    assert health.failed(NAME, health.begin(NAME)) is True


def test_a_probe_needs_no_five_failures(health: Health, clock: Clock) -> None:
    opened(health)
    clock.now += PAUSE
    assert health.failed(NAME, health.begin(NAME)) is True
    assert not health.available(NAME)


def test_after_it_closed_five_are_needed_again(health: Health, clock: Clock) -> None:
    opened(health)
    clock.now += PAUSE
    assert good(health, health.begin(NAME)) is True
    assert [health.failed(NAME, health.begin(NAME)) for _ in range(5)] == [False] * 4 + [True]


def test_a_speed_is_known_for_five_minutes(health: Health, clock: Clock) -> None:
    good(health, health.begin(NAME), latency=80.0)
    assert health.speed(NAME) == pytest.approx(8.0)
    clock.now += 299
    assert health.speed(NAME) == pytest.approx(8.0)
    clock.now += 2
    assert health.speed(NAME) is None
    assert health.report(NAME).speed is None


def test_what_it_was_long_ago_does_not_weigh_on_what_it_is(health: Health, clock: Clock) -> None:
    good(health, health.begin(NAME), latency=80.0)
    clock.now += 301
    good(health, health.begin(NAME), latency=2.0)
    assert health.speed(NAME) == pytest.approx(0.2)


def test_each_measurement_renews_it(health: Health, clock: Clock) -> None:
    for _ in range(4):
        good(health, health.begin(NAME), latency=1.0)
        clock.now += 200
    assert health.speed(NAME) == pytest.approx(0.1)


def test_failures_do_not_renew_it(health: Health, clock: Clock) -> None:
    good(health, health.begin(NAME), latency=1.0)
    for _ in range(4):
        clock.now += 100
        health.failed(NAME, health.begin(NAME))
    assert health.speed(NAME) is None
