"""Which recordings an engine takes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from fakes.clock import Clock
from voxgate.engines import Job
from voxgate.engines.admission import Admission
from voxgate.errors import Overloaded

BATCH = 2.0


def job(seconds: float = 10.0, left: float = 600.0, priority: str = "interactive") -> Job:
    return Job(path="", container="", max_seconds=0.0, seconds=seconds, left=left, priority=priority)


def by_turns(speed: float = 0.0, *, most: int = 100, margin: float = 1.0, clock: Clock | None = None) -> Admission:
    """One that decodes batches."""
    made = Admission(most=most, cost=float, margin=margin, clock=clock or Clock())
    made.restarted(speed, BATCH)
    return made


def in_turn(speed: float = 0.0, *, abreast: int = 1, margin: float = 1.0, clock: Clock | None = None) -> Admission:
    """One that does a recording after the other."""
    made = Admission(most=100, cost=float, abreast=abreast, margin=margin, clock=clock or Clock())
    if speed:
        made.went(speed)
    return made


def wait(door: Admission, seconds: float, left: float, priority: str = "interactive") -> int:
    with pytest.raises(Overloaded) as refusal:
        door.check(priority, seconds, left)
    assert refusal.value.retry_after is not None
    return int(refusal.value.retry_after)


def test_whoever_comes_is_admitted_until_it_is_known_how_fast_it_goes() -> None:
    door = in_turn()
    with door.admit(job(10_000, left=0.1)):
        door.check("interactive", 10_000, 0.1)
        door.went(10.0)
        assert wait(door, 1.0, 0.1) == 1000


@pytest.mark.parametrize("make", [by_turns, in_turn])
def test_what_takes_longer_than_it_may_is_refused(make: Callable[..., Admission]) -> None:
    door = make(10.0, margin=1.1)
    door.check("interactive", 100, 11.1)
    assert wait(door, 100, 10.9) == 1


def test_where_the_speed_is_a_guess_only_who_takes_much_longer_is_refused() -> None:
    door = in_turn(10.0, margin=0.5)
    door.check("interactive", 100, 5.1)
    assert wait(door, 100, 4.9) == 1


def test_what_is_ahead_counts_by_what_is_left_of_it() -> None:
    door = in_turn(10.0)
    with door.admit(job(100)) as first, door.admit(job(200)):
        assert door.queued == 2
        assert wait(door, 10, 30) == 30
        door.hear(first, 60.0)
        door.hear(first, 50.0)  # which is known already
        assert wait(door, 10, 24) == 24
    assert door.queued == 0


def test_several_are_served_at_once() -> None:
    door = in_turn(1.0, abreast=2)
    with door.admit(job(100)):
        door.check("interactive", 1, 2)  # the other has nothing to do
        with door.admit(job(50)):
            assert wait(door, 1, 70) == 75
            door.check("interactive", 1, 90)


def test_who_is_served_in_turn_waits_for_all_who_were_there() -> None:
    door = in_turn(1.0)
    with door.admit(job(100, priority="batch")):
        assert wait(door, 1, 2, "live") == 100


def test_a_short_one_does_not_wait_for_the_end_of_a_long_one() -> None:
    door = by_turns(1.0)
    with door.admit(job(10_000, left=1e6)):
        door.check("interactive", 1, BATCH + 2)  # the batch that is at work, one turn of the other, and its own
        assert wait(door, 1, BATCH + 1.9) == 3
        assert wait(door, 100, 200) == 102


def test_of_a_batch_that_is_at_work_no_more_is_waited_for_than_there_is() -> None:
    door = by_turns(1.0)
    with door.admit(job(0.5)):
        door.check("interactive", 1, 2.0)
    door.check("interactive", 1, 1.0)


def test_who_is_more_urgent_is_served_as_a_whole_before_and_who_is_less_after() -> None:
    door = by_turns(1.0)
    with door.admit(job(100, priority="batch")):
        door.check("interactive", 1, BATCH + 1)
        assert wait(door, 1, BATCH + 1, "batch") == 3
    with door.admit(job(100)):
        assert wait(door, 1, 100, "batch") == 102


def test_more_than_may_wait_are_refused_and_the_less_urgent_count_for_themselves() -> None:
    door = by_turns(most=2)
    with door.admit(job(priority="batch")), door.admit(job(priority="batch")):
        assert wait(door, 1, 600, "batch") == 1
        with door.admit(job()), door.admit(job()):
            assert wait(door, 1, 600) == 1
            with pytest.raises(Overloaded), door.admit(job()):
                raise AssertionError
    with door.admit(job()):
        pass


def test_what_fails_waits_no_longer() -> None:
    door = in_turn()
    with contextlib.suppress(RuntimeError), door.admit(job()):
        raise RuntimeError
    assert door.queued == 0


@pytest.mark.parametrize("make", [by_turns, in_turn])
def test_who_was_slow_once_learns_that_it_is_not_any_more(make: Callable[..., Admission]) -> None:
    clock = Clock()
    door = make(0.001, clock=clock)
    assert wait(door, 10, 1) == 1
    clock.now += 601
    with door.admit(job(10, left=1)):  # with nobody ahead the only way to find out
        assert wait(door, 10, 1) >= 10_000
        door.went(100.0)
    door.check("interactive", 10, 1)


# How fast it goes, where batches are decoded.


def test_the_speed_is_measured_in_what_is_done_whatever_it_took() -> None:
    clock = Clock()
    door = by_turns(50.0, clock=clock)
    with door.admit(job(10_000)) as heard, door.admit(job(10_000)):
        for second in range(1, 61):
            clock.now += 1
            door.hear(heard, 20.0 * second)
    assert door.speed == pytest.approx(20.0, rel=0.01)


def test_who_has_too_little_to_do_is_not_taken_for_slow_and_may_be_faster_than_was_known() -> None:
    clock = Clock()
    door = by_turns(50.0, clock=clock)
    for seconds in (2.0, 0.01):
        before = door.speed
        for _ in range(60):
            with door.admit(job(BATCH)):
                clock.now += seconds
        assert door.speed >= before
    with door.admit(job(10_000)) as heard:
        clock.now += 1
        door.hear(heard, 100.0)
    assert door.speed > 50


def test_what_comes_all_at_once_after_a_while_is_no_peak() -> None:
    clock = Clock()
    door = by_turns(4.0, clock=clock)
    with door.admit(job(10_000, left=1e6)) as heard:
        for number in range(1, 31):
            clock.now += 10
            door.hear(heard, 40.0 * number)
    assert door.speed == pytest.approx(4.0, rel=0.01)


def test_a_recording_is_counted_once_however_often_it_is_told_that_it_was_heard() -> None:
    clock = Clock()
    door = by_turns(1.0, clock=clock)
    with door.admit(job(10_000, left=1e6)):
        for _ in range(60):
            with door.admit(job(5)) as heard:
                door.hear(heard, 5.0)
                door.hear(heard, 5.0)
                clock.now += 1
    assert door.speed == pytest.approx(5.0, rel=0.1)


def test_another_process_is_as_fast_as_it_says() -> None:
    door = by_turns(1.0)
    door.restarted(30.0, 8)
    assert (door.speed, door.batch) == (30.0, 8)
