"""Both stores as tests open, watch, break and kill them."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

import boto3
from botocore.exceptions import ClientError, ReadTimeoutError
from moto import mock_aws
from moto.core.serialize import SERVICE_SPECIFIC_SERIALIZERS, JSONSerializer

from voxgate.accounts import (
    NO_LIMITS,
    Account,
    Bounds,
    Claim,
    Entry,
    EntryKind,
    Hold,
    RateLimits,
    Store,
    Ticket,
    UsageRecord,
)
from voxgate.accounts.dynamodb import DynamoStore
from voxgate.accounts.sqlite import SqliteStore

if TYPE_CHECKING:
    from mypy_boto3_dynamodb.client import DynamoDBClient

P = ParamSpec("P")
T = TypeVar("T")

START = 1_795_262_400.0  # 2026-11-21 12:00 UTC
STORES = ("sqlite", "dynamodb")
_numbers = itertools.count()


class Lost(Exception):
    """The store failed, or its answer never came: what it did of it is anybody's guess."""


def sync(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test that is a coroutine, in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


class Clock:
    """Stands still until it is put forward. Exact, and safe for threads."""

    def __init__(self, now: float = START) -> None:
        self._now = round(now * 1e6)
        self._lock = threading.Lock()

    def __call__(self) -> float:
        # Half a microsecond ahead: whoever rounds down gets the microsecond that was meant.
        return (self._now + 0.5) / 1e6

    @property
    def microseconds(self) -> int:
        return self._now

    def advance(self, seconds: float) -> None:
        with self._lock:
            self._now += round(seconds * 1e6)


class Client:
    """A boto3 client whose calls are counted, and can be made to fail. moto is not atomic under
    threads, so there is one call at a time; between calls anything may happen."""

    def __init__(self, client: DynamoDBClient, lock: threading.RLock) -> None:
        self._client, self._lock = client, lock
        self.calls: list[str] = []
        self._left = 0
        self._after = False

    def fail(self, nth: int, *, after: bool) -> None:
        """The nth call from now gets no answer, `after` it took effect or before; 0 for none."""
        self._left, self._after = nth, after

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        if name in ("exceptions", "meta", "get_waiter", "get_paginator"):
            return attribute

        def call(**request: Any) -> Any:
            with self._lock:
                self.calls.append(name)
                self._left -= 1
                fails = self._left == 0
                if fails and not self._after:
                    raise ReadTimeoutError(endpoint_url="https://dynamodb")
                try:
                    answer = attribute(**request)
                except ClientError as error:
                    if fails:
                        raise ReadTimeoutError(endpoint_url="https://dynamodb") from error
                    raise
                if fails:
                    raise ReadTimeoutError(endpoint_url="https://dynamodb")
                return answer

        return call


class Backend(Protocol):
    """Where stores keep what they keep: several may be open on it, as of several processes."""

    def open(self) -> Store: ...

    def kill(self, store: Store) -> None:
        """What is left of a store when its process is killed."""

    async def fail(self, store: Store, work: Callable[[], Awaitable[T]], nth: int, *, after: bool) -> T:
        """Run `work`, which fails somewhere inside of the store, further on with a greater `nth`.
        Raises `Lost` for that. What did not come to that point ends as it ends."""

    def close(self) -> None: ...


class SqliteBackend:
    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.path, self._clock = path, clock

    def open(self) -> SqliteStore:
        return SqliteStore(self.path, clock=self._clock)

    def kill(self, store: Store) -> None:
        assert isinstance(store, SqliteStore)
        store._threads.submit(store._connection.close).result()
        store._threads.shutdown()
        os.close(store._instance._file)  # the kernel does, and the file stays

    async def fail(self, store: Store, work: Callable[[], Awaitable[T]], nth: int, *, after: bool) -> T:
        """Before: SQLite is interrupted in a statement. After: it was committed, and nobody heard."""
        assert isinstance(store, SqliteStore)
        if after:
            await work()
            raise Lost
        connection, left, statement = store._connection, 1 + nth * 8, ""

        def trace(sql: str) -> None:
            nonlocal statement
            statement = sql

        def interrupt() -> int:
            nonlocal left
            left -= statement != "ROLLBACK"  # nothing can be done where that fails, too
            return int(left == 0 and statement != "ROLLBACK")

        def watch(on: bool) -> None:
            connection.set_trace_callback(trace if on else None)
            connection.set_progress_handler(interrupt if on else None, 1)

        store._threads.submit(watch, True).result()
        try:
            return await work()
        except sqlite3.OperationalError as error:
            raise Lost from error
        finally:
            store._threads.submit(watch, False).result()

    def close(self) -> None:
        pass


def create_table(client: DynamoDBClient, table: str) -> None:
    """The table as the deployment makes it."""
    client.create_table(
        TableName=table,
        KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}, {"AttributeName": "sk", "KeyType": "RANGE"}],
        AttributeDefinitions=[
            {"AttributeName": "pk", "AttributeType": "S"},
            {"AttributeName": "sk", "AttributeType": "S"},
        ],
        BillingMode="PAY_PER_REQUEST",
    )
    client.get_waiter("table_exists").wait(TableName=table)
    client.update_time_to_live(TableName=table, TimeToLiveSpecification={"Enabled": True, "AttributeName": "ttl"})


