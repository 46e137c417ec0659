"""The commands that open accounts, hand out keys, move credit and look after the books."""

from __future__ import annotations

import argparse
import asyncio
import csv
import dataclasses
import datetime as dt
import json
import os
import secrets
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from voxgate.accounts import Account, Entry, EntryKind, Key, RateLimits, Scope, Status, Store, UsageRecord, keys
from voxgate.accounts.reports import difference, grouped, money, usage_json
from voxgate.accounts.rules import day, dollars, midnight
from voxgate.cache import LONGEST_TTL
from voxgate.settings import Settings

Arguments = argparse.Namespace
Action = Callable[[Store, Arguments], Awaitable[int | None]]

_LIMITS = [field.name for field in dataclasses.fields(RateLimits)]
_LOCAL_CREDIT = 100_000_000
_LOCAL_LIMITS = RateLimits(600_000, 36_000_000, 1024)  # one developer's tests are not to be slowed down


def add_commands(commands: Any) -> None:
    accounts = _group(commands, "accounts", "open accounts, show them, and move their credit")
    create = _command(accounts, "create", "open an account", _create_account, "NAME")
    create.add_argument("--credit", type=_credit_of, default=0, metavar="DOLLARS", help="to begin with (default: 0)")
    _add_limits(create)
    _command(accounts, "list", "list all accounts", _list_accounts)
    _command(accounts, "show", "show an account and its keys", _show_account, "ACCOUNT")
    change = _command(accounts, "change", "change an account's limits and budget", _change_account, "ACCOUNT")
    _add_limits(change, changing=True)
    kept = "keep answers so long, to give them again"
    reads = _or_none(_cache_seconds)
    change.add_argument("--cache-seconds", type=reads, default=argparse.SUPPRESS, metavar="N", help=kept)
    suspend = partial(_change_account, text="Suspended '{}': within a minute all is refused.")
    resume = partial(_change_account, text="'{}' is served again, within a minute.")
    suspended = _command(accounts, "suspend", "refuse all of an account's requests", suspend, "ACCOUNT")
    suspended.set_defaults(status=Status.SUSPENDED)
    _command(accounts, "resume", "end a suspension", resume, "ACCOUNT").set_defaults(status=Status.ACTIVE)
    for name, what, kind, text in (
        ("credit", "add credit that was paid for", EntryKind.TOP_UP, "Added ${} to"),
        ("refund", "give back what was charged", EntryKind.REFUND, "Refunded ${} to"),
        ("adjust", "correct a balance, up or down", EntryKind.ADJUSTMENT, "Adjusted by ${}"),
    ):
        post = _command(accounts, name, what, partial(_post, kind=kind, text=text), "ACCOUNT", "DOLLARS")
        post.add_argument("--note", default="", help="why, for the ledger")
        post.add_argument("--reference", help="such as an invoice's number: the same one again changes nothing")
    of_keys = _group(commands, "keys", "create, list, rotate and revoke API keys")
    create = _command(of_keys, "create", "create a key and print it, this once", _create_key, "ACCOUNT")
    create.add_argument("--name", default="", help="what it is for")
    create.add_argument("--scope", action="append", type=Scope, choices=list(Scope), help="repeat it for several")
    create.add_argument("--model", action="append", metavar="MODEL", help="the only one it may use; repeat it")
    create.add_argument("--expires", type=_day, metavar="DAY", help="the day (UTC) from which it is invalid")
    _add_limits(create)
    _command(of_keys, "list", "list an account's keys", _list_keys, "ACCOUNT")
    for name, what, ending in (
        ("revoke", "make a key invalid for good", _revoke_key),
        ("rotate", "replace a key by a new one with the same rights", _rotate_key),
    ):
        _command(of_keys, name, what, ending, "KEY-ID").add_argument("--yes", action="store_true", help="do not ask")
    usage = _command(commands, "usage", "what an account used", _usage, "ACCOUNT")
    usage.add_argument("--since", type=_day, metavar="DAY", help="default: the first of this month")
    usage.add_argument("--until", type=_day, metavar="DAY", help="default: today")
    usage.add_argument("--by", default="day,key,model", help="what to group by (default: %(default)s)")
    usage.add_argument("--csv", action="store_true", help="print CSV")
    usage.add_argument("--requests", action="store_true", help="each request by itself")
    providers = _command(commands, "providers", "the catalogue's deployments, and which are out of order", _providers)
    providers.add_argument("--catalog", metavar="FILE", help="models and providers (default: the catalogue that ships)")
    _command(commands, "sweep", "give back what dead processes held", _sweep)
    _command(commands, "audit", "recompute every balance from its entries; exits 1 where one differs", _audit)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where accounts are kept (default: ./data)")


