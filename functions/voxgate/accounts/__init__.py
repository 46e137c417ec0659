"""Who may call: the port that `sqlite.py` implements, and what both sides speak of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Account:
    """`created` is unix seconds."""

    id: str
    name: str
    created: int


@dataclass(frozen=True, slots=True)
class Key:
    """An API key as the store knows it: never the key itself, only its hash."""

    id: str
    account_id: str
    created: int
    revoked: bool = False


class Accounts(Protocol):
    """A store of accounts and keys. Raises `KeyError` for an account or key that is not there."""

    async def find_key(self, digest: bytes) -> Key | None:
        """The key of that SHA-256 digest, revoked ones included."""

    async def create_account(self, name: str) -> Account:
        """Raises `ValueError` where the name is taken."""

    async def find_account(self, reference: str) -> Account:
        """By id or by name."""

    async def keys(self, account_id: str) -> list[Key]: ...

    async def create_key(self, account_id: str, digest: bytes) -> Key: ...

    async def revoke_key(self, key_id: str) -> Key: ...

    async def close(self) -> None: ...
