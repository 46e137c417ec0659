"""From a request's headers to who is calling, without asking the store each time."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from voxgate.accounts import NO_LIMITS, Bounds, Credential, RateLimits, Scope, Status, Store, Ticket, keys
from voxgate.accounts.recent import Recent
from voxgate.accounts.rules import day
from voxgate.errors import Forbidden, Unauthenticated

_UNKNOWN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling: ids that may be logged, and what holds for them."""

    account_id: str
    key_id: str
    models: tuple[str, ...] | None
    bounds: tuple[Bounds, ...]
    debug: bool = False
    cache_seconds: int | None = None

    def ticket(self, request_id: str) -> Ticket:
        return Ticket(request_id, self.account_id, self.key_id, self.bounds)

    def may_use(self, *names: str) -> bool:
        """Whether a model of any of these names is allowed."""
        return self.models is None or not set(names).isdisjoint(self.models)


ANYONE = Caller("", "", None, ())


class Refused(Forbidden):
    """A caller who is known, and may not."""

    def __init__(self, message: str, *, code: str, caller: Caller) -> None:
        super().__init__(message, code=code)
        self.caller = caller


class Authenticator:
    """API keys against the store.

    What the store said is remembered for its `lookup_seconds`, so a revocation takes effect within
    them; keys that are not there are remembered in a place of their own, so that wrong keys do not
    push out right ones. A mistyped key is told by its checksum and never looked up.
    """

    def __init__(
        self,
        store: Store,
        *,
        account_limits: RateLimits,
        key_limits: RateLimits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._account_limits = account_limits
        self._key_limits = key_limits
        self._clock = clock
        self._known: Recent[bytes, tuple[float, Credential]] = Recent(4096)
        self._unknown: Recent[bytes, float] = Recent(1024)

    async def __call__(
        self, headers: Mapping[str, str], scope: Scope | None = None, *, also: str = "", tokens: bool = False
    ) -> Caller:
        """`also` names a header that may carry the bare key; with `tokens` a token will do. Raises
        `Unauthenticated` or `Forbidden`."""
        presented = _presented(headers, also, tokens=tokens)
        find = self._store.find_token if presented.startswith(keys.TOKEN) else self._store.find_credential
        credential = await self._find(keys.digest(presented), find)
        now = self._clock()
        # Unknown, revoked and expired are one answer: it must not tell a finder what a key once was.
        if (
            credential is None
            or credential.key.revoked is not None
            or (credential.key.expires is not None and credential.key.expires <= now)
        ):
            raise Unauthenticated("Incorrect API key provided, or one that was revoked or has expired.")
        account, key = credential.account, credential.key
        debug = Scope.DEBUG in key.scopes
        caller = Caller(account.id, key.id, key.models, self._bounds(credential), debug, account.cache_seconds)
        if account.status is not Status.ACTIVE:
            message = "This account is suspended; ask whoever runs this service."
            raise Refused(message, code="account_suspended", caller=caller)
        if scope is not None and key.scopes.isdisjoint({scope, Scope.ADMIN}):
            raise Refused(f"This API key has not the scope '{scope}'.", code="permission_denied", caller=caller)
        if key.last_used != (today := day(now)):
            await self._store.mark_used(key, today)
            if known := self._known.get(credential.digest):  # for as long as before, or a revocation would wait
                marked = dataclasses.replace(credential, key=dataclasses.replace(key, last_used=today))
                self._known.put(credential.digest, (known[0], marked))
        return caller

    def _bounds(self, credential: Credential) -> tuple[Bounds, ...]:
        account, key = credential.account, credential.key
        bounds = Bounds(account.id, account.limits.over(self._account_limits), account.budget)
        own = Bounds(key.id, key.limits.over(self._key_limits), key.budget)
        return (bounds,) if own == Bounds(key.id, NO_LIMITS) else (bounds, own)

    async def _find(self, digest: bytes, find: Callable[[bytes], Awaitable[Credential | None]]) -> Credential | None:
        now = self._clock()
        if (known := self._known.get(digest)) and now < known[0]:
            return known[1]
        if now < (self._unknown.get(digest) or 0.0):
            return None
        credential = await find(digest)
        if credential is None or not secrets.compare_digest(credential.digest, digest):
            self._known.pop(digest)
            self._unknown.put(digest, now + _UNKNOWN_SECONDS)
            return None
        self._known.put(digest, (now + self._store.lookup_seconds, credential))
        return credential


def _presented(headers: Mapping[str, str], also: str, *, tokens: bool) -> str:
    """The key that was sent. What is said of it here, anyone who sees it can see."""
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    token = token.strip()
    if not scheme and also:
        scheme, token = "bearer", headers.get(also, "").strip()
    if not token:
        raise Unauthenticated("You didn't provide an API key: send it as 'Authorization: Bearer KEY'.")
    if scheme.lower() != "bearer":
        raise Unauthenticated("The Authorization header must be 'Bearer KEY'.")
    if not keys.well_formed(token) and not (tokens and keys.well_formed(token, keys.TOKEN)):
        raise Unauthenticated("That is no API key of this service: it may be cut off or mistyped.")
    return token
