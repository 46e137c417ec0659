"""How each deployment fares: the breaker, rate limits and speed, by a clock that is set."""

from __future__ import annotations

import pytest

from fakes.clock import Clock
from voxgate.routing.health import Health


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(clock=clock)


def attempt(health: Health, outcome: str, name: str = "a/m") -> bool:
    """`outcome` is one of: good, bad, ended."""
    begun = health.begin(name)
    if outcome == "good":
        return health.succeeded(name, begun, latency=1.0, duration=10.0)
    if outcome == "bad":
        return health.failed(name, begun)
    health.ended(name, begun)
    return False


def state(health: Health, name: str = "a/m") -> str:
    return health.report(name).state


def opened(health: Health) -> None:
    assert [attempt(health, "bad") for _ in range(5)] == [False] * 4 + [True]


def test_who_was_never_asked_is_well(health: Health) -> None:
    assert health.available("a/m")
    assert (health.limited_for("a/m"), health.speed("a/m")) == (0.0, None)
    report = health.report("a/m")
    assert (report.deployment, report.state, report.until) == ("a/m", "closed", None)
    assert (report.attempts, report.failures, report.speed) == (0, 0, None)


# --- The breaker --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "opens"),
    [
        ("bbbb", False),  # too few to say
        ("bbbbb", True),
        ("gggbb", False),
        ("gggbbb", True),  # half of them
        ("ggggggbbbbgb", False),
        ("ggggggbbbbgbbb", True),
        ("ggggggbbbbb", True),  # so many in a row
        ("bgbgb", True),
        ("eeeeeee", False),
        ("bbbbeeee", False),
        ("ggggggggggggg", False),
    ],
)
def test_it_opens_when_half_of_enough_attempts_failed(health: Health, outcomes: str, opens: bool) -> None:
    names = {"b": "bad", "g": "good", "e": "ended"}
    told = [attempt(health, names[outcome]) for outcome in outcomes]
    assert health.available("a/m") is not opens
    assert state(health) == ("open" if opens else "closed")
    assert told == [False] * (len(outcomes) - 1) + [opens]
    assert (health.report("a/m").until is not None) is opens


def test_only_the_last_half_minute_counts(health: Health, clock: Clock) -> None:
    for _ in range(3):
        attempt(health, "bad")
    clock.now += 30.0
    assert attempt(health, "bad") is False
    assert health.available("a/m")
    report = health.report("a/m")
    assert (report.attempts, report.failures) == (1, 1)


def test_each_deployment_has_a_breaker_of_its_own(health: Health) -> None:
    opened(health)
    assert not health.available("a/m")
    assert health.available("a/other")
    assert health.available("b/m")


def test_it_stays_open_for_a_quarter_of_a_minute(health: Health, clock: Clock) -> None:
    opened(health)
    assert health.report("a/m").until == clock.now + 15
    clock.now += 14.9
    assert not health.available("a/m")
    clock.now += 0.1
    assert health.available("a/m")
    assert state(health) == "half-open"


def test_asking_does_not_use_the_probe_up(health: Health, clock: Clock) -> None:
    opened(health)
    clock.now += 15
    assert all(health.available("a/m") for _ in range(10))


def test_one_probe_at_a_time(health: Health, clock: Clock) -> None:
    opened(health)
    clock.now += 15
    probe = health.begin("a/m")
    assert not health.available("a/m")
    assert health.succeeded("a/m", probe, latency=1, duration=1) is True
    assert health.available("a/m")
    assert state(health) == "closed"


def test_a_probe_that_succeeds_forgets_the_failures(health: Health, clock: Clock) -> None:
    opened(health)
    clock.now += 15
    assert attempt(health, "good") is True
    assert attempt(health, "good") is False
    for _ in range(3):
        attempt(health, "bad")
    assert health.available("a/m")


def test_each_probe_that_fails_doubles_the_pause_up_to_five_minutes(health: Health, clock: Clock) -> None:
    opened(health)
    pause = 15.0
    for _ in range(8):
        clock.now += pause
        assert attempt(health, "bad") is True
        pause = min(pause * 2, 300)
        clock.now += pause - 0.1
        assert not health.available("a/m")
        clock.now += 0.1
        assert health.available("a/m")
        clock.now -= pause
    assert pause == 300


def test_a_probe_that_was_given_up_lets_the_next_one_through(health: Health, clock: Clock) -> None:
    opened(health)
    clock.now += 15
    attempt(health, "ended")
    assert health.available("a/m")


def test_a_probe_that_never_ended_is_forgotten(health: Health, clock: Clock) -> None:
    opened(health)
    clock.now += 15
    health.begin("a/m")
    clock.now += 59
    assert not health.available("a/m")
    clock.now += 1
    assert health.available("a/m")


