"""The one item in which all that decides about an account's requests is: the STATE of `dynamodb.py`.

Its attributes are flat, and made when first written: `balance`; `free`, the balance less the holds;
`requests` and `audio`, when the buckets are full again; `slots`, a set of "<expires>|<request id>";
`hold#<request id>`; `spent#<month>`. A key with bounds of its own has its own in the same item,
`requests#<key id>` and so on. So one conditional write of one item decides, and no two requests
are let in on what is there for one. Times are microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from voxgate.accounts import Bounds, Ticket, rules
from voxgate.accounts.table import Item, Update

STATE = "STATE#0"  # a number, so that an account that one item is too slow for can get more


class StateUpdate(Update):
    def __init__(self, account_id: str) -> None:
        super().__init__(f"ACCOUNT#{account_id}", STATE)

    def need(self, ticket: Ticket, amount: int, month: str) -> None:
        """What `rules` check of money, as conditions."""
        self.where(f"{self.name('free')} >= {self.value(max(amount, 1))}")
        for suffix, bounds in places(ticket).items():
            if bounds.budget is not None:
                spent = self.name(f"spent#{month}{suffix}")
                empty = f"attribute_not_exists({spent}) OR " if amount <= bounds.budget else ""
                self.where(f"({empty}{spent} <= {self.value(bounds.budget - amount)})")

    def take(self, attribute: str, bucket: rules.Bucket | None, count: int, known: Mapping[str, int], now: int) -> None:
        """Takes `count` out of a bucket. An expression has no `max`, so there are two: one for a
        bucket that is full, and one for a bucket that fills, chosen by what is known of it."""
        if bucket is None:
            return
        name = self.name(attribute)
        if known.get(attribute, 0) <= now:
            self.where(f"(attribute_not_exists({name}) OR {name} <= {self.value(now)})")
            self.set(attribute, bucket.take(0, count, now))
        else:
            self.where(f"{name} > {self.value(now)} AND {name} <= {self.value(bucket.latest(count, now))}")
            self.add(attribute, bucket.take(0, count, 0))

    def seat(self, attribute: str, most: int | None, member: str) -> None:
        if most is not None:
            name = self.name(attribute)
            empty = f"attribute_not_exists({name}) OR " if most > 0 else ""
            self.where(f"({empty}size({name}) < {self.value(most)})")
        self.include(attribute, member)

    def unseat(self, ticket: Ticket, member: str) -> None:
        for suffix in places(ticket) if member else ():
            self.exclude(f"slots{suffix}", set(member.split()))

    def end(self, hold_id: str, held: Item, cost: int) -> None:
        """Closes an open hold, of which `held` are the amount, the month and the suffixes."""
        name = f"hold#{hold_id}"
        self.where(f"{self.name(name)}.{self.name('amount')} = {self.value(held['amount'])}")
        self.remove(name)
        self.add("balance", -cost)
        self.add("free", held["amount"] - cost)
        for suffix in held["suffixes"]:
            self.add(f"spent#{held['month']}{suffix}", cost - held["amount"])


def places(ticket: Ticket) -> dict[str, Bounds]:
    """By what the names of their attributes end with."""
    account, *own = ticket.bounds
    return {"": account, **{f"#{bounds.id}": bounds for bounds in own}}


def state_of(ticket: Ticket, item: Mapping[str, Any], now: int, month: str = "") -> rules.State:
    """With what was spent in that month, or in this one."""
    tallies = [
        rules.Tally(
            bounds,
            requests=item.get(f"requests{suffix}", 0),
            audio=item.get(f"audio{suffix}", 0),
            running=len(running(item.get(f"slots{suffix}", ()), now)),
            spent=item.get(f"spent#{month or rules.month(now)}{suffix}", 0),
        )
        for suffix, bounds in places(ticket).items()
    ]
    return rules.State(item["balance"], item["free"], tuple(tallies))


def running(slots: Iterable[str], now: int) -> set[str]:
    return {slot for slot in slots if int(slot.partition("|")[0]) > now}


def holds_in(item: Item) -> dict[str, Item]:
    """By their requests' ids."""
    return {name.removeprefix("hold#"): hold for name, hold in item.items() if name.startswith("hold#")}
