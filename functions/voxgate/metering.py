"""One request's way through the ledger: admitted, held, and then settled or released, once.

What it costs must be right however it ends: answered, refused, failed, or cut off because the
client hung up. So whatever gives back runs to its end even while the request is being cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

from voxgate.accounts import Claim, Hold, Replay, Scope, Store, Ticket, UsageRecord
from voxgate.accounts.credentials import ANYONE, Authenticator, Caller, Refused
from voxgate.accounts.rules import dollars, limit_headers
from voxgate.errors import IdempotencyConflict, InsufficientQuota, InvalidInput, VoxgateError
from voxgate.staging import Staging, result_key
from voxgate.tasks import whole

logger = logging.getLogger(__name__)

_INLINE = 256 * 1024  # bytes of an answer in the store; DynamoDB's items end at 400 KB
_MAX_ANSWER = 64 * 1024 * 1024
_KEY = re.compile(r"[ -~]{1,255}")


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished answer of status 200."""

    headers: dict[str, str]
    content: bytes


class Tab:
    """What one request has taken and not yet given back: here nothing, and nothing is charged."""

    replayable = False  # it came with an `Idempotency-Key`, so the hash of the request is needed

    def __init__(self, caller: Caller = ANYONE) -> None:
        self.caller = caller

    def note(self, **known: Any) -> None:
        """What the usage record is to say: fields of `UsageRecord`."""

    async def hold(self, amount: int, *, tenths: int, fingerprint: str) -> Reply | None:
        """Set the credit aside; or the answer to the same request before, which costs nothing. Raises
        `InsufficientQuota`, `RateLimited`, `IdempotencyConflict`."""
        return None

    async def extend(self, amount: int, *, tenths: int) -> None:
        """Set more aside, for a request that does not know beforehand what it will cost. Raises
        `InsufficientQuota`, `RateLimited`; what is held already stays so."""

    async def settle(self, cost: int, reply: Reply) -> Reply:
        """Charge for the answer, before it goes out; the reply with what it cost."""
        return reply


