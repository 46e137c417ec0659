"""Accounts in one DynamoDB table: what the deployment on AWS keeps.

    pk                  sk                      what
    ACCOUNT#<id>        PROFILE                 the account
                        STATE#0                 its live state, see `dynamodb_state.py`
                        ENTRY#<kind>#<ref>      one ledger entry
                        KEY#<key id>            which keys it has
                        CLAIM#<claim key>       who holds an Idempotency-Key, then the answer
    ACCOUNTS            <id>                    which accounts there are
    NAME#<name>         NAME                    whose name it is
    KEY#<key id>        KEY                     the key
    DIGEST#<hex>        DIGEST                  whose hash it is
    TOKEN#<hex>         TOKEN                   which key it stands for
    OUTAGES             <deployment>            until when it is out of order
    USAGE#<id>          <time>#<request id>     one usage record
    ROLLUP#<id>         <day>#<key>#<model>     the records of a day, added up

Times inside are microseconds. `ttl` only cleans up: what has expired counts as gone before that.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import voxgate.accounts as port
from voxgate.accounts import rules, stores
from voxgate.accounts.dynamodb_accounts import DynamoAccounts, recording
from voxgate.accounts.dynamodb_state import STATE, StateUpdate, holds_in, places, running, state_of
from voxgate.accounts.recent import Recent
from voxgate.accounts.stores import threaded
from voxgate.accounts.table import Failed, Item, Table, Update, Write, overloaded, tries
from voxgate.errors import Overloaded

if TYPE_CHECKING:
    from mypy_boto3_dynamodb.client import DynamoDBClient


class DynamoStore(DynamoAccounts):
    """Implements `Store`."""

    lookup_seconds = 30.0

    def __init__(
        self, table: str, *, client: DynamoDBClient | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__("dynamodb", 16, clock)
        self._table = Table(table, client)
        self._known: Recent[str, dict[str, int]] = Recent(1024)  # by account: the numbers of its STATE
        self._slots: Recent[str, str] = Recent(8192)  # by request: its member of `slots`, empty for none

    @threaded
    def admit(self, ticket: port.Ticket, *, lease: float, paid: bool = True, slot: bool = True) -> port.Standing:
        """One conditional write of STATE, so that of two requests for the last place one gets it:

        1. A and B each send the write that fits the STATE they know of.
        2. A's goes through. B's condition fails, and comes with the STATE that A left.
        3. B is refused by it, or writes again: another branch of a bucket, or after removing places
           whose lease is over.

        A crash after the write leaves a place taken until its lease ends. Sent again because only
        the response was lost, the request finds its own place and is not counted twice.
        """
        member = f"{self._now() + rules.microseconds(lease):020d}|{ticket.request_id}" if slot else ""
        for _ in tries():
            now = self._now()
            try:
                item = self._table.once(self._admission(ticket, now, member, paid=paid))
            except Failed as failed:
                if failed.busy:
                    continue
                item = self._learn(ticket.account_id, failed.item(0))
                if member not in item.get("slots", ()):
                    rules.check_admission(state_of(ticket, item, now), now, paid=paid, slot=slot)
                    self._tidy(ticket.account_id, item, now)
                    continue
            self._slots.put(ticket.request_id, member)
            return rules.standing(state_of(ticket, self._learn(ticket.account_id, item), now), now)
        raise overloaded()

    @threaded
    def leave(self, ticket: port.Ticket, record: port.UsageRecord | None = None) -> None:
        """All of it or nothing: what went out twice finds the record there and stops."""
        member = self._member(ticket)
        if not member and record is None:
            return
        update = StateUpdate(ticket.account_id)
        update.add("balance", 0)  # an update has to write something
        update.unseat(ticket, member)
        try:
            self._table.commit(update, *recording(record, new=True))
        except Failed as failed:
            if failed.at(0):
                raise stores.no_account(ticket.account_id) from failed

    @threaded
    def hold(
        self, ticket: port.Ticket, amount: int, *, tenths: int, lease: float, claim: port.Claim | None = None
    ) -> port.Hold | port.Replay:
        """One conditional write of STATE; with a claim, one transaction of it and the claim:

        1. A and B put a claim under one Idempotency-Key where there is none that still holds.
        2. A's transaction goes through. B's is cancelled as a whole and sees A's claim: in flight
           (refused), answered (A's answer), or another request's (refused).
        3. Without claims, but money for one only, B is refused or tries again as in `admit`.

        A crash after the write leaves the hold and the open claim, and both end with the lease: the
        hold by a sweep, the claim by itself. The same request again finds its own hold, and has it.
        """
        account_id = ticket.account_id
        for _ in tries():
            now = self._now()
            expires = now + rules.microseconds(lease)
            update = self._holding(ticket, amount, tenths, now, expires)
            try:
                item = self._table.once(update, *_claiming(ticket, claim, now, expires))
            except Failed as failed:
                if failed.busy:
                    continue
                if claim and (replay := self._earlier(ticket, claim, failed, now)):
                    return replay
                item = self._learn(account_id, failed.item(0) or self._get_state(account_id))
                mine = item.get(f"hold#{ticket.request_id}")
                if mine is None:
                    rules.check_hold(state_of(ticket, item, now), amount, tenths, now)
                    continue
            else:
                # A transaction returns nothing, so there the standing is what was known, and this hold.
                there = item or self._reckon(account_id, update) or self._get_state(account_id)
                item = self._learn(account_id, there)
                mine = {"amount": amount, "month": rules.month(now)}
            standing = rules.standing(state_of(ticket, item, now), now)
            return port.Hold(ticket, mine["amount"], mine["month"], claim, standing)
        raise overloaded()

    @threaded
    def extend(self, hold: port.Hold, amount: int, *, tenths: int, lease: float) -> port.Hold:
        """One conditional write of STATE, that the hold is as this request knows it. Sent again because only
        the response was lost, it finds the time that it wrote itself, and is done. The place, whose name has
        its time in it, is taken anew once half of that is over, and the old one then given back."""
        ticket, account_id, until = hold.ticket, hold.ticket.account_id, self._now() + rules.microseconds(lease)
        place = self._slots.get(hold.id) or ""
        renewed = place and int(place.split()[-1].partition("|")[0]) < until - rules.microseconds(lease / 2)
        member = f"{until:020d}|{hold.id}" if renewed else ""
        if member:
            self._slots.put(hold.id, f"{place} {member}")  # both are this request's to give back
        for _ in tries():
            now = self._now()
            update = self._holding(ticket, amount, tenths, now, until, held=hold)
            for suffix in places(ticket) if member else ():
                update.include(f"slots{suffix}", member)
            try:
                item = self._learn(account_id, self._table.once(update))
            except Failed as failed:
                if failed.busy:
                    continue
                item = self._learn(account_id, failed.item(0))
                mine = item.get(f"hold#{hold.id}")
                if mine is None:
                    raise stores.ended(hold) from failed
                if (mine["expires"], mine["amount"]) != (until, hold.amount + amount):
                    if amount or tenths:
                        rules.check_hold(state_of(ticket, item, now, hold.month), amount, tenths, now, more=True)
                    hold = dataclasses.replace(hold, amount=mine["amount"])
                    continue
            if member:
                self._slots.put(hold.id, member)
                leaving = StateUpdate(account_id)
                leaving.unseat(ticket, place)
                self._table.commit(leaving)
            standing = rules.standing(state_of(ticket, item, now), now)
            return dataclasses.replace(hold, amount=item[f"hold#{hold.id}"]["amount"], standing=standing)
        raise overloaded()

    @threaded
    def settle(self, hold: port.Hold, cost: int, record: port.UsageRecord, answer: bytes | None = None) -> None:
        """One transaction, on the condition that the hold is open and the claim still this request's:

        1. Settled twice, at once or after a lost response: the second is cancelled and finds the
           entry, so it was settled and nothing is left to do. Hence an entry for a cost of 0, too.
        2. A sweep or a release was faster: cancelled, no entry, `HoldEnded`.
        3. The lease ran out, no sweep came by, but another request took the claim over: likewise;
           that request is the one to be charged, and the hold is the next sweep's.

        A crash before leaves the hold until its lease ends; a crash after leaves nothing undone.
        """
        stores.check_cost(hold, cost)
        now = self._now()
        entry = port.Entry(hold.ticket.account_id, port.EntryKind.CHARGE, -cost, now / 1e6, hold.id)
        closing = _dropping(hold, hold.claim) if answer is None else _answering(hold, answer, now)
        try:
            self._end(hold, cost, _posting(entry), *recording(record), *closing)
        except Failed as failed:
            if self._table.get(*_place_of(entry)) is None:
                raise stores.ended(hold) from failed

    @threaded
    def release(self, hold: port.Hold, record: port.UsageRecord | None = None) -> None:
        """One transaction, on the condition that the hold is open: of a release, a settlement and a
        sweep at once, one ends the hold. The claim goes with it, unless its lease ran out and
        another request has it now: then the transaction is cancelled and sent without it."""
        for claim in (hold.claim, None):
            try:
                self._end(hold, 0, *recording(record), *_dropping(hold, claim))
            except Failed as failed:
                if not failed.at(0):
                    continue
            return

    @threaded
    def claimed(self, account_id: str, claim_key: str) -> bool:
        item = self._table.get(f"ACCOUNT#{account_id}", f"CLAIM#{claim_key}")
        return item is not None and item["expires"] > self._now()

    @threaded
    def post(self, entry: port.Entry) -> port.Balance:
        """One transaction of the entry and STATE. Of two with one reference the second is cancelled
        and finds the entry; of two that take the last credit the second finds none and is refused."""
        update = StateUpdate(entry.account_id)
        update.add("balance", entry.amount)
        update.add("free", entry.amount)
        if entry.amount < 0:
            update.where(f"{update.name('free')} >= {update.value(-entry.amount)}")
        try:
            self._table.commit(update, _posting(entry))
        except Failed as failed:
            if self._table.get(*_place_of(entry)) is None:
                raise rules.overdrawn(self._balance(entry.account_id).free, entry.amount) from failed
        return self._balance(entry.account_id)

    @threaded
    def balance(self, account_id: str) -> port.Balance:
        return self._balance(account_id)

    @threaded
    def sweep(self) -> port.Swept:
        """Claims need none: one whose time is over counts as gone. An account that is too busy to be
        swept does not keep the others from it; that there was one is raised at the end."""
        swept = port.Swept(0, 0, 0)
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

    def _admission(self, ticket: port.Ticket, now: int, member: str, *, paid: bool) -> StateUpdate:
        known = self._known.get(ticket.account_id) or {}
        update = StateUpdate(ticket.account_id)
        update.add("balance", 0)  # an update has to write something
        if paid:
            update.need(ticket, 1, rules.month(now))
        if member:
            update.where(f"NOT contains({update.name('slots')}, {update.value(member)})")
        for suffix, bounds in places(ticket).items():
            update.take(f"requests{suffix}", rules.Tally(bounds).request_bucket, 1, known, now)
            if member:
                update.seat(f"slots{suffix}", bounds.limits.concurrent_requests, member)
        return update

    def _holding(
        self, ticket: port.Ticket, amount: int, tenths: int, now: int, expires: int, *, held: port.Hold | None = None
    ) -> StateUpdate:
        """Of a new hold, or of more for one that is `held`."""
        known = self._known.get(ticket.account_id) or {}
        update = StateUpdate(ticket.account_id)
        name, month = f"hold#{ticket.request_id}", held.month if held else rules.month(now)
        if amount or held is None:
            update.need(ticket, amount, month)
        if held is None:
            update.where(f"attribute_not_exists({update.name(name)})")
        else:
            update.where(f"{update.name(name)}.{update.name('amount')} = {update.value(held.amount)}")
        whole = amount + (held.amount if held else 0)
        update.set(name, {"amount": whole, "expires": expires, "month": month, "suffixes": [*places(ticket)]})
        update.add("free", -amount)
        for suffix, bounds in places(ticket).items():
            update.take(f"audio{suffix}", rules.Tally(bounds).audio_bucket if tenths else None, tenths, known, now)
            update.add(f"spent#{month}{suffix}", amount)
        return update

    def _end(self, hold: port.Hold, cost: int, *writes: Write) -> None:
        member = self._member(hold.ticket)
        while True:
            update = StateUpdate(hold.ticket.account_id)
            update.end(hold.id, {"amount": hold.amount, "month": hold.month, "suffixes": places(hold.ticket)}, cost)
            update.unseat(hold.ticket, member)
            try:
                self._table.commit(update, *writes)
            except Failed as failed:
                mine = (failed.item(0) or {}).get(f"hold#{hold.id}", {})
                if mine.get("amount", hold.amount) == hold.amount:
                    raise
                hold = dataclasses.replace(hold, amount=mine["amount"])  # an extension whose answer was lost
            else:
                self._reckon(hold.ticket.account_id, update)
                return

    def _earlier(self, ticket: port.Ticket, claim: port.Claim, failed: Failed, now: int) -> port.Replay | None:
        """What a claim laid earlier says. It is asked for where the failure did not bring it: nothing
        promises that a cancelled transaction names all of its reasons, and a claim goes before money."""
        old = failed.item(1) or self._table.get(f"ACCOUNT#{ticket.account_id}", f"CLAIM#{claim.key}")
        own = old is not None and old["state"] == "open" and old["hold"] == ticket.request_id
        if old is None or old["expires"] <= now or own:
            return None
        rules.check_claim(claim, old["fingerprint"], answered=old["state"] == "answered")
        return port.Replay(old["answer"])

    def _sweep(self, account_id: str, swept: port.Swept) -> port.Swept:
        now = self._now()
        item = self._get_state(account_id) or {}
        over = {hold_id: hold for hold_id, hold in holds_in(item).items() if hold["expires"] <= now}
        ended = [hold["amount"] for hold_id, hold in over.items() if self._expire(account_id, hold_id, hold)]
        for name, full in item.items():  # the buckets of keys that nobody uses
            if name.startswith(("requests#", "audio#")) and full <= now:
                update = StateUpdate(account_id)
                update.where(f"{update.name(name)} = {update.value(full)}")
                update.remove(name)
                with contextlib.suppress(Failed):
                    self._table.commit(update)
        slots = self._tidy(account_id, item, now)
        return port.Swept(swept.holds + len(ended), swept.amount + sum(ended), swept.slots + slots)

    def _expire(self, account_id: str, hold_id: str, hold: Item) -> bool:
        """On the condition that it is that very hold: when it is settled, released or swept between
        being seen and this, nothing happens. Its place has a lease of its own."""
        update = StateUpdate(account_id)
        update.end(hold_id, hold, 0)
        expires = f"{update.name(f'hold#{hold_id}')}.{update.name('expires')}"
        update.where(f"{expires} = {update.value(hold['expires'])}")
        try:
            self._table.commit(update)
        except Failed:
            return False
        return True

    def _tidy(self, account_id: str, item: Item, now: int) -> int:
        """Removes the places whose lease is over, and what was spent before last month. Exactly the
        members that were seen go, so no place taken meanwhile does; two at once count each once."""
        update = StateUpdate(account_id)
        oldest = f"spent#{rules.month(now - 31 * 86_400_000_000)}"
        stale = [name for name in item if name.startswith("spent#") and name[: len(oldest)] < oldest]
        over = {name: set(item[name]) - running(item[name], now) for name in item if name.startswith("slots")}
        over = {name: members for name, members in over.items() if members}
        if not stale and not over:
            return 0
        for name in stale:
            update.remove(name)
        for name, members in over.items():
            update.exclude(name, members)
        old = self._table.commit(update, returns="ALL_OLD")
        return len(over.get("slots", set()) & old.get("slots", set()))

    # Reading, and what is remembered of it.

    def _balance(self, account_id: str) -> port.Balance:
        item = self._learn(account_id, self._get_state(account_id))
        holds = {hold_id: hold["amount"] for hold_id, hold in holds_in(item).items()}
        spent = item.get(f"spent#{rules.month(self._now())}", 0)
        return port.Balance(item["balance"], item["balance"] - item["free"], spent, holds)

    def _learn(self, account_id: str, item: Item | None) -> Item:
        """Keeps the numbers of a STATE for the next write's guess: only a condition decides."""
        if item is None:
            raise stores.no_account(account_id)
        self._known.put(account_id, {name: value for name, value in item.items() if isinstance(value, int)})
        return item

    def _reckon(self, account_id: str, update: Update) -> Item | None:
        """The numbers as they are after that update, if nothing else was written meanwhile."""
        known = self._known.get(account_id)
        return None if known is None else self._learn(account_id, update.reckoned(known))

    def _member(self, ticket: port.Ticket) -> str:
        member = self._slots.pop(ticket.request_id)
        if member is None:  # admitted by another process
            slots = (self._get_state(ticket.account_id) or {}).get("slots", set())
            member = next((slot for slot in slots if slot.partition("|")[2] == ticket.request_id), "")
        return member

    def _get_state(self, account_id: str) -> Item | None:
        return self._table.get(f"ACCOUNT#{account_id}", STATE)


def _claiming(ticket: port.Ticket, claim: port.Claim | None, now: int, expires: int) -> list[Write]:
    """Puts the claim where there is none, or one whose time is over."""
    if claim is None:
        return []
    laid = {"fingerprint": claim.fingerprint, "state": "open", "hold": ticket.request_id, **_until(expires)}
    put = Write("Put", f"ACCOUNT#{ticket.account_id}", f"CLAIM#{claim.key}", laid)
    put.where(f"attribute_not_exists({put.name('pk')}) OR {put.name('expires')} <= {put.value(now)}")
    return [put]


def _answering(hold: port.Hold, answer: bytes, now: int) -> list[Write]:
    if hold.claim is None:
        return []
    update = Update(f"ACCOUNT#{hold.ticket.account_id}", f"CLAIM#{hold.claim.key}")
    update.where(f"{update.name('hold')} = {update.value(hold.id)}")
    expires = _until(now + rules.microseconds(port.ANSWER_SECONDS))
    for name, value in {"state": "answered", "answer": answer, **expires}.items():
        update.set(name, value)
    return [update]


def _dropping(hold: port.Hold, claim: port.Claim | None) -> list[Write]:
    if claim is None:
        return []
    delete = Write("Delete", f"ACCOUNT#{hold.ticket.account_id}", f"CLAIM#{claim.key}")
    delete.where(f"{delete.name('hold')} = {delete.value(hold.id)}")
    return [delete]


def _posting(entry: port.Entry) -> Write:
    return Write("Put", *_place_of(entry), dataclasses.asdict(entry), exists=False)


def _place_of(entry: port.Entry) -> tuple[str, str]:
    return f"ACCOUNT#{entry.account_id}", f"ENTRY#{entry.kind}#{entry.reference}"


def _until(expires: int) -> dict[str, int]:
    return {"expires": expires, "ttl": expires // 1_000_000 + 1}
