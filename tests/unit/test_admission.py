"""Which recordings an engine takes on."""

from __future__ import annotations

import contextlib

import pytest

from fakes.clock import Clock
from voxgate.engines import Job
from voxgate.engines.admission import Admission
from voxgate.errors import Overloaded


def job(seconds: float = 10.0, left: float = 600.0, priority: str = "interactive") -> Job:
    return Job(path="", container="", max_seconds=0.0, seconds=seconds, left=left, priority=priority)


def admission(*, most: int = 100, abreast: int = 1, speed: float = 0.0, margin: float = 1.1) -> Admission:
    made = Admission(most=most, cost=float, abreast=abreast, margin=margin)
    if speed:
        made.went(speed)
    return made


def wait(door: Admission, seconds: float, left: float, priority: str = "interactive") -> int:
    with pytest.raises(Overloaded) as refusal:
        door.check(priority, seconds, left)
    assert refusal.value.retry_after is not None
    return int(refusal.value.retry_after)


def test_whoever_comes_is_admitted_until_it_is_known_how_fast_it_goes() -> None:
    door = admission()
    with door.admit(job(10_000, left=0.1)):
        door.check("interactive", 10_000, 0.1)
        door.went(10.0)
        assert wait(door, 1.0, 0.1) == 1000


def test_what_takes_longer_than_it_may_is_refused() -> None:
    door = admission(speed=10.0)
    door.check("interactive", 100, 11.1)
    assert wait(door, 100, 10.9) == 1


def test_where_the_speed_is_a_guess_only_who_takes_much_longer_is_refused() -> None:
    door = admission(speed=10.0, margin=0.5)
    door.check("interactive", 100, 5.1)
    assert wait(door, 100, 4.9) == 1


def test_what_is_ahead_counts_by_what_is_left_of_it() -> None:
    door = admission(speed=10.0)
    with door.admit(job(100)) as first, door.admit(job(200)):
        assert door.queued == 2
        assert wait(door, 10, 30) == 30
        first.left = 0.0
        door.check("interactive", 10, 30)
    assert door.queued == 0


def test_a_batch_that_is_at_work_is_so_as_a_whole() -> None:
    door = admission(speed=1.0)
    door.batch = 4.0
    with door.admit(job(2)):
        assert wait(door, 1, 7.6) == 6
        door.check("interactive", 1, 7.8)
    door.check("interactive", 1, 1.2)


def test_only_those_count_who_are_served_before() -> None:
    door = admission(speed=1.0)
    with door.admit(job(100, priority="batch")):
        door.check("interactive", 1, 2)
        assert wait(door, 1, 2, "batch") == 100
    with door.admit(job(100)):
        assert wait(door, 1, 2) == wait(door, 1, 2, "batch") == 100


def test_several_are_served_at_once() -> None:
    door = admission(speed=1.0, abreast=2)
    with door.admit(job(100)):
        door.check("interactive", 1, 2)  # the other has nothing to do
        with door.admit(job(50)):
            assert wait(door, 1, 70) == 75
            door.check("interactive", 1, 90)


def test_more_than_may_wait_are_refused() -> None:
    door = admission(most=2)
    with door.admit(job()), door.admit(job()):
        assert wait(door, 1, 600) == 1
        with pytest.raises(Overloaded), door.admit(job()):
            raise AssertionError
    with door.admit(job()):
        pass


def test_what_fails_waits_no_longer() -> None:
    door = admission()
    with contextlib.suppress(RuntimeError), door.admit(job()):
        raise RuntimeError
    assert door.queued == 0


def test_who_was_slow_once_learns_that_it_is_not_any_more() -> None:
    clock = Clock(1000.0)
    door = Admission(most=100, cost=float, clock=clock)
    door.went(0.001)
    assert wait(door, 10, 1) == 1
    clock.now += 601
    with door.admit(job(10, left=1)):  # with nobody ahead the only way to find out
        assert wait(door, 10, 1) == 10_000
        door.went(100.0)
    door.check("interactive", 10, 1)


def test_who_is_served_in_turn_waits_for_all_who_were_there() -> None:
    door = Admission(most=100, cost=float, in_turn=True)
    door.went(1.0)
    with door.admit(job(100, priority="batch")):
        assert wait(door, 1, 2, "live") == 100


def test_the_speed_follows_what_is_seen() -> None:
    door = admission(speed=10.0)
    for _ in range(50):
        door.went(30.0)
    assert door.speed == pytest.approx(30.0, rel=0.01)
