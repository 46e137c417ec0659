"""Accounts and keys in a real SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from voxgate.accounts import keys
from voxgate.accounts.sqlite import SqliteAccounts
from voxgate.errors import InvalidSettings

T = TypeVar("T")


def run(path: Path, work: Callable[[SqliteAccounts], Awaitable[T]], now: float = 1_700_000_000.9) -> T:
    async def inner() -> T:
        accounts = SqliteAccounts(path, clock=lambda: now)
        try:
            return await work(accounts)
        finally:
            await accounts.close()

    return asyncio.run(inner())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "below" / "voxgate.sqlite"


def test_an_account_is_found_by_its_id_and_by_its_name(path: Path) -> None:
    async def work(accounts: SqliteAccounts) -> None:
        made = await accounts.create_account("acme")
        assert (made.name, made.created) == ("acme", 1_700_000_000)
        assert await accounts.find_account(made.id) == made
        assert await accounts.find_account("acme") == made

    run(path, work)


def test_an_account_named_like_anothers_id_does_not_hide_it(path: Path) -> None:
    async def work(accounts: SqliteAccounts) -> None:
        first = await accounts.create_account("acme")
        second = await accounts.create_account(first.id)
        assert await accounts.find_account(first.id) == first
        assert await accounts.find_account(second.id) == second

    run(path, work)


def test_a_name_is_taken_once(path: Path) -> None:
    async def work(accounts: SqliteAccounts) -> None:
        first = await accounts.create_account("acme")
        with pytest.raises(ValueError, match="'acme'"):
            await accounts.create_account("acme")
        assert await accounts.find_account("acme") == first

    run(path, work)


@pytest.mark.parametrize("reference", ["nobody", "", "acct_0", "' OR 1=1 --"])
def test_an_account_that_is_not_there_is_a_key_error(path: Path, reference: str) -> None:
    async def work(accounts: SqliteAccounts) -> None:
        await accounts.create_account("acme")
        with pytest.raises(KeyError):
            await accounts.find_account(reference)

    run(path, work)


def test_a_key_is_found_by_its_digest(path: Path) -> None:
    async def work(accounts: SqliteAccounts) -> None:
        account = await accounts.create_account("acme")
        digest = keys.digest(keys.generate())
        key = await accounts.create_key(account.id, digest)
        assert (key.account_id, key.created, key.revoked) == (account.id, 1_700_000_000, False)
        assert await accounts.find_key(digest) == key
        assert await accounts.find_key(keys.digest("another")) is None

    run(path, work)


def test_a_key_needs_an_account(path: Path) -> None:
    async def work(accounts: SqliteAccounts) -> None:
        with pytest.raises(KeyError):
            await accounts.create_key("acct_nobody", keys.digest("x"))
        assert await accounts.find_key(keys.digest("x")) is None

    run(path, work)


def test_accounts_see_their_own_keys_in_order(path: Path) -> None:
    async def work(accounts: SqliteAccounts) -> None:
        one, other = await accounts.create_account("one"), await accounts.create_account("other")
        made = [await accounts.create_key(one.id, bytes([i] * 32)) for i in range(5)]
        await accounts.create_key(other.id, b"other")
        # All were made within one second, so the ids decide.
        assert await accounts.keys(one.id) == sorted(made, key=lambda key: key.id)

    run(path, work)


def test_a_digest_belongs_to_one_key(path: Path) -> None:
    async def work(accounts: SqliteAccounts) -> None:
        one, other = await accounts.create_account("one"), await accounts.create_account("other")
        key = await accounts.create_key(one.id, b"d" * 32)
        with pytest.raises(sqlite3.IntegrityError):
            await accounts.create_key(other.id, b"d" * 32)
        assert await accounts.find_key(b"d" * 32) == key

    run(path, work)


def test_a_revoked_key_stays_known_as_such(path: Path) -> None:
    digest = keys.digest(keys.generate())

    async def work(accounts: SqliteAccounts) -> None:
        account = await accounts.create_account("acme")
        key = await accounts.create_key(account.id, digest)
        for _ in range(2):  # revoking twice is no error
            revoked = await accounts.revoke_key(key.id)
            assert (revoked.id, revoked.revoked) == (key.id, True)
        assert await accounts.find_key(digest) == revoked
        assert await accounts.keys(account.id) == [revoked]
        with pytest.raises(KeyError):
            await accounts.revoke_key("key_nobody")

    run(path, work)


def test_everything_is_there_after_reopening(path: Path) -> None:
    digest = keys.digest(keys.generate())

    async def write(accounts: SqliteAccounts) -> str:
        account = await accounts.create_account("acme")
        key = await accounts.create_key(account.id, digest)
        await accounts.revoke_key(key.id)
        return account.id

    async def read(accounts: SqliteAccounts) -> None:
        assert (await accounts.find_account("acme")).id == account_id
        key = await accounts.find_key(digest)
        assert key is not None
        assert key.revoked

    account_id = run(path, write)
    run(path, read)


def test_the_file_holds_the_keys_digest_and_never_the_key(path: Path) -> None:
    secret = keys.generate()

    async def work(accounts: SqliteAccounts) -> None:
        account = await accounts.create_account("acme")
        await accounts.create_key(account.id, keys.digest(secret))
        check("while it is open")

    def check(when: str) -> None:
        held = b"".join(file.read_bytes() for file in path.parent.iterdir())
        assert keys.digest(secret) in held, when
        assert secret.encode() not in held, when
        assert secret[3:33].encode() not in held, when

    run(path, work)
    check("when it is closed")


def test_many_requests_at_once_are_served_one_by_one(path: Path) -> None:
    async def work(accounts: SqliteAccounts) -> None:
        made = await asyncio.gather(*(accounts.create_account(f"a{i}") for i in range(50)))
        assert len({account.id for account in made}) == 50
        found = await asyncio.gather(*(accounts.find_account(f"a{i}") for i in range(50)))
        assert found == made

    run(path, work)


def test_two_stores_on_one_file_see_each_others_writes(path: Path) -> None:
    async def work(one: SqliteAccounts) -> None:
        other = SqliteAccounts(path)
        account = await one.create_account("acme")
        key = await other.create_key(account.id, b"d" * 32)
        assert await one.find_key(b"d" * 32) == key
        await other.close()

    run(path, work)


OPENER = """
import asyncio, sys
from pathlib import Path
from voxgate.accounts.sqlite import SqliteAccounts
print("ready", flush=True)
for number, _ in enumerate(sys.stdin):
    store = SqliteAccounts(Path(sys.argv[1]) / f"{number}.sqlite")
    asyncio.run(store.create_account(sys.argv[2]))
    asyncio.run(store.close())
    print("done", flush=True)
"""


def test_processes_that_open_a_new_file_at_once_all_succeed(tmp_path: Path) -> None:
    rounds = 25  # one alone goes well nine times out of ten even where this is broken
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
        assert connection.execute("SELECT count(*) FROM account").fetchone() == (4,)
        connection.close()


def test_a_file_of_a_newer_version_is_refused_and_left_as_it_is(path: Path) -> None:
    async def nothing(accounts: SqliteAccounts) -> None:
        pass

    run(path, nothing)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.commit()
    with pytest.raises(InvalidSettings, match="newer"):
        SqliteAccounts(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (99,)
    connection.close()