@pytest.mark.parametrize("late", ["bad", "ended"])
def test_attempts_that_were_under_way_when_it_opened_do_not_put_the_probe_off(
    health: Health, clock: Clock, late: str
) -> None:
    begun = health.begin("a/m")
    opened(health)
    clock.now += 1
    if late == "bad":
        assert health.failed("a/m", begun) is False
    else:
        health.ended("a/m", begun)
    clock.now += 14
    assert health.available("a/m")


@pytest.mark.parametrize("outcome", ["bad", "ended"])
def test_the_retry_after_the_one_that_opened_it_does_not_put_the_probe_off(
    health: Health, clock: Clock, outcome: str
) -> None:
    opened(health)
    clock.now += 0.1
    assert attempt(health, outcome) is False
    clock.now += 14.9
    assert health.available("a/m")


def test_a_failure_while_it_is_open_does_not_lengthen_the_pause(health: Health, clock: Clock) -> None:
    opened(health)
    until = health.report("a/m").until
    assert until is not None
    for _ in range(10):
        attempt(health, "bad")
    assert health.report("a/m").until == until


# --- Rate limits ----------------------------------------------------------------------------------


def test_a_rate_limit_is_waited_out(health: Health, clock: Clock) -> None:
    health.limited("a/m", health.begin("a/m"), 20)
    assert not health.available("a/m")
    assert health.limited_for("a/m") == 20
    assert (state(health), health.report("a/m").until) == ("rate-limited", clock.now + 20)
    clock.now += 19.5
    assert health.limited_for("a/m") == 0.5
    clock.now += 0.5
    assert health.available("a/m")
    assert (health.limited_for("a/m"), state(health)) == (0.0, "closed")


def test_the_longest_of_several_rate_limits_counts(health: Health) -> None:
    health.limited("a/m", health.begin("a/m"), 20)
    health.limited("a/m", health.begin("a/m"), 5)
    assert health.limited_for("a/m") == 20


def test_a_rate_limit_is_no_failure(health: Health, clock: Clock) -> None:
    for _ in range(20):
        health.limited("a/m", health.begin("a/m"), 1)
    clock.now += 1
    assert health.available("a/m")
    assert (health.report("a/m").failures, health.report("a/m").until) == (0, None)


def test_a_probe_that_meets_a_rate_limit_is_over(health: Health, clock: Clock) -> None:
    opened(health)
    clock.now += 15
    health.limited("a/m", health.begin("a/m"), 2)
    clock.now += 2
    assert health.available("a/m")


# --- Speed ------------------------------------------------------------------------------------------


def test_the_speed_is_a_mean_in_which_the_latest_counts_most(health: Health) -> None:
    health.succeeded("a/m", health.begin("a/m"), latency=2.0, duration=10.0)
    assert health.speed("a/m") == pytest.approx(0.2)
    health.succeeded("a/m", health.begin("a/m"), latency=7.0, duration=10.0)
    assert health.speed("a/m") == pytest.approx(0.3)
    for _ in range(50):
        health.succeeded("a/m", health.begin("a/m"), latency=1.0, duration=10.0)
    assert health.speed("a/m") == pytest.approx(0.1, rel=0.01)


def test_very_short_audio_does_not_look_slow(health: Health) -> None:
    health.succeeded("a/m", health.begin("a/m"), latency=0.3, duration=0.05)
    assert health.speed("a/m") == pytest.approx(0.3)


def test_failures_do_not_change_the_speed(health: Health) -> None:
    health.succeeded("a/m", health.begin("a/m"), latency=2.0, duration=10.0)
    opened_by = [attempt(health, "bad") for _ in range(5)]
    assert any(opened_by)
    assert health.speed("a/m") == pytest.approx(0.2)


# --- What processes tell each other -----------------------------------------------------------------


def test_an_outage_is_learnt(health: Health, clock: Clock) -> None:
    opened(health)
    other = Health(clock=clock)
    until = health.report("a/m").until
    assert until is not None
    other.learn({"a/m": until})
    assert not other.available("a/m")
    assert other.report("a/m").until == until
    clock.now += 15
    assert other.available("a/m")
    assert (health.report("a/m").until, other.report("a/m").until) == (None, None)
    assert attempt(other, "good") is True


def test_what_is_over_is_not_learnt_and_what_is_longer_is_kept(health: Health, clock: Clock) -> None:
    health.learn({"a/m": clock.now, "b/m": clock.now - 100})
    assert health.available("a/m")
    assert health.available("b/m")
    health.learn({"a/m": clock.now + 100})
    health.learn({"a/m": clock.now + 5})
    assert [health.report(name).until for name in ("a/m", "b/m")] == [clock.now + 100, None]