class _Serializer(JSONSerializer):
    """moto's, but that a value of text or numbers, which is kept as it is sent, is not looked through for each type
    that it may be of: with many of them that takes longer than all the rest."""

    def _serialize(self, serialized: Any, value: Any, shape: Any, key: str) -> None:
        if shape.name == "AttributeValue" and value.keys() <= {"S", "N", "SS"}:
            serialized[key] = value
        else:
            super()._serialize(serialized, value, shape, key)


SERVICE_SPECIFIC_SERIALIZERS["dynamodb"] = {"json": _Serializer}


class DynamoBackend:
    def __init__(self, client: DynamoDBClient, clock: Callable[[], float]) -> None:
        self.client, self.table, self._clock = client, f"t{next(_numbers)}", clock
        self._lock = threading.RLock()
        self._clients: dict[int, Client] = {}
        create_table(client, self.table)

    def open(self) -> DynamoStore:
        client = Client(self.client, self._lock)
        store = DynamoStore(self.table, client=cast("DynamoDBClient", client), clock=self._clock)
        self._clients[id(store)] = client
        return store

    def client_of(self, store: Store) -> Client:
        return self._clients[id(store)]

    def kill(self, store: Store) -> None:
        asyncio.run(store.close())  # nothing of it is in the table

    async def fail(self, store: Store, work: Callable[[], Awaitable[T]], nth: int, *, after: bool) -> T:
        client = self.client_of(store)
        client.fail(nth % 4 + 1, after=after)
        try:
            return await work()
        except ReadTimeoutError as error:
            raise Lost from error
        finally:
            client.fail(0, after=False)

    def close(self) -> None:
        self.client.delete_table(TableName=self.table)  # moto copies all tables for each transaction


@contextmanager
def dynamodb() -> Iterator[DynamoDBClient]:
    """A DynamoDB in this process."""
    with mock_aws():
        yield boto3.client("dynamodb", region_name="eu-central-1")


@dataclass
class Bench:
    """One store with one account, on a clock."""

    backend: Backend
    clock: Clock
    store: Store
    account: Account
    others: list[Store] = field(default_factory=list)

    @classmethod
    def make(cls, backend: Backend, clock: Clock) -> Bench:
        store = backend.open()
        return cls(backend, clock, store, asyncio.run(store.create_account("acme")))

    def another(self) -> Store:
        """Another process's store, closed with this bench."""
        self.others.append(store := self.backend.open())
        return store

    def close(self) -> None:
        async def work() -> None:
            for store in (self.store, *self.others):
                await store.close()

        asyncio.run(work())
        self.backend.close()

    def ticket(
        self,
        request_id: str = "",
        *,
        limits: RateLimits = NO_LIMITS,
        budget: int | None = None,
        key: Bounds | None = None,
        account: Account | None = None,
    ) -> Ticket:
        """`key` are bounds of the key's own."""
        account_id = (account or self.account).id
        bounds = (Bounds(account_id, limits, budget), *((key,) if key else ()))
        return Ticket(request_id or f"req-{next(_numbers)}", account_id, key.id if key else "key_1", bounds)

    async def top_up(self, amount: int, account: Account | None = None) -> None:
        account_id = (account or self.account).id
        entry = Entry(account_id, EntryKind.TOP_UP, amount, self.clock(), f"paid-{next(_numbers)}")
        await self.store.post(entry)

    async def hold(
        self, ticket: Ticket, amount: int, *, tenths: int = 0, lease: float = 60.0, claim: Claim | None = None
    ) -> Hold:
        hold = await self.store.hold(ticket, amount, tenths=tenths, lease=lease, claim=claim)
        assert isinstance(hold, Hold)
        return hold

    def record(self, ticket: Ticket, **known: Any) -> UsageRecord:
        values: dict[str, Any] = {"time": self.clock(), "contract": "openai", "status": 200, "latency": 0.5}
        return UsageRecord(
            ticket.request_id, ticket.account_id, ticket.key_id, **(values | {"model": "whisper-1"} | known)
        )
