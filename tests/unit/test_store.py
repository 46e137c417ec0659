"""What every store does, tried on both: accounts, keys, limits, the ledger, claims and usage."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

from fakes.store import STORES, Backend, Bench, Clock, DynamoBackend, SqliteBackend, dynamodb, sync
from voxgate.accounts import (
    Account,
    Balance,
    Bounds,
    Claim,
    Entry,
    EntryKind,
    Hold,
    HoldEnded,
    Key,
    RateLimits,
    Replay,
    Scope,
    Status,
    Store,
    Swept,
    UsageRow,
    Window,
)
from voxgate.errors import IdempotencyConflict, InsufficientQuota, RateLimited

pytestmark = pytest.mark.usefixtures("untraced")

if TYPE_CHECKING:
    from mypy_boto3_dynamodb.client import DynamoDBClient

T = TypeVar("T")

DAY = 86400.0
TODAY = "2026-11-21"
CLAIM = Claim("claim", "print")


@pytest.fixture(scope="module")
def aws() -> Iterator[DynamoDBClient]:
    with dynamodb() as client:
        yield client


@pytest.fixture(params=STORES)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    clock = Clock()
    backend: Backend = (
        SqliteBackend(tmp_path / "voxgate.sqlite", clock)
        if request.param == "sqlite"
        else DynamoBackend(request.getfixturevalue("aws"), clock)
    )
    bench = Bench.make(backend, clock)
    yield bench
    bench.close()


async def refused(call: Awaitable[object], wait: float | None = None) -> RateLimited:
    """The refusal, with headers that agree with each other and, if given, with `wait`."""
    with pytest.raises(RateLimited) as caught:
        await call
    headers = caught.value.headers
    assert int(headers["retry-after"]) == math.ceil(int(headers["retry-after-ms"]) / 1000) >= 1
    if wait is not None:
        assert int(headers["retry-after-ms"]) == math.ceil(wait * 1000)
    return caught.value


async def in_after_what_it_says(bench: Bench, call: Callable[[], Awaitable[T]]) -> T:
    """Refused now and 1 ms before the time it names, and let in at that time."""
    milliseconds = int((await refused(call())).headers["retry-after-ms"])
    bench.clock.advance((milliseconds - 1) / 1000)
    assert (await refused(call())).headers["retry-after-ms"] == "1"
    bench.clock.advance(0.001)
    return await call()


# Accounts.


@sync
async def test_an_account_is_found_by_its_id_and_by_its_name(bench: Bench) -> None:
    made = await bench.store.create_account("Ünï côde #1", limits=RateLimits(1, None, 3), budget=0)
    assert (made.name, made.created, made.status) == ("Ünï côde #1", 1_795_262_400, Status.ACTIVE)
    assert (made.limits, made.budget) == (RateLimits(1, None, 3), 0)
    assert await bench.store.find_account(made.id) == made
    assert await bench.store.find_account(made.name) == made
    assert await bench.store.find_account("acme") == bench.account


@sync
async def test_an_account_named_like_anothers_id_does_not_hide_it(bench: Bench) -> None:
    second = await bench.store.create_account(bench.account.id)
    assert await bench.store.find_account(bench.account.id) == bench.account
    assert await bench.store.find_account(second.id) == second


@sync
async def test_a_name_is_taken_once(bench: Bench) -> None:
    with pytest.raises(ValueError, match="'acme'"):
        await bench.store.create_account("acme")
    assert await bench.store.accounts() == [bench.account]


@pytest.mark.parametrize("reference", ["nobody", "acct_0", "' OR 1=1 --"])
@sync
async def test_what_is_not_there_is_a_key_error_with_a_message(bench: Bench, reference: str) -> None:
    store, nobody = bench.store, Account(id=reference, name="x", created=1)
    key = Key(id=reference, account_id=reference, created=1)
    ticket = bench.ticket("x", account=nobody)
    for call in (
        store.find_account(reference),
        store.change_account(nobody),
        store.create_key(key, b"d" * 32),
        store.find_key(reference),
        store.revoke_key(reference),
        store.admit(ticket, lease=60),
        store.hold(ticket, 1, tenths=0, lease=60),
        store.post(Entry(reference, EntryKind.TOP_UP, 1, 1.0, "r")),
        store.balance(reference),
    ):
        with pytest.raises(KeyError, match=r"\w+ \w+ no \w+"):
            await call
    assert await store.find_credential(b"d" * 32) is None


@sync
async def test_a_key_that_is_not_there_cannot_be_marked_as_used(bench: Bench) -> None:
    with pytest.raises(KeyError, match="no key"):
        await bench.store.mark_used(Key(id="key_no", account_id=bench.account.id, created=1), TODAY)


@sync
async def test_accounts_come_oldest_first(bench: Bench) -> None:
    made = [bench.account]
    for name in ("zulu", "alpha", "mike"):
        bench.clock.advance(1)
        made.append(await bench.store.create_account(name))
    assert await bench.store.accounts() == made


@sync
async def test_an_account_changes_its_status_limits_and_budget_and_nothing_else(bench: Bench) -> None:
    await bench.top_up(500)
    changed = dataclasses.replace(
        bench.account, status=Status.SUSPENDED, limits=RateLimits(None, 5, None), budget=7, name="other", created=1
    )
    await bench.store.change_account(changed)
    wanted = dataclasses.replace(changed, name="acme", created=bench.account.created)
    assert await bench.store.find_account("acme") == wanted
    with pytest.raises(KeyError):
        await bench.store.find_account("other")
    await bench.store.change_account(bench.account)
    assert await bench.store.find_account("acme") == bench.account
    assert (await bench.store.balance(bench.account.id)).balance == 500


@sync
async def test_of_many_accounts_made_at_once_none_is_lost(bench: Bench) -> None:
    made = await asyncio.gather(*(bench.store.create_account(f"a{i}") for i in range(20)))
    assert len({account.id for account in made}) == 20
    assert await asyncio.gather(*(bench.store.find_account(f"a{i}") for i in range(20))) == made
    assert len(await bench.store.accounts()) == 21


# Keys.


@pytest.mark.parametrize(
    "known",
    [
        {},
        {"name": "Ünï côde", "scopes": frozenset(Scope), "models": ("b", "a"), "expires": 5, "last_used": TODAY},
        {"scopes": frozenset(), "models": (), "limits": RateLimits(1, 2, 3), "budget": 0},
        {"limits": RateLimits(None, 2, None), "budget": 2**53, "revoked": 9},
    ],
)
@sync
async def test_a_key_comes_back_as_it_was_made(bench: Bench, known: dict[str, object]) -> None:
    key = dataclasses.replace(Key(id="key_1", account_id=bench.account.id, created=12), **known)  # type: ignore[arg-type]
    await bench.store.create_key(key, b"d" * 32)
    assert await bench.store.find_key("key_1") == key
    assert await bench.store.keys(bench.account.id) == [key]
    credential = await bench.store.find_credential(b"d" * 32)
    assert credential is not None
    assert (credential.account, credential.key, credential.digest) == (bench.account, key, b"d" * 32)
    assert await bench.store.find_credential(b"e" * 32) is None


@sync
async def test_accounts_have_their_own_keys_oldest_first(bench: Bench) -> None:
    other = await bench.store.create_account("other")
    mine = [Key(id=f"key_{9 - i}", account_id=bench.account.id, created=i) for i in range(5)]
    for number, key in enumerate(reversed(mine)):
        await bench.store.create_key(key, bytes([number] * 32))
    theirs = Key(id="key_other", account_id=other.id, created=1)
    await bench.store.create_key(theirs, b"o" * 32)
    assert await bench.store.keys(bench.account.id) == mine
    assert await bench.store.keys(other.id) == [theirs]


@sync
async def test_an_id_and_a_digest_belong_to_one_key(bench: Bench) -> None:
    other = await bench.store.create_account("other")
    key = Key(id="key_1", account_id=bench.account.id, created=1)
    await bench.store.create_key(key, b"d" * 32)
    for wrong, digest in (
        (Key(id="key_2", account_id=other.id, created=1), b"d" * 32),
        (Key(id="key_1", account_id=other.id, created=1), b"e" * 32),
    ):
        with pytest.raises(ValueError, match="already"):
            await bench.store.create_key(wrong, digest)
    assert await bench.store.keys(other.id) == []
    assert await bench.store.find_key("key_1") == key
    assert await bench.store.find_credential(b"e" * 32) is None


@sync
async def test_a_revoked_key_stays_known_and_its_time_stands(bench: Bench) -> None:
    key = Key(id="key_1", account_id=bench.account.id, created=1)
    await bench.store.create_key(key, b"d" * 32)
    bench.clock.advance(10)
    wanted = dataclasses.replace(key, revoked=1_795_262_410)
    assert await bench.store.revoke_key("key_1") == wanted
    bench.clock.advance(10)
    assert await bench.store.revoke_key("key_1") == wanted
    assert await bench.store.find_key("key_1") == wanted
    assert await bench.store.keys(bench.account.id) == [wanted]
    credential = await bench.store.find_credential(b"d" * 32)
    assert credential is not None
    assert credential.key == wanted


@sync
async def test_a_key_is_rotated_by_making_another_and_revoking_it(bench: Bench) -> None:
    old = Key(id="key_old", account_id=bench.account.id, created=1, budget=5, models=("a",))
    await bench.store.create_key(old, b"d" * 32)
    new = dataclasses.replace(old, id="key_new", created=2)
    await bench.store.create_key(new, b"e" * 32)
    both = await bench.store.find_credential(b"d" * 32), await bench.store.find_credential(b"e" * 32)
    assert [found.key for found in both if found] == [old, new]
    revoked = await bench.store.revoke_key("key_old")
    assert await bench.store.keys(bench.account.id) == [revoked, new]
    assert new.revoked is None


@sync
async def test_the_day_of_last_use_is_kept(bench: Bench) -> None:
    key = Key(id="key_1", account_id=bench.account.id, created=1)
    await bench.store.create_key(key, b"d" * 32)
    for day in (TODAY, "2026-11-22", "2026-11-22"):
        await bench.store.mark_used(key, day)
        assert await bench.store.find_key("key_1") == dataclasses.replace(key, last_used=day)


@sync
async def test_a_credential_shows_what_changed_about_its_account(bench: Bench) -> None:
    await bench.store.create_key(Key(id="key_1", account_id=bench.account.id, created=1), b"d" * 32)
    suspended = dataclasses.replace(bench.account, status=Status.SUSPENDED)
    await bench.store.change_account(suspended)
    credential = await bench.store.find_credential(b"d" * 32)
    assert credential is not None
    assert credential.account == suspended


# Tokens.


@pytest.mark.parametrize(("own", "until"), [(None, 500), (400, 400), (500, 500), (600, 500)])
@sync
async def test_a_token_is_its_key_until_the_earlier_end(bench: Bench, own: int | None, until: int) -> None:
    key = Key(id="key_1", account_id=bench.account.id, created=1, models=("a",), budget=7, expires=own)
    await bench.store.create_key(key, b"d" * 32)
    await bench.store.create_token(b"t" * 32, key, 500)
    for store in (bench.store, bench.another()):
        found = await store.find_token(b"t" * 32)
        assert found is not None
        assert (found.account, found.digest) == (bench.account, b"t" * 32)
        assert found.key == dataclasses.replace(key, expires=until)
    assert await bench.store.find_key("key_1") == key


@sync
async def test_a_token_is_no_key_and_a_key_no_token(bench: Bench) -> None:
    key = Key(id="key_1", account_id=bench.account.id, created=1)
    await bench.store.create_key(key, b"d" * 32)
    await bench.store.create_token(b"t" * 32, key, 500)
    assert await bench.store.find_credential(b"t" * 32) is None
    assert await bench.store.find_token(b"d" * 32) is None
    assert await bench.store.find_token(b"x" * 32) is None
    assert await bench.store.keys(bench.account.id) == [key]


@sync
async def test_tokens_are_each_their_own_keys(bench: Bench) -> None:
    other = await bench.store.create_account("other")
    for number, account in enumerate((bench.account, other)):
        key = Key(id=f"key_{number}", account_id=account.id, created=1)
        await bench.store.create_key(key, bytes([number]) * 32)
        for token in (2, 3):
            await bench.store.create_token(bytes([number, token] * 16), key, 500 + token)
    for number, account in enumerate((bench.account, other)):
        for token in (2, 3):
            found = await bench.store.find_token(bytes([number, token] * 16))
            assert found is not None
            assert (found.account.id, found.key.id, found.key.expires) == (account.id, f"key_{number}", 500 + token)


@sync
async def test_a_token_shows_what_became_of_its_key_and_account(bench: Bench) -> None:
    key = Key(id="key_1", account_id=bench.account.id, created=1)
    await bench.store.create_key(key, b"d" * 32)
    await bench.store.create_token(b"t" * 32, key, 500)
    revoked = await bench.store.revoke_key("key_1")
    suspended = dataclasses.replace(bench.account, status=Status.SUSPENDED)
    await bench.store.change_account(suspended)
    found = await bench.store.find_token(b"t" * 32)
    assert found is not None
    assert (found.account, found.key.revoked) == (suspended, revoked.revoked)


@sync
async def test_a_token_outlives_its_process_and_a_sweep_before_its_end(bench: Bench) -> None:
    key = Key(id="key_1", account_id=bench.account.id, created=1)
    await bench.store.create_key(key, b"d" * 32)
    until = int(bench.clock()) + 60
    await bench.store.create_token(b"t" * 32, key, until)
    await asyncio.to_thread(bench.backend.kill, bench.store)
    bench.store = bench.backend.open()
    bench.clock.advance(59.999)
    await bench.store.sweep()
    found = await bench.store.find_token(b"t" * 32)
    assert found is not None
    assert found.key.expires == until


# Rates.


@pytest.mark.parametrize("limit", [1, 7, 30])
@sync
async def test_a_minutes_requests_get_in_at_once_and_then_one_after_another(bench: Bench, limit: int) -> None:
    limits = RateLimits(limit)

    async def admit() -> None:
        await bench.store.admit(bench.ticket(limits=limits), lease=60, paid=False)

    for _ in range(limit):
        await admit()
    await refused(admit(), math.ceil(60e6 / limit) / 1e6)
    for _ in range(2):
        await in_after_what_it_says(bench, admit)
    bench.clock.advance(60)
    for _ in range(limit):
        await admit()
    await refused(admit(), math.ceil(60e6 / limit) / 1e6)


@sync
async def test_a_keys_own_limit_is_its_own_and_what_it_refuses_takes_nothing(bench: Bench) -> None:
    limits, key = RateLimits(5), Bounds("key_1", RateLimits(2))
    for _ in range(2):
        await bench.store.admit(bench.ticket(limits=limits, key=key), lease=60, paid=False)
    for _ in range(3):
        error = await refused(bench.store.admit(bench.ticket(limits=limits, key=key), lease=60, paid=False), 30.0)
        assert "2 requests a minute" in error.message
        assert "by this key" in error.message
    other = Bounds("key_2", RateLimits(5))
    for left in (2, 1, 0):
        standing = await bench.store.admit(bench.ticket(limits=limits, key=other), lease=60, paid=False)
        assert standing.requests.remaining == left
    error = await refused(bench.store.admit(bench.ticket(limits=limits, key=other), lease=60, paid=False), 12.0)
    assert "5 requests a minute" in error.message
    assert "key" not in error.message


@sync
async def test_with_two_limits_reached_the_wait_is_the_longer_one(bench: Bench) -> None:
    limits, key = RateLimits(6), Bounds("key_1", RateLimits(2))
    for _ in range(2):
        await bench.store.admit(bench.ticket(limits=limits, key=key), lease=60, paid=False)
    for _ in range(4):
        await bench.store.admit(bench.ticket(limits=limits), lease=60, paid=False)
    ticket = bench.ticket(limits=limits, key=key)
    await in_after_what_it_says(bench, lambda: bench.store.admit(ticket, lease=60, paid=False))


@pytest.mark.parametrize("by_key", [False, True])
@sync
async def test_as_many_run_at_once_as_may(bench: Bench, by_key: bool) -> None:
    limits = RateLimits(concurrent_requests=2)
    key = Bounds("key_1", limits) if by_key else None
    wide = RateLimits() if by_key else limits
    one, two, three = (bench.ticket(limits=wide, key=key) for _ in range(3))
    await bench.store.admit(one, lease=60, paid=False)
    await bench.store.admit(two, lease=60, paid=False)
    error = await refused(bench.store.admit(three, lease=60, paid=False))
    assert error.message.startswith("2 requests run already")
    assert ("by this key" in error.message) is by_key
    await bench.store.leave(one)
    await bench.store.leave(one)
    await bench.store.admit(three, lease=60, paid=False)
    await refused(bench.store.admit(one, lease=60, paid=False))
    if by_key:
        await bench.store.admit(bench.ticket(key=Bounds("key_2", limits)), lease=60, paid=False)


@sync
async def test_no_place_at_all_is_no_place(bench: Bench) -> None:
    await bench.store.admit(bench.ticket(), lease=60, paid=False)
    await refused(bench.store.admit(bench.ticket(limits=RateLimits(concurrent_requests=0)), lease=60, paid=False))


@sync
async def test_a_place_is_kept_for_its_lease_and_not_longer(bench: Bench) -> None:
    limits = RateLimits(concurrent_requests=1)
    await bench.store.admit(bench.ticket(limits=limits), lease=10, paid=False)
    bench.clock.advance(9.999)
    await refused(bench.store.admit(bench.ticket(limits=limits), lease=10, paid=False))
    bench.clock.advance(0.001)
    await bench.store.admit(bench.ticket(limits=limits), lease=10, paid=False)
    await refused(bench.store.admit(bench.ticket(limits=limits), lease=10, paid=False))


@sync
async def test_who_asks_for_no_place_needs_and_takes_none(bench: Bench) -> None:
    limits = RateLimits(3, None, 1)
    await bench.store.admit(bench.ticket(limits=limits), lease=60, paid=False)
    ticket = bench.ticket(limits=limits)
    await bench.store.admit(ticket, lease=60, paid=False, slot=False)
    await bench.store.leave(ticket)
    await refused(bench.store.admit(bench.ticket(limits=limits), lease=60, paid=False))
    standing = await bench.store.admit(bench.ticket(limits=limits), lease=60, paid=False, slot=False)
    assert standing.requests.remaining == 0  # what was refused for want of a place took no request


@pytest.mark.parametrize("end", ["leave", "settle", "release"])
@sync
async def test_a_place_is_given_back_however_the_request_ends(bench: Bench, end: str) -> None:
    await bench.top_up(100)
    limits, key = RateLimits(concurrent_requests=1), Bounds("key_1", RateLimits(concurrent_requests=1))
    for _ in range(3):
        ticket = bench.ticket(limits=limits, key=key)
        await bench.store.admit(ticket, lease=60)
        if end == "leave":
            await bench.store.leave(ticket, bench.record(ticket))
            continue
        hold = await bench.hold(ticket, 10)
        if end == "settle":
            await bench.store.settle(hold, 1, bench.record(ticket))
        else:
            await bench.store.release(hold, bench.record(ticket))
    assert len(await bench.store.records(bench.account.id, 0.0, 1e10)) == 3


@sync
async def test_a_place_can_be_left_in_another_process(bench: Bench) -> None:
    limits, other = RateLimits(concurrent_requests=1), bench.another()
    ticket = bench.ticket(limits=limits)
    await bench.store.admit(ticket, lease=60, paid=False)
    await refused(other.admit(bench.ticket(limits=limits), lease=60, paid=False))
    await other.leave(ticket)
    await bench.store.admit(bench.ticket(limits=limits), lease=60, paid=False)


@sync
async def test_leaving_without_having_come_changes_nothing(bench: Bench) -> None:
    limits = RateLimits(concurrent_requests=1)
    await bench.store.admit(bench.ticket(limits=limits), lease=60, paid=False)
    await bench.store.leave(bench.ticket(limits=limits))
    await refused(bench.store.admit(bench.ticket(limits=limits), lease=60, paid=False))


@sync
async def test_who_pays_needs_free_credit_to_be_admitted(bench: Bench) -> None:
    limits = RateLimits(2)
    with pytest.raises(InsufficientQuota, match=r"run out of credit: \$0\.00 is left"):
        await bench.store.admit(bench.ticket(limits=limits), lease=60)
    standing = await bench.store.admit(bench.ticket(limits=limits), lease=60, paid=False)
    assert standing.requests.remaining == 1  # the refused one took none
    await bench.top_up(5)
    ticket = bench.ticket(limits=limits)
    await bench.store.admit(ticket, lease=60)
    hold = await bench.hold(ticket, 5)
    with pytest.raises(InsufficientQuota, match=r"\$0\.000005 more is held") as caught:
        await bench.store.admit(bench.ticket(), lease=60)
    assert caught.value.headers["x-should-retry"] == "false"
    assert not any(name.startswith("retry-after") for name in caught.value.headers)
    await bench.store.release(hold)
    await bench.store.admit(bench.ticket(), lease=60)


@sync
async def test_money_is_looked_at_before_rates(bench: Bench) -> None:
    limits = RateLimits(1, None, 1)
    await bench.store.admit(bench.ticket(limits=limits), lease=60, paid=False)
    with pytest.raises(InsufficientQuota):
        await bench.store.admit(bench.ticket(limits=limits), lease=60)


@sync
async def test_a_standing_tells_of_the_limit_with_the_least_left(bench: Bench) -> None:
    await bench.top_up(1000)
    standing = await bench.store.admit(bench.ticket(), lease=60)
    assert standing.requests == standing.audio_seconds == Window(10**9, 10**9, 0.0)
    limits, key = RateLimits(60, 120), Bounds("key_1", RateLimits(6, 600))
    ticket = bench.ticket(limits=limits, key=key)
    standing = await bench.store.admit(ticket, lease=60)
    assert standing.requests == Window(6, 5, 10.0)
    assert standing.audio_seconds == Window(120, 120, 0.0)
    assert (standing.balance, standing.free) == (1000, 1000)
    hold = await bench.hold(ticket, 300, tenths=255)
    assert hold.standing.requests == Window(6, 5, 10.0)
    assert hold.standing.audio_seconds == Window(120, 94, 12.75)
    assert (hold.standing.balance, hold.standing.free) == (1000, 700)
    bench.clock.advance(5)
    standing = await bench.store.admit(bench.ticket(limits=limits, key=key), lease=60)
    assert standing.requests == Window(6, 4, 15.0)
    assert standing.audio_seconds == Window(120, 104, 7.75)
    assert (standing.balance, standing.free) == (1000, 700)


# Seconds of audio.


@pytest.mark.parametrize("by_key", [False, True])
@sync
async def test_seconds_of_audio_are_a_bucket_that_fills_in_a_minute(bench: Bench, by_key: bool) -> None:
    await bench.top_up(1000)
    narrow = RateLimits(audio_seconds_per_minute=60)
    limits, key = (RateLimits(), Bounds("key_1", narrow)) if by_key else (narrow, None)
    await bench.hold(bench.ticket(limits=limits, key=key), 1, tenths=400)
    ticket = bench.ticket(limits=limits, key=key)
    error = await refused(bench.store.hold(ticket, 1, tenths=300, lease=600), 10.0)
    assert "60 seconds of audio a minute" in error.message
    assert ("by this key" in error.message) is by_key
    await bench.hold(bench.ticket(limits=limits, key=key), 1, tenths=200)
    await in_after_what_it_says(bench, lambda: bench.store.hold(ticket, 1, tenths=300, lease=600))


@sync
async def test_a_recording_longer_than_the_bucket_gets_in_when_that_is_full(bench: Bench) -> None:
    await bench.top_up(1000)
    limits = RateLimits(audio_seconds_per_minute=60)
    long = bench.ticket(limits=limits)
    await bench.hold(long, 1, tenths=6000, lease=6000)  # ten minutes: nine of them in debt
    small = bench.ticket(limits=limits)
    await refused(bench.store.hold(small, 1, tenths=1, lease=60), 540.1)
    second = bench.ticket(limits=limits)
    await refused(bench.store.hold(second, 1, tenths=6000, lease=60), 600.0)
    bench.clock.advance(300)
    await bench.store.admit(bench.ticket(limits=limits), lease=60)
    await in_after_what_it_says(bench, lambda: bench.store.hold(small, 1, tenths=1, lease=6000))
    await in_after_what_it_says(bench, lambda: bench.store.hold(second, 1, tenths=6000, lease=6000))


@sync
async def test_with_two_audio_limits_reached_the_wait_is_the_longer_one(bench: Bench) -> None:
    await bench.top_up(1000)
    limits = RateLimits(audio_seconds_per_minute=60)
    key = Bounds("key_1", RateLimits(audio_seconds_per_minute=30))
    await bench.hold(bench.ticket(limits=limits, key=key), 1, tenths=300)
    await bench.hold(bench.ticket(limits=limits), 1, tenths=300)
    ticket = bench.ticket(limits=limits, key=key)
    await in_after_what_it_says(bench, lambda: bench.store.hold(ticket, 1, tenths=100, lease=600))


@sync
async def test_what_the_audio_limit_refuses_takes_no_money_and_no_claim(bench: Bench) -> None:
    await bench.top_up(1000)
    limits, key = RateLimits(audio_seconds_per_minute=60), Bounds("key_1", RateLimits(audio_seconds_per_minute=10))
    await bench.hold(bench.ticket("first", limits=limits, key=key), 1, tenths=100)
    for _ in range(2):
        ticket = bench.ticket(limits=limits, key=key)
        await refused(bench.store.hold(ticket, 10, tenths=100, lease=60, claim=CLAIM), 60.0)
    assert (await bench.store.balance(bench.account.id)).holds == {"first": 1}
    hold = await bench.hold(bench.ticket(limits=limits), 10, tenths=500, claim=Claim("claim", "other"))
    assert hold.standing.audio_seconds.remaining == 0  # the account's bucket lost nothing by it either


# Holding and settling.


@sync
async def test_a_hold_sets_credit_aside_and_a_charge_takes_what_it_cost(bench: Bench) -> None:
    await bench.top_up(1000)
    ticket = bench.ticket("req")
    await bench.store.admit(ticket, lease=60)
    hold = await bench.hold(ticket, 400)
    assert (hold.id, hold.amount, hold.month, hold.claim) == ("req", 400, "2026-11", None)
    held = await bench.store.balance(bench.account.id)
    assert held == Balance(1000, 400, 400, {"req": 400})
    assert held.free == 600
    bench.clock.advance(1)
    settled = await bench.store.settle(hold, 150, bench.record(ticket, cost=150))
    after = await bench.store.balance(bench.account.id)
    assert after == Balance(850, 0, 150, {})
    assert settled in (None, after)
    top_up, charge = await bench.store.entries(bench.account.id)
    assert (top_up.kind, top_up.amount) == (EntryKind.TOP_UP, 1000)
    assert (charge.kind, charge.amount, charge.reference) == (EntryKind.CHARGE, -150, "req")
    assert charge.account_id == bench.account.id
    assert charge.time == pytest.approx(bench.clock(), abs=1e-5)
    assert await bench.store.records(bench.account.id, 0.0, 1e10) == [bench.record(ticket, cost=150)]


@sync
async def test_no_more_is_held_than_is_free(bench: Bench) -> None:
    await bench.top_up(1_500_000)
    await bench.hold(bench.ticket("first"), 1_000_000)
    with pytest.raises(InsufficientQuota) as caught:
        await bench.store.hold(bench.ticket(), 500_001, tenths=0, lease=60)
    assert caught.value.message == (
        "You have run out of credit: $0.50 is left ($1.00 more is held for requests that are running) "
        "and this request needs $0.500001. Top up the account."
    )
    await bench.hold(bench.ticket("second"), 500_000)
    assert await bench.store.balance(bench.account.id) == Balance(
        1_500_000, 1_500_000, 1_500_000, {"first": 1_000_000, "second": 500_000}
    )


@sync
async def test_a_request_that_costs_nothing_needs_credit_all_the_same(bench: Bench) -> None:
    with pytest.raises(InsufficientQuota):
        await bench.store.hold(bench.ticket(), 0, tenths=0, lease=60)
    await bench.top_up(1)
    hold = await bench.hold(bench.ticket("req"), 0)
    assert await bench.store.balance(bench.account.id) == Balance(1, 0, 0, {"req": 0})
    for _ in range(2):
        await bench.store.settle(hold, 0, bench.record(hold.ticket))
    assert await bench.store.balance(bench.account.id) == Balance(1, 0, 0, {})
    assert len(await bench.store.records(bench.account.id, 0.0, 1e10)) == 1
    with pytest.raises(HoldEnded):
        await bench.store.settle(await _released(bench, 0), 0, bench.record(bench.ticket()))


async def _released(bench: Bench, amount: int) -> Hold:
    hold = await bench.hold(bench.ticket(), amount)
    await bench.store.release(hold)
    return hold


@pytest.mark.parametrize("cost", [-1, 401, 10**9])
@sync
async def test_a_cost_outside_of_the_hold_is_a_value_error_and_changes_nothing(bench: Bench, cost: int) -> None:
    await bench.top_up(10**10)
    hold = await bench.hold(bench.ticket("req"), 400)
    before = await bench.store.balance(bench.account.id)
    with pytest.raises(ValueError, match="400"):
        await bench.store.settle(hold, cost, bench.record(hold.ticket, cost=cost))
    assert await bench.store.balance(bench.account.id) == before
    assert await bench.store.records(bench.account.id, 0.0, 1e10) == []
    await bench.store.settle(hold, 400, bench.record(hold.ticket))


@sync
async def test_settling_again_changes_nothing_and_is_no_error(bench: Bench) -> None:
    await bench.top_up(1000)
    hold = await bench.hold(bench.ticket(), 400, claim=CLAIM)
    await bench.store.settle(hold, 100, bench.record(hold.ticket, cost=100), b"first")
    before = await bench.store.balance(bench.account.id), await bench.store.entries(bench.account.id)
    rows = await bench.store.usage(bench.account.id, TODAY, TODAY)
    for cost in (100, 0, 400):
        await bench.store.settle(hold, cost, bench.record(hold.ticket, cost=cost), b"second")
    assert (await bench.store.balance(bench.account.id), await bench.store.entries(bench.account.id)) == before
    assert await bench.store.usage(bench.account.id, TODAY, TODAY) == rows
    assert await bench.store.hold(bench.ticket(), 1, tenths=0, lease=60, claim=CLAIM) == Replay(b"first")


@sync
async def test_a_released_hold_costs_nothing_and_has_ended(bench: Bench) -> None:
    await bench.top_up(1000)
    hold = await bench.hold(bench.ticket(), 400)
    await bench.store.release(hold, bench.record(hold.ticket, status=500))
    for _ in range(2):
        with pytest.raises(HoldEnded):
            await bench.store.settle(hold, 100, bench.record(hold.ticket))
        await bench.store.release(hold, bench.record(hold.ticket, status=400))
        assert await bench.store.balance(bench.account.id) == Balance(1000, 0, 0, {})
        assert len(await bench.store.entries(bench.account.id)) == 1
        (record,) = await bench.store.records(bench.account.id, 0.0, 1e10)
        assert record.status == 500


@sync
async def test_a_release_after_the_settlement_changes_nothing(bench: Bench) -> None:
    await bench.top_up(1000)
    hold = await bench.hold(bench.ticket(), 400, claim=CLAIM)
    await bench.store.settle(hold, 100, bench.record(hold.ticket, cost=100), b"answer")
    await bench.store.release(hold, bench.record(hold.ticket, status=500))
    assert await bench.store.balance(bench.account.id) == Balance(900, 0, 100, {})
    assert [record.status for record in await bench.store.records(bench.account.id, 0.0, 1e10)] == [200]
    assert await bench.store.hold(bench.ticket(), 1, tenths=0, lease=60, claim=CLAIM) == Replay(b"answer")


@sync
async def test_a_hold_that_never_was_has_ended(bench: Bench) -> None:
    await bench.top_up(1000)
    hold = await bench.hold(bench.ticket(), 400)
    with pytest.raises(HoldEnded):
        await bench.store.settle(dataclasses.replace(hold, ticket=bench.ticket()), 1, bench.record(hold.ticket))
    assert (await bench.store.balance(bench.account.id)).balance == 1000


@pytest.mark.parametrize("claim", [None, CLAIM])
@sync
async def test_the_same_request_holds_once(bench: Bench, claim: Claim | None) -> None:
    await bench.top_up(1000)
    ticket = bench.ticket("req", limits=RateLimits(audio_seconds_per_minute=60), budget=1000)
    first = await bench.hold(ticket, 100, tenths=100, claim=claim)
    bench.clock.advance(1)
    again = await bench.hold(ticket, 100, tenths=100, claim=claim)
    assert dataclasses.replace(again, standing=first.standing) == first
    assert await bench.store.balance(bench.account.id) == Balance(1000, 100, 100, {"req": 100})
    assert again.standing.audio_seconds.remaining == 51
    await bench.store.settle(again, 100, bench.record(ticket))
    await bench.store.settle(first, 100, bench.record(ticket))
    assert await bench.store.balance(bench.account.id) == Balance(900, 0, 100, {})


@sync
async def test_a_request_that_holds_again_after_its_end_is_charged_once(bench: Bench) -> None:
    await bench.top_up(1000)
    ticket = bench.ticket("req")
    await bench.store.settle(await bench.hold(ticket, 400), 300, bench.record(ticket))
    late = await bench.hold(ticket, 400)  # its own write, sent once more and come late
    await bench.store.settle(late, 300, bench.record(ticket))
    assert (await bench.store.balance(bench.account.id)).balance == 700
    bench.clock.advance(60)
    await bench.store.sweep()
    assert await bench.store.balance(bench.account.id) == Balance(700, 0, 300, {})


@sync
async def test_a_sweep_ends_the_holds_and_places_whose_time_is_over(bench: Bench) -> None:
    await bench.top_up(1000)
    limits = RateLimits(None, None, 2)
    tickets = [bench.ticket(f"req-{lease}", limits=limits) for lease in (10, 20)]
    for ticket, lease in zip(tickets, (10, 20), strict=True):
        await bench.store.admit(ticket, lease=lease)
    first, second = [
        await bench.hold(ticket, 100 * lease, lease=lease) for ticket, lease in zip(tickets, (1, 2), strict=True)
    ]
    bench.clock.advance(0.999999)
    assert await bench.store.sweep() == Swept(0, 0, 0)
    bench.clock.advance(0.000001)
    assert await bench.store.sweep() == Swept(1, 100, 0)
    assert await bench.store.sweep() == Swept(0, 0, 0)
    assert await bench.store.balance(bench.account.id) == Balance(1000, 200, 200, {"req-20": 200})
    for _ in range(2):
        with pytest.raises(HoldEnded):
            await bench.store.settle(first, 100, bench.record(first.ticket))
        await bench.store.release(first, bench.record(first.ticket))
    assert await bench.store.records(bench.account.id, 0.0, 1e10) == []
    bench.clock.advance(9)
    assert await bench.store.sweep() == Swept(1, 200, 1)
    bench.clock.advance(10)
    assert await bench.store.sweep() == Swept(0, 0, 1)
    with pytest.raises(HoldEnded):
        await bench.store.settle(second, 0, bench.record(second.ticket))
    assert await bench.store.balance(bench.account.id) == Balance(1000, 0, 0, {})


@sync
async def test_a_sweep_covers_all_accounts(bench: Bench) -> None:
    other = await bench.store.create_account("other")
    for account in (bench.account, other):
        await bench.top_up(100, account)
        await bench.hold(bench.ticket(account=account), 50, lease=1)
    bench.clock.advance(1)
    assert await bench.another().sweep() == Swept(2, 100, 0)


@sync
async def test_holds_of_one_account_are_not_anothers(bench: Bench) -> None:
    other = await bench.store.create_account("other")
    await bench.top_up(100)
    await bench.hold(bench.ticket(), 100)
    with pytest.raises(InsufficientQuota):
        await bench.store.hold(bench.ticket(account=other), 1, tenths=0, lease=60)
    assert await bench.store.balance(other.id) == Balance(0, 0, 0, {})


# More for a request that is still running.


async def everything(bench: Bench) -> tuple[Balance, object, object]:
    account_id = bench.account.id
    return (
        await bench.store.balance(account_id),
        await bench.store.entries(account_id),
        await bench.store.records(account_id, 0.0, 1e10),
    )


@sync
async def test_a_hold_grows_and_the_charge_is_what_it_cost(bench: Bench) -> None:
    await bench.top_up(1000)
    limits, key = RateLimits(60, 60, 2), Bounds("key_1", RateLimits(6, 30, 2), 900)
    ticket = bench.ticket("req", limits=limits, budget=900, key=key)
    await bench.store.admit(ticket, lease=60)
    hold = await bench.hold(ticket, 100, tenths=50)
    for number in (1, 2, 3):
        hold = await bench.store.extend(hold, 100, tenths=50, lease=60)
        assert (hold.id, hold.amount, hold.month) == ("req", 100 + 100 * number, "2026-11")
        assert hold.standing.audio_seconds == Window(30, 25 - 5 * number, 10.0 + 10.0 * number)
        assert hold.standing.requests == Window(6, 5, 10.0)
        assert (hold.standing.balance, hold.standing.free) == (1000, 900 - 100 * number)
        assert await bench.store.balance(bench.account.id) == Balance(
            1000, hold.amount, hold.amount, {"req": hold.amount}
        )
    with pytest.raises(ValueError, match="400"):
        await bench.store.settle(hold, 401, bench.record(ticket))
    bench.clock.advance(1)
    for _ in range(2):
        await bench.store.settle(hold, 310, bench.record(ticket, cost=310))
    assert await bench.store.balance(bench.account.id) == Balance(690, 0, 310, {})
    _, charge = await bench.store.entries(bench.account.id)
    assert (charge.amount, charge.reference) == (-310, "req")


@pytest.mark.parametrize("end", ["settle", "release"])
@sync
async def test_what_was_set_aside_later_is_given_back_too(bench: Bench, end: str) -> None:
    await bench.top_up(1000)
    key = Bounds("key_1", RateLimits(), 1000)
    hold = await bench.hold(bench.ticket(key=key, budget=1000), 100)
    hold = await bench.store.extend(hold, 900, tenths=0, lease=60)
    if end == "settle":
        await bench.store.settle(hold, 0, bench.record(hold.ticket))
    else:
        await bench.store.release(hold, bench.record(hold.ticket, status=500))
    assert await bench.store.balance(bench.account.id) == Balance(1000, 0, 0, {})
    await bench.hold(bench.ticket(key=key, budget=1000), 1000)  # of the budgets nothing is gone either


@pytest.mark.parametrize("bound", ["money", "budget", "key's budget", "audio", "key's audio"])
@sync
async def test_more_that_is_refused_leaves_everything_as_it_was(bench: Bench, bound: str) -> None:
    await bench.top_up(1000)
    narrow = RateLimits(None, 60)
    own = {
        "key's budget": Bounds("key_1", RateLimits(), 300),
        "key's audio": Bounds("key_1", narrow),
    }.get(bound, Bounds("key_1", RateLimits(), 10**6))
    limits, budget = narrow if bound == "audio" else RateLimits(), 300 if bound == "budget" else None
    ticket = bench.ticket("req", limits=limits, budget=budget, key=own)
    await bench.store.admit(ticket, lease=60)
    hold = await bench.hold(ticket, 100, tenths=550)
    before = await everything(bench)
    money = "audio" not in bound
    amount, tenths = {"money": (901, 0), "audio": (1, 51), "key's audio": (1, 51)}.get(bound, (201, 0))
    for _ in range(2):
        if money:
            with pytest.raises(InsufficientQuota, match="run out" if bound == "money" else "budget"):
                await bench.store.extend(hold, amount, tenths=tenths, lease=600)
        else:
            await refused(bench.store.extend(hold, amount, tenths=tenths, lease=600), 0.1)
        assert await everything(bench) == before
    hold = await bench.store.extend(hold, amount - 1, tenths=max(tenths - 1, 0), lease=60)
    assert hold.amount == 100 + amount - 1
    bench.clock.advance(60)
    assert await bench.store.sweep() == Swept(1, hold.amount, 1)  # no refusal has put it off


@sync
async def test_more_that_is_refused_at_the_moment_of_the_hold_itself_is_refused(bench: Bench) -> None:
    await bench.top_up(100)
    hold = await bench.hold(bench.ticket(), 100, lease=60)
    with pytest.raises(InsufficientQuota):
        await bench.store.extend(hold, 1, tenths=0, lease=60)


@sync
async def test_more_seconds_of_audio_get_in_when_the_refusal_says(bench: Bench) -> None:
    await bench.top_up(1000)
    hold = await bench.hold(bench.ticket(limits=RateLimits(None, 60)), 100, tenths=600)
    bench.clock.advance(1)
    more = await in_after_what_it_says(bench, lambda: bench.store.extend(hold, 10, tenths=50, lease=60))
    assert more.amount == 110
    assert more.standing.audio_seconds.remaining == 0


@pytest.mark.parametrize("end", ["settle", "release", "sweep"])
@sync
async def test_a_hold_that_has_ended_does_not_grow(bench: Bench, end: str) -> None:
    await bench.top_up(1000)
    hold = await bench.hold(bench.ticket(), 100)
    hold = await bench.store.extend(hold, 100, tenths=0, lease=60)
    if end == "settle":
        await bench.store.settle(hold, 200, bench.record(hold.ticket, cost=200))
    elif end == "release":
        await bench.store.release(hold)
    else:
        bench.clock.advance(60)
        assert await bench.store.sweep() == Swept(1, 200, 0)
    before = await everything(bench)
    for amount in (0, 1, 10**6):
        with pytest.raises(HoldEnded):
            await bench.store.extend(hold, amount, tenths=0, lease=60)
    never = dataclasses.replace(hold, ticket=bench.ticket())
    with pytest.raises(HoldEnded):
        await bench.store.extend(never, 1, tenths=0, lease=60)
    assert await everything(bench) == before


@sync
async def test_nobody_extends_the_hold_of_an_account_that_is_not_there(bench: Bench) -> None:
    await bench.top_up(1000)
    hold = await bench.hold(bench.ticket(), 100)
    nobody = Account(id="acct_no", name="x", created=1)
    with pytest.raises(KeyError, match="no account"):
        await bench.store.extend(dataclasses.replace(hold, ticket=bench.ticket(account=nobody)), 1, tenths=0, lease=60)


@sync
async def test_an_extension_of_nothing_renews_the_lease_whatever_is_left(bench: Bench) -> None:
    await bench.top_up(100)
    ticket = bench.ticket("req", limits=RateLimits(1, 60, 1), budget=100)
    await bench.store.admit(ticket, lease=60)
    hold = await bench.hold(ticket, 100, tenths=3000)  # no credit, budget, place, request or audio is left
    for _ in range(4):
        bench.clock.advance(50)
        assert await bench.store.sweep() == Swept(0, 0, 0)
        hold = await bench.store.extend(hold, 0, tenths=0, lease=60)
        assert await bench.store.balance(bench.account.id) == Balance(100, 100, 100, {"req": 100})
        assert hold.amount == 100
    bench.clock.advance(59.999)
    assert await bench.store.sweep() == Swept(0, 0, 0)
    bench.clock.advance(0.001)
    assert await bench.store.sweep() == Swept(1, 100, 1)


@sync
async def test_audio_that_is_paid_for_already_needs_no_more_credit(bench: Bench) -> None:
    # As where a price is for at least ten seconds: the first second has paid for the others.
    await bench.top_up(100)
    hold = await bench.hold(bench.ticket("req", limits=RateLimits(None, 60), budget=100), 100, tenths=10)
    hold = await bench.store.extend(hold, 0, tenths=50, lease=60)
    assert (hold.amount, hold.standing.audio_seconds.remaining) == (100, 54)


@pytest.mark.parametrize("by_key", [False, True])
@sync
async def test_an_extension_keeps_the_place_until_its_own_lease_ends(bench: Bench, by_key: bool) -> None:
    await bench.top_up(1000)
    narrow = RateLimits(concurrent_requests=1)
    limits, key = (RateLimits(), Bounds("key_1", narrow)) if by_key else (narrow, None)

    def another() -> Awaitable[object]:
        return bench.store.admit(bench.ticket(limits=limits, key=key), lease=60)

    ticket = bench.ticket("req", limits=limits, key=key)
    await bench.store.admit(ticket, lease=60)
    hold = await bench.hold(ticket, 100)
    for seconds in (10, 20, 25, 31, 45, 59):
        bench.clock.advance(seconds)
        hold = await bench.store.extend(hold, 1, tenths=0, lease=60)
        bench.clock.advance(0.5)
        await refused(another())
    bench.clock.advance(59.499)
    await refused(another())
    bench.clock.advance(0.001)
    assert await bench.store.sweep() == Swept(1, 106, 1)
    await another()


@pytest.mark.parametrize("end", ["settle", "release", "leave"])
@sync
async def test_a_renewed_place_is_given_back(bench: Bench, end: str) -> None:
    await bench.top_up(1000)
    limits, key = RateLimits(concurrent_requests=1), Bounds("key_1", RateLimits(concurrent_requests=1))
    for _ in range(2):
        ticket = bench.ticket(limits=limits, key=key)
        await bench.store.admit(ticket, lease=60)
        hold = await bench.hold(ticket, 10)
        for _ in range(3):
            bench.clock.advance(50)
            hold = await bench.store.extend(hold, 10, tenths=0, lease=60)
        if end == "settle":
            await bench.store.settle(hold, 1, bench.record(ticket))
        else:
            await bench.store.release(hold, bench.record(ticket))
        if end == "leave":  # once more, which changes nothing
            await bench.store.leave(ticket)
    assert await bench.store.sweep() == Swept(0, 0, 0)


@sync
async def test_an_extended_hold_keeps_its_place_in_another_process_too(bench: Bench) -> None:
    await bench.top_up(1000)
    limits, other = RateLimits(concurrent_requests=1), bench.another()
    ticket = bench.ticket("req", limits=limits)
    await bench.store.admit(ticket, lease=60)
    hold = await bench.hold(ticket, 10)
    bench.clock.advance(50)
    hold = await bench.store.extend(hold, 10, tenths=0, lease=60)
    await refused(other.admit(bench.ticket(limits=limits), lease=60))
    await other.settle(hold, 20, bench.record(ticket, cost=20))
    await other.admit(bench.ticket(limits=limits), lease=60)
    assert (await bench.store.balance(bench.account.id)).balance == 980


@sync
async def test_a_hold_that_grows_in_another_month_counts_in_the_one_in_which_it_was_made(bench: Bench) -> None:
    await bench.top_up(1000)
    bench.clock.advance(9.5 * DAY - 1)
    hold = await bench.hold(bench.ticket("req"), 100)
    bench.clock.advance(2)
    hold = await bench.store.extend(hold, 100, tenths=0, lease=60)
    assert hold.month == "2026-11"
    assert await bench.store.balance(bench.account.id) == Balance(1000, 200, 0, {"req": 200})
    await bench.store.settle(hold, 150, bench.record(hold.ticket, cost=150))
    assert await bench.store.balance(bench.account.id) == Balance(850, 0, 0, {})
    bench.clock.advance(-2)
    assert (await bench.store.balance(bench.account.id)).spent == 150


@sync
async def test_a_budget_binds_what_runs_over_the_end_of_the_month(bench: Bench) -> None:
    await bench.top_up(10_000)
    bench.clock.advance(9.5 * DAY - 1)
    hold = await bench.hold(bench.ticket(budget=300), 100)
    with contextlib.suppress(InsufficientQuota):
        for _ in range(7):
            bench.clock.advance(1)
            hold = await bench.store.extend(hold, 100, tenths=0, lease=60)
    assert hold.amount <= 2 * 300  # of two months


@sync
async def test_an_extended_hold_outlives_its_process(bench: Bench) -> None:
    await bench.top_up(1000)
    ticket = bench.ticket("req")
    await bench.store.admit(ticket, lease=60)
    hold = await bench.store.extend(await bench.hold(ticket, 100), 300, tenths=0, lease=60)
    await asyncio.to_thread(bench.backend.kill, bench.store)
    bench.store = bench.backend.open()
    assert await bench.store.balance(bench.account.id) == Balance(1000, 400, 400, {"req": 400})
    await bench.store.settle(hold, 350, bench.record(ticket, cost=350))
    assert await bench.store.balance(bench.account.id) == Balance(650, 0, 350, {})


# The ledger.


@sync
async def test_the_same_reference_is_posted_once(bench: Bench) -> None:
    entry = Entry(bench.account.id, EntryKind.TOP_UP, 100, 5.5, "ref", "a note")
    first = await bench.store.post(entry)
    assert first == Balance(100, 0, 0, {})
    bench.clock.advance(1)
    assert await bench.store.post(entry) == first
    assert await bench.store.post(dataclasses.replace(entry, amount=999, time=6.0)) == first
    assert await bench.store.entries(bench.account.id) == [entry]
    refund = Entry(bench.account.id, EntryKind.REFUND, 7, 6.5, "ref")
    assert (await bench.store.post(refund)).balance == 107
    other = await bench.store.create_account("other")
    assert (await bench.store.post(dataclasses.replace(entry, account_id=other.id))).balance == 100
    assert await bench.store.entries(bench.account.id) == [entry, refund]


@sync
async def test_an_adjustment_takes_no_more_than_is_free(bench: Bench) -> None:
    await bench.top_up(100)
    hold = await bench.hold(bench.ticket("req"), 60)
    for amount in (-41, -100, -1000):
        with pytest.raises(ValueError, match="free"):
            await bench.store.post(Entry(bench.account.id, EntryKind.ADJUSTMENT, amount, 1.0, "a"))
    assert await bench.store.post(Entry(bench.account.id, EntryKind.ADJUSTMENT, -40, 1.0, "a")) == Balance(
        60, 60, 60, {"req": 60}
    )
    assert (await bench.store.post(Entry(bench.account.id, EntryKind.ADJUSTMENT, -40, 1.0, "a"))).balance == 60
    with pytest.raises(ValueError, match="free"):
        await bench.store.post(Entry(bench.account.id, EntryKind.ADJUSTMENT, -1, 1.0, "b"))
    await bench.store.settle(hold, 60, bench.record(hold.ticket))
    assert await bench.store.balance(bench.account.id) == Balance(0, 0, 60, {})


@sync
async def test_entries_come_oldest_first(bench: Bench) -> None:
    wanted = [
        Entry(bench.account.id, kind, 10, float(time), f"r{9 - time}")
        for time, kind in enumerate([EntryKind.TOP_UP, EntryKind.REFUND, EntryKind.ADJUSTMENT, EntryKind.TOP_UP])
    ]
    for entry in reversed(wanted):
        await bench.store.post(entry)
    assert await bench.store.entries(bench.account.id) == wanted
    assert await bench.store.entries((await bench.store.create_account("other")).id) == []


@sync
async def test_entries_of_one_moment_never_add_up_to_less_than_nothing(bench: Bench) -> None:
    for kind, amount in ((EntryKind.TOP_UP, 100), (EntryKind.ADJUSTMENT, -100), (EntryKind.REFUND, 50)):
        await bench.store.post(Entry(bench.account.id, kind, amount, 5.0, "r"))
    amounts = [entry.amount for entry in await bench.store.entries(bench.account.id)]
    assert min(itertools.accumulate(amounts)) >= 0, amounts


# Budgets.


@sync
async def test_a_budget_is_spent_by_what_is_charged_and_held_and_renews_with_the_month(bench: Bench) -> None:
    await bench.top_up(10_000_000)
    hold = await bench.hold(bench.ticket(budget=1_000_000), 600_000)
    with pytest.raises(InsufficientQuota) as caught:
        await bench.store.hold(bench.ticket(budget=1_000_000), 400_001, tenths=0, lease=60)
    assert caught.value.message == (
        "The monthly budget of $1.00 is spent: $0.40 of it is left and this request needs $0.400001. "
        "It renews on 2026-12-01 (UTC)."
    )
    await bench.store.settle(hold, 500_000, bench.record(hold.ticket))
    full = await bench.hold(bench.ticket(budget=1_000_000), 500_000)
    with pytest.raises(InsufficientQuota, match=r"\$1\.00 is spent: \$0\.00 of it is left\. It renews on 2026-12-01"):
        await bench.store.admit(bench.ticket(budget=1_000_000), lease=60)
    await bench.store.release(full)
    await bench.store.admit(bench.ticket(budget=1_000_000), lease=60)
    await bench.hold(bench.ticket(budget=1_000_000), 500_000, lease=1e7)
    bench.clock.advance(9.5 * DAY - 0.001)  # 2026-11-30 23:59:59.999
    with pytest.raises(InsufficientQuota):
        await bench.store.admit(bench.ticket(budget=1_000_000), lease=60)
    assert (await bench.store.balance(bench.account.id)).spent == 1_000_000
    bench.clock.advance(0.001)
    await bench.store.admit(bench.ticket(budget=1_000_000), lease=60)
    assert (await bench.store.balance(bench.account.id)).spent == 0
    await bench.hold(bench.ticket(budget=1_000_000), 1_000_000)
    bench.clock.advance(30 * DAY)
    with pytest.raises(InsufficientQuota, match="2027-01-01"):
        await bench.store.admit(bench.ticket(budget=1_000_000), lease=60)


@sync
async def test_a_hold_counts_in_the_month_in_which_it_was_made(bench: Bench) -> None:
    await bench.top_up(1000)
    bench.clock.advance(9.5 * DAY - 1)
    key = Bounds("key_1", RateLimits(), 250)
    settled = await bench.hold(bench.ticket(key=key), 100)
    released = await bench.hold(bench.ticket(key=key), 100)
    bench.clock.advance(1)
    await bench.hold(bench.ticket("req", key=key), 250)
    await bench.store.settle(settled, 70, bench.record(settled.ticket))
    await bench.store.release(released)
    assert settled.month == "2026-11"
    assert await bench.store.balance(bench.account.id) == Balance(930, 250, 250, {"req": 250})
    with pytest.raises(InsufficientQuota):
        await bench.store.admit(bench.ticket(key=key), lease=60)
    bench.clock.advance(-1)
    assert (await bench.store.balance(bench.account.id)).spent == 70


@sync
async def test_a_keys_budget_is_its_own(bench: Bench) -> None:
    await bench.top_up(1000)
    key, other = Bounds("key_1", RateLimits(), 100), Bounds("key_2", RateLimits(), 100)
    await bench.hold(bench.ticket(key=key), 100)
    with pytest.raises(InsufficientQuota, match="by this key"):
        await bench.store.admit(bench.ticket(key=key), lease=60)
    with pytest.raises(InsufficientQuota, match="by this key"):
        await bench.store.hold(bench.ticket(key=key), 1, tenths=0, lease=60)
    await bench.hold(bench.ticket(budget=200, key=other), 100)
    with pytest.raises(InsufficientQuota) as caught:
        await bench.store.hold(bench.ticket(budget=200, key=other), 1, tenths=0, lease=60)
    assert "key" not in caught.value.message
    assert (await bench.store.balance(bench.account.id)).spent == 200


@sync
async def test_no_budget_at_all_lets_nothing_in(bench: Bench) -> None:
    await bench.top_up(1000)
    with pytest.raises(InsufficientQuota, match="budget"):
        await bench.store.admit(bench.ticket(budget=0), lease=60)


# Claims.


@sync
async def test_a_claim_in_flight_is_refused_before_any_money_is_looked_at(bench: Bench) -> None:
    await bench.top_up(100)
    await bench.hold(bench.ticket("req"), 100, claim=CLAIM)
    with pytest.raises(IdempotencyConflict, match="still running") as caught:
        await bench.store.hold(bench.ticket(budget=0), 100, tenths=0, lease=60, claim=CLAIM)
    assert caught.value.headers == {"retry-after": "1"}
    with pytest.raises(IdempotencyConflict, match="another request") as caught:
        await bench.store.hold(bench.ticket(budget=0), 100, tenths=0, lease=60, claim=Claim("claim", "other"))
    assert caught.value.headers == {"x-should-retry": "false"}
    assert await bench.store.claimed(bench.account.id, "claim")
    assert (await bench.store.balance(bench.account.id)).holds == {"req": 100}


@sync
async def test_an_answer_is_had_again_for_a_day_and_costs_nothing(bench: Bench) -> None:
    await bench.top_up(100)
    hold = await bench.hold(bench.ticket(), 100, claim=CLAIM)
    assert hold.claim == CLAIM
    await bench.store.settle(hold, 100, bench.record(hold.ticket), b"\x00answer")

    def again(claim: Claim = CLAIM) -> Awaitable[Hold | Replay]:
        ticket = bench.ticket(limits=RateLimits(audio_seconds_per_minute=1), budget=0)
        return bench.another().hold(ticket, 100, tenths=9999, lease=60, claim=claim)

    for seconds in (0.0, 60.0, DAY - 60.001):
        bench.clock.advance(seconds)
        await bench.store.sweep()
        assert await again() == Replay(b"\x00answer")
        assert await bench.store.claimed(bench.account.id, "claim")
        with pytest.raises(IdempotencyConflict, match="another request"):
            await again(Claim("claim", "other"))
    assert await bench.store.balance(bench.account.id) == Balance(0, 0, 100, {})
    bench.clock.advance(0.001)
    assert not await bench.store.claimed(bench.account.id, "claim")
    with pytest.raises(InsufficientQuota):
        await again()
    await bench.store.sweep()
    await bench.top_up(100)
    await bench.hold(bench.ticket(), 1, claim=Claim("claim", "other"))


@sync
async def test_an_empty_answer_is_an_answer(bench: Bench) -> None:
    await bench.top_up(100)
    hold = await bench.hold(bench.ticket(), 10, claim=CLAIM)
    await bench.store.settle(hold, 10, bench.record(hold.ticket), b"")
    assert await bench.store.claimed(bench.account.id, "claim")
    assert await bench.store.hold(bench.ticket(), 10, tenths=0, lease=60, claim=CLAIM) == Replay(b"")


@pytest.mark.parametrize("end", ["release", "no answer", "sweep", "lease"])
@sync
async def test_a_claim_whose_request_came_to_nothing_can_be_taken_again(bench: Bench, end: str) -> None:
    await bench.top_up(100)
    hold = await bench.hold(bench.ticket(), 10, claim=CLAIM)
    if end == "release":
        await bench.store.release(hold)
    elif end == "no answer":
        await bench.store.settle(hold, 0, bench.record(hold.ticket))
    else:
        bench.clock.advance(59.999)
        with pytest.raises(IdempotencyConflict):
            await bench.store.hold(bench.ticket(), 10, tenths=0, lease=60, claim=CLAIM)
        bench.clock.advance(0.001)
        if end == "sweep":
            await bench.store.sweep()
    assert not await bench.store.claimed(bench.account.id, "claim")
    second = await bench.hold(bench.ticket(), 10, claim=Claim("claim", "other"))
    with pytest.raises(IdempotencyConflict, match="another request"):
        await bench.store.hold(bench.ticket(), 10, tenths=0, lease=60, claim=CLAIM)
    await bench.store.release(hold)  # of the first one: the claim is the second's now
    await bench.store.settle(second, 10, bench.record(second.ticket), b"second")
    again = await bench.store.hold(bench.ticket(), 10, tenths=0, lease=60, claim=Claim("claim", "other"))
    assert again == Replay(b"second")


@sync
async def test_who_lost_the_claim_to_another_is_not_charged_for_an_answer_that_it_cannot_leave(bench: Bench) -> None:
    await bench.top_up(100)
    slow = await bench.hold(bench.ticket(), 10, claim=CLAIM)
    bench.clock.advance(60)
    second = await bench.hold(bench.ticket(), 10, claim=CLAIM)
    with pytest.raises(HoldEnded):
        await bench.store.settle(slow, 10, bench.record(slow.ticket), b"slow")
    await bench.store.settle(second, 10, bench.record(second.ticket), b"second")
    await bench.store.sweep()
    assert await bench.store.balance(bench.account.id) == Balance(90, 0, 10, {})
    assert await bench.store.hold(bench.ticket(), 10, tenths=0, lease=60, claim=CLAIM) == Replay(b"second")


@sync
async def test_what_is_refused_for_money_lays_no_claim(bench: Bench) -> None:
    await bench.top_up(100)
    with pytest.raises(InsufficientQuota):
        await bench.store.hold(bench.ticket(), 101, tenths=0, lease=60, claim=CLAIM)
    await bench.hold(bench.ticket(), 100, claim=Claim("claim", "other"))


@sync
async def test_claims_are_each_accounts_own(bench: Bench) -> None:
    other = await bench.store.create_account("other")
    for account in (bench.account, other):
        await bench.top_up(100, account)
        hold = await bench.hold(bench.ticket(account=account), 10, claim=Claim("claim", account.id))
        await bench.store.settle(hold, 10, bench.record(hold.ticket), account.id.encode())
    for account in (bench.account, other):
        again = bench.ticket(account=account)
        answer = await bench.store.hold(again, 10, tenths=0, lease=60, claim=Claim("claim", account.id))
        assert answer == Replay(account.id.encode())
    assert not await bench.store.claimed(other.id, "another")


# Usage.


@sync
async def test_usage_is_added_up_by_day_key_and_model(bench: Bench) -> None:
    other = await bench.store.create_account("other")
    made = [
        (0.0, "key_2", "b", 200, 1.5, 10),
        (0.0, "key_1", "b", 200, 0.1, 20),
        (1.0, "key_1", "b", 502, 0.2, 0),
        (2.0, "key_1", "", 401, 0.0, 0),
        (DAY / 2 - 0.001, "key_1", "b", 399, 0.4, 1),  # the last of the day
        (DAY / 2, "key_1", "a", 400, 2.0, 7),
        (DAY, "key_1", "a", 200, 3.0, 8),
        (2 * DAY, "key_1", "a", 200, 1.0, 1),
    ]
    for offset, key_id, model, status, seconds, cost in made:
        ticket = dataclasses.replace(bench.ticket(), key_id=key_id)
        moment = bench.clock() + offset
        record = bench.record(ticket, time=moment, model=model, status=status, seconds=seconds, cost=cost)
        await bench.store.leave(ticket, record)
        await bench.store.leave(ticket, record)  # again: counted once
    theirs = bench.ticket(account=other)
    await bench.store.leave(theirs, bench.record(theirs))
    tomorrow = "2026-11-22"
    days = [
        UsageRow(TODAY, "key_1", "", 1, 1, 0.0, 0),
        UsageRow(TODAY, "key_1", "b", 3, 1, 0.7, 21),
        UsageRow(TODAY, "key_2", "b", 1, 0, 1.5, 10),
        UsageRow(tomorrow, "key_1", "a", 2, 1, 5.0, 15),
    ]
    assert await bench.store.usage(bench.account.id, TODAY, tomorrow) == days
    assert await bench.store.usage(bench.account.id, TODAY, TODAY) == days[:3]
    assert await bench.store.usage(bench.account.id, tomorrow, tomorrow) == days[3:]
    assert len(await bench.store.usage(bench.account.id, "2026-01-01", "2026-12-31")) == 5
    assert await bench.store.usage(bench.account.id, "2026-11-01", "2026-11-20") == []
    assert [row.requests for row in await bench.store.usage(other.id, TODAY, TODAY)] == [1]


@sync
async def test_records_come_back_as_they_were_made_oldest_first(bench: Bench) -> None:
    start = bench.clock()
    tickets = [bench.ticket() for _ in range(4)]
    records = [
        bench.record(
            ticket,
            time=start + number / 4,
            latency=0.25 * number,
            provider="p",
            deployment="d",
            seconds=2.5,
            size=2**40,
            cost=number,
            attempts=3,
        )
        for number, ticket in enumerate(tickets)
    ]
    for number in (2, 0, 3, 1):
        await bench.store.leave(tickets[number], records[number])
    found = await bench.store.records(bench.account.id, 0.0, 1e10)
    assert found == records
    assert all(isinstance(record.latency, float) and isinstance(record.cost, int) for record in found)
    assert await bench.store.records(bench.account.id, records[1].time, records[3].time) == records[1:3]
    assert await bench.store.records(bench.account.id, records[1].time, records[1].time) == []
    assert await bench.store.records(bench.account.id, 0.0, start) == []
    assert await bench.store.records("acct_other", 0.0, 1e10) == []


@sync
async def test_a_settled_request_counts_once_however_often_it_is_told(bench: Bench) -> None:
    await bench.top_up(1000)
    ticket = bench.ticket()
    await bench.store.admit(ticket, lease=60)
    hold = await bench.hold(ticket, 400)
    record = bench.record(ticket, cost=100, seconds=1.5)
    await bench.store.settle(hold, 100, record)
    await bench.store.settle(hold, 100, record)
    await bench.store.release(hold, record)
    await bench.store.leave(ticket)
    assert await bench.store.records(bench.account.id, 0.0, 1e10) == [record]
    assert await bench.store.usage(bench.account.id, TODAY, TODAY) == [
        UsageRow(TODAY, "key_1", "whisper-1", 1, 0, 1.5, 100)
    ]


@sync
async def test_a_window_that_ends_before_it_begins_is_empty(bench: Bench) -> None:
    ticket = bench.ticket()
    await bench.store.leave(ticket, bench.record(ticket))
    assert await bench.store.usage(bench.account.id, "2026-11-22", "2026-11-20") == []
    assert await bench.store.records(bench.account.id, bench.clock() + 1, bench.clock() - 1) == []


# What stays.


@sync
async def test_everything_is_there_after_the_process_was_killed(bench: Bench) -> None:
    await bench.top_up(1000)
    await bench.store.create_key(Key(id="key_1", account_id=bench.account.id, created=1), b"d" * 32)
    limits = RateLimits(2, 60, 2)
    ticket = bench.ticket(limits=limits)
    await bench.store.admit(ticket, lease=60)
    hold = await bench.hold(ticket, 400, tenths=300, claim=CLAIM)
    await asyncio.to_thread(bench.backend.kill, bench.store)
    bench.store = bench.backend.open()
    assert await bench.store.balance(bench.account.id) == Balance(1000, 400, 400, {ticket.request_id: 400})
    assert (await bench.store.find_key("key_1")).id == "key_1"
    standing = await bench.store.admit(bench.ticket(limits=limits), lease=60)
    assert (standing.requests.remaining, standing.audio_seconds.remaining, standing.free) == (0, 30, 600)
    await refused(bench.store.admit(bench.ticket(limits=RateLimits(None, None, 2)), lease=60))
    await bench.store.settle(hold, 100, bench.record(ticket), b"answer")
    assert await bench.store.hold(bench.ticket(), 1, tenths=0, lease=60, claim=CLAIM) == Replay(b"answer")
    await bench.store.admit(bench.ticket(limits=RateLimits(None, None, 2)), lease=60)


# Races.


def race(stores: list[Store], count: int, work: Callable[[Store, int], Awaitable[T]]) -> list[T | Exception]:
    """`work` so many times in 64 threads, each with a loop of its own, all from the start."""
    together = threading.Barrier(64)

    def one(number: int) -> T | Exception:
        if number < 64:
            together.wait(10)

        async def inner() -> T:
            return await work(stores[number % len(stores)], number)

        try:
            return asyncio.run(inner())
        except (RateLimited, InsufficientQuota, IdempotencyConflict, HoldEnded) as error:
            return error

    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(one, range(count)))


def test_credit_for_a_hundred_requests_lets_exactly_a_hundred_of_four_hundred_in(bench: Bench) -> None:
    asyncio.run(bench.top_up(1009))
    stores = [bench.store, bench.another(), bench.another()]
    answers = race(stores, 400, lambda s, n: s.hold(bench.ticket(f"race-{n}"), 10, tenths=0, lease=60))
    holds = [answer for answer in answers if isinstance(answer, Hold)]
    assert {type(answer) for answer in answers} == {Hold, InsufficientQuota}
    assert len(holds) == 100
    balance = asyncio.run(bench.store.balance(bench.account.id))
    assert balance == Balance(1009, 1000, 1000, {hold.id: 10 for hold in holds})


def test_all_that_is_held_at_once_is_never_more_than_there_is(bench: Bench) -> None:
    asyncio.run(bench.top_up(320))

    def work(store: Store, number: int) -> Awaitable[Hold | Replay]:
        claim = Claim(f"claim-{number}", "print") if number % 2 else None
        return store.hold(bench.ticket(f"race-{number}"), 10 + number % 7, tenths=0, lease=60, claim=claim)

    answers = race([bench.store, bench.another()], 64, work)
    holds = {answer.id: answer.amount for answer in answers if isinstance(answer, Hold)}
    balance = asyncio.run(bench.store.balance(bench.account.id))
    assert balance == Balance(320, sum(holds.values()), sum(holds.values()), holds)
    assert 0 <= balance.free < 16


def test_of_a_settlement_a_release_and_a_sweep_at_once_one_ends_the_hold(bench: Bench) -> None:
    asyncio.run(bench.top_up(160))
    holds = [asyncio.run(bench.hold(bench.ticket(), 10)) for _ in range(16)]
    bench.clock.advance(60)

    async def end(store: Store, number: int) -> int:
        hold = holds[number // 2 % 16]
        if number == 63:
            swept = await store.sweep()
            assert swept.amount == 10 * swept.holds
            return swept.holds
        if number % 2 == number // 2 % 2:
            await store.settle(hold, 7, bench.record(hold.ticket, cost=7))
        else:
            await store.release(hold, bench.record(hold.ticket, status=500))
        return 0

    ends = race([bench.store, bench.another()], 64, end)
    swept = sum(number for number in ends if isinstance(number, int))
    entries = asyncio.run(bench.store.entries(bench.account.id))
    charged = {entry.reference for entry in entries if entry.kind is EntryKind.CHARGE}
    assert len(charged) == len(entries) - 1
    balance = asyncio.run(bench.store.balance(bench.account.id))
    assert balance == Balance(160 - 7 * len(charged), 0, 7 * len(charged), {})
    records = asyncio.run(bench.store.records(bench.account.id, 0.0, 1e10))
    assert {record.request_id for record in records if record.status == 200} == charged
    assert len({record.request_id for record in records}) == len(records) == 16 - swept


def test_one_of_many_gets_the_claim_and_all_others_its_answer(bench: Bench) -> None:
    asyncio.run(bench.top_up(1000))

    async def work(store: Store, number: int) -> bytes:
        ticket = bench.ticket(f"race-{number}")
        answer = await store.hold(ticket, 10, tenths=0, lease=60, claim=CLAIM)
        if isinstance(answer, Replay):
            return answer.answer
        await store.settle(answer, 10, bench.record(ticket), ticket.request_id.encode())
        return ticket.request_id.encode()

    stores = [bench.store, bench.another()]
    answers = race(stores, 100, work)
    said = {answer for answer in answers if isinstance(answer, bytes)}
    assert len(said) == 1
    assert {type(answer) for answer in answers} <= {bytes, IdempotencyConflict}
    assert (asyncio.run(bench.store.balance(bench.account.id))).balance == 990


def test_a_post_and_a_settlement_sent_by_many_at_once_count_once(bench: Bench) -> None:
    asyncio.run(bench.top_up(1000))
    hold = asyncio.run(bench.hold(bench.ticket(), 100))
    entry = Entry(bench.account.id, EntryKind.REFUND, 50, 1.0, "refund")

    async def work(store: Store, number: int) -> None:
        if number % 2:
            await store.post(entry)
        else:
            await store.settle(hold, 30, bench.record(hold.ticket, cost=30))

    assert set(race([bench.store, bench.another()], 64, work)) == {None}
    assert asyncio.run(bench.store.balance(bench.account.id)) == Balance(1020, 0, 30, {})
    assert [row.cost for row in asyncio.run(bench.store.usage(bench.account.id, TODAY, TODAY))] == [30]


def test_in_no_window_do_more_get_in_than_the_rate_allows(bench: Bench) -> None:
    limits, stores = RateLimits(60), [bench.store, bench.another()]
    admitted: list[tuple[float, float]] = []  # when it was asked for, and when it was in

    async def admit(store: Store, number: int) -> None:
        before = bench.clock()
        try:
            await store.admit(bench.ticket(f"race-{number}", limits=limits), lease=60, paid=False, slot=False)
            admitted.append((before, bench.clock()))
        finally:
            bench.clock.advance(0.05)

    race(stores, 400, admit)
    starts, ends = sorted(start for start, _ in admitted), sorted(end for _, end in admitted)
    for start, end in itertools.product(starts, ends):
        inside = sum(start <= asked and came <= end for asked, came in admitted)
        assert inside <= 60 + max(end - start, 0.0) + 1e-5
    assert 70 <= len(admitted) <= 81  # a full bucket, and one a second for twenty seconds


def test_never_more_run_at_once_than_may(bench: Bench) -> None:
    limits, stores = RateLimits(concurrent_requests=8), [bench.store, bench.another()]
    lock, running, most = threading.Lock(), 0, 0

    async def work(store: Store, number: int) -> None:
        nonlocal running, most
        ticket = bench.ticket(f"race-{number}", limits=limits)
        await store.admit(ticket, lease=60, paid=False)
        with lock:
            running += 1
            most = max(most, running)
        await asyncio.sleep(0.03)
        with lock:
            running -= 1
        await store.leave(ticket)

    answers = race(stores, 256, work)
    assert 1 < most <= 8
    assert answers.count(None) >= 16
    for _ in range(8):  # nobody kept a place
        asyncio.run(bench.store.admit(bench.ticket(limits=limits), lease=60, paid=False))


def test_many_extensions_at_once_never_hold_more_than_there_is(bench: Bench) -> None:
    asyncio.run(bench.top_up(1000))
    stores = [bench.store, bench.another(), bench.another()]
    holds = [asyncio.run(bench.hold(bench.ticket(f"race-{number}"), 10)) for number in range(16)]

    async def grow(store: Store, number: int) -> int:
        """Four times, as one session does: one after another."""
        hold, grown = holds[number], 0
        try:
            for _ in range(4):
                bench.clock.advance(0.001)
                hold = await store.extend(hold, 20, tenths=0, lease=60)
                grown += 20
        except InsufficientQuota:
            pass
        holds[number] = hold
        assert hold.amount == 10 + grown
        return grown

    together = threading.Barrier(16)

    def one(number: int) -> int:
        together.wait(10)
        return asyncio.run(grow(stores[number % 3], number))

    with ThreadPoolExecutor(16) as pool:
        grown = list(pool.map(one, range(16)))
    assert sum(grown) == 840  # of 1,000, less 160 that were held before
    balance = asyncio.run(bench.store.balance(bench.account.id))
    assert balance == Balance(1000, 1000, 1000, {hold.id: hold.amount for hold in holds})
    for number, hold in enumerate(holds):
        asyncio.run(stores[number % 3].settle(hold, hold.amount, bench.record(hold.ticket, cost=hold.amount)))
    assert asyncio.run(bench.store.balance(bench.account.id)) == Balance(0, 0, 1000, {})


def test_of_an_extension_and_an_end_at_once_nothing_is_lost(bench: Bench) -> None:
    asyncio.run(bench.top_up(1000))
    holds = [asyncio.run(bench.hold(bench.ticket(), 10)) for _ in range(32)]

    async def work(store: Store, number: int) -> None:
        hold = holds[number // 2]
        if number % 2:
            await store.extend(hold, 5, tenths=0, lease=60)
        elif number % 4:
            await store.release(hold)
        else:
            await store.settle(hold, 10, bench.record(hold.ticket, cost=10))

    answers = race([bench.store, bench.another()], 64, work)
    assert {type(answer) for answer in answers} <= {type(None), HoldEnded}
    assert [answer for answer in answers[::2] if answer is not None] == []
    assert asyncio.run(bench.store.balance(bench.account.id)) == Balance(840, 0, 160, {})


# What only one of them has.


def test_a_token_whose_time_is_over_is_swept(tmp_path: Path) -> None:
    # DynamoDB does so by itself.
    clock = Clock()
    bench = Bench.make(SqliteBackend(tmp_path / "voxgate.sqlite", clock), clock)

    async def work() -> None:
        key = Key(id="key_1", account_id=bench.account.id, created=1)
        await bench.store.create_key(key, b"d" * 32)
        for number in (1, 2):
            await bench.store.create_token(bytes([number]) * 32, key, int(clock()) + 60 * number)
        clock.advance(60)
        await bench.store.sweep()
        assert await bench.store.find_token(b"\1" * 32) is None
        assert await bench.store.find_token(b"\2" * 32) is not None

    asyncio.run(work())
    bench.close()


@pytest.mark.parametrize("claim", [None, CLAIM])
def test_a_request_costs_three_calls_of_dynamodb(aws: DynamoDBClient, claim: Claim | None) -> None:
    clock = Clock()
    backend = DynamoBackend(aws, clock)
    bench = Bench.make(backend, clock)
    calls = backend.client_of(bench.store).calls
    bounds = {"limits": RateLimits(60, 600, 4), "key": Bounds("key_1", RateLimits(30, 300, 4), 900)}

    async def request(number: int) -> None:
        ticket = bench.ticket(limits=bounds["limits"], budget=1000, key=bounds["key"])  # type: ignore[arg-type]
        await bench.store.admit(ticket, lease=60)
        own = dataclasses.replace(claim, key=f"claim-{number}") if claim else None
        hold = await bench.hold(ticket, 100, tenths=10, claim=own)
        await bench.store.settle(hold, 50, bench.record(ticket, cost=50), b"answer" if claim else None)

    async def work() -> None:
        await bench.top_up(1000)
        await request(0)  # this one warms it up
        for number in range(1, 5):
            calls.clear()
            await request(number)
            assert len(calls) <= 3, calls
            clock.advance(1 if number % 2 else 100)
        assert await bench.store.balance(bench.account.id) == Balance(750, 0, 250, {})

    asyncio.run(work())
    bench.close()


# Outages.


@sync
async def test_an_outage_is_told_to_the_others_until_it_is_over_or_taken_back(bench: Bench) -> None:
    now = bench.clock()
    await bench.store.report_outage("a/m", now + 60)
    await bench.store.report_outage("b/m", now + 60)
    assert await bench.store.outages() == {"a/m": now + 60, "b/m": now + 60}
    await bench.store.report_outage("b/m", 0.0)
    assert await bench.store.outages() == {"a/m": now + 60}
    bench.clock.advance(60)
    assert await bench.store.outages() == {}
