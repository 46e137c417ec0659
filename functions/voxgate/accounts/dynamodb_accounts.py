"""Accounts, their keys and what was noted of their requests: what of `dynamodb.py` decides about no request."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import voxgate.accounts as port
from voxgate.accounts import rules, stores
from voxgate.accounts.dynamodb_state import STATE
from voxgate.accounts.stores import Threaded, restored, threaded
from voxgate.accounts.table import Failed, Item, Table, Update, Write

_KINDS = list(port.EntryKind)


class DynamoAccounts(Threaded):
    """The half of `DynamoStore` that is asked and administered."""

    _table: Table

    @threaded
    def find_credential(self, digest: bytes) -> port.Credential | None:
        owner = self._table.get(f"DIGEST#{digest.hex()}", "DIGEST")
        if owner is None:
            return None
        return self._credential(owner, digest)

    def _credential(self, owner: Item, digest: bytes) -> port.Credential:
        wanted = [(f"KEY#{owner['key_id']}", "KEY"), (f"ACCOUNT#{owner['account_id']}", "PROFILE")]
        found = {item["sk"]: item for item in self._table.get_all(wanted)}
        return port.Credential(restored(port.Account, found["PROFILE"]), restored(port.Key, found["KEY"]), digest)

    @threaded
    def create_token(self, digest: bytes, key: port.Key, expires: int) -> None:
        owner = {"account_id": key.account_id, "key_id": key.id, "expires": expires, "ttl": expires + 1}
        self._table.commit(Write("Put", f"TOKEN#{digest.hex()}", "TOKEN", owner))

    @threaded
    def find_token(self, digest: bytes) -> port.Credential | None:
        owner = self._table.get(f"TOKEN#{digest.hex()}", "TOKEN")
        return None if owner is None else stores.token(self._credential(owner, digest), owner["expires"])

    @threaded
    def create_account(
        self, name: str, *, limits: port.RateLimits = port.NO_LIMITS, budget: int | None = None
    ) -> port.Account:
        """Of two at once with one name, one gets the name; a crash leaves all four items or none."""
        account = stores.new_account(name, self._clock(), limits, budget)
        pk = f"ACCOUNT#{account.id}"
        with _failing_as(stores.name_taken(name)):
            self._table.commit(
                Write("Put", f"NAME#{name}", "NAME", {"account_id": account.id}, exists=False),
                Write("Put", pk, "PROFILE", dataclasses.asdict(account)),
                Write("Put", pk, STATE, {"balance": 0, "free": 0}),
                Write("Put", "ACCOUNTS", account.id, {}),
            )
        return account

    @threaded
    def find_account(self, reference: str) -> port.Account:
        # An id before a name, should somebody name an account like another's id.
        item = self._table.get(f"ACCOUNT#{reference}", "PROFILE")
        if item is None and (owner := self._table.get(f"NAME#{reference}", "NAME")):
            item = self._table.get(f"ACCOUNT#{owner['account_id']}", "PROFILE")
        if item is None:
            raise stores.no_account(reference)
        return restored(port.Account, item)

    @threaded
    def accounts(self) -> list[port.Account]:
        wanted = [(f"ACCOUNT#{item['sk']}", "PROFILE") for item in self._table.query("ACCOUNTS")]
        found = [restored(port.Account, item) for item in self._table.get_all(wanted)]
        return sorted(found, key=lambda account: (account.created, account.id))

    @threaded
    def change_account(self, account: port.Account) -> None:
        """Of two at once the later one stands, whole."""
        update = Update(f"ACCOUNT#{account.id}", "PROFILE")
        for name, value in dataclasses.asdict(account).items():
            if name not in ("id", "name", "created"):
                update.set(name, value)
        with _failing_as(stores.no_account(account.id)):
            self._table.commit(update)

    @threaded
    def keys(self, account_id: str) -> list[port.Key]:
        pointers = self._table.query(f"ACCOUNT#{account_id}", "KEY#", "KEY$")
        found = [restored(port.Key, item) for item in self._table.get_all([(each["sk"], "KEY") for each in pointers])]
        return sorted(found, key=lambda key: (key.created, key.id))

    @threaded
    def create_key(self, key: port.Key, digest: bytes) -> None:
        """Of two at once with one id or digest, one is made; a crash leaves all of it or nothing."""
        pk = f"ACCOUNT#{key.account_id}"
        owner = {"account_id": key.account_id, "key_id": key.id}
        try:
            self._table.commit(
                Write("ConditionCheck", pk, "PROFILE", exists=True),
                Write("Put", f"KEY#{key.id}", "KEY", {**dataclasses.asdict(key), "digest": digest}, exists=False),
                Write("Put", f"DIGEST#{digest.hex()}", "DIGEST", owner, exists=False),
                Write("Put", pk, f"KEY#{key.id}", {}),
            )
        except Failed as failed:
            raise (stores.no_account(key.account_id) if failed.at(0) else stores.key_taken(key)) from failed

    @threaded
    def find_key(self, key_id: str) -> port.Key:
        item = self._table.get(f"KEY#{key_id}", "KEY")
        if item is None:
            raise stores.no_key(key_id)
        return restored(port.Key, item)

    @threaded
    def revoke_key(self, key_id: str) -> port.Key:
        """The first of several stands: the time is only set where there is none."""
        update = Update(f"KEY#{key_id}", "KEY")
        update.set("revoked", int(self._clock()), once=True)
        with _failing_as(stores.no_key(key_id)):
            return restored(port.Key, self._table.commit(update))

    @threaded
    def mark_used(self, key: port.Key, day: str) -> None:
        """Of several at once the latest day stands, in whatever order they come."""
        update = Update(f"KEY#{key.id}", "KEY")
        name = update.name("last_used")
        update.where(f"(attribute_not_exists({name}) OR {name} < {update.value(day)})")
        update.set("last_used", day)
        try:
            self._table.commit(update)
        except Failed as failed:
            if failed.item(0) is None:
                raise stores.no_key(key.id) from failed

    @threaded
    def entries(self, account_id: str) -> list[port.Entry]:
        items = self._table.query(f"ACCOUNT#{account_id}", "ENTRY#", "ENTRY$")
        # Of one and the same time, a top-up comes before what it paid for.
        return sorted(
            (restored(port.Entry, item) for item in items),
            key=lambda entry: (entry.time, _KINDS.index(entry.kind), entry.reference),
        )

    @threaded
    def usage(self, account_id: str, since: str, until: str) -> list[port.UsageRow]:
        rows = []
        for item in self._table.query(f"ROLLUP#{account_id}", since, f"{until}$"):
            day, key_id, model = item["sk"].split("#", 2)
            seconds = item["milliseconds"] / 1000
            rows.append(port.UsageRow(day, key_id, model, item["requests"], item["errors"], seconds, item["cost"]))
        return sorted(rows, key=lambda row: (row.day, row.key_id, row.model))

    @threaded
    def records(self, account_id: str, since: float, until: float) -> list[port.UsageRecord]:
        # A record's key goes on after its time, so it is above `since` and, at `until`, above that.
        if since >= until:
            return []  # BETWEEN the wrong way round is an error there
        items = self._table.query(f"USAGE#{account_id}", _stamp(since), _stamp(until))
        return [restored(port.UsageRecord, item) for item in items]

    @threaded
    def outages(self) -> dict[str, float]:
        now = self._clock()
        found = {item["sk"]: float(item["until"]) for item in self._table.query("OUTAGES")}
        return {deployment: until for deployment, until in found.items() if until > now}

    @threaded
    def report_outage(self, deployment: str, until: float) -> None:
        """Of two at once the later stands; both were right."""
        self._table.commit(Write("Put", "OUTAGES", deployment, {"until": until, "ttl": int(until) + 86_400}))


def recording(record: port.UsageRecord | None, *, new: bool = False) -> list[Write]:
    """The record, and the day that it is added to."""
    if record is None:
        return []
    day = f"{rules.day(record.time)}#{record.key_id}#{record.model}"
    added = Update(f"ROLLUP#{record.account_id}", day, exists=None)
    added.add("requests", 1)
    added.add("errors", int(record.status >= 400))
    added.add("milliseconds", round(record.seconds * 1000))  # whole numbers add up without drift
    added.add("cost", record.cost)
    sk = f"{_stamp(record.time)}#{record.request_id}"
    return [
        Write("Put", f"USAGE#{record.account_id}", sk, dataclasses.asdict(record), exists=False if new else None),
        added,
    ]


def _stamp(seconds: float) -> str:
    return f"{rules.microseconds(min(max(seconds, 0.0), 1e13)):020d}"


@contextlib.contextmanager
def _failing_as(error: Exception) -> Iterator[None]:
    try:
        yield
    except Failed as failed:
        raise error from failed
