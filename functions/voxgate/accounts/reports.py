"""Amounts and usage as people and programs are shown them: by the command line and over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from voxgate.accounts import Account, Store, UsageRow
from voxgate.accounts.rules import dollars


def money(amounts: Mapping[str, int | None]) -> dict[str, Any]:
    """Each amount as dollars in text, and exactly."""
    shown = {name: None if amount is None else dollars(amount) for name, amount in amounts.items()}
    return shown | {f"{name}_microdollars": amount for name, amount in amounts.items()}


def grouped(rows: list[UsageRow], by: tuple[str, ...]) -> list[UsageRow]:
    """Rows added up to one for each value of `by`; what is not in it is empty."""
    sums: dict[tuple[str, str, str], UsageRow] = {}
    for row in rows:
        key = (
            row.day if "day" in by else "",
            row.key_id if "key" in by else "",
            row.model if "model" in by else "",
        )
        last = sums.get(key) or UsageRow(*key, 0, 0, 0.0, 0)
        sums[key] = UsageRow(
            *key,
            last.requests + row.requests,
            last.errors + row.errors,
            round(last.seconds + row.seconds, 1),
            last.cost + row.cost,
        )
    return [sums[key] for key in sorted(sums)]


def usage_json(row: UsageRow, by: tuple[str, ...]) -> dict[str, Any]:
    names = {"day": row.day, "key": row.key_id, "model": row.model}
    counts = {"requests": row.requests, "errors": row.errors, "seconds": row.seconds}
    return {name: names[name] for name in by} | counts | money({"cost": row.cost})


async def difference(store: Store, account: Account) -> dict[str, Any] | None:
    """Between the balance and its entries. An account that is in use gets entries while it is looked
    at: then the balance must lie within what those that are new can have made of it."""
    before = {(entry.kind, entry.reference): entry.amount for entry in await store.entries(account.id)}
    balance = await store.balance(account.id)
    new = [entry.amount for entry in await store.entries(account.id) if (entry.kind, entry.reference) not in before]
    entries, holds = sum(before.values()), sum(balance.holds.values())
    least, most = (entries + sum(amount for amount in new if amount * sign > 0) for sign in (-1, 1))
    if least <= balance.balance <= most and balance.held == holds and 0 <= balance.free <= balance.balance:
        return None
    amounts = {"balance": balance.balance, "entries": entries, "held": balance.held, "holds": holds}
    return {"account": account.id, "name": account.name} | money(amounts)
