"""What only the SQLite store has: a file that several processes open, write and are killed over."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fakes.store import Bench, Clock, SqliteBackend, sync
from voxgate.accounts import (
    Account,
    Balance,
    Claim,
    Entry,
    EntryKind,
    Hold,
    Key,
    RateLimits,
    Status,
    Swept,
    keys,
)
from voxgate.accounts.sqlite import SqliteStore
from voxgate.errors import InvalidSettings

VERSION_1 = """
CREATE TABLE account (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, created INTEGER NOT NULL) STRICT;
CREATE TABLE key (
    id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES account (id),
    digest BLOB NOT NULL UNIQUE,
    created INTEGER NOT NULL,
    revoked INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO account VALUES ('acct_old', 'old', 5);
INSERT INTO key VALUES ('key_good', 'acct_old', x'01', 6, 0), ('key_gone', 'acct_old', x'02', 7, 1);
PRAGMA user_version = 1;
"""

# What a process does: what it is told on its standard input, with the file it is given.
HEAD = """
import asyncio, sys
from pathlib import Path
from voxgate.accounts import *
from voxgate.accounts.sqlite import SqliteStore
from voxgate.errors import InsufficientQuota
path, account_id = Path(sys.argv[1]), sys.argv[2]
def ticket(name):
    bounds = Bounds(account_id, RateLimits(concurrent_requests=1000))
    return Ticket(name, account_id, "key_1", (bounds,))
def record(name, cost):
    return UsageRecord(name, account_id, "key_1", 1.0, "openai", 200, 0.1, cost=cost)
"""
HOLDER = (
    HEAD
    + """
async def work():
    store = SqliteStore(path)
    await store.admit(ticket("killed"), lease=3600)
    await store.hold(ticket("killed"), 400, tenths=1, lease=3600, claim=Claim("claim", "print"))
    print("ready", flush=True)
    sys.stdin.read()
asyncio.run(work())
"""
)
RACER = (
    HEAD
    + """
async def one(store, name):
    try:
        hold = await store.hold(ticket(name), 10, tenths=0, lease=3600)
    except InsufficientQuota:
        return 0
    await store.settle(hold, 10, record(name, 10))
    return 1
async def work():
    store = SqliteStore(path)
    print("ready", flush=True)
    sys.stdin.readline()
    print(sum(await asyncio.gather(*(one(store, f"{sys.argv[3]}-{i}") for i in range(200)))), flush=True)
    await store.close()
asyncio.run(work())
"""
)
WORKER = (
    HEAD
    + """
async def work():
    store = SqliteStore(path)
    print("ready", flush=True)
    for i in range(10**9):
        name = f"{sys.argv[3]}-{i}"
        await store.admit(ticket(name), lease=3600)
        hold = await store.hold(ticket(name), 10, tenths=0, lease=3600)
        await store.settle(hold, 3, record(name, 3))
asyncio.run(work())
"""
)
OPENER = """
import asyncio, sys
from pathlib import Path
from voxgate.accounts.sqlite import SqliteStore
print("ready", flush=True)
for number, _ in enumerate(sys.stdin):
    store = SqliteStore(Path(sys.argv[1]) / f"{number}.sqlite")
    asyncio.run(store.create_account(sys.argv[2]))
    asyncio.run(store.close())
    print("done", flush=True)
"""


@contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that says when it is ready. It is killed after."""
    started = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n", started.communicate()[1]
        yield started
    finally:
        started.kill()
        started.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "below" / "voxgate.sqlite"


@pytest.fixture
def bench(path: Path) -> Iterator[Bench]:
    clock = Clock(time.time())
    bench = Bench.make(SqliteBackend(path, clock), clock)
    yield bench
    bench.close()


def old_file(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    connection = sqlite3.connect(path)
    connection.executescript(VERSION_1)
    connection.close()


# The file.


@sync
async def test_the_file_holds_the_keys_digest_and_never_the_key(bench: Bench, path: Path) -> None:
    secret = keys.generate()
    await bench.store.create_key(Key(id="key_1", account_id=bench.account.id, created=1), keys.digest(secret))
    held = b"".join(file.read_bytes() for file in path.parent.iterdir() if file.is_file())
    assert keys.digest(secret) in held
    assert secret.encode() not in held
    assert secret[3:33].encode() not in held


def test_the_file_is_written_ahead(bench: Bench, path: Path) -> None:
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_nothing_is_left_beside_the_file_after_closing(path: Path) -> None:
    store = SqliteStore(path)
    assert len(list((path.parent / "instances").iterdir())) == 1
    sync(store.close)()
    assert [file.name for file in path.parent.iterdir() if file.is_file()] == [path.name]
    assert list((path.parent / "instances").iterdir()) == []


@sync
async def test_two_stores_on_one_file_see_each_others_writes(bench: Bench) -> None:
    other = bench.another()
    key = Key(id="key_1", account_id=bench.account.id, created=1)
    await other.create_key(key, b"d" * 32)
    credential = await bench.store.find_credential(b"d" * 32)
    assert credential is not None
    assert credential.key == key


@sync
async def test_who_reads_does_not_wait_for_another_process_that_writes_and_who_writes_does(
    bench: Bench, path: Path
) -> None:
    await bench.top_up(5)
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE account SET balance = 99")
    assert (await bench.store.balance(bench.account.id)).balance == 5
    waiting = asyncio.create_task(bench.top_up(1))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    connection.execute("ROLLBACK")
    connection.close()
    await waiting
    assert (await bench.store.balance(bench.account.id)).balance == 6


@sync
async def test_a_full_disk_fails_the_request_as_a_whole_and_the_next_goes_on(bench: Bench) -> None:
    store = bench.store
    assert isinstance(store, SqliteStore)

    def pages(most: int) -> None:
        store._connection.execute(f"PRAGMA max_page_count = {most}").fetchall()

    await bench.top_up(100)
    hold = await bench.hold(bench.ticket(), 50)
    before = await store.balance(bench.account.id)
    store._threads.submit(pages, 1).result()  # no more than it has
    with pytest.raises(sqlite3.OperationalError):
        await store.post(Entry(bench.account.id, EntryKind.TOP_UP, 1, 1.0, "note", "x" * 100_000))
    with pytest.raises(sqlite3.OperationalError):
        await store.settle(hold, 10, bench.record(hold.ticket, contract="x" * 100_000))
    assert await store.balance(bench.account.id) == before
    assert await store.records(bench.account.id, 0.0, 1e10) == []
    store._threads.submit(pages, 1_000_000).result()
    await store.settle(hold, 10, bench.record(hold.ticket))
    assert await store.balance(bench.account.id) == Balance(90, 0, 10, {})


@sync
async def test_wherever_sqlite_fails_it_says_why_and_the_next_request_goes_on(bench: Bench) -> None:
    store = bench.store
    assert isinstance(store, SqliteStore)

    def interrupt_at(step: int) -> None:
        steps = itertools.count(1)
        store._connection.set_progress_handler((lambda: int(next(steps) == step)) if step else None, 1)

    await bench.top_up(10_000)
    said = set()
    for step in itertools.count(1):
        hold = await bench.hold(bench.ticket(), 10)
        record = bench.record(hold.ticket)
        store._threads.submit(interrupt_at, step).result()
        try:
            await store.settle(hold, 10, record)
        except sqlite3.OperationalError as error:
            said.add(str(error))
        else:
            break
        finally:
            store._threads.submit(interrupt_at, 0).result()
        await store.settle(hold, 10, record)  # whether it was done before or not
        assert await store.balance(bench.account.id) == Balance(10_000 - 10 * step, 0, 10 * step, {})
    assert step > 20
    assert said == {"interrupted"}


# Versions.


@sync
async def test_a_file_of_version_1_keeps_its_accounts_and_keys_and_gets_a_ledger(path: Path) -> None:
    old_file(path)
    clock = Clock()
    store = SqliteStore(path, clock=clock)
    account = Account(id="acct_old", name="old", created=5)
    assert await store.accounts() == [account]
    assert (account.status, account.limits, account.budget) == (Status.ACTIVE, RateLimits(), None)
    good, gone = await store.keys("acct_old")
    assert good == Key(id="key_good", account_id="acct_old", created=6)
    assert (gone.id, gone.created) == ("key_gone", 7)
    assert gone.revoked is not None
    credential = await store.find_credential(b"\x01")
    assert credential is not None
    assert (credential.account, credential.key) == (account, good)
    bench = Bench(SqliteBackend(path, clock), clock, store, account)
    await bench.top_up(100)
    ticket = bench.ticket()
    await store.admit(ticket, lease=60)
    await store.settle(await bench.hold(ticket, 60), 40, bench.record(ticket))
    assert await store.balance("acct_old") == Balance(60, 0, 40, {})
    await store.close()
    again = SqliteStore(path, clock=clock)  # not migrated twice
    assert await again.balance("acct_old") == Balance(60, 0, 40, {})
    await again.close()


def test_a_file_of_a_newer_version_is_refused_and_left_as_it_is(path: Path) -> None:
    sync(SqliteStore(path).close)()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.commit()
    for _ in range(2):
        with pytest.raises(InvalidSettings, match="newer"):
            SqliteStore(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (99,)
    connection.close()


@pytest.mark.parametrize("old", [False, True])
def test_processes_that_open_a_new_or_an_old_file_at_once_all_succeed(tmp_path: Path, old: bool) -> None:
    rounds = 20  # one alone goes well nine times out of ten even where this is broken
    for number in range(rounds if old else 0):
        old_file(tmp_path / f"{number}.sqlite")
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", OPENER, str(tmp_path), f"a{i}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    for turn in range(rounds + 1):
        for opener in openers:
            assert opener.stdout is not None
            assert opener.stdout.readline() == ("done\n" if turn else "ready\n"), opener.communicate()[1]
        if turn < rounds:
            for opener in openers:
                assert opener.stdin is not None
                opener.stdin.write("go\n")
                opener.stdin.flush()
    assert [opener.communicate(timeout=30)[1] for opener in openers] == [""] * 4
    for number in range(rounds):
        connection = sqlite3.connect(tmp_path / f"{number}.sqlite")
        assert connection.execute("SELECT count(*) FROM account").fetchone() == (4 + old,)
        connection.close()


# Processes.


@sync
async def test_a_sweep_gives_back_at_once_what_a_killed_process_held(bench: Bench, path: Path) -> None:
    await bench.top_up(1000)
    mine = await bench.hold(bench.ticket("mine"), 100, lease=3600)
    with process(HOLDER, path, bench.account.id) as holder:
        assert await bench.store.sweep() == Swept(0, 0, 0)  # it lives
        assert (await bench.store.balance(bench.account.id)).holds == {"mine": 100, "killed": 400}
        holder.kill()  # SIGKILL
        holder.wait()
        assert await bench.store.sweep() == Swept(1, 400, 1)
        assert await bench.store.sweep() == Swept(0, 0, 0)
    assert (await bench.store.balance(bench.account.id)).holds == {"mine": 100}
    await bench.hold(bench.ticket(), 10, claim=Claim("claim", "other"))
    await bench.store.settle(mine, 100, bench.record(mine.ticket))
    assert len(list((path.parent / "instances").iterdir())) == 1  # its mark is gone, too


@sync
async def test_a_store_that_was_closed_holds_nothing(bench: Bench) -> None:
    await bench.top_up(1000)
    other = bench.backend.open()
    ticket = bench.ticket()
    await other.admit(ticket, lease=3600)
    hold = await other.hold(ticket, 400, tenths=0, lease=3600)
    assert isinstance(hold, Hold)
    await other.close()
    assert await bench.store.sweep() == Swept(1, 400, 1)


def test_two_processes_spend_what_there_is_and_not_more(bench: Bench, path: Path) -> None:
    asyncio.run(bench.top_up(1009))
    with process(RACER, path, bench.account.id, "a") as one, process(RACER, path, bench.account.id, "b") as other:
        served = []
        for racer in (one, other):
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        for racer in (one, other):
            assert racer.stdout is not None
            served.append(int(racer.stdout.readline()))
    assert sum(served) == 100
    assert asyncio.run(bench.store.balance(bench.account.id)) == Balance(9, 0, 1000, {})
    entries = asyncio.run(bench.store.entries(bench.account.id))
    assert sum(entry.kind is EntryKind.CHARGE for entry in entries) == 100


def test_however_a_process_is_killed_the_ledger_adds_up(bench: Bench, path: Path) -> None:
    asyncio.run(bench.top_up(1_000_000))
    charges = 0
    for turn in range(4):
        with process(WORKER, path, bench.account.id, turn) as worker:
            threading.Event().wait(0.05 + 0.0137 * turn)
            worker.kill()
            worker.wait()
        swept = asyncio.run(bench.store.sweep())
        assert swept.holds <= 1
        assert swept.amount == 10 * swept.holds
        entries = asyncio.run(bench.store.entries(bench.account.id))
        balance = asyncio.run(bench.store.balance(bench.account.id))
        assert len(entries) - 1 > charges
        charges = len(entries) - 1
        assert balance.balance == sum(entry.amount for entry in entries) == 1_000_000 - 3 * charges
        assert (balance.held, balance.spent) == (0, 3 * charges)
        assert len(asyncio.run(bench.store.records(bench.account.id, 0.0, 1e10))) == charges
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("SELECT count(*) FROM slot").fetchone() == (0,)
    connection.close()