class Meter:
    """A gate that knows its callers and bills them. `lease` is the seconds after which what a
    request holds is anyone's to give back: longer than any request can take."""

    def __init__(
        self,
        *,
        authenticate: Authenticator,
        store: Store,
        staging: Staging,
        lease: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.authenticate = authenticate
        self.store = store
        self.lease = lease
        self._staging = staging
        self._clock = clock

    @contextlib.asynccontextmanager
    async def request(
        self,
        request_id: str,
        contract: str,
        headers: Mapping[str, str],
        key_header: str,
        told: MutableMapping[str, str],
        *,
        tokens: bool = False,
    ) -> AsyncIterator[Tab]:
        """Let a request in, and see it out however it ends. `told` takes the headers that every answer
        to it carries; with `tokens` a token will do for a key. Raises what the client is to see, before
        anything of the body is read."""
        asking = self.authenticate(headers, Scope.TRANSCRIBE, also=key_header, tokens=tokens)
        caller = await self._known(request_id, asking, told)
        record = UsageRecord(request_id, caller.account_id, caller.key_id, self._clock(), contract, 200, 0.0)
        tab = _MeteredTab(self, caller, headers.get("idempotency-key"), record, told)
        try:
            await whole(tab.admit())
            yield tab
        except BaseException as error:
            await whole(tab.abandon(error))
            raise
        await whole(tab.close())

    async def reading(
        self, request_id: str, headers: Mapping[str, str], scope: Scope | None, told: MutableMapping[str, str]
    ) -> Caller:
        """Let in a request that costs nothing but its place in the rate. Raises what the client is to see."""
        caller = await self._known(request_id, self.authenticate(headers, scope), told)
        await self._count(request_id, caller, told)
        return caller

    async def _known(self, request_id: str, asking: Awaitable[Caller], told: MutableMapping[str, str]) -> Caller:
        try:
            return await asking
        except Refused as error:  # counts like any other request, and is told where it stands
            await self._count(request_id, error.caller, told)
            raise

    async def _count(self, request_id: str, caller: Caller, told: MutableMapping[str, str]) -> None:
        standing = await self.store.admit(caller.ticket(request_id), lease=0.0, paid=False, slot=False)
        told.update(limit_headers(standing))

    async def pack(self, ticket: Ticket, reply: Reply) -> bytes:
        """An answer as the store keeps it: itself, or where it is staged."""
        answer = json.dumps(reply.headers).encode() + b"\n" + reply.content
        if len(answer) <= _INLINE:
            return b"=" + answer
        key = result_key(ticket.account_id, ticket.request_id)
        await self._staging.put(key, answer)
        return b"@" + key.encode()

    async def unpack(self, answer: bytes) -> Reply:
        kind, rest = answer[:1], answer[1:]
        if kind == b"@":
            try:
                rest = await self._staging.get(rest.decode(), limit=_MAX_ANSWER)
            except KeyError as error:
                message = "The answer under this Idempotency-Key is not there any more; take a new key."
                raise IdempotencyConflict(message) from error
        headers, _, content = rest.partition(b"\n")
        return Reply(json.loads(headers), content)


class _MeteredTab(Tab):
    def __init__(
        self, meter: Meter, caller: Caller, key: str | None, record: UsageRecord, told: MutableMapping[str, str]
    ) -> None:
        super().__init__(caller)
        self.replayable = key is not None
        self._meter = meter
        self._ticket = caller.ticket(record.request_id)
        self._key = key
        self._claim_key = None if key is None else hashlib.sha256(key.encode()).hexdigest()
        self._record = record
        self._told = told
        self._hold: Hold | None = None
        self._open = False
        self._begun = time.perf_counter()

    def note(self, **known: Any) -> None:
        self._record = replace(self._record, **known)

    async def admit(self) -> None:
        store, lease = self._meter.store, self._meter.lease
        try:
            standing = await store.admit(self._ticket, lease=lease)
        except InsufficientQuota:
            # An answer that is or will be paid for can be had with no credit left; nothing new can.
            if self._claim_key is None or not await store.claimed(self._ticket.account_id, self._claim_key):
                raise
            standing = await store.admit(self._ticket, lease=lease, paid=False)
        self._open = True
        self._told.update(limit_headers(standing))
        if self._key is not None and not _KEY.fullmatch(self._key):
            raise InvalidInput("An Idempotency-Key is 1 to 255 printable ASCII characters.", param="Idempotency-Key")

    async def hold(self, amount: int, *, tenths: int, fingerprint: str) -> Reply | None:
        claim = None if self._claim_key is None else Claim(self._claim_key, fingerprint)
        held = await whole(self._take(amount, tenths, claim))
        if isinstance(held, Replay):
            reply = await self._meter.unpack(held.answer)
            balance = await self._meter.store.balance(self._ticket.account_id)
            headers = _bill(0, balance.balance) | {"idempotency-replayed": "true"}
            return Reply(reply.headers | headers, reply.content)
        self._told.update(limit_headers(held.standing))
        return None

    async def extend(self, amount: int, *, tenths: int) -> None:
        await whole(self._more(amount, tenths))

    async def settle(self, cost: int, reply: Reply) -> Reply:
        # Once it is charged the answer goes out, also when the time for it ran out meanwhile.
        return await whole(self._settle(cost, reply), keep=True)

    async def abandon(self, error: BaseException) -> None:
        """Give everything back after a failure. What cannot be given back now, a sweep gives back."""
        status = error.status if isinstance(error, VoxgateError) else 500
        status = 499 if isinstance(error, asyncio.CancelledError | GeneratorExit) else status
        self.note(status=status)
        try:
            await self.close()
        except Exception:  # the failure that the client is to be told of is the first one
            logger.exception("request %s is not closed in the ledger", self._ticket.request_id)

    async def close(self) -> None:
        if not self._open:
            return
        self._open = False
        if self._hold is None:
            await self._meter.store.leave(self._ticket, self._finished())
        else:
            await self._meter.store.release(self._hold, self._finished())

    async def _take(self, amount: int, tenths: int, claim: Claim | None) -> Hold | Replay:
        lease = self._meter.lease
        held = await self._meter.store.hold(self._ticket, amount, tenths=tenths, lease=lease, claim=claim)
        self._hold = held if isinstance(held, Hold) else None
        return held

    async def _more(self, amount: int, tenths: int) -> None:
        assert self._hold is not None, "nothing is held"
        self._hold = await self._meter.store.extend(self._hold, amount, tenths=tenths, lease=self._meter.lease)

    async def _settle(self, cost: int, reply: Reply) -> Reply:
        hold = self._hold
        assert hold is not None, "nothing is held"
        answer = await self._meter.pack(self._ticket, reply) if hold.claim else None
        balance = await self._meter.store.settle(hold, cost, replace(self._finished(), cost=cost), answer)
        self._open = False
        left = hold.standing.balance - cost if balance is None else balance.balance
        return Reply(reply.headers | _bill(cost, left), reply.content)

    def _finished(self) -> UsageRecord:
        return replace(self._record, latency=round(time.perf_counter() - self._begun, 4))


class Unmetered:
    """A gate to a service that has no customers of its own: whoever reaches it may use it, unless `check`
    refuses the headers."""

    def __init__(self, check: Callable[[Mapping[str, str]], None] = lambda _: None) -> None:
        self._check = check

    @contextlib.asynccontextmanager
    async def request(
        self,
        request_id: str,
        contract: str,
        headers: Mapping[str, str],
        key_header: str,
        told: MutableMapping[str, str],
        *,
        tokens: bool = False,
    ) -> AsyncIterator[Tab]:
        self._check(headers)
        yield Tab()


Gate = Meter | Unmetered


def _bill(cost: int, balance: int) -> dict[str, str]:
    return {"x-voxgate-cost": dollars(cost), "x-voxgate-balance": dollars(balance)}


def fingerprint(account_id: str, path: str, fields: tuple[tuple[str, str], ...], audio: bytes) -> str:
    """A hash of what makes two requests the same one; `audio` is the digest of the file's bytes."""
    # By name alone: the order of a repeated field's values may matter.
    known = json.dumps([account_id, path, sorted(fields, key=lambda field: field[0])]).encode()
    return hashlib.sha256(known + audio).hexdigest()


async def sweep_forever(store: Store, staging: Staging, *, every: float = 60.0) -> None:
    """Give back, now and each `every` seconds, what died with its process."""
    while True:
        try:
            swept = await store.sweep()
            if swept.holds or swept.slots:
                logger.info("swept %d holds and %d places of requests that are no more", swept.holds, swept.slots)
            await staging.sweep()
        except Exception:  # a sweep that fails is tried again
            logger.exception("the sweep failed")
        await asyncio.sleep(every)
