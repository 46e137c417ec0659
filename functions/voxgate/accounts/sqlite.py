"""Accounts in one SQLite file: what `voxgate serve` keeps in its data directory."""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from voxgate.accounts import Account, Key
from voxgate.errors import InvalidSettings

_T = TypeVar("_T")
_BUSY_TIMEOUT = 10.0  # seconds that another process's write is waited for

# Step N brings a file from version N to N + 1; a released step never changes. The ledger's tables
# are a later step.
_MIGRATIONS = (
    """
    CREATE TABLE account (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created INTEGER NOT NULL) STRICT;
    CREATE TABLE key (
        id TEXT PRIMARY KEY,
        account_id TEXT NOT NULL REFERENCES account (id),
        digest BLOB NOT NULL UNIQUE,
        created INTEGER NOT NULL,
        revoked INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    """,
)


class SqliteAccounts:
    """Implements `Accounts`. One thread owns the connection, so that no query blocks the loop."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="accounts")
        self._connection = self._thread.submit(_open, path).result()

    async def find_key(self, digest: bytes) -> Key | None:
        rows = await self._query("SELECT id, account_id, created, revoked FROM key WHERE digest = ?", digest)
        return _key(rows[0]) if rows else None

    async def create_account(self, name: str) -> Account:
        account = Account(f"acct_{secrets.token_hex(8)}", name, int(self._clock()))
        try:
            await self._query("INSERT INTO account VALUES (?, ?, ?)", account.id, account.name, account.created)
        except sqlite3.IntegrityError as error:
            raise ValueError(f"There is an account named '{name}' already.") from error
        return account

    async def find_account(self, reference: str) -> Account:
        rows = await self._query(
            # An id before a name, should somebody name an account like another's id.
            "SELECT id, name, created FROM account WHERE id = ?1 OR name = ?1 ORDER BY id = ?1 DESC",
            reference,
        )
        if not rows:
            raise KeyError(f"There is no account '{reference}'.")
        return Account(*rows[0])

    async def keys(self, account_id: str) -> list[Key]:
        query = "SELECT id, account_id, created, revoked FROM key WHERE account_id = ? ORDER BY created, id"
        return [_key(row) for row in await self._query(query, account_id)]

    async def create_key(self, account_id: str, digest: bytes) -> Key:
        key = Key(f"key_{secrets.token_hex(8)}", account_id, int(self._clock()))
        query = """
            INSERT INTO key (id, account_id, digest, created) SELECT ?, id, ?, ? FROM account WHERE id = ? RETURNING id
        """
        if not await self._query(query, key.id, digest, key.created, account_id):
            raise KeyError(f"There is no account '{account_id}'.")
        return key

    async def revoke_key(self, key_id: str) -> Key:
        query = "UPDATE key SET revoked = 1 WHERE id = ? RETURNING id, account_id, created, revoked"
        rows = await self._query(query, key_id)
        if not rows:
            raise KeyError(f"There is no key '{key_id}'.")
        return _key(rows[0])

    async def close(self) -> None:
        await self._run(self._connection.close)
        self._thread.shutdown()

    async def _query(self, sql: str, *values: object) -> list[Any]:
        return await self._run(lambda: self._connection.execute(sql, values).fetchall())

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_TIMEOUT)
    _write_ahead(connection)
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("BEGIN IMMEDIATE")  # two processes may open a new file at once
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(_MIGRATIONS):
        connection.close()
        raise InvalidSettings(f"{path} was written by a newer Voxgate: update this one, or name another directory.")
    for step in _MIGRATIONS[version:]:
        for statement in step.split(";"):
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
    connection.execute("COMMIT")
    return connection


def _write_ahead(connection: sqlite3.Connection) -> None:
    # The busy timeout does not hold here: two processes that do this to a new file at once get
    # SQLITE_BUSY at once (https://www.sqlite.org/wal.html#sometimes_queries_return_sqlite_busy_in_wal_mode).
    deadline = time.monotonic() + _BUSY_TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _key(row: tuple[str, str, int, int]) -> Key:
    key_id, account_id, created, revoked = row
    return Key(key_id, account_id, created, bool(revoked))
