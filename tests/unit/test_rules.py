"""The rules both stores refuse by: buckets, money, and in which order."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxgate.accounts import Bounds, Claim, RateLimits, Window
from voxgate.accounts.rules import (
    Bucket,
    State,
    Tally,
    check_admission,
    check_claim,
    check_hold,
    day,
    dollars,
    limit_headers,
    microseconds,
    month,
    renewal,
    standing,
)
from voxgate.errors import IdempotencyConflict, InsufficientQuota, RateLimited

NOW = 1_795_262_400_000_000  # 2026-11-21 12:00 UTC
MINUTE = 60_000_000
UNITS = st.integers(1, 2000) | st.sampled_from([6000, 3_600_000, 60_000_000, 59_999_999])


def tally(
    rpm: int | None = None,
    spm: int | None = None,
    at_once: int | None = None,
    /,
    *,
    key: bool = False,
    budget: int | None = None,
    **used: int,
) -> Tally:
    return Tally(Bounds("key_1" if key else "acct_1", RateLimits(rpm, spm, at_once), budget), **used)


def rich(*tallies: Tally) -> State:
    return State(10**9, 10**9, tallies)


def at(text: str) -> int:
    return microseconds(dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC).timestamp())


# Buckets.


@given(
    units=st.integers(1, 400),
    steps=st.lists(st.tuples(st.none() | st.integers(0, MINUTE // 8), st.integers(1, 50)), min_size=1, max_size=60),
)
def test_no_window_takes_more_than_a_full_bucket_and_what_flows_in(
    units: int, steps: list[tuple[int | None, int]]
) -> None:
    bucket, full, now = Bucket(units), 0, NOW
    taken: list[tuple[int, int]] = []
    for pause, wanted in steps:  # without a pause it comes the moment that it may
        count = min(wanted, units)
        now += round(bucket.wait(full, count, now) * 1e6) if pause is None else pause
        if not bucket.wait(full, count, now):
            full = bucket.take(full, count, now)
            taken.append((now, count))
    for first, last in itertools.combinations_with_replacement(range(len(taken)), 2):
        inside = sum(count for _, count in taken[first : last + 1])
        length = taken[last][0] - taken[first][0]
        assert inside * MINUTE <= units * (MINUTE + length)


@given(units=UNITS, ahead=st.integers(-MINUTE, 5 * MINUTE), count=st.integers(1, 5000))
def test_the_wait_is_exact_to_the_microsecond(units: int, ahead: int, count: int) -> None:
    bucket, full = Bucket(units), NOW + ahead
    wait = microseconds(bucket.wait(full, count, NOW) + 1e-7)
    assert bucket.wait(full, count, NOW + wait) == 0
    if wait:
        assert bucket.wait(full, count, NOW + wait - 1) == 1e-6


@given(units=UNITS)
def test_a_full_bucket_holds_its_units_and_not_one_more(units: int) -> None:
    bucket = Bucket(units)
    assert bucket.wait(0, units, NOW) == 0
    assert bucket.window(0, NOW) == Window(units, units, 0.0)
    full = bucket.take(0, units, NOW)
    assert bucket.window(full, NOW).remaining == 0
    assert bucket.wait(full, 1, NOW) == pytest.approx(bucket.step / 1e6)
    assert bucket.window(full, NOW + bucket.step).remaining == 1


@given(units=st.integers(1, 1000), count=st.integers(1, 10_000))
def test_more_than_a_bucket_gets_in_when_it_is_full_and_leaves_it_in_debt(units: int, count: int) -> None:
    bucket = Bucket(units)
    assert bucket.wait(0, units + count, NOW) == 0
    if units > 1 or count > 0:
        assert bucket.wait(bucket.take(0, 1, NOW), units + count, NOW) > 0
    full = bucket.take(0, units + count, NOW)
    assert bucket.wait(full, 1, NOW) == pytest.approx(bucket.step * (count + 1) / 1e6)
    assert bucket.window(full, NOW).remaining == 0
    assert bucket.window(full, NOW).reset == pytest.approx(bucket.step * (units + count) / 1e6)


@given(units=UNITS, ahead=st.integers(-MINUTE, 2 * MINUTE))
def test_what_remains_gets_in_and_no_more(units: int, ahead: int) -> None:
    bucket, full = Bucket(units), NOW + ahead
    remaining = bucket.window(full, NOW).remaining
    assert 0 <= remaining <= units
    if remaining:
        assert bucket.wait(full, remaining, NOW) == 0
    if remaining < units:
        assert bucket.wait(full, remaining + 1, NOW) > 0


# What is refused, and in which order.


def test_money_comes_before_rates_and_rates_before_places() -> None:
    full = NOW + MINUTE
    worst = tally(1, None, 1, requests=full, running=1, budget=5, spent=5)
    with pytest.raises(InsufficientQuota, match="budget"):
        check_admission(State(0, 0, (worst,)), NOW, paid=True, slot=True)
    with pytest.raises(InsufficientQuota, match="run out"):
        check_admission(State(0, 0, (tally(1, None, 1, requests=full, running=1),)), NOW, paid=True, slot=True)
    with pytest.raises(RateLimited, match="1 requests a minute"):
        check_admission(State(0, 0, (worst,)), NOW, paid=False, slot=True)
    with pytest.raises(RateLimited, match="1 requests run already"):
        check_admission(rich(tally(1, None, 1, running=1)), NOW, paid=True, slot=True)
    check_admission(rich(tally(1, None, 1, running=1)), NOW, paid=True, slot=False)


def test_the_account_is_named_before_its_key() -> None:
    account, key = tally(5, budget=10, spent=10), tally(5, key=True, budget=10, spent=10)
    with pytest.raises(InsufficientQuota) as caught:
        check_admission(rich(account, key), NOW, paid=True, slot=True)
    assert "key" not in caught.value.message
    with pytest.raises(InsufficientQuota, match="by this key"):
        check_admission(rich(tally(5), key), NOW, paid=True, slot=True)


@given(first=st.integers(1, MINUTE), second=st.integers(1, MINUTE), units=st.tuples(*[st.integers(1, 50)] * 2))
def test_whoever_waits_as_long_as_told_gets_in_whatever_limits_are_reached(
    first: int, second: int, units: tuple[int, int]
) -> None:
    requests = rich(tally(units[0], requests=NOW + first), tally(units[1], key=True, requests=NOW + second))
    seconds = rich(tally(None, units[0], audio=NOW + first), tally(None, units[1], key=True, audio=NOW + second))

    def admit(now: int) -> RateLimited | None:
        return _refusal(lambda: check_admission(requests, now, paid=True, slot=True))

    def hold(now: int) -> RateLimited | None:
        return _refusal(lambda: check_hold(seconds, 1, 20, now))

    for check in (admit, hold):
        if refusal := check(NOW):
            wait = int(refusal.headers["retry-after-ms"])
            assert int(refusal.headers["retry-after"]) * 1000 >= wait > 0
            assert check(NOW + wait * 1000) is None
            assert check(NOW + (wait - 1) * 1000) is not None


def _refusal(check: Callable[[], None]) -> RateLimited | None:
    try:
        check()
    except RateLimited as error:
        return error
    return None


@pytest.mark.parametrize(
    ("free", "amount", "enough"), [(0, 0, False), (1, 0, True), (1, 1, True), (1, 2, False), (0, 1, False)]
)
def test_any_request_needs_free_credit_one_that_costs_nothing_too(free: int, amount: int, enough: bool) -> None:
    state = State(100, free, ())
    if enough:
        check_hold(state, amount, 0, NOW)
    else:
        with pytest.raises(InsufficientQuota, match="run out of credit"):
            check_hold(state, amount, 0, NOW)


def test_a_refusal_for_money_says_what_is_left_what_is_held_and_what_it_takes() -> None:
    with pytest.raises(InsufficientQuota) as caught:
        check_hold(State(1_500_000, 250_000, ()), 300_000, 0, NOW)
    assert caught.value.message == (
        "You have run out of credit: $0.25 is left ($1.25 more is held for requests that are running) "
        "and this request needs $0.30. Top up the account."
    )
    with pytest.raises(InsufficientQuota) as caught:
        check_hold(rich(tally(key=True, budget=1_000_000, spent=999_999)), 2, 0, NOW)
    assert caught.value.message == (
        "The monthly budget of $1.00 is spent by this key: $0.000001 of it is left and this request needs $0.000002. "
        "It renews on 2026-12-01 (UTC)."
    )
    check_hold(rich(tally(budget=1_000_000, spent=999_999)), 1, 0, NOW)


def test_a_refusal_tells_where_its_caller_stands() -> None:
    state = State(0, 0, (tally(60, 120, requests=NOW + 30_500_000, audio=NOW + 600_000),))
    with pytest.raises(InsufficientQuota) as caught:
        check_hold(state, 1, 0, NOW)
    assert caught.value.headers == {
        "x-should-retry": "false",
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "29",
        "x-ratelimit-reset-requests": "30.5s",
        "x-ratelimit-limit-audio-seconds": "120",
        "x-ratelimit-remaining-audio-seconds": "118",
        "x-ratelimit-reset-audio-seconds": "600ms",
    }
    assert caught.value.headers.items() >= limit_headers(standing(state, NOW)).items()


@pytest.mark.parametrize(
    ("ahead", "text"),
    [(0, "0s"), (1, "1ms"), (12_000, "12ms"), (1_000_000, "1s"), (1_500_000, "1.5s"), (60_000_000, "1m0s"),
     (999_001, "1s"), (59_999_001, "1m0s"), (90_250_000, "1m30.25s"), (360_000_000, "6m0s")],
)  # fmt: skip
def test_the_time_until_a_limit_is_whole_again_is_written_as_openai_writes_it(ahead: int, text: str) -> None:
    headers = limit_headers(standing(rich(tally(60, requests=NOW + ahead)), NOW))
    assert headers["x-ratelimit-reset-requests"] == text


def test_a_claim_is_another_requests_in_flight_or_answered() -> None:
    claim = Claim("key", "print")
    for answered in (False, True):
        with pytest.raises(IdempotencyConflict, match="another request") as caught:
            check_claim(claim, "other", answered=answered)
        assert caught.value.headers == {"x-should-retry": "false"}
    with pytest.raises(IdempotencyConflict, match="still running") as caught:
        check_claim(claim, "print", answered=False)
    assert caught.value.headers == {"retry-after": "1"}
    check_claim(claim, "print", answered=True)


# Money and days in words.


@given(st.integers(-(10**15), 10**15))
def test_dollars_say_the_exact_amount(amount: int) -> None:
    text = dollars(amount)
    assert Decimal(text) * 1_000_000 == amount
    decimals = text.partition(".")[2]
    assert 2 <= len(decimals) <= 6
    assert len(decimals) == 2 or not decimals.endswith("0")


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "0.00"), (1, "0.000001"), (10_000, "0.01"), (1_230_000, "1.23"), (-500_000, "-0.50")]
)
def test_dollars_have_two_decimals_and_as_many_more_as_it_takes(amount: int, text: str) -> None:
    assert dollars(amount) == text


@pytest.mark.parametrize(
    ("moment", "first"),
    [
        ("2026-01-01", "2026-02-01"),
        ("2026-11-30T23:59:59.999999", "2026-12-01"),
        ("2026-12-01", "2027-01-01"),
        ("2026-12-31T23:59:59.999999", "2027-01-01"),
        ("2027-01-01", "2027-02-01"),
        ("2028-02-29", "2028-03-01"),
    ],
)
def test_a_budget_renews_on_the_first_of_the_next_month(moment: str, first: str) -> None:
    assert renewal(at(moment)) == first


@given(st.dates(dt.date(1970, 1, 2), dt.date(2200, 1, 1)), st.times())
def test_a_budget_never_renews_in_its_own_month(date: dt.date, time: dt.time) -> None:
    moment = dt.datetime.combine(date, time, dt.UTC)
    now = microseconds(moment.timestamp())
    assert month(now) == moment.isoformat()[:7]
    assert day(now / 1e6) == moment.date().isoformat()
    first = dt.date.fromisoformat(renewal(now))
    assert first > moment.date()
    assert (first - dt.timedelta(days=1)).isoformat()[:7] == month(now)
