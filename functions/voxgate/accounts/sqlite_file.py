"""The SQLite file under `sqlite.py`: its schema, how it is opened, and who has it open."""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import time
from pathlib import Path

from voxgate.errors import InvalidSettings

_BUSY_TIMEOUT = 10.0  # seconds that another process's write is waited for

# Step N brings a file from version N to N + 1; a released step never changes.
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
    # Money is in micro-dollars; `expires`, `requests` and `audio` in microseconds, see rules.py.
    # What is held is the sum of the rows in `hold`, which are there only while they are open.
    """
    ALTER TABLE account ADD COLUMN status TEXT NOT NULL DEFAULT 'active';
    ALTER TABLE account ADD COLUMN requests_per_minute INTEGER;
    ALTER TABLE account ADD COLUMN audio_seconds_per_minute INTEGER;
    ALTER TABLE account ADD COLUMN concurrent_requests INTEGER;
    ALTER TABLE account ADD COLUMN budget INTEGER;
    ALTER TABLE account ADD COLUMN balance INTEGER NOT NULL DEFAULT 0 CHECK (balance >= 0);
    ALTER TABLE key ADD COLUMN name TEXT NOT NULL DEFAULT '';
    ALTER TABLE key ADD COLUMN scopes TEXT NOT NULL DEFAULT 'transcribe usage';
    ALTER TABLE key ADD COLUMN models TEXT;
    ALTER TABLE key ADD COLUMN expires INTEGER;
    ALTER TABLE key ADD COLUMN requests_per_minute INTEGER;
    ALTER TABLE key ADD COLUMN audio_seconds_per_minute INTEGER;
    ALTER TABLE key ADD COLUMN concurrent_requests INTEGER;
    ALTER TABLE key ADD COLUMN budget INTEGER;
    ALTER TABLE key ADD COLUMN last_used TEXT;
    CREATE TABLE tally (
        scope TEXT PRIMARY KEY, requests INTEGER NOT NULL DEFAULT 0, audio INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE TABLE spending (
        scope TEXT NOT NULL, month TEXT NOT NULL, amount INTEGER NOT NULL, PRIMARY KEY (scope, month)
    ) STRICT;
    CREATE TABLE slot (
        request_id TEXT PRIMARY KEY, account_id TEXT NOT NULL, key_id TEXT NOT NULL, expires INTEGER NOT NULL,
        owner TEXT NOT NULL
    ) STRICT;
    CREATE INDEX slot_account ON slot (account_id);
    CREATE TABLE hold (
        id TEXT PRIMARY KEY, account_id TEXT NOT NULL REFERENCES account (id), key_id TEXT NOT NULL,
        amount INTEGER NOT NULL CHECK (amount >= 0), month TEXT NOT NULL, expires INTEGER NOT NULL, owner TEXT NOT NULL
    ) STRICT;
    CREATE INDEX hold_account ON hold (account_id, amount);
    CREATE TABLE claim (
        account_id TEXT NOT NULL, key TEXT NOT NULL, fingerprint TEXT NOT NULL, hold_id TEXT NOT NULL UNIQUE,
        expires INTEGER NOT NULL, answer BLOB, PRIMARY KEY (account_id, key)
    ) STRICT;
    CREATE TABLE entry (
        account_id TEXT NOT NULL REFERENCES account (id), kind TEXT NOT NULL, amount INTEGER NOT NULL,
        time REAL NOT NULL, reference TEXT NOT NULL, note TEXT NOT NULL, PRIMARY KEY (account_id, kind, reference)
    ) STRICT;
    CREATE TABLE usage (
        request_id TEXT PRIMARY KEY, account_id TEXT NOT NULL, key_id TEXT NOT NULL, time REAL NOT NULL,
        contract TEXT NOT NULL, status INTEGER NOT NULL, latency REAL NOT NULL, model TEXT NOT NULL,
        provider TEXT NOT NULL, deployment TEXT NOT NULL, seconds REAL NOT NULL, size INTEGER NOT NULL,
        cost INTEGER NOT NULL, attempts INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX usage_time ON usage (account_id, time);
    """,
    """
    CREATE TABLE outage (deployment TEXT PRIMARY KEY, until REAL NOT NULL) STRICT;
    """,
    """
    ALTER TABLE account ADD COLUMN cache_seconds INTEGER;
    ALTER TABLE usage ADD COLUMN converted TEXT NOT NULL DEFAULT '';
    """,
    """
    CREATE TABLE token (
        digest BLOB PRIMARY KEY, key_id TEXT NOT NULL REFERENCES key (id), expires INTEGER NOT NULL
    ) STRICT;
    """,
)


def open_file(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # it holds answers; SQLite's other files follow its mode
    connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_TIMEOUT)
    connection.row_factory = sqlite3.Row
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous = NORMAL")
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


class Instance:
    """This process's mark on what it holds: a file locked for as long as the process lives. The
    kernel lets go of the lock when it ends, however it ends, so a sweep can tell whose holds are
    nobody's any more without waiting for them to expire."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self._directory = directory
        self.id = secrets.token_hex(8)
        self._file = os.open(directory / self.id, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def tidy(self) -> None:
        """Forget the processes that are gone."""
        for left in self._directory.iterdir():
            self.alive(left.name)

    def alive(self, owner: str) -> bool:
        try:
            file = os.open(self._directory / owner, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        (self._directory / owner).unlink(missing_ok=True)
        return False

    def close(self) -> None:
        (self._directory / self.id).unlink(missing_ok=True)
        os.close(self._file)