def settings_of(arguments: Arguments) -> Settings:
    settings = Settings.from_environment()
    given = {name: getattr(arguments, name, None) for name in ("data_dir", "catalog", "table", "region", "profile")}
    if given["data_dir"] is not None and given["table"] is None:
        given["table"] = ""  # what is said on the command line goes before the environment
    return dataclasses.replace(settings, **{name: value for name, value in given.items() if value is not None})


async def local_key(settings: Settings, store: Store) -> tuple[str, bool]:
    """The key of the account `local`, and whether it was created now."""
    file = settings.data_dir / "api-key"
    key = file.read_text(encoding="ascii").strip() if file.exists() else ""
    try:
        account = await store.find_account("local")
    except KeyError:
        account = await store.create_account("local", limits=_LOCAL_LIMITS)
    await store.post(_entry(account, EntryKind.TOP_UP, _LOCAL_CREDIT, "first-start", "to begin with"))
    known = await store.find_credential(keys.digest(key)) if key else None
    if known is not None and known.key.revoked is None:
        return key, False
    created = known is not None or not keys.well_formed(key)  # the file may be older than the database
    key = keys.generate() if created else key
    mine = Key(id=_key_id(), account_id=account.id, created=int(time.time()), name="local")
    await store.create_key(mine, keys.digest(key))
    if created:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, f"{key}\n".encode())
        os.close(descriptor)
    return key, created


def _group(commands: Any, name: str, what: str) -> Any:
    return commands.add_parser(name, help=what).add_subparsers(metavar="ACTION", required=True)


