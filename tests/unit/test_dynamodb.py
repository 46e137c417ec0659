"""What only the DynamoDB store has: how many calls a request costs, and races on one table."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import pytest
from botocore.exceptions import ReadTimeoutError

from fakes.store import create_table, dynamodb
from voxgate.accounts import (
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
    Ticket,
    UsageRecord,
)
from voxgate.accounts.dynamodb import DynamoStore
from voxgate.errors import IdempotencyConflict, InsufficientQuota, Overloaded, RateLimited

if TYPE_CHECKING:
    from mypy_boto3_dynamodb.client import DynamoDBClient

START = 1_795_262_400.0  # 2026-11-21 12:00 UTC


def check_placeholders(request: dict[str, Any]) -> None:
    """As the service does and moto, in a transaction, does not: what is given must be used."""
    for write in request.get("TransactItems", [request]):
        for part in [write, *(value for value in write.values() if isinstance(value, dict))]:
            said = " ".join(str(part.get(f"{kind}Expression", "")) for kind in ("Update", "Condition", "KeyCondition"))
            used = set(re.findall(r"[#:]\w+", said))
            given = {*part.get("ExpressionAttributeNames", ()), *part.get("ExpressionAttributeValues", ())}
            assert given <= used, f"unused: {given - used}"


class Client:
    """A client that counts its calls. moto is not atomic under threads, so one call at a time."""

    def __init__(self, client: Any, lock: threading.RLock, calls: list[str]) -> None:
        self._client, self._lock, self.calls = client, lock, calls
        self.before: Callable[[str], None] = lambda name: None
        self.lost = 0  # so many of the next writes are done, and the answer does not come

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        if not callable(attribute) or name == "exceptions":
            return attribute

        def call(**request: Any) -> Any:
            self.before(name)
            check_placeholders(request)
            with self._lock:
                self.calls.append(name)
                try:
                    return attribute(**request)
                finally:
                    if self.lost and name in ("update_item", "transact_write_items"):
                        self.lost -= 1
                        raise ReadTimeoutError(endpoint_url="https://dynamodb")

        return call


class World:
    def __init__(self, raw: DynamoDBClient) -> None:
        self.now = START
        self.lock = threading.RLock()
        self.raw = raw
        create_table(self.raw, "t")
        self.calls: list[str] = []
        self.store, self.client = self.another()
        self.account = asyncio.run(self.store.create_account("acme"))
        self.number = 0
        self.calls.clear()

    def another(self) -> tuple[DynamoStore, Client]:
        client = Client(self.raw, self.lock, self.calls)
        return DynamoStore("t", client=cast("Any", client), clock=lambda: self.now), client

    def top_up(self, amount: int) -> None:
        self.number += 1
        entry = Entry(self.account.id, EntryKind.TOP_UP, amount, self.now, f"top{self.number}")
        asyncio.run(self.store.post(entry))
        self.calls.clear()

    def ticket(
        self,
        request_id: str = "req-1",
        limits: RateLimits = RateLimits(60, 600, 4),  # noqa: B008
        budget: int | None = None,
        own: Bounds | None = None,
    ) -> Ticket:
        bounds = (Bounds(self.account.id, limits, budget), *([own] if own else []))
        return Ticket(request_id, self.account.id, "key_1", bounds)

    def record(self, request_id: str = "req-1", **changes: Any) -> UsageRecord:
        values: dict[str, Any] = {"status": 200, "model": "m#1", "seconds": 0.1, "cost": 7, "latency": 2.0} | changes
        return UsageRecord(
            request_id=request_id, account_id=self.account.id, key_id="key_1", time=self.now, contract="openai",
            **values,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        key = {"pk": {"S": f"ACCOUNT#{self.account.id}"}, "sk": {"S": "STATE#0"}}
        return cast("dict[str, Any]", self.raw.get_item(TableName="t", Key=cast("Any", key))["Item"])


@pytest.fixture(scope="module")
def aws() -> Iterator[DynamoDBClient]:
    with dynamodb() as client:
        yield client


@pytest.fixture
def world(aws: DynamoDBClient) -> Iterator[World]:
    world = World(aws)
    yield world
    asyncio.run(world.store.close())
    aws.delete_table(TableName="t")


def held(answer: Hold | Replay) -> Hold:
    assert isinstance(answer, Hold)
    return answer


def test_it_is_a_store(world: World) -> None:
    store: Store = world.store
    assert store.lookup_seconds == 30.0


@pytest.mark.parametrize("claim", [None, Claim("c", "f")])
def test_a_request_costs_three_calls(world: World, claim: Claim | None) -> None:
    world.top_up(1000)
    own = Bounds("key_1", RateLimits(10, 60, 2), 500)

    async def work() -> None:
        for number in range(3):  # the buckets are full at first, and fill after
            if claim and number:
                return
            ticket = world.ticket(f"req-{number}", own=own)
            standing = await world.store.admit(ticket, lease=60)
            assert standing.requests.remaining == 9 - number
            assert standing.free == 1000 - 7 * number
            hold = held(await world.store.hold(ticket, 100, tenths=10, lease=60, claim=claim))
            assert hold.standing.free == 900 - 7 * number
            assert hold.standing.audio_seconds.remaining == 59 - number
            assert (await world.store.balance(world.account.id)).holds == {ticket.request_id: 100}
            world.calls.remove("get_item")
            await world.store.settle(hold, 7, world.record(f"req-{number}"), b"answer")

    asyncio.run(work())
    hold_call = "transact_write_items" if claim else "update_item"
    assert world.calls == ["update_item", hold_call, "transact_write_items"] * (1 if claim else 3)
    balance = asyncio.run(world.store.balance(world.account.id))
    spent = 7 if claim else 21
    assert (balance.balance, balance.held, balance.spent, balance.holds) == (1000 - spent, 0, spent, {})
    assert not {name for name in world.state() if name.startswith(("slots", "hold"))}
    assert world.state()["spent#2026-11#key_1"] == {"N": str(spent)}
    (row,) = asyncio.run(world.store.usage(world.account.id, "2026-11-21", "2026-11-21"))
    count = 1 if claim else 3
    assert (row.model, row.requests, row.seconds) == ("m#1", count, count / 10)
    assert asyncio.run(world.store.usage(world.account.id, "2026-11-22", "2026-12-01")) == []


def test_what_is_refused(world: World) -> None:
    async def work() -> None:
        store = world.store
        with pytest.raises(InsufficientQuota, match="run out"):
            await store.admit(world.ticket(), lease=60)
        await store.admit(world.ticket("free"), lease=60, paid=False)
        with pytest.raises(InsufficientQuota, match="run out"):
            await store.hold(world.ticket("free"), 0, tenths=1, lease=60)
        await store.leave(world.ticket("free"), world.record("free"))
        await store.leave(world.ticket("free"), world.record("free"))
        assert len(await store.records(world.account.id, 0, float("inf"))) == 1
        await store.post(Entry(world.account.id, EntryKind.TOP_UP, 1000, world.now, "t"))
        with pytest.raises(InsufficientQuota, match="budget"):
            await store.admit(world.ticket(budget=0), lease=60)
        with pytest.raises(InsufficientQuota, match="budget"):
            await store.hold(world.ticket(budget=50), 51, tenths=1, lease=60)
        with pytest.raises(InsufficientQuota, match="by this key"):
            await store.hold(world.ticket(own=Bounds("key_1", RateLimits(), 50)), 51, tenths=1, lease=60)
        held(await store.hold(world.ticket("b", budget=50), 50, tenths=1, lease=60))
        with pytest.raises(InsufficientQuota, match="budget"):
            await store.hold(world.ticket(budget=50), 1, tenths=1, lease=60)
        with pytest.raises(InsufficientQuota, match=r"0\.00005 more is held"):
            await store.hold(world.ticket(), 951, tenths=1, lease=60)
        narrow = RateLimits(1, 1, 1)
        world.now += 120
        await store.admit(world.ticket("n", narrow), lease=60)
        with pytest.raises(RateLimited, match="requests a minute"):
            await store.admit(world.ticket("n2", narrow), lease=60)
        with pytest.raises(RateLimited, match="run already"):
            await store.admit(world.ticket("n3", RateLimits(None, 1, 1)), lease=60)
        with pytest.raises(RateLimited, match="run already"):
            await store.admit(world.ticket("n3", RateLimits(None, 1, 0)), lease=60)
        held(await store.hold(world.ticket("n", narrow), 1, tenths=600, lease=60))  # more than the bucket: in debt
        with pytest.raises(RateLimited, match="seconds of audio"):
            await store.hold(world.ticket("n2", narrow), 1, tenths=1, lease=60)
        with pytest.raises(KeyError):
            await store.admit(Ticket("x", "acct_no", "key_1", (Bounds("acct_no", RateLimits()),)), lease=1)
        with pytest.raises(KeyError):
            await store.leave(Ticket("x", "acct_no", "key_1", (Bounds("acct_no", RateLimits()),)), world.record())
        with pytest.raises(KeyError):
            await store.post(Entry("acct_no", EntryKind.TOP_UP, 1, 1.0, "t"))

    asyncio.run(work())
    assert "Item" not in world.raw.get_item(TableName="t", Key={"pk": {"S": "ACCOUNT#acct_no"}, "sk": {"S": "STATE#0"}})


def test_places_whose_lease_is_over_are_taken_again(world: World) -> None:
    world.top_up(1000)
    one = RateLimits(None, None, 1)

    async def work() -> None:
        await world.store.admit(world.ticket("a", one), lease=10)
        await world.store.admit(world.ticket("a", one), lease=10)  # the response was lost: it is in already
        world.now += 10
        world.calls.clear()
        await world.store.admit(world.ticket("b", one), lease=10)
        assert world.calls == ["update_item"] * 3
        with pytest.raises(RateLimited):
            await world.store.admit(world.ticket("c", one), lease=10)
        other, _ = world.another()  # which did not admit b
        await other.leave(world.ticket("b", one))
        await world.store.admit(world.ticket("c", one), lease=10)
        await world.store.admit(world.ticket("d", one), lease=10, slot=False)
        world.calls.clear()
        await world.store.leave(world.ticket("d", one))
        assert world.calls == []
        await other.close()

    asyncio.run(work())


def test_claims(world: World) -> None:
    world.top_up(100)
    claim, store = Claim("c", "f"), world.store

    async def work() -> None:
        first = held(await store.hold(world.ticket("a"), 100, tenths=1, lease=60, claim=claim))
        again = held(await store.hold(world.ticket("a"), 100, tenths=1, lease=60, claim=claim))
        assert (again.id, again.amount, again.month) == (first.id, first.amount, first.month)
        assert (await store.balance(world.account.id)).held == 100
        for fingerprint, words in (("f", "still running"), ("g", "another request")):  # there is no money either
            with pytest.raises(IdempotencyConflict, match=words):
                await store.hold(world.ticket("b"), 100, tenths=1, lease=60, claim=Claim("c", fingerprint))
        assert await store.claimed(world.account.id, "c")
        with pytest.raises(ValueError, match="101"):
            await store.settle(first, 101, world.record("a"), b"answer")
        await store.settle(first, 100, world.record("a"), b"answer")
        await store.settle(first, 100, world.record("a"), b"answer")
        assert await store.claimed(world.account.id, "c")
        assert await store.hold(world.ticket("b"), 9, tenths=1, lease=60, claim=claim) == Replay(b"answer")
        with pytest.raises(IdempotencyConflict, match="another request"):
            await store.hold(world.ticket("b"), 9, tenths=1, lease=60, claim=Claim("c", "g"))
        world.now += 24 * 3600
        assert not await store.claimed(world.account.id, "c")
        with pytest.raises(InsufficientQuota):
            await store.hold(world.ticket("b"), 9, tenths=1, lease=60, claim=claim)
        assert (await store.balance(world.account.id)).balance == 0
        assert [(e.kind, e.amount) for e in await store.entries(world.account.id)] == [
            (EntryKind.TOP_UP, 100), (EntryKind.CHARGE, -100),
        ]  # fmt: skip
        assert len(await store.records(world.account.id, START, START + 1)) == 1

    asyncio.run(work())


def test_a_claim_whose_lease_is_over_is_another_requests(world: World) -> None:
    world.top_up(1000)
    claim, store = Claim("c", "f"), world.store

    async def work() -> None:
        first = held(await store.hold(world.ticket("a"), 10, tenths=1, lease=60, claim=claim))
        world.now += 60
        second = held(await store.hold(world.ticket("b"), 10, tenths=1, lease=60, claim=claim))
        with pytest.raises(HoldEnded):
            await store.settle(first, 10, world.record("a"), b"first")
        await store.release(first)
        assert (await store.balance(world.account.id)).holds == {"b": 10}
        await store.settle(second, 10, world.record("b"), b"second")
        assert await store.hold(world.ticket("d"), 10, tenths=1, lease=60, claim=claim) == Replay(b"second")
        third = held(await store.hold(world.ticket("e"), 10, tenths=1, lease=60, claim=Claim("x", "f")))
        await store.release(third, world.record("e", status=500))
        await store.release(third, world.record("e", status=500))
        with pytest.raises(HoldEnded):
            await store.settle(third, 10, world.record("e"), b"third")
        held(await store.hold(world.ticket("g"), 10, tenths=1, lease=60, claim=Claim("x", "other")))
        (row,) = await store.usage(world.account.id, "2026-11-01", "2026-11-30")
        assert (row.requests, row.errors) == (2, 1)

    asyncio.run(work())


def test_a_sweep(world: World) -> None:
    world.top_up(1000)
    own = Bounds("key_1", RateLimits(10, 60, 2), 500)

    async def work() -> None:
        ticket = world.ticket("a", own=own)
        await world.store.admit(ticket, lease=60)
        hold = held(await world.store.hold(ticket, 10, tenths=1, lease=60))
        held(await world.store.hold(world.ticket("b"), 10, tenths=1, lease=61))
        world.now += 60
        swept = await world.store.sweep()
        assert (swept.holds, swept.amount, swept.slots) == (1, 10, 1)
        swept = await world.store.sweep()
        assert (swept.holds, swept.amount, swept.slots) == (0, 0, 0)
        with pytest.raises(HoldEnded):
            await world.store.settle(hold, 10, world.record("a"))
        await world.store.release(hold, world.record("a"))
        assert await world.store.records(world.account.id, 0, 1e10) == []
        balance = await world.store.balance(world.account.id)
        assert (balance.free, balance.spent, balance.holds) == (990, 10, {"b": 10})
        assert world.state()["spent#2026-11#key_1"] == {"N": "0"}
        world.now += 20 * 86400
        await world.store.sweep()
        assert "spent#2026-11" in world.state()
        world.now += 31 * 86400
        await world.store.sweep()
        assert not {name for name in world.state() if name.startswith("spent")}

    asyncio.run(work())


def race(world: World, count: int, work: Callable[[DynamoStore, int], Any]) -> list[Any]:
    def one(number: int) -> Any:
        store, _ = world.another()
        store._known = world.store._known  # all of one process

        async def inner() -> Any:
            try:
                return await work(store, number)
            except (RateLimited, InsufficientQuota, IdempotencyConflict, HoldEnded, ValueError) as error:
                return error
            finally:
                await store.close()

        return asyncio.run(inner())

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def errors(results: list[Any]) -> int:
    return sum(isinstance(result, Exception) for result in results)


def test_races(world: World) -> None:
    world.top_up(100)
    for limits, most in ((RateLimits(10, None, None), 10), (RateLimits(None, None, 7), 7)):
        results = race(world, 32, lambda s, n, limits=limits: s.admit(world.ticket(f"r{n}", limits), lease=60))  # type: ignore[misc]
        assert errors(results) == 32 - most
        world.now += 120
        asyncio.run(world.store.sweep())
    results = race(world, 32, lambda s, n: s.hold(world.ticket(f"h{n}"), 10, tenths=1, lease=60))
    assert errors(results) == 22
    holds = [result for result in results if isinstance(result, Hold)]

    async def end(store: DynamoStore, number: int) -> None:
        hold = holds[number % 8]
        await (store.release(hold) if number % 4 == 0 else store.settle(hold, 3, world.record(hold.id)))

    race(world, 32, end)
    entries = asyncio.run(world.store.entries(world.account.id))
    balance = asyncio.run(world.store.balance(world.account.id))
    assert sum(entry.amount for entry in entries) == balance.balance
    assert balance.balance == 100 - 3 * (len(entries) - 1)
    assert 6 <= len(entries) - 1 <= 8
    assert sum(balance.holds.values()) == balance.held == 20
    spent = race(world, 20, lambda s, n: s.post(Entry(world.account.id, EntryKind.ADJUSTMENT, -10, 1.0, f"{n % 10}")))
    after = asyncio.run(world.store.balance(world.account.id))
    assert 0 <= after.free < 10
    assert errors(spent) > 0


def test_one_of_many_gets_the_claim_and_the_name(world: World) -> None:
    world.top_up(100)
    results = race(world, 32, lambda s, n: s.hold(world.ticket(f"h{n}"), 10, tenths=1, lease=60, claim=Claim("c", "f")))
    assert errors(results) == 31
    assert asyncio.run(world.store.balance(world.account.id)).held == 10
    assert errors(race(world, 8, lambda s, n: s.create_account("one"))) == 7
    assert len(asyncio.run(world.store.accounts())) == 2


def test_collisions_are_tried_again_and_then_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.top_up(100)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    left = 5

    def collide(name: str) -> None:
        nonlocal left
        left -= 1
        if left >= 0 and name in ("update_item", "transact_write_items"):
            single = {"Error": {"Code": "TransactionConflictException", "Message": ""}}
            several = {
                "Error": {"Code": "TransactionCanceledException", "Message": ""},
                "CancellationReasons": [{"Code": "TransactionConflict"}, {"Code": "None"}],
            }
            raise world.raw.exceptions.ClientError(cast("Any", single if name == "update_item" else several), name)

    world.client.before = collide

    async def work() -> None:
        nonlocal left
        await world.store.admit(world.ticket(), lease=60)
        left = 5
        hold = held(await world.store.hold(world.ticket(), 10, tenths=1, lease=60, claim=Claim("c", "f")))
        left = 5
        await world.store.settle(hold, 10, world.record(), b"answer")
        left = 1000
        with pytest.raises(Overloaded):
            await world.store.admit(world.ticket(), lease=60)
        left = 0

    asyncio.run(work())
    assert asyncio.run(world.store.balance(world.account.id)).balance == 90


def test_keys_and_accounts(world: World) -> None:
    async def work() -> None:
        store, account = world.store, world.account
        key = Key(
            id="key_1", account_id=account.id, created=1, name="", models=(), scopes=frozenset(), expires=5,
            limits=RateLimits(1, None, 3), budget=0,
        )  # fmt: skip
        await store.create_key(key, b"d" * 32)
        other = Key(id="key_2", account_id=account.id, created=2, scopes=frozenset({Scope.ADMIN}), models=("b", "a"))
        await store.create_key(other, b"e" * 32)
        assert await store.keys(account.id) == [key, other]
        for wrong in (Key(id="key_1", account_id=account.id, created=1), Key(id="k", account_id=account.id, created=1)):
            with pytest.raises(ValueError, match="already"):
                await store.create_key(wrong, b"d" * 32)
        with pytest.raises(KeyError):
            await store.create_key(Key(id="k", account_id="acct_no", created=1), b"f" * 32)
        world.calls.clear()
        credential = await store.find_credential(b"d" * 32)
        assert world.calls == ["get_item", "batch_get_item"]
        assert credential is not None
        assert (credential.account, credential.key) == (account, key)
        assert await store.find_credential(b"x" * 32) is None
        revoked = await store.revoke_key("key_1")
        world.now += 5
        assert await store.revoke_key("key_1") == revoked == await store.find_key("key_1")
        assert revoked.revoked == int(START)
        for day in ("2026-11-21", "2026-11-20"):
            await store.mark_used(other, day)
        assert (await store.find_key("key_2")).last_used == "2026-11-21"
        changed = type(account)(
            id=account.id, name="acme", created=account.created, status=Status.SUSPENDED, limits=RateLimits(2), budget=9
        )
        await store.change_account(changed)
        assert await store.find_account("acme") == changed == await store.find_account(account.id)
        await store.change_account(account)
        assert await store.accounts() == [account]
        with pytest.raises(ValueError, match="'acme'"):
            await store.create_account("acme")
        second = await store.create_account(account.id)
        assert (await store.find_account(account.id)).name == "acme"
        assert await store.find_account(second.id) == second
        nobody = Key(id="key_no", account_id="x", created=1)
        for missing in (
            store.find_account("nobody"), store.find_key("key_no"), store.revoke_key("key_no"),
            store.mark_used(nobody, "2026-11-21"), store.balance("acct_no"),
            store.change_account(type(account)(id="acct_no", name="", created=1)),
        ):  # fmt: skip
            with pytest.raises(KeyError, match="no"):
                await missing

    asyncio.run(work())


def test_long_lists_come_in_pages(world: World) -> None:
    async def work() -> None:
        note = "x" * 9000
        for number in range(130):
            await world.store.post(Entry(world.account.id, EntryKind.TOP_UP, 1, START + number, f"{number}", note))
        entries = await world.store.entries(world.account.id)
        assert [entry.reference for entry in entries] == [str(number) for number in range(130)]
        assert isinstance(entries[0].time, float)

    asyncio.run(work())
    assert world.calls.count("query") == 2


def test_a_process_that_did_not_admit_goes_on(world: World) -> None:
    world.top_up(100)

    async def work() -> None:
        ticket = world.ticket()
        await world.store.admit(ticket, lease=60)
        second, _ = world.another()
        hold = held(await second.hold(ticket, 10, tenths=1, lease=60, claim=Claim("c", "f")))
        assert (hold.standing.free, hold.standing.requests.remaining) == (90, 59)
        third, _ = world.another()
        world.calls.clear()
        await third.settle(hold, 10, world.record(), None)  # no answer: the key is free again
        assert world.calls == ["get_item", "transact_write_items"]
        assert "slots" not in world.state()
        held(await third.hold(world.ticket("b"), 10, tenths=1, lease=60, claim=Claim("c", "g")))
        await second.close()
        await third.close()

    asyncio.run(work())


# More for a request that is still running.


def test_an_extension_is_one_call_and_renews_the_place_with_a_second_one_now_and_then(world: World) -> None:
    world.top_up(1000)
    own = Bounds("key_1", RateLimits(10, 60, 2), 500)

    async def work() -> None:
        ticket = world.ticket(own=own)
        await world.store.admit(ticket, lease=60)
        hold = held(await world.store.hold(ticket, 10, tenths=10, lease=60))
        for wait, calls in ((20, 1), (5, 1), (10, 2), (20, 1), (20, 2)):
            world.now += wait
            world.calls.clear()
            hold = await world.store.extend(hold, 10, tenths=10, lease=60)
            assert world.calls == ["update_item"] * calls
            (member,) = world.state()["slots"]["SS"]
            assert world.state()["slots#key_1"] == {"SS": [member]}
            expires, _, name = member.partition("|")
            assert (name, int(expires) > (world.now + 30) * 1e6) == ("req-1", True)
        world.calls.clear()
        await world.store.settle(hold, 60, world.record())
        assert world.calls == ["transact_write_items"]

    asyncio.run(work())
    assert not {name for name in world.state() if name.startswith(("slots", "hold"))}
    assert world.state()["spent#2026-11#key_1"] == {"N": "60"}


@pytest.mark.parametrize("renewed", [False, True])
def test_an_extension_whose_answer_was_lost_is_sent_again_and_counts_once(world: World, renewed: bool) -> None:
    world.top_up(1000)

    async def work() -> None:
        ticket = world.ticket()
        await world.store.admit(ticket, lease=60)
        hold = held(await world.store.hold(ticket, 100, tenths=10, lease=60))
        world.now += 40 if renewed else 1
        left = hold.standing.audio_seconds.remaining
        world.calls.clear()
        world.client.lost = 1
        hold = await world.store.extend(hold, 50, tenths=0, lease=60)
        assert world.calls == ["update_item"] * (3 if renewed else 2)
        assert (hold.amount, hold.standing.free) == (150, 850)
        assert hold.standing.audio_seconds.remaining >= left
        world.now += 1
        hold = await world.store.extend(hold, 50, tenths=0, lease=60)
        balance = await world.store.balance(world.account.id)
        assert (balance.held, balance.spent, balance.holds) == (200, 200, {"req-1": 200})
        await world.store.settle(hold, 200, world.record(cost=200))
        balance = await world.store.balance(world.account.id)
        assert (balance.balance, balance.held, balance.spent) == (800, 0, 200)

    asyncio.run(work())
    assert "slots" not in world.state()


def test_the_audio_of_an_extension_that_was_sent_again_counts_once(world: World) -> None:
    world.top_up(1000)

    async def work() -> None:
        hold = held(await world.store.hold(world.ticket(limits=RateLimits(None, 60)), 1, tenths=100, lease=60))
        world.now += 0.5
        world.client.lost = 1
        hold = await world.store.extend(hold, 1, tenths=100, lease=60)
        assert hold.standing.audio_seconds.remaining == 40

    asyncio.run(work())


@pytest.mark.parametrize("end", ["settle", "release", "sweep", "extend"])
def test_an_extension_that_nobody_heard_of_is_given_back_by_whatever_ends_the_request(world: World, end: str) -> None:
    world.top_up(1000)
    own = Bounds("key_1", RateLimits(10, 600, 2), 500)

    async def work() -> None:
        ticket = world.ticket(own=own)
        await world.store.admit(ticket, lease=60)
        hold = held(await world.store.hold(ticket, 100, tenths=10, lease=60))
        world.now += 1
        world.client.lost = 2  # and so was the answer to the second try
        with pytest.raises(ReadTimeoutError):
            await world.store.extend(hold, 50, tenths=10, lease=60)
        assert (await world.store.balance(world.account.id)).holds == {"req-1": 150}
        world.now += 1
        if end == "settle":
            for _ in range(2):
                await world.store.settle(hold, 80, world.record(cost=80))
        elif end == "release":
            await world.store.release(hold, world.record(status=500, cost=0))
        elif end == "sweep":
            world.now += 60
            swept = await world.store.sweep()
            assert (swept.holds, swept.amount, swept.slots) == (1, 150, 1)
            with pytest.raises(HoldEnded):
                await world.store.settle(hold, 80, world.record())
            with pytest.raises(HoldEnded):
                await world.store.extend(hold, 1, tenths=0, lease=60)
        else:
            hold = await world.store.extend(hold, 50, tenths=10, lease=60)
            assert hold.amount == 200
            assert (await world.store.balance(world.account.id)).holds == {"req-1": 200}
            await world.store.settle(hold, 180, world.record(cost=180))
        balance = await world.store.balance(world.account.id)
        cost = {"settle": 80, "extend": 180}.get(end, 0)
        assert (balance.balance, balance.held, balance.spent, balance.holds) == (1000 - cost, 0, cost, {})
        assert world.state()["spent#2026-11#key_1"] == {"N": str(cost)}

    asyncio.run(work())
    assert not {name for name in world.state() if name.startswith(("slots", "hold"))}


@pytest.mark.parametrize("end", ["settle", "release"])
def test_a_place_whose_renewal_nobody_heard_of_is_given_back(world: World, end: str) -> None:
    world.top_up(1000)

    async def work() -> None:
        ticket = world.ticket()
        await world.store.admit(ticket, lease=60)
        hold = held(await world.store.hold(ticket, 100, tenths=10, lease=60))
        world.now += 40
        world.client.lost = 2
        with pytest.raises(ReadTimeoutError):
            await world.store.extend(hold, 50, tenths=10, lease=60)
        if end == "settle":
            await world.store.settle(hold, 80, world.record())
        else:
            await world.store.release(hold, world.record())

    asyncio.run(work())
    assert "slots" not in world.state()


def test_the_charge_of_an_extended_hold_is_sent_again_without_harm(world: World) -> None:
    world.top_up(1000)

    async def work() -> None:
        hold = held(await world.store.hold(world.ticket(), 100, tenths=10, lease=60, claim=Claim("c", "f")))
        world.now += 1
        hold = await world.store.extend(hold, 50, tenths=10, lease=60)
        world.client.lost = 1
        await world.store.settle(hold, 120, world.record(cost=120), b"answer")
        assert await world.store.hold(world.ticket("b"), 1, tenths=1, lease=60, claim=Claim("c", "f")) == Replay(
            b"answer"
        )
        balance = await world.store.balance(world.account.id)
        assert (balance.balance, balance.held, balance.spent) == (880, 0, 120)

    asyncio.run(work())


def test_extensions_that_collide_are_tried_again_and_then_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.top_up(1000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    left = 0

    def collide(name: str) -> None:
        nonlocal left
        left -= 1
        if left >= 0 and name == "update_item":
            busy = {"Error": {"Code": "TransactionConflictException", "Message": ""}}
            raise world.raw.exceptions.ClientError(cast("Any", busy), name)

    world.client.before = collide

    async def work() -> None:
        nonlocal left
        ticket = world.ticket()
        await world.store.admit(ticket, lease=60)
        hold = held(await world.store.hold(ticket, 10, tenths=1, lease=60))
        world.now += 40
        left = 5
        hold = await world.store.extend(hold, 10, tenths=1, lease=60)
        assert hold.amount == 20
        world.now += 1
        left = 1000
        with pytest.raises(Overloaded):
            await world.store.extend(hold, 10, tenths=1, lease=60)
        left = 0
        assert (await world.store.balance(world.account.id)).holds == {"req-1": 20}
        await world.store.release(hold)

    asyncio.run(work())
    assert "slots" not in world.state()


def test_a_process_that_knows_old_numbers_extends_by_the_right_ones(world: World) -> None:
    world.top_up(1000)
    limits = RateLimits(None, 60)

    async def work() -> None:
        other, _ = world.another()
        mine = held(await world.store.hold(world.ticket("a", limits), 10, tenths=10, lease=60))
        theirs = held(await other.hold(world.ticket("b", limits), 10, tenths=10, lease=60))
        for number in range(1, 5):  # each makes the other's numbers old
            world.now += 0.001
            mine = await world.store.extend(mine, 10, tenths=60, lease=60)
            theirs = await other.extend(theirs, 10, tenths=60, lease=60)
            assert theirs.standing.audio_seconds.remaining == 58 - 12 * number
        world.now += 60
        mine = await world.store.extend(mine, 10, tenths=60, lease=60)  # the bucket is full again
        assert mine.standing.audio_seconds.remaining == 54
        await other.close()

    asyncio.run(work())


def test_a_tokens_item_goes_by_itself_when_its_time_is_over(world: World) -> None:
    async def work() -> None:
        key = Key(id="key_1", account_id=world.account.id, created=1)
        await world.store.create_key(key, b"d" * 32)
        world.calls.clear()
        await world.store.create_token(b"t" * 32, key, 500)
        assert world.calls == ["transact_write_items"]
        world.calls.clear()
        assert await world.store.find_token(b"t" * 32) is not None
        assert world.calls == ["get_item", "batch_get_item"]

    asyncio.run(work())
    place = {"pk": {"S": f"TOKEN#{(b't' * 32).hex()}"}, "sk": {"S": "TOKEN"}}
    item = world.raw.get_item(TableName="t", Key=cast("Any", place))["Item"]
    assert int(item["ttl"]["N"]) > int(item["expires"]["N"]) == 500


def test_a_token_whose_making_was_not_heard_of_is_made_once(world: World) -> None:
    async def work() -> None:
        key = Key(id="key_1", account_id=world.account.id, created=1)
        await world.store.create_key(key, b"d" * 32)
        world.client.lost = 1
        await world.store.create_token(b"t" * 32, key, 500)
        assert await world.store.find_token(b"t" * 32) is not None

    asyncio.run(work())
