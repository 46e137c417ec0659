"""The store in one SQLite file: what `voxgate serve` keeps in its data directory.

Each method is one transaction. The file is in WAL mode with `synchronous = NORMAL`: what was
committed survives the end of the process at any moment (a power cut may cost the last commits).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

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
)
from voxgate.accounts.rules import (
    State,
    Tally,
    check_admission,
    check_claim,
    check_hold,
    microseconds,
    midnight,
    month,
    overdrawn,
    standing,
)
from voxgate.accounts.sqlite_file import Instance, open_file

_T = TypeVar("_T")
_LIMITS = "requests_per_minute, audio_seconds_per_minute, concurrent_requests"
_ACCOUNT = f"id, name, created, status, budget, cache_seconds, {_LIMITS}"
_KEY = f"id, account_id, created, name, scopes, models, expires, budget, last_used, revoked, {_LIMITS}"


class SqliteStore:
    """Implements `Store`. One thread owns the connection, so that no query blocks a loop."""

    lookup_seconds = 2.0  # asking the file again is cheap

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._clock = clock
        self._instance = Instance(path.parent / "instances")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="accounts")
        self._connection = self._thread.submit(open_file, path).result()
        self._reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._reading = threading.Lock()

    async def find_credential(self, digest: bytes) -> Credential | None:
        query = f"SELECT digest, {_of('key', _KEY)}, {_of('account', _ACCOUNT)} "
        query += "FROM key JOIN account ON account.id = account_id WHERE digest = ?"
        # On the loop itself: in WAL mode a reader waits for nobody, and the way to the thread and back
        # would cost ten times the look-up, which is what a flood of wrong keys is made of.
        with self._reading:
            rows = self._reader.execute(query, (digest,)).fetchall()
        return Credential(_account(rows[0][14:]), _key(rows[0][1:14]), rows[0][0]) if rows else None

    async def create_account(self, name: str, *, limits: RateLimits = NO_LIMITS, budget: int | None = None) -> Account:
        account = Account(
            id=f"acct_{secrets.token_hex(8)}", name=name, created=int(self._clock()), limits=limits, budget=budget
        )
        values = (account.id, name, account.created, account.status, budget, None, *_values(limits))
        try:
            await self._run(lambda db: db.execute(f"INSERT INTO account ({_ACCOUNT}) VALUES ({_marks(9)})", values))
        except sqlite3.IntegrityError as error:
            raise ValueError(f"There is an account named '{name}' already.") from error
        return account

    async def find_account(self, reference: str) -> Account:
        rows = await self._all(
            # An id before a name, should somebody name an account like another's id.
            f"SELECT {_ACCOUNT} FROM account WHERE id = ?1 OR name = ?1 ORDER BY id = ?1 DESC",
            reference,
        )
        if not rows:
            raise KeyError(f"There is no account '{reference}'.")
        return _account(rows[0])

    async def accounts(self) -> list[Account]:
        return [_account(row) for row in await self._all(f"SELECT {_ACCOUNT} FROM account ORDER BY created, id")]

    async def change_account(self, account: Account) -> None:
        columns = f"status, budget, cache_seconds, {_LIMITS}"
        await self._one(
            f"no account '{account.id}'",
            f"UPDATE account SET ({columns}) = ({_marks(6)}) WHERE id = ? RETURNING id",
            *(account.status, account.budget, account.cache_seconds, *_values(account.limits), account.id),
        )

    async def keys(self, account_id: str) -> list[Key]:
        query = f"SELECT {_KEY} FROM key WHERE account_id = ? ORDER BY created, id"
        return [_key(row) for row in await self._all(query, account_id)]

    async def create_key(self, key: Key, digest: bytes) -> None:
        models = None if key.models is None else json.dumps(key.models)
        values = (
            *(key.id, key.account_id, key.created, key.name, " ".join(sorted(key.scopes)), models, key.expires),
            *(key.budget, key.last_used, key.revoked or 0, *_values(key.limits), digest),
        )
        try:
            await self._run(lambda db: db.execute(f"INSERT INTO key ({_KEY}, digest) VALUES ({_marks(14)})", values))
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorname == "SQLITE_CONSTRAINT_FOREIGNKEY":
                raise KeyError(f"There is no account '{key.account_id}'.") from error
            raise ValueError(f"There is a key '{key.id}' already, or one with the same hash.") from error

    async def find_key(self, key_id: str) -> Key:
        return _key(await self._one(f"no key '{key_id}'", f"SELECT {_KEY} FROM key WHERE id = ?", key_id))

    async def revoke_key(self, key_id: str) -> Key:
        query = f"UPDATE key SET revoked = iif(revoked, revoked, ?) WHERE id = ? RETURNING {_KEY}"
        return _key(await self._one(f"no key '{key_id}'", query, int(self._clock()), key_id))

    async def mark_used(self, key: Key, day: str) -> None:
        query = "UPDATE key SET last_used = max(?, coalesce(last_used, '')) WHERE id = ? RETURNING id"
        await self._one(f"no key '{key.id}'", query, day, key.id)

    async def admit(self, ticket: Ticket, *, lease: float, paid: bool = True, slot: bool = True) -> Standing:
        def work(db: sqlite3.Connection) -> Standing:
            now = microseconds(self._clock())
            state = _state(db, ticket, now)
            check_admission(state, now, paid=paid, slot=slot)
            for tally in state.tallies:
                if bucket := tally.request_bucket:
                    _fill(db, "requests", tally, bucket.take(tally.requests, 1, now))
            if slot:
                db.execute(
                    "INSERT OR REPLACE INTO slot VALUES (?, ?, ?, ?, ?)",
                    (ticket.request_id, ticket.account_id, ticket.key_id, now + microseconds(lease), self._instance.id),
                )
            return standing(_state(db, ticket, now), now)

        return await self._run(work)

    async def leave(self, ticket: Ticket, record: UsageRecord | None = None) -> None:
        await self._run(lambda db: _leave(db, ticket.request_id, record))

    async def hold(
        self, ticket: Ticket, amount: int, *, tenths: int, lease: float, claim: Claim | None = None
    ) -> Hold | Replay:
        def work(db: sqlite3.Connection) -> Hold | Replay:
            now = microseconds(self._clock())
            state = _state(db, ticket, now)
            mine = db.execute("SELECT amount, month FROM hold WHERE id = ?", (ticket.request_id,)).fetchone()
            if mine is not None:
                return Hold(ticket, mine[0], mine[1], claim, standing(state, now))
            if claim is not None and (replay := _claimed(db, ticket, claim, now)):
                return replay
            check_hold(state, amount, tenths, now)
            for tally in state.tallies:
                if bucket := tally.audio_bucket:
                    _fill(db, "audio", tally, bucket.take(tally.audio, tenths, now))
            expires = now + microseconds(lease)
            values = (ticket.request_id, ticket.account_id, ticket.key_id, amount, month(now), expires)
            db.execute("INSERT INTO hold VALUES (?, ?, ?, ?, ?, ?, ?)", (*values, self._instance.id))
            _spend(db, (ticket.account_id, ticket.key_id), month(now), amount)
            if claim is not None:
                db.execute(
                    "INSERT OR REPLACE INTO claim VALUES (?, ?, ?, ?, ?, NULL)",
                    (ticket.account_id, claim.key, claim.fingerprint, ticket.request_id, expires),
                )
            return Hold(ticket, amount, month(now), claim, standing(_state(db, ticket, now), now))

        return await self._run(work)

    async def settle(self, hold: Hold, cost: int, record: UsageRecord, answer: bytes | None = None) -> Balance | None:
        if not 0 <= cost <= hold.amount:
            raise ValueError(f"A hold of {hold.amount} cannot be settled with {cost}.")

        def work(db: sqlite3.Connection) -> Balance:
            account_id, now = hold.ticket.account_id, self._clock()
            if _entered(db, account_id, EntryKind.CHARGE, hold.id):
                _end(db, hold.id, 0)  # a hold of that request that came late, sent twice
                return _balance(db, account_id, now)
            if _end(db, hold.id, cost) is None:
                raise HoldEnded(f"The hold {hold.id} has ended.")
            _enter(db, Entry(account_id, EntryKind.CHARGE, -cost, now, hold.id))
            if answer is not None:
                until = microseconds(now + ANSWER_SECONDS)
                laid = db.execute(
                    "UPDATE claim SET answer = ?, expires = ? WHERE hold_id = ?", (answer, until, hold.id)
                )
                if hold.claim and not laid.rowcount:  # its time was over, and another request has it now
                    raise HoldEnded(f"The hold {hold.id} has lost its Idempotency-Key.")
            _leave(db, hold.id, record)
            return _balance(db, account_id, now)

        return await self._run(work)

    async def release(self, hold: Hold, record: UsageRecord | None = None) -> None:
        def work(db: sqlite3.Connection) -> None:
            if _end(db, hold.id, 0) is not None:
                _leave(db, hold.id, record)

        await self._run(work)

    async def claimed(self, account_id: str, claim_key: str) -> bool:
        query = "SELECT 1 FROM claim WHERE account_id = ? AND key = ? AND expires > ?"
        return bool(await self._all(query, account_id, claim_key, microseconds(self._clock())))

    async def post(self, entry: Entry) -> Balance:
        def work(db: sqlite3.Connection) -> Balance:
            before = _balance(db, entry.account_id, self._clock())
            if _entered(db, entry.account_id, entry.kind, entry.reference):
                return before
            if before.free + entry.amount < 0:
                raise overdrawn(before.free, entry.amount)
            _enter(db, entry)
            return _balance(db, entry.account_id, self._clock())

        return await self._run(work)

    async def balance(self, account_id: str) -> Balance:
        return await self._run(lambda db: _balance(db, account_id, self._clock()), begin="BEGIN")

    async def entries(self, account_id: str) -> list[Entry]:
        query = "SELECT account_id, kind, amount, time, reference, note FROM entry WHERE account_id = ? "
        query += "ORDER BY time, rowid"
        return [Entry(row[0], EntryKind(row[1]), *row[2:]) for row in await self._all(query, account_id)]

    async def usage(self, account_id: str, since: str, until: str) -> list[UsageRow]:
        query = """
            SELECT date(time, 'unixepoch') AS day, key_id, model, count(*), sum(status >= 400),
                   round(sum(seconds), 1), sum(cost)
            FROM usage WHERE account_id = ? AND time >= ? AND time < ?
            GROUP BY day, key_id, model ORDER BY day, key_id, model
        """
        begin, end = midnight(since), midnight(until) + 86_400
        return [UsageRow(*row) for row in await self._all(query, account_id, begin, end)]

    async def records(self, account_id: str, since: float, until: float) -> list[UsageRecord]:
        columns = ", ".join(field.name for field in dataclasses.fields(UsageRecord))
        query = f"SELECT {columns} FROM usage WHERE account_id = ? AND time >= ? AND time < ? ORDER BY time"
        return [UsageRecord(*row) for row in await self._all(query, account_id, since, until)]

    async def outages(self) -> dict[str, float]:
        return dict(await self._all("SELECT deployment, until FROM outage WHERE until > ?", self._clock()))

    async def report_outage(self, deployment: str, until: float) -> None:
        await self._all("INSERT OR REPLACE INTO outage VALUES (?, ?)", deployment, until)

    async def sweep(self) -> Swept:
        def work(db: sqlite3.Connection) -> Swept:
            now = microseconds(self._clock())
            owners = db.execute("SELECT owner FROM hold UNION SELECT owner FROM slot").fetchall()
            gone = [(owner,) for (owner,) in owners if not self._instance.alive(owner)]
            over = "expires <= ?1 OR owner IN (SELECT owner FROM temp.gone)"
            db.execute("CREATE TEMP TABLE IF NOT EXISTS gone (owner TEXT)")
            db.execute("DELETE FROM temp.gone")
            db.executemany("INSERT INTO temp.gone VALUES (?)", gone)
            holds = [row[0] for row in db.execute(f"SELECT id FROM hold WHERE {over}", (now,)).fetchall()]
            amount = sum(_end(db, hold_id, 0) or 0 for hold_id in holds)
            slots = db.execute(f"DELETE FROM slot WHERE {over}", (now,)).rowcount
            db.execute("DELETE FROM claim WHERE expires <= ?", (now,))
            self._instance.tidy()
            return Swept(len(holds), amount, slots)

        return await self._run(work)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._connection.close)
        self._thread.shutdown()
        self._reader.close()
        self._instance.close()

    async def _all(self, sql: str, *values: object) -> list[Any]:
        """One statement, which is a transaction by itself."""
        work = functools.partial(self._connection.execute, sql, values)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work().fetchall())

    async def _one(self, missing: str, sql: str, *values: object) -> Any:
        rows = await self._all(sql, *values)
        if not rows:
            raise KeyError(f"There is {missing}.")
        return rows[0]

    async def _run(self, work: Callable[[sqlite3.Connection], _T], begin: str = "BEGIN IMMEDIATE") -> _T:
        # Immediate: a transaction that reads before it writes must not find itself behind another's write.
        def transaction() -> _T:
            with _transaction(self._connection, begin):
                return work(self._connection)

        return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)


def _state(db: sqlite3.Connection, ticket: Ticket, now: int) -> State:
    row = db.execute(
        "SELECT balance, balance - (SELECT coalesce(sum(amount), 0) FROM hold WHERE account_id = account.id) "
        "FROM account WHERE id = ?",
        (ticket.account_id,),
    ).fetchone()
    if row is None:
        raise KeyError(f"There is no account '{ticket.account_id}'.")
    return State(row[0], row[1], tuple(_tally(db, bounds, ticket, now) for bounds in ticket.bounds))


def _tally(db: sqlite3.Connection, bounds: Bounds, ticket: Ticket, now: int) -> Tally:
    column = "account_id" if bounds.id == ticket.account_id else "key_id"
    row = db.execute(
        f"""
        SELECT coalesce(max(requests), 0), coalesce(max(audio), 0),
               (SELECT count(*) FROM slot WHERE account_id = ?2 AND {column} = ?1 AND expires > ?3),
               coalesce((SELECT amount FROM spending WHERE scope = ?1 AND month = ?4), 0)
        FROM tally WHERE scope = ?1
        """,
        (bounds.id, ticket.account_id, now, month(now)),
    ).fetchone()
    return Tally(bounds, *row)


def _fill(db: sqlite3.Connection, column: str, tally: Tally, full: int) -> None:
    query = f"INSERT INTO tally (scope, {column}) VALUES (?, ?) ON CONFLICT DO UPDATE SET {column} = excluded.{column}"
    db.execute(query, (tally.bounds.id, full))


def _claimed(db: sqlite3.Connection, ticket: Ticket, claim: Claim, now: int) -> Replay | None:
    query = "SELECT fingerprint, answer FROM claim WHERE account_id = ? AND key = ? AND expires > ?"
    row = db.execute(query, (ticket.account_id, claim.key, now)).fetchone()
    if row is None:
        return None
    check_claim(claim, row[0], answered=row[1] is not None)
    return Replay(row[1])


def _end(db: sqlite3.Connection, hold_id: str, cost: int) -> int | None:
    """Close an open hold and charge its cost; what it held, or None where it was not open. A claim
    goes with it until `settle` has an answer for it."""
    query = "DELETE FROM hold WHERE id = ? RETURNING account_id, key_id, amount, month"
    row = db.execute(query, (hold_id,)).fetchone()
    if row is None:
        return None
    account_id, key_id, amount, spent_in = row
    db.execute("UPDATE claim SET expires = 0 WHERE hold_id = ?", (hold_id,))
    _spend(db, (account_id, key_id), spent_in, cost - amount)
    return int(amount)


def _spend(db: sqlite3.Connection, scopes: tuple[str, ...], spent_in: str, amount: int) -> None:
    query = "INSERT INTO spending VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET amount = amount + excluded.amount"
    db.executemany(query, [(scope, spent_in, amount) for scope in scopes])


def _entered(db: sqlite3.Connection, account_id: str, kind: EntryKind, reference: str) -> bool:
    query = "SELECT 1 FROM entry WHERE account_id = ? AND kind = ? AND reference = ?"
    return db.execute(query, (account_id, kind, reference)).fetchone() is not None


def _enter(db: sqlite3.Connection, entry: Entry) -> None:
    db.execute("INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?)", _values(entry))
    db.execute("UPDATE account SET balance = balance + ? WHERE id = ?", (entry.amount, entry.account_id))


def _leave(db: sqlite3.Connection, request_id: str, record: UsageRecord | None) -> None:
    db.execute("DELETE FROM slot WHERE request_id = ?", (request_id,))
    if record is not None:
        values = _values(record)
        db.execute(
            f"INSERT INTO usage ({', '.join(field.name for field in dataclasses.fields(record))}) "
            f"VALUES ({_marks(len(values))}) ON CONFLICT DO NOTHING",
            values,
        )


def _balance(db: sqlite3.Connection, account_id: str, now: float) -> Balance:
    row = db.execute("SELECT balance FROM account WHERE id = ?", (account_id,)).fetchone()
    if row is None:
        raise KeyError(f"There is no account '{account_id}'.")
    holds = dict(db.execute("SELECT id, amount FROM hold WHERE account_id = ?", (account_id,)).fetchall())
    query = "SELECT amount FROM spending WHERE scope = ? AND month = ?"
    spent = db.execute(query, (account_id, month(microseconds(now)))).fetchone()
    return Balance(row[0], sum(holds.values()), spent[0] if spent else 0, holds)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    try:
        connection.execute(begin)
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # of some failures SQLite has rolled back already
            connection.execute("ROLLBACK")
        raise


def _account(row: tuple[Any, ...]) -> Account:
    account_id, name, created, status, budget, cache_seconds, *limits = row
    return Account(
        id=account_id,
        name=name,
        created=created,
        status=Status(status),
        budget=budget,
        cache_seconds=cache_seconds,
        limits=RateLimits(*limits),
    )


def _key(row: tuple[Any, ...]) -> Key:
    key_id, account_id, created, name, scopes, models, expires, budget, last_used, revoked, *limits = row
    return Key(
        id=key_id,
        account_id=account_id,
        created=created,
        name=name,
        scopes=frozenset(map(Scope, scopes.split())),
        models=None if models is None else tuple(json.loads(models)),
        expires=expires,
        budget=budget,
        last_used=last_used,
        revoked=revoked or None,
        limits=RateLimits(*limits),
    )


def _of(table: str, columns: str) -> str:
    return ", ".join(f"{table}.{column}" for column in columns.split(", "))


def _values(record: Entry | UsageRecord | RateLimits) -> tuple[Any, ...]:
    """`dataclasses.astuple` copies deeply, which these need not."""
    return tuple(getattr(record, field.name) for field in dataclasses.fields(record))


def _marks(count: int) -> str:
    return ", ".join("?" * count)