def _command(actions: Any, name: str, what: str, action: Action, *places: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    for place in places:
        kind = _amount if place == "DOLLARS" else str
        helps = {"ACCOUNT": "an account's id or name", "DOLLARS": "an amount such as 5.00"}
        parser.add_argument(place.lower().replace("-", "_"), metavar=place, type=kind, help=helps.get(place))
    add_data_dir(parser)
    parser.add_argument("--table", metavar="NAME", help="the DynamoDB table of a deployment, instead of a directory")
    parser.add_argument("--region", metavar="REGION", help="the table's region (default: as AWS's own tools find it)")
    parser.add_argument("--profile", metavar="NAME", help="whose credentials to use (default: likewise)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=lambda arguments: asyncio.run(_run(action, arguments)))
    return parser


def _add_limits(parser: argparse.ArgumentParser, *, changing: bool = False) -> None:
    """`changing` those that there are: what is not given is not in the arguments, and may be `none`."""
    reads = _or_none if changing else lambda read: read
    default = argparse.SUPPRESS if changing else None
    for name in _LIMITS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=reads(_positive), default=default, metavar="N")
    most = "the most that may be spent in a month"
    parser.add_argument("--budget", type=reads(_credit_of), default=default, metavar="DOLLARS", help=most)


def _or_none(read: Callable[[str], int]) -> Callable[[str], int | None]:
    return lambda text: None if text == "none" else read(text)


async def _run(action: Action, arguments: Arguments) -> int:
    from voxgate.wiring import build_store

    settings = settings_of(arguments)
    try:
        store = build_store(settings)
        try:
            return await action(store, arguments) or 0
        except (KeyError, ValueError) as error:
            print(f"voxgate: {error.args[0]}", file=sys.stderr)
            return 1
        finally:
            await store.close()
    except _store_failures(settings) as error:  # what the database says goes to the operator, without a traceback
        sys.exit(f"voxgate: {f'the table {settings.table}' if settings.table else settings.data_dir}: {error}")


def _store_failures(settings: Settings) -> tuple[type[Exception], ...]:
    if not settings.table:
        return (sqlite3.Error,)
    from botocore.exceptions import BotoCoreError, ClientError

    return (BotoCoreError, ClientError)


async def _create_account(store: Store, arguments: Arguments) -> None:
    name = arguments.name.strip()
    if not name:
        raise ValueError("An account needs a name.")
    account = await store.create_account(name, limits=_limits(arguments), budget=arguments.budget)
    if arguments.credit:
        await store.post(_entry(account, EntryKind.TOP_UP, arguments.credit, "opening", "with the account"))
    text = f"Opened the account '{name}' ({account.id}) with ${dollars(arguments.credit)}."
    _say(arguments, await _account_json(store, account), text)


async def _list_accounts(store: Store, arguments: Arguments) -> None:
    shown = [await _account_json(store, account) for account in await store.accounts()]
    _table(arguments, shown, ("id", "name", "status", "balance", "held"))


async def _show_account(store: Store, arguments: Arguments) -> None:
    account = await store.find_account(arguments.account)
    owned = await store.keys(account.id)
    shown = await _account_json(store, account)
    lines = [f"{account.name} ({account.id}), {account.status}: ${shown['balance']}, of it ${shown['held']} held"]
    lines += [
        f"  {name.replace('_', ' ')}: {value}"
        for name in ("budget", "cache_seconds", *_LIMITS)
        if (value := shown[name])
    ]
    _say(arguments, shown | {"keys": [_key_json(key) for key in owned]}, "\n".join([*lines, *map(_key_line, owned)]))


async def _change_account(store: Store, arguments: Arguments, *, text: str = "Changed '{}'.") -> None:
    account = await store.find_account(arguments.account)
    given = vars(arguments)
    limits = {name: given[name] for name in _LIMITS if name in given}
    others = {name: given[name] for name in ("status", "budget", "cache_seconds") if name in given}
    account = dataclasses.replace(account, limits=dataclasses.replace(account.limits, **limits), **others)
    await store.change_account(account)
    _say(arguments, await _account_json(store, account), text.format(account.name))


async def _post(store: Store, arguments: Arguments, *, kind: EntryKind, text: str) -> None:
    if arguments.dollars <= 0 and kind is not EntryKind.ADJUSTMENT:
        raise ValueError("The amount must be more than 0; 'accounts adjust' takes credit away.")
    account = await store.find_account(arguments.account)
    reference = arguments.reference or f"manual-{secrets.token_hex(8)}"
    if arguments.reference and await _is_there(store, account, kind, arguments):
        said = f"Nothing to do: '{reference}' is there already, with that amount. '{account.name}':"
    else:
        await store.post(_entry(account, kind, arguments.dollars, reference, arguments.note))
        said = f"{text.format(dollars(arguments.dollars))} '{account.name}':"
    shown = await _account_json(store, account) | {"reference": reference}
    _say(arguments, shown, f"{said} ${shown['balance']} now.")


async def _is_there(store: Store, account: Account, kind: EntryKind, arguments: Arguments) -> bool:
    """Whether the ledger has that reference already. Raises `ValueError` where its amount is another,
    and where a refund is more than the charge that it names."""
    reference, amount = arguments.reference, arguments.dollars
    there = {entry.kind: entry.amount for entry in await store.entries(account.id) if entry.reference == reference}
    charged = -there.get(EntryKind.CHARGE, -amount)
    if kind is EntryKind.REFUND and amount > charged:
        raise ValueError(f"The request '{reference}' was charged ${dollars(charged)}, and no more can be refunded.")
    if there.get(kind, amount) != amount:
        raise ValueError(f"'{reference}' is there already, with ${dollars(there[kind])}: nothing was changed.")
    return kind in there


async def _create_key(store: Store, arguments: Arguments) -> None:
    account = await store.find_account(arguments.account)
    key = Key(
        id=_key_id(),
        account_id=account.id,
        created=int(time.time()),
        name=arguments.name,
        scopes=frozenset(arguments.scope or (Scope.TRANSCRIBE, Scope.USAGE)),
        models=tuple(arguments.model) if arguments.model else None,
        expires=int(midnight(arguments.expires)) if arguments.expires else None,
        limits=_limits(arguments),
        budget=arguments.budget,
    )
    await _hand_out(store, arguments, account, key, "")


async def _hand_out(store: Store, arguments: Arguments, account: Account, key: Key, more: str) -> None:
    secret = keys.generate()
    await store.create_key(key, keys.digest(secret))
    text = f"{secret}\n({key.id}, for the account '{account.name}'; it is not stored and cannot be shown again){more}"
    _say(arguments, _key_json(key) | {"key": secret}, text)


async def _list_keys(store: Store, arguments: Arguments) -> None:
    account = await store.find_account(arguments.account)
    shown = [_key_json(key) for key in await store.keys(account.id)]
    _table(arguments, shown, ("id", "name", "scopes", "models", "last_used", "expires", "revoked"))


async def _revoke_key(store: Store, arguments: Arguments) -> int:
    key = await store.find_key(arguments.key_id)
    if not _sure(arguments, f"Revoke {key.id}{f' ({key.name})' if key.name else ''} for good?"):
        return 1
    revoked = await store.revoke_key(key.id)
    _say(arguments, _key_json(revoked), f"Revoked {key.id}; within a minute it is refused everywhere.")
    return 0


async def _rotate_key(store: Store, arguments: Arguments) -> int:
    old = await store.find_key(arguments.key_id)
    if not _sure(arguments, f"Replace {old.id} by a new key, and revoke it for good?"):
        return 1
    if old.revoked is not None or (old.expires is not None and old.expires <= time.time()):
        raise ValueError(f"{old.id} is revoked or has expired already; 'keys create' makes a new one.")
    account = await store.find_account(old.account_id)
    fresh = dataclasses.replace(old, id=_key_id(), created=int(time.time()), last_used=None)
    await _hand_out(store, arguments, account, fresh, f"\nRevoked {old.id}; within a minute it is refused.")
    await store.revoke_key(old.id)
    return 0


async def _usage(store: Store, arguments: Arguments) -> None:
    account = await store.find_account(arguments.account)
    until = arguments.until or day(time.time())
    since = arguments.since or f"{until[:7]}-01"
    if arguments.requests:
        records = await store.records(account.id, midnight(since), midnight(until) + 86_400)
        each = [dataclasses.asdict(record) | money({"cost": record.cost}) for record in records]
        columns = (field.name for field in dataclasses.fields(UsageRecord) if field.name != "account_id")
        _table(arguments, each, tuple(columns))
        return
    by = tuple(arguments.by.split(","))
    if not set(by) <= {"day", "key", "model"}:
        raise ValueError("--by takes day, key and model, separated by commas.")
    rows = [usage_json(row, by) for row in grouped(await store.usage(account.id, since, until), by)]
    _table(arguments, rows, (*by, "requests", "errors", "seconds", "cost"))


async def _providers(store: Store, arguments: Arguments) -> None:
    from voxgate.wiring import load_catalog

    catalog = load_catalog(settings_of(arguments))
    outages = await store.outages()
    rows = [
        {
            "deployment": name,
            "model": model,
            "eu_native": deployment.provider.eu_native,
            "price_per_minute": dollars(deployment.price),
            "state": "open" if name in outages else "closed",
            "until": outages.get(name),
        }
        for name, models in catalog.offers.items()
        for model, deployment in models.items()
    ]
    _table(arguments, rows, ("deployment", "model", "eu_native", "price_per_minute", "state", "until"))


async def _sweep(store: Store, arguments: Arguments) -> None:
    swept = await store.sweep()
    text = f"Gave back {swept.holds} holds (${dollars(swept.amount)}) and {swept.slots} places of dead requests."
    _say(arguments, dataclasses.asdict(swept), text)


async def _audit(store: Store, arguments: Arguments) -> int:
    audited = await store.accounts()
    differences = [found for account in audited if (found := await difference(store, account))]
    lines = [
        f"'{d['name']}' ({d['account']}): the balance says ${d['balance']} and its entries ${d['entries']}; "
        f"${d['held']} are held and the holds are ${d['holds']}."
        for d in differences
    ]
    text = "\n".join(lines) or f"All {len(audited)} balances are the sums of their entries."
    _say(arguments, {"accounts": len(audited), "differences": differences}, text)
    return 1 if differences else 0


def _key_id() -> str:
    return f"key_{secrets.token_hex(8)}"


def _entry(account: Account, kind: EntryKind, amount: int, reference: str, note: str) -> Entry:
    return Entry(account.id, kind, amount, time.time(), reference, note)


def _limits(arguments: Arguments) -> RateLimits:
    return RateLimits(**{name: getattr(arguments, name) for name in _LIMITS})


async def _account_json(store: Store, account: Account) -> dict[str, Any]:
    now = await store.balance(account.id)
    return _json(account, {"balance": now.balance, "held": now.held, "spent_this_month": now.spent})


def _key_json(key: Key) -> dict[str, Any]:
    return _json(key, {}) | {"scopes": sorted(key.scopes)}


def _json(record: Account | Key, amounts: Mapping[str, int]) -> dict[str, Any]:
    shown = dataclasses.asdict(record)
    limits: dict[str, Any] = shown.pop("limits")
    return shown | money({**amounts, "budget": record.budget}) | limits


def _key_line(key: Key) -> str:
    facts = [key.name, f"last used {key.last_used}" if key.last_used else "", "revoked" if key.revoked else ""]
    return "  ".join(["", key.id, *filter(None, facts)])


def _sure(arguments: Arguments, question: str) -> bool:
    """Asks a person; a script, which cannot be asked, is taken at its word."""
    if arguments.yes or not sys.stdin.isatty():
        return True
    if input(f"{question} [y/N] ").strip().lower() in ("y", "yes"):
        return True
    print("Nothing was changed.", file=sys.stderr)
    return False


def _say(arguments: Arguments, value: dict[str, Any], text: str) -> None:
    print(json.dumps(value) if arguments.json else text)


def _table(arguments: Arguments, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    if arguments.json:
        print(json.dumps(rows))
        return
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    if getattr(arguments, "csv", False):
        csv.writer(sys.stdout, lineterminator="\n").writerows([columns, *cells])
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [list(columns), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _amount(text: str) -> int:
    """Dollars as text to micro-dollars."""
    try:
        amount = Decimal(text) * 1_000_000
        if amount != int(amount) or abs(amount) > 10**15:
            raise ValueError
    except (ArithmeticError, ValueError) as error:  # no number, not a finite one, or too fine or large a one
        raise argparse.ArgumentTypeError(f"{text!r} is no amount such as 5.00, with at most six decimals") from error
    return int(amount)


def _credit_of(text: str) -> int:
    amount = _amount(text)
    if amount < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is less than nothing")
    return amount


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= 10**9):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _cache_seconds(text: str) -> int:
    if _positive(text) > LONGEST_TTL:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {LONGEST_TTL}")
    return int(text)


def _day(text: str) -> str:
    try:
        return dt.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no day such as 2026-11-21") from error
