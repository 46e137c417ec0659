"""What both stores do alike: work in threads, make records of what was kept, and miss what is not there."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import secrets
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

import voxgate.accounts as port
from voxgate.accounts import rules


class Threaded:
    """A store's threads and its clock."""

    def __init__(self, name: str, threads: int, clock: Callable[[], float]) -> None:
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)
        self._clock = clock

    def _now(self) -> int:
        """In microseconds."""
        return rules.microseconds(self._clock())


_P = ParamSpec("_P")
_T = TypeVar("_T")
_S = TypeVar("_S", bound=Threaded)
_R = TypeVar("_R", port.Account, port.Key, port.Entry, port.UsageRecord)

# What a field of that type is made with; DynamoDB gives 2.0 back as 2.
_MADE: dict[str, Callable[[Any], Any]] = {
    "EntryKind": port.EntryKind,
    "RateLimits": lambda limits: port.RateLimits(**limits),
    "Status": port.Status,
    "float": float,
    "frozenset[Scope]": lambda scopes: frozenset(map(port.Scope, scopes)),
    "tuple[str, ...] | None": tuple,
}


def threaded(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, _T]]:
    """Databases block, so a method with all of its calls is one job of its store's threads."""

    @functools.wraps(method)
    async def run(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        work = functools.partial(method, self, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    return run


def restored(kind: type[_R], item: Mapping[str, Any]) -> _R:
    """A record of what was kept of it; what is None there, or missing, is as the class has it."""
    kept = {field.name: str(field.type) for field in dataclasses.fields(kind) if item.get(field.name) is not None}
    return kind(**{name: _MADE[type_](item[name]) if type_ in _MADE else item[name] for name, type_ in kept.items()})


def new_account(name: str, created: float, limits: port.RateLimits, budget: int | None) -> port.Account:
    return port.Account(
        id=f"acct_{secrets.token_hex(8)}", name=name, created=int(created), limits=limits, budget=budget
    )


def check_cost(hold: port.Hold, cost: int) -> None:
    if not 0 <= cost <= hold.amount:
        raise ValueError(f"A hold of {hold.amount} cannot be settled with {cost}.")


def ended(hold: port.Hold) -> port.HoldEnded:
    return port.HoldEnded(f"The hold of request {hold.id} is not open any more.")


def token(credential: port.Credential, expires: int) -> port.Credential:
    """What a token stands for until then."""
    own = credential.key.expires
    key = dataclasses.replace(credential.key, expires=expires if own is None else min(own, expires))
    return dataclasses.replace(credential, key=key)


def name_taken(name: str) -> ValueError:
    return ValueError(f"There is an account named '{name}' already.")


def key_taken(key: port.Key) -> ValueError:
    return ValueError(f"There is a key '{key.id}' already, or one with the same hash.")


def no_account(reference: str) -> KeyError:
    return KeyError(f"There is no account '{reference}'.")


def no_key(key_id: str) -> KeyError:
    return KeyError(f"There is no key '{key_id}'.")
