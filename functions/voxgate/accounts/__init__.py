"""Who may call, what they may spend and what they spent: the port of `sqlite.py` and `dynamodb.py`.

Money is in integer micro-dollars, times are unix seconds, days are `2026-11-21` and months
`2026-11`, both UTC. A request goes `admit`, `hold`, `settle`; one that comes to nothing ends with
`release` after a hold and with `leave` before one. What a store refuses it refuses with the error
that the client is to see (`InsufficientQuota`, `RateLimited`, `IdempotencyConflict`).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from enum import StrEnum
from typing import Protocol

ANSWER_SECONDS = 24 * 3600.0  # for how long an answer can be had again under its Idempotency-Key


class Status(StrEnum):
    ACTIVE = "active"
    SUSPENDED = "suspended"


class Scope(StrEnum):
    """What a key is for; `ADMIN` is for everything but `DEBUG`, which shows what providers were sent and said."""

    TRANSCRIBE = "transcribe"
    USAGE = "usage"
    ADMIN = "admin"
    DEBUG = "debug"


class EntryKind(StrEnum):
    TOP_UP = "top_up"
    CHARGE = "charge"
    REFUND = "refund"
    ADJUSTMENT = "adjustment"


@dataclass(frozen=True, slots=True)
class RateLimits:
    """None: no limit at this place (a key's account limits it too, an account the settings)."""

    requests_per_minute: int | None = None
    audio_seconds_per_minute: int | None = None
    concurrent_requests: int | None = None

    def over(self, defaults: RateLimits) -> RateLimits:
        """These, and the defaults for what is not said here."""
        pairs = zip(astuple(self), astuple(defaults), strict=True)
        return RateLimits(*(default if own is None else own for own, default in pairs))


NO_LIMITS = RateLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """`budget` is what may be spent in a month; None where the balance alone decides. `cache_seconds` is for
    how long its answers are kept to be given again; None where only requests that ask for that are."""

    id: str
    name: str
    created: int
    status: Status = Status.ACTIVE
    limits: RateLimits = NO_LIMITS
    budget: int | None = None
    cache_seconds: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """`models` are the only ones it may use, None for any; `last_used` is a day."""

    id: str
    account_id: str
    created: int
    name: str = ""
    scopes: frozenset[Scope] = frozenset({Scope.TRANSCRIBE, Scope.USAGE})
    models: tuple[str, ...] | None = None
    expires: int | None = None
    limits: RateLimits = NO_LIMITS
    budget: int | None = None
    last_used: str | None = None
    revoked: int | None = None


@dataclass(frozen=True, slots=True)
class Credential:
    account: Account
    key: Key
    digest: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What holds for one account, or for one key of its own; `id` is the account's or the key's."""

    id: str
    limits: RateLimits
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request on its way through a store; the account's bounds come first, then the key's, if any."""

    request_id: str
    account_id: str
    key_id: str
    bounds: tuple[Bounds, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """A rate limit as its headers tell it: `reset` is in seconds, until all of it is there again."""

    limit: int
    remaining: int
    reset: float


@dataclass(frozen=True, slots=True)
class Standing:
    """Of several limits the one with the least left. `free` is the balance less what is held."""

    requests: Window
    audio_seconds: Window
    balance: int
    free: int


@dataclass(frozen=True, slots=True)
class Claim:
    """An `Idempotency-Key`, hashed, and a hash of the request that came with it."""

    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Credit set aside for one request. It ends once: settled, released or expired."""

    ticket: Ticket
    amount: int
    month: str
    claim: Claim | None
    standing: Standing

    @property
    def id(self) -> str:
        return self.ticket.request_id


@dataclass(frozen=True, slots=True)
class Replay:
    """The first answer to the same request under the same `Idempotency-Key`."""

    answer: bytes


@dataclass(frozen=True, slots=True)
class Balance:
    """`balance` is the sum of the entries and includes what is `held`; `spent` is this month's,
    with what is held. `holds` maps each open hold to its amount: their sum is `held`."""

    balance: int
    held: int
    spent: int
    holds: dict[str, int]

    @property
    def free(self) -> int:
        return self.balance - self.held


@dataclass(frozen=True, slots=True)
class Entry:
    """`reference` is unique within its account and kind: a charge's is its request's id."""

    account_id: str
    kind: EntryKind
    amount: int
    time: float
    reference: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One admitted request, without text and audio. `seconds` are billable ones, `latency` seconds
    from the request's start to its end; `provider` and `deployment` are empty where none served,
    `converted` where the audio went out as it came."""

    request_id: str
    account_id: str
    key_id: str
    time: float
    contract: str
    status: int
    latency: float
    model: str = ""
    provider: str = ""
    deployment: str = ""
    seconds: float = 0.0
    size: int = 0
    cost: int = 0
    attempts: int = 0
    converted: str = ""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The records of one day, key and model, added up; `errors` are those of `requests` that failed."""

    day: str
    key_id: str
    model: str
    requests: int
    errors: int
    seconds: float
    cost: int


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep gave back: holds and their micro-dollars, and places among the concurrent."""

    holds: int
    amount: int
    slots: int


class HoldEnded(Exception):
    """The hold was not open any more, and not settled by this request either."""


class Store(Protocol):
    """Accounts, keys, ledger and limits. Raises `KeyError` for what is not there, with a message.

    Safe to call from several threads, each with an event loop of its own. `lookup_seconds` is for
    how long what `find_credential` said may be relied on.
    """

    lookup_seconds: float

    async def find_credential(self, digest: bytes) -> Credential | None:
        """The key of that SHA-256 digest and its account, revoked and expired ones included."""

    async def create_token(self, digest: bytes, key: Key, expires: int) -> None:
        """Another way to that key until then, by a digest of its own."""

    async def find_token(self, digest: bytes) -> Credential | None:
        """The token's key, which expires with it, and its account."""

    async def create_account(self, name: str, *, limits: RateLimits = NO_LIMITS, budget: int | None = None) -> Account:
        """Raises `ValueError` where the name is taken."""

    async def find_account(self, reference: str) -> Account:
        """By id or by name."""

    async def accounts(self) -> list[Account]:
        """All of them, oldest first."""

    async def change_account(self, account: Account) -> None:
        """Replace the status, limits, budget and cache time of the account with that id."""

    async def keys(self, account_id: str) -> list[Key]:
        """Oldest first, revoked ones included."""

    async def create_key(self, key: Key, digest: bytes) -> None:
        """Raises `ValueError` where there is a key of that id or digest."""

    async def find_key(self, key_id: str) -> Key: ...

    async def revoke_key(self, key_id: str) -> Key:
        """Revoking again changes nothing."""

    async def mark_used(self, key: Key, day: str) -> None:
        """The latest day stays."""

    async def admit(self, ticket: Ticket, *, lease: float, paid: bool = True, slot: bool = True) -> Standing:
        """Take one request out of each rate, and with `slot` a place among the concurrent ones for `lease`
        seconds at most. With `paid`, refuses without free credit or budget. All or nothing."""

    async def leave(self, ticket: Ticket, record: UsageRecord | None = None) -> None:
        """Give the place back, and write the record."""

    async def hold(
        self, ticket: Ticket, amount: int, *, tenths: int, lease: float, claim: Claim | None = None
    ) -> Hold | Replay:
        """Set `amount` aside for `lease` seconds at most, take `tenths` of seconds of audio out of
        each rate, and lay hands on the claim. All or nothing; a claim that is answered, in flight
        or another request's comes before any refusal of money."""

    async def extend(self, hold: Hold, amount: int, *, tenths: int, lease: float) -> Hold:
        """Set `amount` more aside under an open hold, as `hold` does, and let it and the place last for `lease`
        seconds from now. Raises `HoldEnded` where it is not open any more."""

    async def settle(self, hold: Hold, cost: int, record: UsageRecord, answer: bytes | None = None) -> Balance | None:
        """End the hold with a charge of `cost` (0..amount), give the place back, write the record
        and, for the claim, the answer: all or nothing. Settling again changes nothing and is no
        error. Raises `HoldEnded` where the hold was released or expired. Returns the balance
        where the store knows it without asking again."""

    async def release(self, hold: Hold, record: UsageRecord | None = None) -> None:
        """End the hold without a charge, let go of the claim, give the place back, write the
        record. Once the hold has ended, changes nothing."""

    async def claimed(self, account_id: str, claim_key: str) -> bool:
        """Whether a request has that claim now: one that is running, or one that was answered."""

    async def post(self, entry: Entry) -> Balance:
        """Add to the ledger, outside of any request; the same reference again changes nothing. Raises
        `ValueError` where the free balance would go below zero."""

    async def balance(self, account_id: str) -> Balance: ...

    async def entries(self, account_id: str) -> list[Entry]:
        """All of them, oldest first."""

    async def usage(self, account_id: str, since: str, until: str) -> list[UsageRow]:
        """By day, key and model, in that order; both days inclusive."""

    async def records(self, account_id: str, since: float, until: float) -> list[UsageRecord]:
        """Oldest first, `since` inclusive, `until` not."""

    async def outages(self) -> dict[str, float]:
        """Which deployments some process has found out of order, until when."""

    async def report_outage(self, deployment: str, until: float) -> None:
        """Tell the other processes; a time that has passed takes it back."""

    async def sweep(self) -> Swept:
        """End the holds, places and claims whose time is over or whose process is gone, and forget
        answers that are older than a day."""

    async def close(self) -> None: ...
