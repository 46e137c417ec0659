"""Accounts in one DynamoDB table: what the deployment on AWS keeps.

    pk                  sk                      what
    ACCOUNT#<id>        PROFILE                 the account
                        STATE#0                 its live state, see below
                        ENTRY#<kind>#<ref>      one ledger entry
                        KEY#<key id>            which keys it has
                        CLAIM#<claim key>       who holds an Idempotency-Key, then the answer
    ACCOUNTS            <id>                    which accounts there are
    NAME#<name>         NAME                    whose name it is
    KEY#<key id>        KEY                     the key
    DIGEST#<hex>        DIGEST                  whose hash it is
    OUTAGES             <deployment>            until when it is out of order
    USAGE#<id>          <time>#<request id>     one usage record
    ROLLUP#<id>         <day>#<key>#<model>     the records of a day, added up

All that decides about a request is in STATE, in flat attributes that are made when first written:
`balance`; `free`, the balance less the holds; `requests` and `audio`, when the buckets are full
again; `slots`, a set of "<expires>|<request id>"; `hold#<request id>`; `spent#<month>`. A key with
bounds of its own has its own in the same item, `requests#<key id>` and so on. So one conditional
write of one item decides, and no two requests are let in on what is there for one.
Times inside are microseconds. `ttl` only cleans up: what has expired counts as gone before that.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

from voxgate.accounts import (
    ANSWER_SECONDS,
    NO_LIMITS,
    Account,
    Balance,
    Bounds,
    Claim,
    Credential,
    Entry,
    EntryKind,
    Hold,
    HoldEnded,
    Key,
    RateLimits,
    Replay,
    Scope,
    Standing,
    Status,
    Swept,
    Ticket,
    UsageRecord,
    UsageRow,
    rules,
)
from voxgate.accounts.table import Failed, Item, Table, Update, Write, dump, key_of, overloaded, tries
from voxgate.errors import Overloaded

if TYPE_CHECKING:
    from mypy_boto3_dynamodb.client import DynamoDBClient
    from mypy_boto3_dynamodb.type_defs import (
        TransactWriteItemTypeDef,
    )

_P = ParamSpec("_P")
_T = TypeVar("_T")
_STATE = "STATE#0"  # a number, so that an account that one item is too slow for can get more
_KINDS = list(EntryKind)


def _threaded(
    method: Callable[Concatenate[DynamoStore, _P], _T],
) -> Callable[Concatenate[DynamoStore, _P], Coroutine[Any, Any, _T]]:
    """boto3 blocks, so a method with all of its calls is one job of the store's threads."""

    @functools.wraps(method)
    async def run(self: DynamoStore, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        work = functools.partial(method, self, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    return run


class DynamoStore:
    """Implements `Store`."""

    lookup_seconds = 30.0

    def __init__(
        self, table: str, *, client: DynamoDBClient | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._table = Table(table, client)
        self._clock = clock
        self._threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="dynamodb")
        self._known: _Recent[dict[str, int]] = _Recent(1024)  # by account: the numbers of its STATE
        self._slots: _Recent[str] = _Recent(8192)  # by request: its member of `slots`, empty for none

    @_threaded
    def find_credential(self, digest: bytes) -> Credential | None:
        owner = self._table.get(f"DIGEST#{digest.hex()}", "DIGEST")
        if owner is None:
            return None
        wanted = [(f"KEY#{owner['key_id']}", "KEY"), (f"ACCOUNT#{owner['account_id']}", "PROFILE")]
        found = {item["sk"]: item for item in self._table.get_all(wanted)}
        return Credential(_account(found["PROFILE"]), _api_key(found["KEY"]), digest)

    @_threaded
    def create_account(self, name: str, *, limits: RateLimits = NO_LIMITS, budget: int | None = None) -> Account:
        """Of two at once with one name, one gets the name; a crash leaves all four items or none."""
        account = Account(
            id=f"acct_{secrets.token_hex(8)}", name=name, created=int(self._clock()), limits=limits, budget=budget
        )
        pk = f"ACCOUNT#{account.id}"
        try:
            self._table.commit(
                self._table.put(f"NAME#{name}", "NAME", {"account_id": account.id}, new=True),
                self._table.put(pk, "PROFILE", dataclasses.asdict(account)),
                self._table.put(pk, _STATE, {"balance": 0, "free": 0}),
                self._table.put("ACCOUNTS", account.id, {}),
            )
        except Failed as failed:
            raise ValueError(f"There is an account named '{name}' already.") from failed
        return account

    @_threaded
    def find_account(self, reference: str) -> Account:
        # An id before a name, should somebody name an account like another's id.
        item = self._table.get(f"ACCOUNT#{reference}", "PROFILE")
        if item is None and (owner := self._table.get(f"NAME#{reference}", "NAME")):
            item = self._table.get(f"ACCOUNT#{owner['account_id']}", "PROFILE")
        if item is None:
            raise _no_account(reference)
        return _account(item)

    @_threaded
    def accounts(self) -> list[Account]:
        found = self._table.get_all([(f"ACCOUNT#{item['sk']}", "PROFILE") for item in self._table.query("ACCOUNTS")])
        return sorted(map(_account, found), key=lambda account: (account.created, account.id))

    @_threaded
    def change_account(self, account: Account) -> None:
        """Of two at once the later one stands, whole."""
        update = Update(f"ACCOUNT#{account.id}", "PROFILE")
        update.set("status", account.status)
        update.set("limits", dataclasses.asdict(account.limits))
        for name, value in (("budget", account.budget), ("cache_seconds", account.cache_seconds)):
            if value is None:
                update.remove(name)
            else:
                update.set(name, value)
        try:
            self._table.commit(update)
        except Failed as failed:
            raise _no_account(account.id) from failed

    @_threaded
    def keys(self, account_id: str) -> list[Key]:
        pointers = self._table.query(f"ACCOUNT#{account_id}", "KEY#", "KEY$")
        found = self._table.get_all([(pointer["sk"], "KEY") for pointer in pointers])
        return sorted(map(_api_key, found), key=lambda key: (key.created, key.id))

    @_threaded
    def create_key(self, key: Key, digest: bytes) -> None:
        """Of two at once with one id or digest, one is made; a crash leaves all of it or nothing."""
        pk = f"ACCOUNT#{key.account_id}"
        exists: TransactWriteItemTypeDef = {
            "ConditionCheck": {
                "TableName": self._table.name,
                "Key": key_of(pk, "PROFILE"),
                "ConditionExpression": "attribute_exists(pk)",
            }
        }
        owner = {"account_id": key.account_id, "key_id": key.id}
        try:
            self._table.commit(
                exists,
                self._table.put(f"KEY#{key.id}", "KEY", {**dataclasses.asdict(key), "digest": digest}, new=True),
                self._table.put(f"DIGEST#{digest.hex()}", "DIGEST", owner, new=True),
                self._table.put(pk, f"KEY#{key.id}", {}),
            )
        except Failed as failed:
            if failed.at(0):
                raise _no_account(key.account_id) from failed
            raise ValueError(f"There is a key '{key.id}' already, or one with the same hash.") from failed

    @_threaded
    def find_key(self, key_id: str) -> Key:
        item = self._table.get(f"KEY#{key_id}", "KEY")
        if item is None:
            raise _no_key(key_id)
        return _api_key(item)

    @_threaded
    def revoke_key(self, key_id: str) -> Key:
        """The first of several stands: the time is only set where there is none."""
        update = Update(f"KEY#{key_id}", "KEY")
        update.set("revoked", int(self._clock()), once=True)
        try:
            return _api_key(self._table.commit(update))
        except Failed as failed:
            raise _no_key(key_id) from failed

    @_threaded
    def mark_used(self, key: Key, day: str) -> None:
        """Of several at once the latest day stands, in whatever order they come."""
        update = Update(f"KEY#{key.id}", "KEY")
        name = update.name("last_used")
        update.where(f"(attribute_not_exists({name}) OR {name} < {update.value(day)})")
        update.set("last_used", day)
        try:
            self._table.commit(update)
        except Failed as failed:
            if failed.item(0) is None:
                raise _no_key(key.id) from failed

    @_threaded
    def admit(self, ticket: Ticket, *, lease: float, paid: bool = True, slot: bool = True) -> Standing:
        """One conditional write of STATE, so that of two requests for the last place one gets it:

        1. A and B each send the write that fits the STATE they know of.
        2. A's goes through. B's condition fails, and comes with the STATE that A left.
        3. B is refused by it, or knows it now and writes again: another branch of a bucket
           (`Update.take`), or after removing places whose lease is over.

        A crash after the write leaves a place taken until its lease ends. When only the response
        is lost, the request sent again finds its own place: it is in, and not counted twice.
        """
        member = f"{self._now() + rules.microseconds(lease):020d}|{ticket.request_id}" if slot else ""
        for _ in tries():
            now = self._now()
            update = self._admission(ticket, now, member, paid=paid)
            try:
                item = self._table.once(update)
            except Failed as failed:
                if failed.busy:
                    continue
                item = self._learn(ticket.account_id, failed.item(0))
                if member not in item.get("slots", ()):
                    rules.check_admission(_state(ticket, item, now), now, paid=paid, slot=slot)
                    self._tidy(ticket.account_id, item, now)
                    continue
            self._slots.put(ticket.request_id, member)
            return rules.standing(_state(ticket, self._learn(ticket.account_id, item), now), now)
        raise overloaded()

    @_threaded
    def leave(self, ticket: Ticket, record: UsageRecord | None = None) -> None:
        """All of it or nothing: what went out twice finds the record there and stops."""
        member = self._member(ticket)
        if not member and record is None:
            return
        update = _state_update(ticket.account_id)
        _unseat(update, ticket, member)
        try:
            self._table.commit(update, *self._recording(record, new=True))
        except Failed as failed:
            if failed.at(0):
                raise _no_account(ticket.account_id) from failed

    @_threaded
    def hold(
        self, ticket: Ticket, amount: int, *, tenths: int, lease: float, claim: Claim | None = None
    ) -> Hold | Replay:
        """One conditional write of STATE; with a claim, one transaction of it and the claim:

        1. A and B come with one Idempotency-Key. Both put a claim where there is none, or where
           its lease or its answer's day is over.
        2. A's transaction goes through. B's is cancelled as a whole and sees A's claim: in flight
           (refused), answered (A's answer), or another request's (refused).
        3. Neither had a claim against it, but money for one only: B's condition on STATE fails with
           the STATE that A left, by which it is refused or tries again, as in `admit`.

        A crash after the write leaves the hold and the open claim, and both end with the lease: the
        hold by a sweep, the claim by itself. The same request again finds its own hold, and has it.
        """
        for _ in tries():
            now = self._now()
            expires = now + rules.microseconds(lease)
            update = self._holding(ticket, amount, tenths, now, expires)
            try:
                item = self._table.once(update, *self._claiming(ticket, claim, now, expires))
            except Failed as failed:
                if failed.busy:
                    continue
                if claim and (replay := self._earlier(ticket, claim, failed, now)):
                    return replay
                item = self._learn(ticket.account_id, failed.item(0) or self._get_state(ticket.account_id))
                if mine := item.get(f"hold#{ticket.request_id}"):
                    standing = rules.standing(_state(ticket, item, now), now)
                    return Hold(ticket, mine["amount"], mine["month"], claim, standing)
                rules.check_hold(_state(ticket, item, now), amount, tenths, now)
                continue
            # A transaction returns nothing, so there the standing is what was known, and this hold.
            now_there = item or self._reckon(ticket.account_id, update) or self._get_state(ticket.account_id)
            item = self._learn(ticket.account_id, now_there)
            standing = rules.standing(_state(ticket, item, now), now)
            return Hold(ticket, amount, rules.month(now), claim, standing)
        raise overloaded()

    @_threaded
    def settle(self, hold: Hold, cost: int, record: UsageRecord, answer: bytes | None = None) -> None:
        """One transaction, on the condition that the hold is open and the claim still this request's:

        1. Settled twice, at once or after a lost response: the second is cancelled and finds the
           entry, so it was settled and nothing is left to do. Hence an entry for a cost of 0, too.
        2. A sweep or a release was faster: cancelled, no entry, `HoldEnded`.
        3. The lease ran out, no sweep came by, but another request took the claim over: likewise;
           that request is the one to be charged, and the hold is the next sweep's.

        A crash before leaves the hold until its lease ends; a crash after leaves nothing undone.
        """
        if not 0 <= cost <= hold.amount:
            raise ValueError(f"A hold of {hold.amount} cannot be settled with {cost}.")
        now = self._now()
        account_id = hold.ticket.account_id
        update = self._ending(hold, cost)
        entry = Entry(account_id, EntryKind.CHARGE, -cost, now / 1e6, hold.id)
        writes = [self._posting(entry), *self._recording(record), *self._answering(hold, answer, now)]
        try:
            self._table.commit(update, *writes)
        except Failed as failed:
            if self._table.get(f"ACCOUNT#{account_id}", f"ENTRY#{EntryKind.CHARGE}#{hold.id}") is None:
                raise HoldEnded(f"The hold of request {hold.id} is not open any more.") from failed
        else:
            self._reckon(account_id, update)

    @_threaded
    def release(self, hold: Hold, record: UsageRecord | None = None) -> None:
        """One transaction, on the condition that the hold is open: of a release, a settlement and a
        sweep at once, one ends the hold. The claim goes with it, unless its lease ran out and
        another request has it now: then the transaction is cancelled and sent without it."""
        for claim in (hold.claim, None):
            update = self._ending(hold, 0)
            try:
                self._table.commit(update, *self._recording(record), *self._dropping(hold, claim))
            except Failed as failed:
                if failed.at(0):
                    return
            else:
                self._reckon(hold.ticket.account_id, update)
                return

    @_threaded
    def claimed(self, account_id: str, claim_key: str) -> bool:
        item = self._table.get(f"ACCOUNT#{account_id}", f"CLAIM#{claim_key}")
        return item is not None and item["expires"] > self._now()

    @_threaded
    def post(self, entry: Entry) -> Balance:
        """One transaction of the entry and STATE. Of two with one reference the second is cancelled
        and finds the entry; of two that take the last credit the second finds none and is refused."""
        update = _state_update(entry.account_id)
        update.add("balance", entry.amount)
        update.add("free", entry.amount)
        if entry.amount < 0:
            update.where(f"{update.name('free')} >= {update.value(-entry.amount)}")
        try:
            self._table.commit(update, self._posting(entry))
        except Failed as failed:
            if self._table.get(f"ACCOUNT#{entry.account_id}", f"ENTRY#{entry.kind}#{entry.reference}") is None:
                raise rules.overdrawn(self._balance(entry.account_id).free, entry.amount) from failed
        return self._balance(entry.account_id)

    @_threaded
    def balance(self, account_id: str) -> Balance:
        return self._balance(account_id)

    @_threaded
    def entries(self, account_id: str) -> list[Entry]:
        items = self._table.query(f"ACCOUNT#{account_id}", "ENTRY#", "ENTRY$")
        found = [Entry(**_fields(Entry, {**item, "kind": EntryKind(item["kind"])})) for item in items]
        # Of one and the same time, a top-up comes before what it paid for.
        return sorted(found, key=lambda entry: (entry.time, _KINDS.index(entry.kind), entry.reference))

    @_threaded
    def usage(self, account_id: str, since: str, until: str) -> list[UsageRow]:
        rows = []
        for item in self._table.query(f"ROLLUP#{account_id}", since, f"{until}$"):
            day, key_id, model = item["sk"].split("#", 2)
            seconds = item["milliseconds"] / 1000
            rows.append(UsageRow(day, key_id, model, item["requests"], item["errors"], seconds, item["cost"]))
        return sorted(rows, key=lambda row: (row.day, row.key_id, row.model))

    @_threaded
    def records(self, account_id: str, since: float, until: float) -> list[UsageRecord]:
        # A record's key goes on after its time, so it is above `since` and, at `until`, above that.
        if since >= until:
            return []  # BETWEEN the wrong way round is an error there
        items = self._table.query(f"USAGE#{account_id}", _stamp(since), _stamp(until))
        return [UsageRecord(**_fields(UsageRecord, item)) for item in items]

    @_threaded
    def outages(self) -> dict[str, float]:
        now = self._clock()
        found = {item["sk"]: float(item["until"]) for item in self._table.query("OUTAGES")}
        return {deployment: until for deployment, until in found.items() if until > now}

    @_threaded
    def report_outage(self, deployment: str, until: float) -> None:
        """Of two at once the later stands; both were right."""
        update = Update("OUTAGES", deployment, exists=False)
        update.set("until", until)
        update.set("ttl", int(until) + 86_400)
        self._table.commit(update)

    @_threaded
    def sweep(self) -> Swept:
        """Claims need none: one whose time is over counts as gone. An account that is too busy to be
        swept does not keep the others from it; that there was one is raised at the end."""
        swept = Swept(0, 0, 0)
        busy: Overloaded | None = None
        for account in self._table.query("ACCOUNTS"):
            try:
                swept = self._sweep(account["sk"], swept)
            except Overloaded as error:
                busy = error
        if busy is not None:
            raise busy
        return swept

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)

    # What the methods above are made of: the writes.

    def _admission(self, ticket: Ticket, now: int, member: str, *, paid: bool) -> Update:
        known = self._known.get(ticket.account_id) or {}
        update = _state_update(ticket.account_id)
        if paid:
            _need(update, ticket, 1, now)
        if member:
            update.where(f"NOT contains({update.name('slots')}, {update.value(member)})")
        for suffix, bounds in _places(ticket).items():
            update.take(f"requests{suffix}", rules.Tally(bounds).request_bucket, 1, known, now)
            if member:
                update.seat(f"slots{suffix}", bounds.limits.concurrent_requests, member)
        return update

    def _holding(self, ticket: Ticket, amount: int, tenths: int, now: int, expires: int) -> Update:
        known = self._known.get(ticket.account_id) or {}
        update = _state_update(ticket.account_id)
        _need(update, ticket, amount, now)
        name, month = f"hold#{ticket.request_id}", rules.month(now)
        places = _places(ticket)
        update.where(f"attribute_not_exists({update.name(name)})")
        update.set(name, {"amount": amount, "expires": expires, "month": month, "suffixes": [*places]})
        update.add("free", -amount)
        for suffix, bounds in places.items():
            update.take(f"audio{suffix}", rules.Tally(bounds).audio_bucket, tenths, known, now)
            update.add(f"spent#{month}{suffix}", amount)
        return update

    def _ending(self, hold: Hold, cost: int) -> Update:
        update = _state_update(hold.ticket.account_id)
        held = {"amount": hold.amount, "month": hold.month, "suffixes": _places(hold.ticket)}
        _end(update, hold.id, held, cost)
        _unseat(update, hold.ticket, self._member(hold.ticket))
        return update

    def _claiming(self, ticket: Ticket, claim: Claim | None, now: int, expires: int) -> list[TransactWriteItemTypeDef]:
        """Puts the claim where there is none, or one whose time is over."""
        if claim is None:
            return []
        laid = {"fingerprint": claim.fingerprint, "state": "open", "hold": ticket.request_id}
        put = self._table.put(f"ACCOUNT#{ticket.account_id}", f"CLAIM#{claim.key}", {**laid, **_until(expires)})
        put["Put"] |= {
            "ConditionExpression": "attribute_not_exists(pk) OR #expires <= :now",
            "ExpressionAttributeNames": {"#expires": "expires"},
            "ExpressionAttributeValues": {":now": dump(now)},
            "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        }
        return [put]

    def _earlier(self, ticket: Ticket, claim: Claim, failed: Failed, now: int) -> Replay | None:
        """What a claim laid earlier says. It is asked for where the failure did not bring it: nothing
        promises that a cancelled transaction names all of its reasons, and a claim goes before money."""
        old = failed.item(1) or self._table.get(f"ACCOUNT#{ticket.account_id}", f"CLAIM#{claim.key}")
        if old is None or old["expires"] <= now:
            return None
        if old["state"] == "open" and old["hold"] == ticket.request_id:
            return None
        rules.check_claim(claim, old["fingerprint"], answered=old["state"] == "answered")
        return Replay(old["answer"])

    def _answering(self, hold: Hold, answer: bytes | None, now: int) -> list[Write]:
        if hold.claim is None or answer is None:
            return self._dropping(hold, hold.claim)
        update = Update(f"ACCOUNT#{hold.ticket.account_id}", f"CLAIM#{hold.claim.key}")
        update.where(f"{update.name('hold')} = {update.value(hold.id)}")
        expires = _until(now + rules.microseconds(ANSWER_SECONDS))
        for name, value in {"state": "answered", "answer": answer, **expires}.items():
            update.set(name, value)
        return [update]

    def _dropping(self, hold: Hold, claim: Claim | None) -> list[Write]:
        if claim is None:
            return []
        return [
            {
                "Delete": {
                    "TableName": self._table.name,
                    "Key": key_of(f"ACCOUNT#{hold.ticket.account_id}", f"CLAIM#{claim.key}"),
                    "ConditionExpression": "#hold = :hold",
                    "ExpressionAttributeNames": {"#hold": "hold"},
                    "ExpressionAttributeValues": {":hold": dump(hold.id)},
                }
            }
        ]

    def _posting(self, entry: Entry) -> TransactWriteItemTypeDef:
        sk = f"ENTRY#{entry.kind}#{entry.reference}"
        return self._table.put(f"ACCOUNT#{entry.account_id}", sk, dataclasses.asdict(entry), new=True)

    def _recording(self, record: UsageRecord | None, *, new: bool = False) -> list[Write]:
        if record is None:
            return []
        pk, sk = f"USAGE#{record.account_id}", f"{_stamp(record.time)}#{record.request_id}"
        day = f"{rules.day(record.time)}#{record.key_id}#{record.model}"
        added = Update(f"ROLLUP#{record.account_id}", day, exists=False)
        added.add("requests", 1)
        added.add("errors", int(record.status >= 400))
        added.add("milliseconds", round(record.seconds * 1000))  # whole numbers add up without drift
        added.add("cost", record.cost)
        return [self._table.put(pk, sk, dataclasses.asdict(record), new=new), added]

    def _sweep(self, account_id: str, swept: Swept) -> Swept:
        now = self._now()
        item = self._get_state(account_id) or {}
        over = {name: hold for name, hold in item.items() if name.startswith("hold#") and hold["expires"] <= now}
        ended = [hold["amount"] for name, hold in over.items() if self._expire(account_id, name, hold)]
        for name, full in item.items():  # the buckets of keys that nobody uses
            if name.startswith(("requests#", "audio#")) and full <= now:
                update = _state_update(account_id)
                update.where(f"{update.name(name)} = {update.value(full)}")
                update.remove(name)
                with contextlib.suppress(Failed):
                    self._table.commit(update)
        slots = self._tidy(account_id, item, now)
        return Swept(swept.holds + len(ended), swept.amount + sum(ended), swept.slots + slots)

    def _expire(self, account_id: str, name: str, hold: Item) -> bool:
        """On the condition that it is that very hold: when it is settled, released or swept between
        being seen and this, nothing happens. Its place has a lease of its own."""
        update = _state_update(account_id)
        _end(update, name.removeprefix("hold#"), hold, 0)
        update.where(f"{update.name(name)}.{update.name('expires')} = {update.value(hold['expires'])}")
        try:
            self._table.commit(update)
        except Failed:
            return False
        return True

    def _tidy(self, account_id: str, item: Item, now: int) -> int:
        """Removes the places whose lease is over, and what was spent before last month. Exactly the
        members that were seen go, so no place taken meanwhile does; two at once count each once."""
        update = _state_update(account_id)
        oldest = f"spent#{rules.month(now - 31 * 86_400_000_000)}"
        stale = [name for name in item if name.startswith("spent#") and name[: len(oldest)] < oldest]
        over = {name: _running(item[name], 0) - _running(item[name], now) for name in item if name.startswith("slots")}
        over = {name: members for name, members in over.items() if members}
        if not stale and not over:
            return 0
        for name in stale:
            update.remove(name)
        for name, members in over.items():
            update.delete(name, members)
        old = self._table.commit(update, returns="ALL_OLD")
        return len(over.get("slots", set()) & old.get("slots", set()))

    # Reading, and what is remembered of it.

    def _balance(self, account_id: str) -> Balance:
        item = self._learn(account_id, self._get_state(account_id))
        holds = {name.removeprefix("hold#"): hold["amount"] for name, hold in item.items() if name.startswith("hold#")}
        spent = item.get(f"spent#{rules.month(self._now())}", 0)
        return Balance(item["balance"], item["balance"] - item["free"], spent, holds)

    def _learn(self, account_id: str, item: Item | None) -> Item:
        """Keeps the numbers of a STATE for the next write's guess: only a condition decides."""
        if item is None:
            raise _no_account(account_id)
        self._known.put(account_id, {name: value for name, value in item.items() if isinstance(value, int)})
        return item

    def _reckon(self, account_id: str, update: Update) -> Item | None:
        """The numbers as they are after that update, if nothing else was written meanwhile."""
        known = self._known.get(account_id)
        return None if known is None else self._learn(account_id, update.reckoned(known))

    def _member(self, ticket: Ticket) -> str:
        member = self._slots.pop(ticket.request_id)
        if member is None:  # admitted by another process
            slots = (self._get_state(ticket.account_id) or {}).get("slots", set())
            member = next((slot for slot in slots if slot.partition("|")[2] == ticket.request_id), "")
        return member

    def _now(self) -> int:
        return rules.microseconds(self._clock())

    def _get_state(self, account_id: str) -> Item | None:
        return self._table.get(f"ACCOUNT#{account_id}", _STATE)


class _Recent(Generic[_T]):
    """The last so many values, for all threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[str, _T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> _T | None:
        with self._lock:
            return self._values.get(key)

    def put(self, key: str, value: _T) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            if len(self._values) > self._size:
                self._values.popitem(last=False)

    def pop(self, key: str) -> _T | None:
        with self._lock:
            return self._values.pop(key, None)


def _state_update(account_id: str) -> Update:
    update = Update(f"ACCOUNT#{account_id}", _STATE)
    update.add("balance", 0)  # an update has to write something
    return update


def _places(ticket: Ticket) -> dict[str, Bounds]:
    """By what the names of their attributes in STATE end with."""
    account, *own = ticket.bounds
    return {"": account, **{f"#{bounds.id}": bounds for bounds in own}}


def _need(update: Update, ticket: Ticket, amount: int, now: int) -> None:
    """`rules.check_money`, as conditions."""
    update.where(f"{update.name('free')} >= {update.value(max(amount, 1))}")
    for suffix, bounds in _places(ticket).items():
        if bounds.budget is not None:
            update.within(f"spent#{rules.month(now)}{suffix}", amount, bounds.budget)


def _end(update: Update, hold_id: str, held: Item, cost: int) -> None:
    name = f"hold#{hold_id}"
    update.where(f"attribute_exists({update.name(name)})")
    update.remove(name)
    update.add("balance", -cost)
    update.add("free", held["amount"] - cost)
    for suffix in held["suffixes"]:
        update.add(f"spent#{held['month']}{suffix}", cost - held["amount"])


def _unseat(update: Update, ticket: Ticket, member: str) -> None:
    for suffix in _places(ticket) if member else ():
        update.delete(f"slots{suffix}", {member})


def _state(ticket: Ticket, item: Mapping[str, Any], now: int) -> rules.State:
    tallies = [
        rules.Tally(
            bounds,
            requests=item.get(f"requests{suffix}", 0),
            audio=item.get(f"audio{suffix}", 0),
            running=len(_running(item.get(f"slots{suffix}", ()), now)),
            spent=item.get(f"spent#{rules.month(now)}{suffix}", 0),
        )
        for suffix, bounds in _places(ticket).items()
    ]
    return rules.State(item["balance"], item["free"], tuple(tallies))


def _running(slots: Iterable[str], now: int) -> set[str]:
    return {slot for slot in slots if int(slot.partition("|")[0]) > now}


def _until(expires: int) -> dict[str, int]:
    return {"expires": expires, "ttl": expires // 1_000_000 + 1}


def _stamp(seconds: float) -> str:
    return f"{rules.microseconds(min(max(seconds, 0.0), 1e13)):020d}"


def _no_account(reference: str) -> KeyError:
    return KeyError(f"There is no account '{reference}'.")


def _no_key(key_id: str) -> KeyError:
    return KeyError(f"There is no key '{key_id}'.")


def _fields(kind: type[Entry | UsageRecord | Account | Key], item: Item) -> Item:
    """Of an item, what the class has. DynamoDB gives 2.0 back as 2."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    return {name: float(item[name]) if fields[name] == "float" else item[name] for name in fields if name in item}


def _account(item: Item) -> Account:
    limits = RateLimits(**item["limits"])
    return Account(**{**_fields(Account, item), "status": Status(item["status"]), "limits": limits})


def _api_key(item: Item) -> Key:
    models = tuple(item["models"]) if "models" in item else None
    scopes = frozenset(map(Scope, item["scopes"]))
    return Key(**{**_fields(Key, item), "scopes": scopes, "models": models, "limits": RateLimits(**item["limits"])})
