"""The store in one SQLite file: what `voxgate serve` keeps in its data directory.

Each method is one transaction. The file is in WAL mode with `synchronous = NORMAL`: what was
committed survives the end of the process at any moment (a power cut may cost the last commits).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import voxgate.accounts as port
from voxgate.accounts import rules, stores
from voxgate.accounts.sqlite_file import Instance, open_file
from voxgate.accounts.stores import Threaded, threaded

_LIMITS = [field.name for field in dataclasses.fields(port.RateLimits)]


class SqliteStore(Threaded):
    """Implements `Store`. One thread owns the connection, so that no query blocks a loop."""

    lookup_seconds = 2.0  # asking the file again is cheap

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        super().__init__("accounts", 1, clock)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._instance = Instance(path.parent / "instances")
        self._connection = self._threads.submit(open_file, path).result()
        self._reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._reader.row_factory = sqlite3.Row
        self._reading = threading.Lock()

    async def find_credential(self, digest: bytes) -> port.Credential | None:
        # On the loop itself: in WAL mode a reader waits for nobody, and the way to the thread and back
        # would cost ten times the look-up, which is what a flood of wrong keys is made of.
        with self._reading:
            key = self._reader.execute("SELECT * FROM key WHERE digest = ?", (digest,)).fetchone()
            if key is None:
                return None
            account = self._reader.execute("SELECT * FROM account WHERE id = ?", (key["account_id"],)).fetchone()
        return port.Credential(_account(account), _key(key), key["digest"])

    @threaded
    def create_token(self, digest: bytes, key: port.Key, expires: int) -> None:
        _insert(self._connection, "token", {"digest": digest, "key_id": key.id, "expires": expires})

    @threaded
    def find_token(self, digest: bytes) -> port.Credential | None:
        query = "SELECT key.*, token.expires AS until FROM token JOIN key ON key.id = key_id WHERE token.digest = ?"
        for row in self._all(query, digest):
            account = self._all("SELECT * FROM account WHERE id = ?", row["account_id"])
            return stores.token(port.Credential(_account(account[0]), _key(row), digest), row["until"])
        return None

    @threaded
    def create_account(
        self, name: str, *, limits: port.RateLimits = port.NO_LIMITS, budget: int | None = None
    ) -> port.Account:
        account = stores.new_account(name, self._clock(), limits, budget)
        try:
            _insert(self._connection, "account", _row(account))
        except sqlite3.IntegrityError as error:
            raise stores.name_taken(name) from error
        return account

    @threaded
    def find_account(self, reference: str) -> port.Account:
        # An id before a name, should somebody name an account like another's id.
        query = "SELECT * FROM account WHERE id = ?1 OR name = ?1 ORDER BY id = ?1 DESC"
        return _account(self._one(stores.no_account(reference), query, reference))

    @threaded
    def accounts(self) -> list[port.Account]:
        return [_account(row) for row in self._all("SELECT * FROM account ORDER BY created, id")]

    @threaded
    def change_account(self, account: port.Account) -> None:
        changed = {name: value for name, value in _row(account).items() if name not in ("id", "name", "created")}
        query = f"UPDATE account SET ({', '.join(changed)}) = ({_marks(changed)}) WHERE id = ? RETURNING id"
        self._one(stores.no_account(account.id), query, *changed.values(), account.id)

    @threaded
    def keys(self, account_id: str) -> list[port.Key]:
        query = "SELECT * FROM key WHERE account_id = ? ORDER BY created, id"
        return [_key(row) for row in self._all(query, account_id)]

    @threaded
    def create_key(self, key: port.Key, digest: bytes) -> None:
        text = {
            "scopes": " ".join(sorted(key.scopes)),
            "models": None if key.models is None else json.dumps(key.models),
            "revoked": key.revoked or 0,
        }
        try:
            _insert(self._connection, "key", _row(key) | text | {"digest": digest})
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorname == "SQLITE_CONSTRAINT_FOREIGNKEY":
                raise stores.no_account(key.account_id) from error
            raise stores.key_taken(key) from error

    @threaded
    def find_key(self, key_id: str) -> port.Key:
        return _key(self._one(stores.no_key(key_id), "SELECT * FROM key WHERE id = ?", key_id))

    @threaded
    def revoke_key(self, key_id: str) -> port.Key:
        query = "UPDATE key SET revoked = iif(revoked, revoked, ?) WHERE id = ? RETURNING *"
        return _key(self._one(stores.no_key(key_id), query, int(self._clock()), key_id))

    @threaded
    def mark_used(self, key: port.Key, day: str) -> None:
        query = "UPDATE key SET last_used = max(?, coalesce(last_used, '')) WHERE id = ? RETURNING id"
        self._one(stores.no_key(key.id), query, day, key.id)

    @threaded
    def admit(self, ticket: port.Ticket, *, lease: float, paid: bool = True, slot: bool = True) -> port.Standing:
        with self._transaction() as db:
            now = self._now()
            state = _state(db, ticket, now)
            rules.check_admission(state, now, paid=paid, slot=slot)
            for tally in state.tallies:
                if bucket := tally.request_bucket:
                    _fill(db, "requests", tally, bucket.take(tally.requests, 1, now))
            if slot:
                _insert(db, "slot", self._lasting("request_id", ticket, now, lease), otherwise="REPLACE")
            return rules.standing(_state(db, ticket, now), now)

    @threaded
    def leave(self, ticket: port.Ticket, record: port.UsageRecord | None = None) -> None:
        with self._transaction() as db:
            _leave(db, ticket.request_id, record)

    @threaded
    def hold(
        self, ticket: port.Ticket, amount: int, *, tenths: int, lease: float, claim: port.Claim | None = None
    ) -> port.Hold | port.Replay:
        with self._transaction() as db:
            now = self._now()
            month = rules.month(now)
            state = _state(db, ticket, now)
            mine = db.execute("SELECT amount, month FROM hold WHERE id = ?", (ticket.request_id,)).fetchone()
            if mine is not None:
                return port.Hold(ticket, mine["amount"], mine["month"], claim, rules.standing(state, now))
            if claim is not None and (row := _claimed(db, ticket.account_id, claim.key, now)):
                rules.check_claim(claim, row["fingerprint"], answered=row["answer"] is not None)
                return port.Replay(row["answer"])
            rules.check_hold(state, amount, tenths, now)
            for tally in state.tallies:
                if bucket := tally.audio_bucket:
                    _fill(db, "audio", tally, bucket.take(tally.audio, tenths, now))
            held = self._lasting("id", ticket, now, lease) | {"amount": amount, "month": month}
            _insert(db, "hold", held)
            _spend(db, (ticket.account_id, ticket.key_id), month, amount)
            if claim is not None:
                laid = dataclasses.asdict(claim) | {"account_id": ticket.account_id, "hold_id": ticket.request_id}
                _insert(db, "claim", laid | {"expires": held["expires"]}, otherwise="REPLACE")
            return port.Hold(ticket, amount, month, claim, rules.standing(_state(db, ticket, now), now))

    @threaded
    def extend(self, hold: port.Hold, amount: int, *, tenths: int, lease: float) -> port.Hold:
        with self._transaction() as db:
            now = self._now()
            state = _state(db, hold.ticket, now, hold.month)
            query = "UPDATE hold SET amount = amount + ?, expires = ? WHERE id = ? RETURNING amount"
            until = now + rules.microseconds(lease)
            row = db.execute(query, (amount, until, hold.id)).fetchone()
            if row is None:
                raise stores.ended(hold)
            if amount or tenths:
                rules.check_hold(state, amount, tenths, now, more=True)
            for tally in state.tallies:
                if bucket := tally.audio_bucket:
                    _fill(db, "audio", tally, bucket.take(tally.audio, tenths, now))
            db.execute("UPDATE slot SET expires = ? WHERE request_id = ?", (until, hold.id))
            _spend(db, (hold.ticket.account_id, hold.ticket.key_id), hold.month, amount)
            standing = rules.standing(_state(db, hold.ticket, now), now)
            return dataclasses.replace(hold, amount=row["amount"], standing=standing)

    @threaded
    def settle(
        self, hold: port.Hold, cost: int, record: port.UsageRecord, answer: bytes | None = None
    ) -> port.Balance | None:
        stores.check_cost(hold, cost)
        account_id = hold.ticket.account_id
        with self._transaction() as db:
            now = self._clock()
            entry = port.Entry(account_id, port.EntryKind.CHARGE, -cost, now, hold.id)
            if _entered(db, entry):
                _end(db, hold.id, 0)  # a hold of that request that came late, sent twice
                return _balance(db, account_id, now)
            if _end(db, hold.id, cost) is None:
                raise stores.ended(hold)
            _enter(db, entry)
            if answer is not None:
                query = "UPDATE claim SET answer = ?, expires = ? WHERE hold_id = ?"
                until = rules.microseconds(now + port.ANSWER_SECONDS)
                laid = db.execute(query, (answer, until, hold.id))
                if hold.claim and not laid.rowcount:  # its time was over, and another request has it now
                    raise port.HoldEnded(f"The hold {hold.id} has lost its Idempotency-Key.")
            _leave(db, hold.id, record)
            return _balance(db, account_id, now)

    @threaded
    def release(self, hold: port.Hold, record: port.UsageRecord | None = None) -> None:
        with self._transaction() as db:
            if _end(db, hold.id, 0) is not None:
                _leave(db, hold.id, record)

    @threaded
    def claimed(self, account_id: str, claim_key: str) -> bool:
        return _claimed(self._connection, account_id, claim_key, self._now()) is not None

    @threaded
    def post(self, entry: port.Entry) -> port.Balance:
        with self._transaction() as db:
            before = _balance(db, entry.account_id, self._clock())
            if _entered(db, entry):
                return before
            if before.free + entry.amount < 0:
                raise rules.overdrawn(before.free, entry.amount)
            _enter(db, entry)
            return _balance(db, entry.account_id, self._clock())

    @threaded
    def balance(self, account_id: str) -> port.Balance:
        with self._transaction("BEGIN") as db:
            return _balance(db, account_id, self._clock())

    @threaded
    def entries(self, account_id: str) -> list[port.Entry]:
        rows = self._all("SELECT * FROM entry WHERE account_id = ? ORDER BY time, rowid", account_id)
        return [stores.restored(port.Entry, dict(row)) for row in rows]

    @threaded
    def usage(self, account_id: str, since: str, until: str) -> list[port.UsageRow]:
        query = """
            SELECT date(time, 'unixepoch') AS day, key_id, model, count(*), sum(status >= 400),
                   round(sum(seconds), 1), sum(cost)
            FROM usage WHERE account_id = ? AND time >= ? AND time < ?
            GROUP BY day, key_id, model ORDER BY day, key_id, model
        """
        begin, end = rules.midnight(since), rules.midnight(until) + 86_400
        return [port.UsageRow(*row) for row in self._all(query, account_id, begin, end)]

    @threaded
    def records(self, account_id: str, since: float, until: float) -> list[port.UsageRecord]:
        query = "SELECT * FROM usage WHERE account_id = ? AND time >= ? AND time < ? ORDER BY time"
        return [stores.restored(port.UsageRecord, dict(row)) for row in self._all(query, account_id, since, until)]

    @threaded
    def outages(self) -> dict[str, float]:
        return dict(self._all("SELECT deployment, until FROM outage WHERE until > ?", self._clock()))

    @threaded
    def report_outage(self, deployment: str, until: float) -> None:
        _insert(self._connection, "outage", {"deployment": deployment, "until": until}, otherwise="REPLACE")

    @threaded
    def sweep(self) -> port.Swept:
        with self._transaction() as db:
            now = self._now()
            owners = db.execute("SELECT owner FROM hold UNION SELECT owner FROM slot").fetchall()
            gone = json.dumps([owner for (owner,) in owners if not self._instance.alive(owner)])
            over = "expires <= ?1 OR owner IN (SELECT value FROM json_each(?2))"
            holds = db.execute(f"SELECT id FROM hold WHERE {over}", (now, gone)).fetchall()
            amount = sum(_end(db, hold_id, 0) or 0 for (hold_id,) in holds)
            slots = db.execute(f"DELETE FROM slot WHERE {over}", (now, gone)).rowcount
            db.execute("DELETE FROM claim WHERE expires <= ?", (now,))
            db.execute("DELETE FROM token WHERE expires <= ?", (self._clock(),))
            self._instance.tidy()
            return port.Swept(len(holds), amount, slots)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, self._connection.close)
        self._threads.shutdown()
        self._reader.close()
        self._instance.close()

    def _lasting(self, name: str, ticket: port.Ticket, now: int, lease: float) -> dict[str, Any]:
        """What a hold and a place both have: whose they are, until when, and which process answers for them."""
        whose = {name: ticket.request_id, "account_id": ticket.account_id, "key_id": ticket.key_id}
        return whose | {"expires": now + rules.microseconds(lease), "owner": self._instance.id}

    def _all(self, query: str, *values: object) -> list[Any]:
        return self._connection.execute(query, values).fetchall()

    def _one(self, missing: KeyError, query: str, *values: object) -> Any:
        rows = self._all(query, *values)
        if not rows:
            raise missing
        return rows[0]

    @contextlib.contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        # Immediate: a transaction that reads before it writes must not find itself behind another's write.
        try:
            self._connection.execute(begin)
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # of some failures SQLite has rolled back already
                self._connection.execute("ROLLBACK")
            raise


def _state(db: sqlite3.Connection, ticket: port.Ticket, now: int, month: str = "") -> rules.State:
    """With what was spent in that month, or in this one."""
    row = db.execute(
        "SELECT balance, balance - (SELECT coalesce(sum(amount), 0) FROM hold WHERE account_id = account.id) "
        "FROM account WHERE id = ?",
        (ticket.account_id,),
    ).fetchone()
    if row is None:
        raise stores.no_account(ticket.account_id)
    return rules.State(
        row[0], row[1], tuple(_tally(db, bounds, ticket, now, month or rules.month(now)) for bounds in ticket.bounds)
    )


def _tally(db: sqlite3.Connection, bounds: port.Bounds, ticket: port.Ticket, now: int, month: str) -> rules.Tally:
    column = "account_id" if bounds.id == ticket.account_id else "key_id"
    row = db.execute(
        f"""
        SELECT coalesce(max(requests), 0), coalesce(max(audio), 0),
               (SELECT count(*) FROM slot WHERE account_id = ?2 AND {column} = ?1 AND expires > ?3),
               coalesce((SELECT amount FROM spending WHERE scope = ?1 AND month = ?4), 0)
        FROM tally WHERE scope = ?1
        """,
        (bounds.id, ticket.account_id, now, month),
    ).fetchone()
    return rules.Tally(bounds, *row)


def _fill(db: sqlite3.Connection, column: str, tally: rules.Tally, full: int) -> None:
    query = f"INSERT INTO tally (scope, {column}) VALUES (?, ?) ON CONFLICT DO UPDATE SET {column} = excluded.{column}"
    db.execute(query, (tally.bounds.id, full))


def _claimed(db: sqlite3.Connection, account_id: str, claim_key: str, now: int) -> Any:
    query = "SELECT fingerprint, answer FROM claim WHERE account_id = ? AND key = ? AND expires > ?"
    return db.execute(query, (account_id, claim_key, now)).fetchone()


def _end(db: sqlite3.Connection, hold_id: str, cost: int) -> int | None:
    """Close an open hold and charge its cost; what it held, or None where it was not open. A claim
    goes with it until `settle` has an answer for it."""
    query = "DELETE FROM hold WHERE id = ? RETURNING account_id, key_id, amount, month"
    row = db.execute(query, (hold_id,)).fetchone()
    if row is None:
        return None
    account_id, key_id, amount, month = row
    db.execute("UPDATE claim SET expires = 0 WHERE hold_id = ?", (hold_id,))
    _spend(db, (account_id, key_id), month, cost - amount)
    return int(amount)


def _spend(db: sqlite3.Connection, scopes: tuple[str, ...], month: str, amount: int) -> None:
    query = "INSERT INTO spending VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET amount = amount + excluded.amount"
    db.executemany(query, [(scope, month, amount) for scope in scopes])


def _entered(db: sqlite3.Connection, entry: port.Entry) -> bool:
    query = "SELECT 1 FROM entry WHERE account_id = ? AND kind = ? AND reference = ?"
    return db.execute(query, (entry.account_id, entry.kind, entry.reference)).fetchone() is not None


def _enter(db: sqlite3.Connection, entry: port.Entry) -> None:
    _insert(db, "entry", _row(entry))
    db.execute("UPDATE account SET balance = balance + ? WHERE id = ?", (entry.amount, entry.account_id))


def _leave(db: sqlite3.Connection, request_id: str, record: port.UsageRecord | None) -> None:
    db.execute("DELETE FROM slot WHERE request_id = ?", (request_id,))
    if record is not None:
        _insert(db, "usage", _row(record), otherwise="IGNORE")


def _balance(db: sqlite3.Connection, account_id: str, now: float) -> port.Balance:
    row = db.execute("SELECT balance FROM account WHERE id = ?", (account_id,)).fetchone()
    if row is None:
        raise stores.no_account(account_id)
    holds = dict(db.execute("SELECT id, amount FROM hold WHERE account_id = ?", (account_id,)).fetchall())
    query = "SELECT amount FROM spending WHERE scope = ? AND month = ?"
    spent = db.execute(query, (account_id, rules.month(rules.microseconds(now)))).fetchone()
    return port.Balance(row[0], sum(holds.values()), spent[0] if spent else 0, holds)


def _account(row: sqlite3.Row) -> port.Account:
    return stores.restored(port.Account, _item(row))


def _key(row: sqlite3.Row) -> port.Key:
    models = json.loads(row["models"] or "null")
    text = {"scopes": row["scopes"].split(), "models": models, "revoked": row["revoked"] or None}
    return stores.restored(port.Key, _item(row) | text)


def _item(row: sqlite3.Row) -> dict[str, Any]:
    return dict(row) | {"limits": {name: row[name] for name in _LIMITS}}


def _row(record: port.Account | port.Key | port.Entry | port.UsageRecord) -> dict[str, Any]:
    """Its columns, of which limits have one each. `dataclasses.asdict` copies deeply, which these need not."""
    row = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    limits = row.pop("limits", None)
    return row | dataclasses.asdict(limits) if limits else row


def _insert(db: sqlite3.Connection, table: str, row: Mapping[str, object], *, otherwise: str = "ABORT") -> None:
    query = f"INSERT OR {otherwise} INTO {table} ({', '.join(row)}) VALUES ({_marks(row)})"
    db.execute(query, tuple(row.values()))


def _marks(columns: Mapping[str, object]) -> str:
    return ", ".join("?" * len(columns))
