"""Random histories of both stores, with failures and crashes at every step, against a small model."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fakes.store import START, Backend, Bench, Clock, DynamoBackend, Lost, SqliteBackend, dynamodb
from voxgate.accounts import (
    ANSWER_SECONDS,
    Balance,
    Bounds,
    Claim,
    Entry,
    EntryKind,
    Hold,
    HoldEnded,
    RateLimits,
    Replay,
    Store,
    Swept,
    Ticket,
)
from voxgate.errors import IdempotencyConflict, InsufficientQuota, RateLimited

pytestmark = pytest.mark.usefixtures("untraced")

LEASE = 60
STEPS = 40
SECOND = 1_000_000  # the model counts in microseconds
MOST = 3  # that may run at once
BUDGET, KEY_BUDGET = 5000, 1500
MONTH_END = START + 9.5 * 86400 - 300  # five minutes before midnight, 2026-11-30
REFUSALS = (RateLimited, InsufficientQuota, IdempotencyConflict, HoldEnded, ValueError)

Failure = tuple[int, bool] | None  # at which point, and whether after its effect
FAILURES = st.none() | st.tuples(st.integers(0, 60), st.booleans())
WHICH = st.integers(0, 1)
AMOUNTS = st.sampled_from([0, 1, 200, 700, 1500])
CLAIMS = st.none() | st.builds(Claim, st.sampled_from("ab"), st.sampled_from("xxy"))


@dataclasses.dataclass
class Open:
    amount: int
    expires: int
    month: str
    scopes: tuple[str, ...]
    owner: int
    claim: Claim | None


@dataclasses.dataclass
class Laid:
    claim: Claim
    request_id: str
    expires: int
    answer: bytes | None = None


@dataclasses.dataclass
class Model:
    """What a store must have kept. A method changes it, and returns what it answers or raises what
    it refuses with."""

    entries: dict[tuple[EntryKind, str], int] = dataclasses.field(default_factory=dict)
    holds: dict[str, Open] = dataclasses.field(default_factory=dict)
    settled: set[str] = dataclasses.field(default_factory=set)
    ended: set[str] = dataclasses.field(default_factory=set)
    claims: dict[str, Laid] = dataclasses.field(default_factory=dict)
    spent: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    records: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def balance(self) -> int:
        return sum(self.entries.values())

    @property
    def held(self) -> int:
        return sum(hold.amount for hold in self.holds.values())

    def hold(self, ticket: Ticket, amount: int, claim: Claim | None, now: int, owner: int) -> Hold | Replay | None:
        """None for a hold."""
        if ticket.request_id in self.holds:
            return None
        if claim is not None and (laid := self.claims.get(claim.key)) and laid.expires > now:
            if laid.claim.fingerprint != claim.fingerprint or laid.answer is None:
                raise IdempotencyConflict("")
            return Replay(laid.answer)
        month = _month(now)
        for bounds in ticket.bounds:
            if bounds.budget is not None and self.spent[bounds.id, month] + amount > bounds.budget:
                raise InsufficientQuota("")
        if self.balance - self.held < max(amount, 1):
            raise InsufficientQuota("")
        scopes = tuple(bounds.id for bounds in ticket.bounds)
        self.holds[ticket.request_id] = Open(amount, now + LEASE * SECOND, month, scopes, owner, claim)
        for scope in scopes:
            self.spent[scope, month] += amount
        if claim is not None:
            self.claims[claim.key] = Laid(claim, ticket.request_id, now + LEASE * SECOND)
        return None

    def extend(self, ticket: Ticket, amount: int, now: int) -> None:
        if (hold := self.holds.get(ticket.request_id)) is None:
            raise HoldEnded
        for bounds in ticket.bounds if amount else ():
            if bounds.budget is not None and self.spent[bounds.id, hold.month] + amount > bounds.budget:
                raise InsufficientQuota("")
        if self.balance - self.held < amount:
            raise InsufficientQuota("")
        hold.amount += amount
        hold.expires = now + LEASE * SECOND
        for scope in hold.scopes:
            self.spent[scope, hold.month] += amount

    def end(self, request_id: str, cost: int) -> None:
        hold = self.holds.pop(request_id)
        self.ended.add(request_id)
        for scope in hold.scopes:
            self.spent[scope, hold.month] += cost - hold.amount
        if hold.claim and self.claims[hold.claim.key].request_id == request_id:
            self.claims[hold.claim.key].expires = 0

    def settle(self, request_id: str, cost: int, answer: bytes | None, now: int) -> None:
        if request_id in self.settled:
            return
        if (hold := self.holds.get(request_id)) is None:
            raise HoldEnded
        laid = self.claims.get(hold.claim.key) if hold.claim else None
        if laid and laid.request_id != request_id:
            raise HoldEnded
        self.end(request_id, cost)
        self.settled.add(request_id)
        self.entries[EntryKind.CHARGE, request_id] = -cost
        self.records.setdefault(request_id, (200, cost))
        if laid and answer is not None:
            laid.answer, laid.expires = answer, now + int(ANSWER_SECONDS) * SECOND

    def release(self, request_id: str) -> None:
        if request_id in self.holds:
            self.end(request_id, 0)
            self.records.setdefault(request_id, (500, 0))

    def leave(self, request_id: str) -> None:
        self.records.setdefault(request_id, (400, 0))

    def post(self, kind: EntryKind, reference: str, amount: int) -> None:
        if (kind, reference) in self.entries:
            return
        if self.balance - self.held + amount < 0:
            raise ValueError
        self.entries[kind, reference] = amount

    def sweep(self, now: int, alive: set[int] | None) -> Swept:
        over = {
            name: hold.amount
            for name, hold in self.holds.items()
            if hold.expires <= now or (alive is not None and hold.owner not in alive)
        }
        for name in over:
            self.end(name, 0)
        return Swept(len(over), sum(over.values()), 0)

    def view(self, account_id: str, now: int) -> tuple[object, ...]:
        """As `Machine.view` sees it in a store."""
        balance = Balance(
            self.balance,
            self.held,
            self.spent[account_id, _month(now)],
            {name: hold.amount for name, hold in self.holds.items()},
        )
        return balance, self.entries, self.records, {key for key, laid in self.claims.items() if laid.expires > now}


def _month(now: int) -> str:
    return "2026-11" if now < (MONTH_END + 300) * SECOND else "2026-12"


class Machine(RuleBasedStateMachine):
    """Two stores on one table or file, as of two processes, each call to one of them."""

    client: ClassVar[Any] = None  # of DynamoDB, or None for SQLite

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = Clock(MONTH_END)
        self.files = tempfile.TemporaryDirectory()
        self.backend: Backend = (
            SqliteBackend(Path(self.files.name) / "voxgate.sqlite", self.clock)
            if self.client is None
            else DynamoBackend(self.client, self.clock)
        )
        self.stores: list[Store] = [self.backend.open(), self.backend.open()]
        self.owners = [0, 1]
        self.opened = 2
        self.account = self.run(self.stores[0].create_account("acme", budget=BUDGET))
        self.bench = Bench(self.backend, self.clock, self.stores[0], self.account)
        self.model = Model()
        self.model.entries[EntryKind.TOP_UP, "first"] = 3000
        self.run(self.stores[0].post(Entry(self.account.id, EntryKind.TOP_UP, 3000, self.clock(), "first")))
        self.tickets: list[Ticket] = []
        self.unheld: set[str] = set()  # who never held anything
        self.left: set[str] = set()
        self.handles: list[Hold] = []  # every hold that a caller was ever given
        self.asked: dict[str, tuple[int, Claim | None]] = {}
        self.posts: list[Entry] = []
        self.places: dict[str, int] = {}  # who runs for certain, and until when
        self.maybe: list[tuple[str, int]] = []  # who may run, as nobody heard of it

    def run(self, call: Awaitable[Any]) -> Any:
        async def inner() -> Any:
            return await call

        return self.runner.run(inner())

    def teardown(self) -> None:
        for store in self.stores:
            self.run(store.close())
        self.runner.close()
        self.backend.close()
        self.files.cleanup()

    # A step: the same in the model and in the store.

    def step(
        self,
        work: Callable[[], Awaitable[Any]],
        expected: Callable[[Model], Any],
        *,
        which: int = 0,
        failure: Failure = None,
        compare: bool = True,
    ) -> Any:
        """What the store said, checked against the model; `Lost` where it failed. What it did then is
        seen in the store: it must be all or nothing."""
        after = copy.deepcopy(self.model)
        wanted = _outcome(lambda: expected(after))
        try:
            got = self.run(self.attempt(self.stores[which], work, failure))
        except Lost:
            seen, now = self.view(), self.clock.microseconds
            before, done = self.model.view(self.account.id, now), after.view(self.account.id, now)
            assert seen in (before, done), (seen, before, done)
            if seen == done:
                self.model = after
            return Lost
        except REFUSALS as error:
            got = type(error)
        self.model = after
        if compare or isinstance(got, type) or isinstance(wanted, type):
            assert got == wanted or (isinstance(got, Hold) and wanted is None), (got, wanted)
        return got

    async def attempt(self, store: Store, work: Callable[[], Awaitable[Any]], failure: Failure) -> Any:
        if failure is None:
            return await work()
        nth, after = failure
        return await self.backend.fail(store, work, nth, after=after)

    def view(self) -> tuple[object, ...]:
        async def read() -> tuple[object, ...]:
            store, account_id = self.stores[0], self.account.id
            balance = await store.balance(account_id)
            entries = {(e.kind, e.reference): e.amount for e in await store.entries(account_id)}
            records = {r.request_id: (r.status, r.cost) for r in await store.records(account_id, 0.0, 1e10)}
            rows = await store.usage(account_id, "2026-11-01", "2026-12-31")
            assert sum(row.requests for row in rows) == len(records)
            assert sum(row.cost for row in rows) == sum(cost for _, cost in records.values())
            assert sum(row.errors for row in rows) == sum(status >= 400 for status, _ in records.values())
            claimed = {key for key in "ab" if await store.claimed(account_id, key)}
            return balance, entries, records, claimed

        return self.run(read())  # type: ignore[no-any-return]

    # The rules.

    @rule(which=WHICH, keyed=st.booleans(), failure=FAILURES)
    def admit(self, which: int, keyed: bool, failure: Failure) -> None:
        key = Bounds("key_own", RateLimits(concurrent_requests=MOST), KEY_BUDGET) if keyed else None
        limits = RateLimits(concurrent_requests=MOST)
        ticket = self.bench.ticket(f"r{len(self.tickets)}", limits=limits, budget=BUDGET, key=key)
        self.enter(ticket, which, failure)

    @precondition(lambda self: self.tickets)
    @rule(which=WHICH, data=st.data(), failure=FAILURES)
    def admit_again(self, which: int, data: st.DataObject, failure: Failure) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        if ticket.request_id not in self.left:
            self.enter(ticket, which, failure)

    def enter(self, ticket: Ticket, which: int, failure: Failure) -> None:
        now = self.clock.microseconds
        certain = {name for name, until in self.places.items() if until > now}
        maybe = [name for name, until in self.maybe if until > now]
        try:
            self.run(
                self.attempt(
                    self.stores[which], lambda: self.stores[which].admit(ticket, lease=LEASE, paid=False), failure
                )
            )
        except Lost:
            self.maybe.append((ticket.request_id, now + LEASE * SECOND))
        except RateLimited:
            assert len(certain) + len(maybe) >= MOST
            return
        else:
            assert len(certain - {ticket.request_id}) < MOST
            if ticket.request_id in certain:  # its first place may be its own still
                self.maybe.append((ticket.request_id, self.places[ticket.request_id]))
            self.places[ticket.request_id] = now + LEASE * SECOND
        if ticket not in self.tickets:
            self.tickets.append(ticket)
            self.unheld.add(ticket.request_id)

    def gone(self, request_id: str) -> None:
        self.places.pop(request_id, None)

    def perhaps_gone(self, request_id: str) -> None:
        if until := self.places.pop(request_id, None):
            self.maybe.append((request_id, until))

    @rule(which=WHICH, amount=AMOUNTS, claim=CLAIMS, failure=FAILURES, retry=st.booleans())
    def hold(self, which: int, amount: int, claim: Claim | None, failure: Failure, retry: bool) -> None:
        """Without a place, so that there is always room for one more."""
        ticket = self.bench.ticket(f"r{len(self.tickets)}", limits=RateLimits(concurrent_requests=MOST), budget=BUDGET)
        self.tickets.append(ticket)
        self.enter_hold(ticket, which, amount, claim, failure, retry)

    @precondition(lambda self: self.tickets)
    @rule(which=WHICH, data=st.data(), amount=AMOUNTS, claim=CLAIMS, failure=FAILURES, retry=st.booleans())
    def hold_what_was_admitted_or_again(
        self, which: int, data: st.DataObject, amount: int, claim: Claim | None, failure: Failure, retry: bool
    ) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        if ticket.request_id not in self.model.ended | self.left:  # those know that they came to their end
            self.enter_hold(ticket, which, amount, claim, failure, retry)

    def enter_hold(
        self, ticket: Ticket, which: int, amount: int, claim: Claim | None, failure: Failure, retry: bool
    ) -> None:
        amount, claim = self.asked.setdefault(ticket.request_id, (amount, claim))
        late = claim and ticket.request_id in self.model.holds
        if late and claim and self.model.claims[claim.key].request_id != ticket.request_id:
            return  # so late that another has its claim: one store tells it so, the other gives it its hold
        self.unheld.discard(ticket.request_id)

        def call() -> Awaitable[Hold | Replay]:
            return self.stores[which].hold(ticket, amount, tenths=0, lease=LEASE, claim=claim)

        for point in (failure, None) if retry else (failure,):
            got = self.step(
                call,
                lambda model: model.hold(ticket, amount, claim, self.clock.microseconds, self.owners[which]),
                which=which,
                failure=point,
            )
            if isinstance(got, Hold):
                hold = self.model.holds[ticket.request_id]
                assert (got.id, got.amount, got.month) == (ticket.request_id, hold.amount, hold.month)
                self.handles.append(got)
            if got is not Lost:
                return

    @precondition(lambda self: self.handles)
    @rule(which=WHICH, data=st.data(), amount=AMOUNTS, failure=FAILURES)
    def extend(self, which: int, data: st.DataObject, amount: int, failure: Failure) -> None:
        hold = data.draw(st.sampled_from(self.handles))  # an old one, too, of which there is more by now
        self.clock.advance(0.000001)  # no two of one request come at one moment
        now = self.clock.microseconds
        if hold.month != _month(now):
            return
        got = self.step(
            lambda: self.stores[which].extend(hold, amount, tenths=0, lease=LEASE),
            lambda model: model.extend(hold.ticket, amount, now),
            which=which,
            failure=failure,
        )
        if isinstance(got, Hold):
            assert got.amount == self.model.holds[hold.id].amount
            self.handles.append(got)
        if hold.id in self.places:  # which it keeps, and perhaps for longer
            self.maybe.append((hold.id, now + LEASE * SECOND))

    @precondition(lambda self: self.handles)
    @rule(
        which=WHICH,
        data=st.data(),
        share=st.sampled_from([0.0, 0.4, 1.0, 2.0]),
        failure=FAILURES,
        retry=st.booleans(),
    )
    def settle(self, which: int, data: st.DataObject, share: float, failure: Failure, retry: bool) -> None:
        hold = data.draw(st.sampled_from(self.handles))
        answer = hold.id.encode() if hold.claim else None
        cost = int(hold.amount * share)

        def settled(model: Model) -> None:
            if cost > hold.amount:
                raise ValueError
            model.settle(hold.id, cost, answer, self.clock.microseconds)

        record = self.bench.record(hold.ticket, time=MONTH_END, cost=cost)
        open_before = hold.id in self.model.holds
        for point in (failure, None) if retry else (failure,):
            got = self.step(
                lambda: self.stores[which].settle(hold, cost, record, answer),
                settled,
                which=which,
                failure=point,
                compare=False,
            )
            if open_before and hold.id not in self.model.holds:
                self.gone(hold.id)
            if got is not Lost:
                return

    @precondition(lambda self: self.handles)
    @rule(which=WHICH, data=st.data(), failure=FAILURES, retry=st.booleans())
    def release(self, which: int, data: st.DataObject, failure: Failure, retry: bool) -> None:
        hold = data.draw(st.sampled_from(self.handles))
        record = self.bench.record(hold.ticket, time=MONTH_END, status=500)
        open_before = hold.id in self.model.holds
        for point in (failure, None) if retry else (failure,):
            got = self.step(
                lambda: self.stores[which].release(hold, record),
                lambda model: model.release(hold.id),
                which=which,
                failure=point,
            )
            if open_before and hold.id not in self.model.holds:
                self.gone(hold.id)
            if got is not Lost:
                return

    @precondition(lambda self: self.unheld)
    @rule(which=WHICH, data=st.data(), failure=FAILURES)
    def leave(self, which: int, data: st.DataObject, failure: Failure) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.unheld)))
        (ticket,) = (ticket for ticket in self.tickets if ticket.request_id == request_id)
        record = self.bench.record(ticket, time=MONTH_END, status=400)
        self.left.add(request_id)
        got = self.step(
            lambda: self.stores[which].leave(ticket, record),
            lambda model: model.leave(request_id),
            which=which,
            failure=failure,
        )
        if got is Lost:
            self.perhaps_gone(request_id)
        else:
            self.gone(request_id)

    @rule(
        which=WHICH,
        kind=st.sampled_from([EntryKind.TOP_UP, EntryKind.REFUND, EntryKind.ADJUSTMENT]),
        amount=st.sampled_from([1, 300, 1000, 2500]),
        failure=FAILURES,
    )
    def post(self, which: int, kind: EntryKind, amount: int, failure: Failure) -> None:
        amount = -amount if kind is EntryKind.ADJUSTMENT else amount
        self.posts.append(Entry(self.account.id, kind, amount, self.clock(), f"p{len(self.posts) // 2}"))
        self.enter_post(self.posts[-1], which, failure)

    @precondition(lambda self: self.posts)
    @rule(which=WHICH, data=st.data(), failure=FAILURES)
    def post_again(self, which: int, data: st.DataObject, failure: Failure) -> None:
        self.enter_post(data.draw(st.sampled_from(self.posts)), which, failure)

    def enter_post(self, entry: Entry, which: int, failure: Failure) -> None:
        self.step(
            lambda: self.stores[which].post(entry),
            lambda model: model.post(entry.kind, entry.reference, entry.amount),
            which=which,
            failure=failure,
            compare=False,
        )

    @rule(seconds=st.sampled_from([0.001, 1.0, 30.0, 60.0, 400.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(which=WHICH, failure=FAILURES)
    def sweep(self, which: int, failure: Failure) -> None:
        now, store = self.clock.microseconds, self.stores[which]
        alive = set(self.owners) if isinstance(self.backend, SqliteBackend) else None
        after = copy.deepcopy(self.model)
        wanted = after.sweep(now, alive)
        try:
            got = self.run(self.attempt(store, store.sweep, failure))
        except Lost:
            # It ends one after another, so a part may be done, but no hold by half.
            left = self.run(self.stores[0].balance(self.account.id)).holds
            over = set(self.model.holds) - set(left)
            assert set(after.holds) <= set(left)
            for request_id in over:
                self.model.end(request_id, 0)
        else:
            assert (got.holds, got.amount) == (wanted.holds, wanted.amount)
            self.model = after
        if alive is not None:  # a place of a process that is gone is free
            self.maybe += self.places.items()
            self.places.clear()

    @rule(which=WHICH)
    def crash(self, which: int) -> None:
        self.backend.kill(self.stores[which])
        self.stores[which] = self.backend.open()
        self.owners[which] = self.opened
        self.opened += 1

    @rule(which=WHICH)
    def end_of_all_leases(self, which: int) -> None:
        self.clock.advance(LEASE)
        self.sweep(which, None)
        balance = self.run(self.stores[which].balance(self.account.id))
        assert (balance.held, balance.holds) == (0, {})

    # What holds after every step.

    @invariant()
    def the_store_is_as_the_model(self) -> None:
        seen = self.view()
        assert seen == self.model.view(self.account.id, self.clock.microseconds)
        balance, entries = seen[:2]
        assert isinstance(balance, Balance)
        assert isinstance(entries, dict)
        assert balance.balance == sum(entries.values()) >= 0
        assert balance.held == sum(balance.holds.values())
        assert balance.free >= 0
        assert self.model.settled.isdisjoint(balance.holds)


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except REFUSALS as error:
        return type(error)


@pytest.fixture(scope="module")
def aws() -> Iterator[Any]:
    with dynamodb() as client:
        yield client


@pytest.mark.parametrize(("store", "examples"), [("sqlite", 60), ("dynamodb", 6)])
def test_no_history_loses_or_makes_credit(request: pytest.FixtureRequest, store: str, examples: int) -> None:
    class Tried(Machine):
        client = request.getfixturevalue("aws") if store == "dynamodb" else None

    run_state_machine_as_test(
        Tried,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # shrinking takes minutes; add it to look into a failure
            suppress_health_check=list(HealthCheck),
        ),
    )
