"""What must run to its end: a charge, and whatever gives back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from voxgate.accounts import Entry, EntryKind, Key, keys
from voxgate.accounts.sqlite import SqliteStore
from voxgate.errors import InvalidSettings
from voxgate.hosts.asgi import AsgiApp
from voxgate.hosts.http import Application, Request, Response
from voxgate.metering import Reply, fingerprint
from voxgate.settings import Settings
from voxgate.tasks import whole
from voxgate.wiring import build_gateway, build_staging


async def cancelled(work: Any, **options: bool) -> tuple[asyncio.Task[Any], list[str]]:
    """A task that waits for `work` as a whole, cancelled while that goes on."""
    done: list[str] = []

    async def slow() -> str:
        await asyncio.sleep(0.02)
        done.append("done")
        return await work() if work else "result"

    task = asyncio.create_task(whole(slow(), **options))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    return task, done


def test_what_gives_back_runs_to_its_end_and_then_is_cancelled() -> None:
    async def run() -> None:
        task, done = await cancelled(None)
        assert task.cancelled()
        assert done == ["done"]

    asyncio.run(run())


def test_a_charge_that_was_made_keeps_its_answer_when_time_runs_out_meanwhile() -> None:
    async def run() -> str:
        async def settle() -> str:
            await asyncio.sleep(0.05)
            return "answer"

        async with asyncio.timeout(0.01):
            return await whole(settle(), keep=True)

    assert asyncio.run(run()) == "answer"


def test_a_charge_that_failed_is_cancelled_like_anything_else() -> None:
    async def fail() -> str:
        raise ValueError("no")

    async def run() -> None:
        task, _ = await cancelled(fail, keep=True)
        assert task.cancelled()

    asyncio.run(run())


def test_requests_that_run_at_shutdown_give_back_before_the_store_is_closed() -> None:
    events: list[str] = []
    running = asyncio.Event()

    async def handler(request: Request) -> Response:
        try:
            running.set()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            events.append("given back")
        raise AssertionError

    async def nothing() -> None:
        pass

    async def stop() -> None:
        events.append("closed")

    async def run() -> None:
        app = AsgiApp(Application({"/": {"GET": handler}}), start=nothing, stop=stop)
        asked: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        asked.put_nowait({"type": "lifespan.startup"})

        async def send(message: MutableMapping[str, Any]) -> None:
            pass

        async def still_there() -> dict[str, Any]:
            await asyncio.sleep(60)
            raise AssertionError

        lifespan = asyncio.create_task(app({"type": "lifespan"}, asked.get, send))
        scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
        request = asyncio.create_task(app(scope, still_there, send))
        await running.wait()
        request.cancel()  # as uvicorn does when its patience ends
        asked.put_nowait({"type": "lifespan.shutdown"})
        await lifespan
        with contextlib.suppress(asyncio.CancelledError):
            await request

    asyncio.run(run())
    assert events == ["given back", "closed"]


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ((("b", "2"), ("a", "1")), True),
        ((("a", "1"), ("b", "3")), False),
        ((("a", "1"), ("b", "2"), ("b", "2")), False),
    ],
)
def test_two_requests_are_the_same_whatever_the_order_of_their_fields(
    fields: tuple[tuple[str, str], ...], same: bool
) -> None:
    known = fingerprint("acct", "/v1", (("a", "1"), ("b", "2")), b"audio")
    assert (fingerprint("acct", "/v1", fields, b"audio") == known) is same


def test_the_order_of_a_repeated_field_tells_requests_apart() -> None:
    one, other = (("fallbacks", "a"), ("fallbacks", "b")), (("fallbacks", "b"), ("fallbacks", "a"))
    assert fingerprint("acct", "/v1", one, b"") != fingerprint("acct", "/v1", other, b"")


def test_a_table_needs_a_bucket_beside_it() -> None:
    with pytest.raises(InvalidSettings, match="VOXGATE_STAGING_BUCKET"):
        build_staging(Settings(table="voxgate"))


class Broken(SqliteStore):
    """One that fails to charge, and gives back all the same."""

    async def settle(self, *_: Any) -> Any:
        raise OSError("the disk is full")


def test_what_was_not_charged_costs_nothing_in_the_usage_either(tmp_path: Path) -> None:
    async def run() -> tuple[list[tuple[int, int]], int, int]:
        store = Broken(tmp_path / "voxgate.sqlite")
        account = await store.create_account("acme")
        await store.post(Entry(account.id, EntryKind.TOP_UP, 1_000_000, time.time(), "opening"))
        secret = keys.generate()
        await store.create_key(Key(id="key_1", account_id=account.id, created=0), keys.digest(secret))
        gateway = build_gateway(Settings(data_dir=tmp_path, spool_dir=tmp_path), store)
        headers = {"authorization": f"Bearer {secret}"}
        with contextlib.suppress(OSError):
            async with gateway.meter.request("req_1", "openai", headers, "", {}) as tab:
                assert await tab.hold(500, tenths=10, fingerprint="") is None
                await tab.settle(500, Reply({}, b"text"))
        balance = await store.balance(account.id)
        records = await store.records(account.id, 0.0, time.time() + 60)
        await gateway.close()
        return [(record.status, record.cost) for record in records], balance.balance, balance.held

    assert asyncio.run(run()) == ([(500, 0)], 1_000_000, 0)
