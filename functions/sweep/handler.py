"""The Lambda function on a schedule that gives back what died with its process, and audits the ledger."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from voxgate.accounts import Store
from voxgate.accounts.reports import difference
from voxgate.metrics import Metrics
from voxgate.settings import Settings
from voxgate.wiring import build_store

settings = Settings.from_environment()
store = build_store(settings)
metrics = Metrics(settings.environment)


def handler(event: dict[str, Any], context: Any) -> dict[str, int]:
    """The counts of what was given back, or with `{"task": "audit"}` those of the accounts and of the
    differences found; raises what the store raises, for the alarm to see."""
    if event.get("task") == "audit":
        return asyncio.run(_audit(store))
    return dataclasses.asdict(asyncio.run(store.sweep()))


async def _audit(store: Store) -> dict[str, int]:
    accounts = await store.accounts()
    found = [d for account in accounts if (d := await difference(store, account))]
    off = [abs(d["balance_microdollars"] - d["entries_microdollars"]) for d in found]
    off += [abs(d["held_microdollars"] - d["holds_microdollars"]) for d in found]
    metrics.add("LedgerDifference", max(sum(off), len(found)))
    metrics.flush()
    return {"accounts": len(accounts), "differences": len(found)}
