"""What a customer may read with a key: the models, the balance, and what was used."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
from collections.abc import Awaitable, Callable
from typing import Any

from voxgate.accounts import Scope, UsageRow
from voxgate.accounts.credentials import Caller
from voxgate.accounts.reports import grouped, money, usage_json
from voxgate.accounts.rules import dollars
from voxgate.catalog import Catalog, Deployment, Model
from voxgate.errors import InvalidInput, ModelNotFound
from voxgate.hosts.http import Handler, Request, Response, json_response
from voxgate.routing.health import Report
from voxgate.wiring import Gateway

_GROUPS = ("day", "key", "model")
_MAX_DAYS = 366
_MAX_PAGE = 1000
Read = Callable[[Request, Caller], Awaitable[Any]]
LetIn = Callable[[Request, Scope | None], Awaitable[Caller]]


def models(catalog: Catalog, let_in: LetIn) -> dict[str, dict[str, Handler]]:
    """`GET /v1/models` and `/v1/models/{id}`, in OpenAI's shape."""

    async def all_models(request: Request, caller: Caller) -> Any:
        allowed = [model for model in catalog.models.values() if caller.may_use(model.id, *model.aliases)]
        return {"object": "list", "data": [_model(model) for model in allowed]}

    async def one_model(request: Request, caller: Caller) -> Any:
        name = request.path.removeprefix("/v1/models/")
        model = catalog.find(name)
        if not caller.may_use(name, model.id, *model.aliases):
            raise ModelNotFound(f"The model '{name[:200]}' is none that this API key may use.", param="model")
        return _model(model) | {"id": name}

    return {"/v1/models": _get(all_models, None, let_in), "/v1/models/": _get(one_model, None, let_in)}


def routes(gateway: Gateway) -> dict[str, dict[str, Handler]]:
    store = gateway.store

    async def let_in(request: Request, scope: Scope | None) -> Caller:
        return await gateway.meter.reading(request.id, request.headers, scope, request.told)

    async def balance(request: Request, caller: Caller) -> Any:
        account = await store.find_account(caller.account_id)
        now = await store.balance(account.id)
        amounts = {"balance": now.balance, "held": now.held, "free": now.free, "spent_this_month": now.spent}
        return {
            "object": "balance",
            "account": account.id,
            "currency": "usd",
            **money(amounts),
            **money({"monthly_budget": account.budget}),
        }

    async def usage(request: Request, caller: Caller) -> Any:
        since, until = _days(request)
        rows = await store.usage(caller.account_id, since, until)
        return _usage(request, since, until, rows)

    async def providers(request: Request, caller: Caller) -> Any:
        offers = gateway.catalog.offers
        return {"object": "list", "data": [_offer(gateway.health.report(name), of) for name, of in offers.items()]}

    return models(gateway.catalog, let_in) | {
        "/v1/providers": _get(providers, Scope.ADMIN, let_in),
        "/v1/balance": _get(balance, Scope.USAGE, let_in),
        "/v1/usage": _get(usage, Scope.USAGE, let_in),
    }


def _get(read: Read, scope: Scope | None, let_in: LetIn) -> dict[str, Handler]:
    async def handle(request: Request) -> Response:
        caller = await let_in(request, scope)
        return json_response(await read(request, caller))

    return {"GET": handle}


def _usage(request: Request, since: str, until: str, rows: list[UsageRow]) -> dict[str, Any]:
    by = _group_by(request)
    key, model = request.query.get("key"), request.query.get("model")
    rows = [row for row in rows if key in (None, row.key_id) and model in (None, row.model)]
    sums = grouped(rows, by)
    total = grouped(rows, ()) or [UsageRow("", "", "", 0, 0, 0.0, 0)]
    start, limit = _cursor(request), _number(request, "limit", 100, _MAX_PAGE)
    left = [row for row in sums if (row.day, row.key_id, row.model) > start]
    page = left[:limit]
    more = len(left) > limit
    return {
        "object": "list",
        "since": since,
        "until": until,
        "data": [usage_json(row, by) for row in page],
        "total": usage_json(total[0], ()),
        "has_more": more,
        "next": _next(page[-1]) if more else None,
    }


def _days(request: Request) -> tuple[str, str]:
    today = dt.datetime.now(dt.UTC).date()
    until = _day(request, "until", today)
    since = _day(request, "since", until.replace(day=1))
    if not dt.timedelta(0) <= until - since < dt.timedelta(days=_MAX_DAYS):
        raise InvalidInput(f"'since' must be before 'until', by {_MAX_DAYS} days at most.", param="since")
    return since.isoformat(), until.isoformat()


def _day(request: Request, name: str, default: dt.date) -> dt.date:
    text = request.query.get(name)
    if text is None:
        return default
    try:
        return dt.datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=dt.UTC).date()
    except ValueError as error:
        raise InvalidInput(f"'{name}' must be a day such as 2026-11-21 (UTC).", param=name) from error


def _group_by(request: Request) -> tuple[str, ...]:
    asked = request.query.get("group_by", ",".join(_GROUPS)).split(",")
    if not set(asked) <= set(_GROUPS):
        raise InvalidInput(f"'group_by' takes {', '.join(_GROUPS)}, separated by commas.", param="group_by")
    return tuple(group for group in _GROUPS if group in asked)


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= most):
        raise InvalidInput(f"'{name}' must be a number of 1 to {most}.", param=name)
    return int(text)


def _cursor(request: Request) -> tuple[str, ...]:
    text = request.query.get("after")
    if text is None:
        return ()
    try:
        day, key, model = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True).decode().split("\0")
        return day, key, model
    except (binascii.Error, ValueError) as error:
        raise InvalidInput("'after' must be the 'next' of the page before.", param="after") from error


def _next(row: UsageRow) -> str:
    return base64.urlsafe_b64encode("\0".join((row.day, row.key_id, row.model)).encode()).decode()


def _offer(report: Report, models: dict[str, Deployment]) -> dict[str, Any]:
    provider = next(iter(models.values())).provider
    return {
        "id": report.deployment,
        "object": "deployment",
        "provider": provider.name,
        "regions": list(provider.regions),
        "eu_native": provider.eu_native,
        "models": {model: {"price_per_minute": dollars(deployment.price)} for model, deployment in models.items()},
        "state": report.state,
        "until": report.until,
        "attempts": report.attempts,
        "failures": report.failures,
        "seconds_per_audio_second": None if report.speed is None else round(report.speed, 4),
    }


def _model(model: Model) -> dict[str, Any]:
    # OpenAI's `created` is when the model was; a catalogue does not know, and clients want a number.
    return {"id": model.id, "object": "model", "created": 0, "owned_by": model.deployments[0].provider.name}
